"""Pretraining: `train` joins the parts of a run, `run_steps` is the training loop.

The training time counts optimizer steps only, without evaluation, saving and logging, and without
the first steps, which compile. On a GPU, Python launches the next step before it reads the loss of
the current one. All losses are read before a save or an evaluation.
"""

import contextlib
import gc
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat import build, checkpoint, schedule
from nanochat.common import print0, warn
from nanochat.config import TrainingConfig, model_config, run_horizon
from nanochat.core_eval import bundle_folder, evaluate_core
from nanochat.dataloader import TokenLoader, n_batches_of_rank
from nanochat.dataset import open_dataset
from nanochat.device import device_name, peak_bf16_flops
from nanochat.distributed import Ranks, on_main
from nanochat.gpt import GPT, flops_per_token
from nanochat.loss_eval import (
    DOCUMENT_LOSSES,
    SplitRows,
    evaluate_split,
    sample_documents,
    save_document_losses,
)
from nanochat.optim import MuonAdamW
from nanochat.plan import at_start
from nanochat.runlog import UNTIMED_STEPS
from nanochat.schedule import Horizon
from nanochat.target import reaches
from nanochat.tokenizer import Tokenizer, load_tokenizer
from nanochat.tokens import token_shards

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PIPELINED = ("cuda",)  # device types that compute while Python prepares the next step
REPEAT_SEC = 1.0  # a scheduler's signal can arrive twice: directly, and passed on by torchrun


@dataclass
class Progress:
    """State of a run besides model, optimizer and loader; part of every checkpoint."""

    step: int = 0  # optimizer steps completed
    train_time_sec: float = 0.0
    usual_dt_sec: float | None = None  # counted instead of the step that compiles after a resume
    best_step: int | None = None  # the checkpoint with the lowest val_bpb
    best_val_bpb: float | None = None


@dataclass
class Run:
    """The parts of one training run, as `train` joins them."""

    config: TrainingConfig
    device: torch.device
    device_name: str
    ranks: Ranks
    horizon: Horizon
    micro_batches: int  # of all ranks in one optimizer step
    model: GPT
    compiled: Callable  # the model, compiled; (inputs, targets) -> mean loss
    optimizer: MuonAdamW
    loader: TokenLoader
    tokenizer: Tokenizer
    val_rows: SplitRows
    core_bundle: Path | None  # None: CORE is not evaluated
    folder: Path  # folder of the checkpoints
    meta: dict  # content of every checkpoint's meta file, without loop_state
    progress: Progress
    log: object = None  # RunLog on rank 0, NoLog elsewhere

    first_step: int = field(init=False)  # step at which this process started
    saved_step: int | None = field(init=False)
    saved_at_sec: float = field(init=False)  # time.monotonic() of the last save, or of the start
    mark_sec: float = 0.0  # start of the oldest step that has not been recorded
    must_save: bool = False  # a rank asks for a checkpoint by the clock
    stopping: bool = False  # a rank got a stop signal
    reached_target: bool = False
    repeats: bool = field(init=False)  # the text repeats, and the event for it was recorded

    def __post_init__(self):
        self.first_step = self.progress.step
        self.saved_step = self.first_step or None
        self.saved_at_sec = time.monotonic()
        self.repeats = self.loader.epochs > 1

    @property
    def is_last(self):
        """Return whether the horizon is complete."""
        return self.progress.step == self.horizon.num_iterations

    def is_due(self, every):
        """Return whether an action with an interval of N steps (-1 or 0: never) is due now."""
        return every > 0 and (self.is_last or self.progress.step % every == 0)

    def event(self, kind, step=None, **fields):
        """Append one event to the record."""
        step = self.progress.step if step is None else step
        tokens = step * self.horizon.total_batch_size_tokens
        self.log.event(kind, step=step, tokens=tokens, **fields)


def train(config, device, ranks, started_sec):
    """Train one model with `config`. Return (status, number of the stop signal, Run).

    status: ok, interrupted or nan. started_sec: time.monotonic() at the start of the process.
    """
    # Device and kernels: refuse flags that cannot run here before any text is tokenised.
    name = device_name(device)
    dtype, reason = build.training_dtype(device)
    print0(f"device: {name}, {ranks.world_size} rank(s), compute dtype {dtype}: {reason}")
    build.check_kernels(config, device, dtype)

    # Data, model and horizon.
    dataset = open_dataset(config.dataset)
    tokenizer = load_tokenizer(config.tokenizer_dir)
    train_shards = token_shards(dataset, tokenizer, "train")
    val_shards = token_shards(dataset, tokenizer, "val")
    n_train_tokens = sum(shard.n_tokens for shard in train_shards)
    shape = model_config(config, tokenizer.vocab_size)
    horizon = run_horizon(config, shape)
    build.warn_of_short_horizon(config, horizon.num_iterations)
    micro_batches = schedule.count_micro_batches(
        horizon.total_batch_size_tokens, config.device_batch_size, config.max_seq_len,
        ranks.world_size)

    # Resume: the checkpoint must belong to this run and have been computed with the same settings.
    folder = checkpoint.checkpoint_folder(config.tag)
    expected = build.identity(config, dataset, tokenizer, horizon)
    segment = build.segment_facts(config, ranks, device, dtype, reason)
    step = build.resume_step(config, folder, ranks)
    resumed, changed = {}, []
    if step is not None:
        resumed, changed = build.check_resume(
            config, folder, step, {**expected, **shape.to_dict()}, segment)
    loop_state = resumed.get("loop_state", {})

    # Model and optimizer.
    model = build.build_model(config, shape, device, dtype)
    optimizer = build.build_optimizer(config, model, horizon, ranks, dtype)
    if resumed:
        build.restore(model, optimizer, folder, step, resumed, device, ranks)
    print0(build.describe(
        shape, horizon, micro_batches, ranks, dataset, tokenizer, n_train_tokens))
    print0(at_start(config, shape, micro_batches, ranks.world_size, device, dtype))
    compiled = build.compile_model(config, model, optimizer)

    # Record and loop.
    run_id = config.run_id or resumed.get("run_id")
    run_id = run_id or build.new_run_id(config.tag, config.seed, ranks)
    facts = build.run_facts(shape, horizon, expected, segment, n_train_tokens)
    meta = {"model_config": shape.to_dict(), "user_config": segment["flags"], "run_id": run_id,
            "segment": {key: value for key, value in segment.items() if key != "flags"},
            **expected}
    loader = TokenLoader(
        train_shards, config.device_batch_size, config.max_seq_len, config.seed, rank=ranks.rank,
        world_size=ranks.world_size, step_batches=micro_batches, device=device, crop=config.crop,
        state=loop_state.get("loader"))
    with loader:
        build.compile_ahead(config, compiled, optimizer, micro_batches, ranks, device)
        run = Run(
            config, device, name, ranks, horizon, micro_batches, model, compiled, optimizer,
            loader, tokenizer,
            SplitRows(val_shards, config.max_seq_len, config.eval_tokens, config.crop),
            _core_bundle(config), folder, meta,
            Progress(**{name: loop_state[name] for name in asdict(Progress())
                        if name in loop_state}))
        # Open the record last, so that a failure before leaves no files.
        log = on_main(ranks, lambda: build.open_record(
            config, run_id, facts, folder, step, {**segment, "changed": changed}))
        run.log = log or build.NoLog()
        try:
            with StopSignals(ranks) as signals:
                status = run_steps(run, signals)
        except BaseException:
            if ranks.is_main:
                build.close_failed_record(log, device, config.target, started_sec, loader)
            raise
    summary = on_main(ranks, lambda: build.close_record(
        log, status, device, config.target, started_sec, loader))
    if ranks.is_main:
        print0(build.describe_end(summary, log.folder))
    return status, signals.number, run


class Diverged(Exception):
    """A training loss, a validation loss or a weight is not finite."""


class Stopped(BaseException):
    """A stop signal arrived during an evaluation."""


def run_steps(run, signals):
    """Train to the horizon or the target; return how the run ended: ok, interrupted or nan."""
    in_flight = None  # a step whose loss has not been read yet
    try:
        while True:
            if in_flight and (run.stopping or _is_something_due(run)):
                record_step(run, in_flight)
                in_flight = None
            if run.stopping:
                return _interrupted(run)

            _between_steps(run, signals)
            if run.is_last or run.reached_target:
                return "ok"

            if in_flight is None:
                run.mark_sec = time.perf_counter()
            launched = train_step(run, signals)
            if in_flight:
                record_step(run, in_flight)
            if run.device.type in PIPELINED:
                in_flight = launched
            else:
                record_step(run, launched)

            if run.progress.step == run.first_step + 1:
                gc.collect()  # objects made so far stay: later collections skip them
                gc.freeze()
    except Stopped:
        return _interrupted(run)
    except Diverged:
        if run.saved_step == run.progress.step and run.ranks.is_main:
            checkpoint.mark_bad(run.folder, run.saved_step)
        return "nan"
    finally:
        gc.unfreeze()


@dataclass
class _Launched:
    """A step that was launched. outcome: loss, stop and save flags, summed over ranks."""

    step: int
    multiplier: float
    outcome: torch.Tensor
    wait: Callable[[], None]
    epochs: float


def train_step(run, signals):
    """Launch one optimizer step. On a CPU it is complete when this returns."""
    step, n_steps, config = run.progress.step, run.horizon.num_iterations, run.config
    multiplier = schedule.lr_multiplier(
        step, n_steps, warmup_steps=config.warmup_steps, warmdown_ratio=config.warmdown_ratio,
        final_lr_frac=config.final_lr_frac)
    momentum = schedule.muon_momentum(step, n_steps, warmdown_ratio=config.warmdown_ratio)
    decay = schedule.muon_weight_decay(step, n_steps, 1.0)
    run.optimizer.schedule(multiplier, momentum, decay)

    ranks = run.ranks
    total = torch.zeros((), device=run.device)
    for _ in range(n_batches_of_rank(run.micro_batches, ranks.rank, ranks.world_size)):
        inputs, targets = next(run.loader)
        loss = run.compiled(inputs, targets)
        # The optimizer averages over ranks, so each divides by its average share.
        (loss / (run.micro_batches / ranks.world_size)).backward()
        if run.micro_batches > ranks.world_size:
            run.optimizer.accumulate()
        total += loss.detach()
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1

    must_save = time.monotonic() - run.saved_at_sec >= 60 * (config.save_minutes or math.inf)
    outcome = torch.zeros(3, device=run.device)
    outcome[0] = total / run.micro_batches
    if signals.number:
        outcome[1] = 1
    if must_save:
        outcome[2] = 1
    if ranks.world_size > 1:
        dist.all_reduce(outcome)

    outcome, wait = _to_host(outcome)
    return _Launched(run.progress.step, multiplier, outcome, wait, run.loader.epochs)


def record_step(run, launched):
    """Wait for a launched step and record it. Raise Diverged if its loss is not finite."""
    launched.wait()
    loss, stop, save = launched.outcome.tolist()
    now_sec = time.perf_counter()
    dt_sec, run.mark_sec = now_sec - run.mark_sec, now_sec
    compiled = launched.step == run.first_step + 1
    _advance_clock(run.progress, launched.step, dt_sec, compiled)

    tok_per_sec = run.horizon.total_batch_size_tokens / dt_sec
    peak = peak_bf16_flops(run.device_name)
    mfu = None
    if peak:
        mfu = tok_per_sec * flops_per_token(run.model.config) / (peak * run.ranks.world_size)
    run.event("train", launched.step, loss=loss, lr_multiplier=launched.multiplier,
              dt_ms=1000 * dt_sec, tok_per_sec=tok_per_sec,
              train_time_sec=run.progress.train_time_sec, mfu=mfu)
    if not run.repeats and launched.epochs > 1:
        run.repeats = True
        run.event("repeats", launched.step, distinct_tokens=run.loader.distinct_tokens)

    run.stopping |= stop > 0
    run.must_save |= save > 0
    if not math.isfinite(loss):
        run.progress.step = launched.step  # forget a step that was launched after it
        raise Diverged


def save(run):
    """Save a checkpoint; every rank calls it. Raise Diverged if the weights are not finite."""
    step = run.progress.step
    run.optimizer.complete_weights()
    on_main(run.ranks, run.log.before_checkpoint)
    loop_state = {**asdict(run.progress), "loader": run.loader.state_dict()}
    # torch.save writes complete storages, and Muon's weights are views of larger ones: copy them.
    weights = {name: value.detach().cpu().clone() for name, value in
               (run.model.state_dict().items() if run.ranks.is_main else ())}
    good = checkpoint.save_checkpoint(run.folder, step, weights, run.optimizer.state_dict(),
                                      {**run.meta, "loop_state": loop_state}, run.ranks)
    run.event("checkpoint", path=str(run.folder), good=good)
    if run.config.keep_checkpoints and run.ranks.is_main:
        checkpoint.remove_old(run.folder, step, run.config.keep_checkpoints,
                              run.progress.best_step)
    run.saved_step, run.must_save, run.saved_at_sec = step, False, time.monotonic()
    if not good:
        raise Diverged


def validate(run):
    """Measure and record bits per byte. Raise Diverged if they are not finite."""
    config, progress = run.config, run.progress
    result = evaluate_split(run.compiled, run.val_rows, config.device_batch_size,
                            run.tokenizer.token_bytes(), run.device, run.ranks)
    val_bpb = result.bits_per_byte
    run.event("val", **result.event_fields(), train_time_sec=progress.train_time_sec)
    if not math.isfinite(val_bpb):
        raise Diverged
    if progress.step == run.saved_step and val_bpb < (progress.best_val_bpb or math.inf):
        progress.best_step, progress.best_val_bpb = progress.step, val_bpb
    _check_target(run, "val_bpb", val_bpb)

    if not (run.is_last or run.reached_target):
        return
    if config.position_losses:
        run.event("position_losses", nats_by_position=result.nats_by_position,
                  counts_by_position=result.counts_by_position)
    if run.ranks.is_main:
        save_document_losses(run.log.folder / DOCUMENT_LOSSES, result, run.meta["dataset_id"],
                             run.meta["tokenizer_id"])
        if result.warning():
            warn(result.warning())


class StopSignals:
    """Store the first stop signal of a block in `number`; let a second one end the process.

    With one rank, a signal ends an evaluation at once. Several ranks must stop together after a
    step.
    """

    def __init__(self, ranks):
        self.number = 0
        self._ranks, self._at_sec, self._evaluating = ranks, 0.0, False

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def evaluation(self):
        """Raise Stopped if a signal arrives in this block, which may take long."""
        self._evaluating = self._ranks.world_size == 1
        try:
            if self._evaluating and self.number:
                raise Stopped
            yield
        finally:
            self._evaluating = False

    def _handle(self, number, _frame):
        if not self.number:
            self.number, self._at_sec = number, time.monotonic()
            if self._ranks.is_main:  # not print: the signal may have interrupted one
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step; repeat the signal to stop at once\n")
            if self._evaluating:
                raise Stopped
        elif time.monotonic() - self._at_sec > REPEAT_SEC:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_something_due(run):
    config = run.config
    intervals = (config.eval_every, config.core_metric_every, config.sample_every,
                 config.save_every)
    return run.is_last or run.must_save or any(map(run.is_due, intervals))


def _between_steps(run, signals):
    """Save, evaluate and sample if that is due. The loss of every step has been read before."""
    config, step = run.config, run.progress.step
    may_save = config.save_every != 0 and step > 0

    # Save before evaluating: if an evaluation fails, the weights are safe.
    if may_save and step != run.saved_step and (
            run.must_save or run.is_last or run.is_due(config.save_every)):
        save(run)

    if run.is_due(config.eval_every):
        with signals.evaluation():
            validate(run)

    if run.core_bundle and step > 0 and run.is_due(config.core_metric_every):
        with signals.evaluation():
            core = evaluate_core(
                run.model, run.tokenizer, run.core_bundle, run.device,
                max_per_task=config.core_metric_max_per_task, max_tokens=run.model.cos.size(1),
                rank=run.ranks.rank, world_size=run.ranks.world_size)
        run.event("core", core_metric=core.core_metric, tasks=core.centered,
                  train_time_sec=run.progress.train_time_sec)
        _check_target(run, "core", core.core_metric)

    if run.reached_target and may_save and step != run.saved_step:
        save(run)

    if run.ranks.is_main and step > 0 and run.is_due(config.sample_every):
        with signals.evaluation():
            samples = sample_documents(run.model, run.tokenizer, run.val_rows.shards[0])
        for sample in samples:
            run.log.event("sample", step=step, **sample)


def _core_bundle(config):
    """Return the folder of the CORE tasks, or None if CORE is not evaluated."""
    if config.core_metric_every <= 0:
        return None
    folder = bundle_folder()
    if not folder.exists():
        print0(f"CORE is not evaluated: {folder} is missing (download it with "
               "python -m nanochat.core_eval)")
        return None
    return folder


def _check_target(run, metric_name, value):
    name, threshold = run.config.target
    if run.config.stop_at_target and name == metric_name:
        run.reached_target = reaches(metric_name, value, threshold)


def _interrupted(run):
    if run.progress.step not in (0, run.saved_step) and run.config.save_every != 0:
        try:
            save(run)
        except Diverged:
            return "nan"
    return "interrupted"


def _advance_clock(progress, step, dt_sec, compiled):
    """Add the time of a step to the training time. compiled: the step included compilation."""
    if step <= UNTIMED_STEPS:
        return
    if compiled:
        progress.train_time_sec += progress.usual_dt_sec or 0.0
        return
    progress.train_time_sec += dt_sec
    usual = progress.usual_dt_sec
    progress.usual_dt_sec = dt_sec if usual is None else 0.9 * usual + 0.1 * dt_sec


def _to_host(outcome):
    """Return (tensor on the host, function that waits until it has arrived)."""
    if outcome.device.type != "cuda":
        return outcome.cpu(), lambda: None
    arrived = torch.cuda.Event()
    outcome = outcome.to("cpu", non_blocking=True)
    arrived.record()
    return outcome, arrived.synchronize
