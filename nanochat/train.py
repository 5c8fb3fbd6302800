"""Pretraining: `train` sets up a run and records it, `run_steps` is the training loop.

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
from collections import deque, namedtuple

import torch
import torch.distributed as dist

from nanochat import build, checkpoint, schedule
from nanochat.common import print0, warn
from nanochat.config import model_config, run_horizon
from nanochat.core_eval import bundle_folder, evaluate_core
from nanochat.dataloader import TokenLoader, n_batches_of_rank
from nanochat.dataset import open_dataset
from nanochat.device import device_name, peak_bf16_flops
from nanochat.distributed import on_main
from nanochat.gpt import flops_per_token
from nanochat.loss_eval import (
    DOCUMENT_LOSSES,
    SplitRows,
    evaluate_split,
    sample_documents,
    save_document_losses,
)
from nanochat.plan import at_start
from nanochat.runlog import UNTIMED_STEPS
from nanochat.target import reaches
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import token_shards

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
PIPELINED = ("cuda",)  # device types that compute while Python prepares the next step
REPEAT_SEC = 1.0  # a scheduler's signal can arrive twice: directly, and passed on by torchrun


class Run:
    """The parts and the state of one training run.

    The constructor sets it up as the flags ask for, or restores it from a checkpoint. It writes
    nothing but the token cache. Raise UserError if the run cannot be trained or resumed here.
    """

    def __init__(self, config, device, ranks):
        self.config, self.device, self.ranks = config, device, ranks
        self.device_name = device_name(device)
        dtype = build.choose_dtype(config, device, ranks)  # refuses before any text is tokenised

        # Data, sizes of the model, horizon.
        self.tokenizer = load_tokenizer(config.tokenizer_dir)
        build.check_memory(config, self.tokenizer.vocab_size, device, dtype, ranks)
        dataset = open_dataset(config.dataset)
        train_shards = token_shards(dataset, self.tokenizer, "train")
        val_shards = token_shards(dataset, self.tokenizer, "val")
        self.train_tokens = sum(shard.n_tokens for shard in train_shards)
        self.shape = model_config(config, self.tokenizer.vocab_size)
        self.horizon = run_horizon(config, self.shape)
        build.warn_of_short_horizon(config, self.horizon.num_iterations)
        self.micro_batches = schedule.count_micro_batches(  # of all ranks in one optimizer step
            self.horizon.total_batch_size_tokens, config.device_batch_size, config.max_seq_len,
            ranks.world_size)
        self.facts = build.facts_of(self, dataset, dtype)

        # The checkpoint to resume from, if any.
        self.folder = checkpoint.checkpoint_folder(config.tag)
        self.resumed_step = build.resume_step(config, self.folder, ranks)  # None: a new run
        meta, self.changed = build.check_resume(self) if self.resumed_step else ({}, [])
        if not meta:
            build.check_passes(config, self.horizon, self.train_tokens)
        self.run_id = config.run_id or meta.get("run_id") or on_main(ranks, lambda: (
            f"{config.tag[:80]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{config.seed}"))

        # Model and optimizer.
        self.model = build.build_model(config, self.shape, device, dtype)
        self.optimizer = build.build_optimizer(config, self.model, self.horizon, ranks, dtype)
        if meta:
            build.restore(self, meta)
        print0(build.describe_start(self))
        line, recompute = at_start(
            config, self.shape, self.micro_batches, ranks.world_size, device, dtype)
        print0(line)
        self.compiled = build.compile_model(config, self.model, self.optimizer, recompute)

        # State of the loop, first the part that is in every checkpoint.
        state = {"step": 0, "train_time_sec": 0.0, "best_step": None, "best_val_bpb": None,
                 "loader": None, **meta.get("loop_state", {})}
        self.step, self.train_time_sec = state["step"], state["train_time_sec"]
        self.best_step, self.best_val_bpb = state["best_step"], state["best_val_bpb"]
        self.first_step = self.step  # of this process
        self.saved_step, self.saved_at_sec = self.resumed_step, time.monotonic()
        self.mark_sec = 0.0  # start of the oldest step that has not been recorded
        self.must_save = False  # a rank asks for a checkpoint by the clock
        self.signal_number, self.signal_at_sec = 0, 0.0  # the first stop signal of this rank
        self.stopping = False  # a rank got a stop signal
        self.reached_target = False
        self.log = None  # RunLog on rank 0, set by build.open_record

        if config.core_metric_every > 0 and not bundle_folder().exists():
            print0(f"CORE is not evaluated: {bundle_folder()} is missing (download it with "
                   "python -m nanochat.core_eval)")
        self.val_rows = SplitRows(val_shards, config.max_seq_len, config.eval_tokens, config.crop)
        self.loader = TokenLoader(
            train_shards, config.device_batch_size, config.max_seq_len, config.seed,
            rank=ranks.rank, world_size=ranks.world_size, step_batches=self.micro_batches,
            device=device, crop=config.crop, state=state["loader"])
        self.repeats = self.loader.epochs > 1  # the text repeats, and the event was recorded

    @property
    def is_last(self):
        """Return whether the horizon is complete."""
        return self.step == self.horizon.num_iterations

    def is_due(self, every):
        """Return whether an action with an interval of N steps (-1 or 0: never) is due now."""
        return every > 0 and (self.is_last or self.step % every == 0)

    def is_something_due(self):
        """Return whether the next step must wait for a save, an evaluation or samples."""
        config = self.config
        intervals = (config.eval_every, config.core_metric_every, config.sample_every,
                     config.save_every)
        return self.is_last or self.must_save or any(map(self.is_due, intervals))

    def event(self, kind, step=None, **fields):
        """Append one event to the record."""
        step = self.step if step is None else step
        if self.log:
            tokens = step * self.horizon.total_batch_size_tokens
            self.log.event(kind, step=step, tokens=tokens, **fields)


def train(config, device, ranks, started_sec):
    """Train one model with `config`. Return (status, Run).

    status: ok, interrupted or nan. started_sec: time.monotonic() at the start of the process.
    """
    run = Run(config, device, ranks)
    with run.loader:
        build.compile_ahead(run)
        on_main(ranks, lambda: build.open_record(run))  # last: a failure before leaves no files
        try:
            with stop_signals(run):
                status = run_steps(run)
        except BaseException:
            with contextlib.suppress(OSError, ValueError):  # the first error is the one to report
                if ranks.is_main:
                    build.close_record(run, "error", started_sec)
            raise
    on_main(ranks, lambda: build.close_record(run, status, started_sec))
    return status, run


class Diverged(Exception):
    """A training loss, a validation loss or a weight is not finite."""


def run_steps(run):
    """Train, and save at a stop signal; return how the run ended: ok, interrupted or nan."""
    try:
        return _train_to_the_end(run)
    except Diverged:
        if run.saved_step == run.step and run.ranks.is_main:
            checkpoint.set_aside(run.folder, after=run.saved_step - 1)
        return "nan"
    finally:
        gc.unfreeze()


def _train_to_the_end(run):
    """Train to the horizon, the target or a stop signal; return the status. Raise Diverged."""
    launched = deque()  # steps whose losses have not been read yet
    ahead = 1 if run.device.type in PIPELINED else 0
    while True:
        while launched and (len(launched) > ahead or run.stopping or run.is_something_due()):
            record_step(run, launched.popleft())
        if run.stopping:
            save(run)
            return "interrupted"
        if run.must_save or run.is_last or run.is_due(run.config.save_every):
            save(run)  # before evaluating: if an evaluation fails, the weights are safe
        evaluate(run)
        if run.reached_target:
            save(run)
        if run.is_last or run.reached_target:
            return "ok"

        if not launched:
            run.mark_sec = time.perf_counter()
        launched.append(train_step(run))
        if run.step == run.first_step + 1:
            gc.collect()  # objects made so far stay: later collections skip them
            gc.freeze()


# A step whose loss has not been read. outcome: loss, stop flag and save flag, summed over ranks, on
# the host after the CUDA event `arrived` (None: already).
Launched = namedtuple("Launched", "step multiplier outcome arrived epochs")


def train_step(run):
    """Launch one optimizer step. On a CPU it is complete when this returns."""
    step, n_steps, config = run.step, run.horizon.num_iterations, run.config
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
    run.step += 1

    outcome = torch.zeros(3, device=run.device)
    outcome[0] = total / run.micro_batches
    if run.signal_number:
        outcome[1] = 1
    if time.monotonic() - run.saved_at_sec >= 60 * (config.save_minutes or math.inf):
        outcome[2] = 1
    if ranks.world_size > 1:
        dist.all_reduce(outcome)
    arrived = None
    if run.device.type == "cuda":
        outcome = outcome.to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
    return Launched(run.step, multiplier, outcome, arrived, run.loader.epochs)


def record_step(run, launched):
    """Wait for a launched step and record it. Raise Diverged if its loss is not finite."""
    if launched.arrived:
        launched.arrived.synchronize()
    loss, stop, must_save = launched.outcome.tolist()
    now_sec = time.perf_counter()
    dt_sec, run.mark_sec = now_sec - run.mark_sec, now_sec
    counted_sec = dt_sec
    if launched.step == run.first_step + 1:  # it compiled, after a resume: count the mean instead
        counted_sec = run.train_time_sec / max(1, launched.step - 1 - UNTIMED_STEPS)
    if launched.step > UNTIMED_STEPS:
        run.train_time_sec += counted_sec

    tok_per_sec = run.horizon.total_batch_size_tokens / dt_sec
    peak = peak_bf16_flops(run.device_name)  # None: not in the table
    mfu = peak and tok_per_sec * flops_per_token(run.shape) / (peak * run.ranks.world_size)
    run.event("train", launched.step, loss=loss, lr_multiplier=launched.multiplier,
              dt_ms=1000 * dt_sec, tok_per_sec=tok_per_sec,
              train_time_sec=run.train_time_sec, mfu=mfu)
    if not run.repeats and launched.epochs > 1:
        run.repeats = True
        run.event("repeats", launched.step, distinct_tokens=run.loader.distinct_tokens)

    run.stopping |= stop > 0
    run.must_save |= must_save > 0
    if not math.isfinite(loss):
        run.step = launched.step  # forget a step that was launched after it
        raise Diverged


def evaluate(run):
    """Evaluate and sample if that is due. The loss of every step has been read before."""
    config, step = run.config, run.step
    if run.is_due(config.eval_every):
        validate(run)
    if step > 0 and run.is_due(config.core_metric_every) and bundle_folder().exists():
        core = evaluate_core(
            run.model, run.tokenizer, bundle_folder(), run.device,
            max_per_task=config.core_metric_max_per_task, max_tokens=run.model.cos.size(1),
            rank=run.ranks.rank, world_size=run.ranks.world_size)
        run.event("core", core_metric=core.core_metric, tasks=core.centered,
                  train_time_sec=run.train_time_sec)
        _check_target(run, "core", core.core_metric)
    if run.ranks.is_main and step > 0 and run.is_due(config.sample_every):
        for sample in sample_documents(run.model, run.tokenizer, run.val_rows.shards[0]):
            run.log.event("sample", step=step, **sample)


def save(run):
    """Save a checkpoint, unless the step has one or --save-every 0 forbids it.

    Every rank calls it. Raise Diverged if the weights are not finite; nothing is saved then.
    """
    step, config = run.step, run.config
    if config.save_every == 0 or step in (0, run.saved_step):
        return
    run.optimizer.complete_weights()
    weights = run.model.state_dict()
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise Diverged

    on_main(run.ranks, lambda: run.log.before_checkpoint())
    loop_state = {"step": step, "train_time_sec": run.train_time_sec, "best_step": run.best_step,
                  "best_val_bpb": run.best_val_bpb, "loader": run.loader.state_dict()}
    facts = {name: value for name, value in run.facts.items() if name != "flags"}
    meta = {**facts, "user_config": run.facts["flags"], "run_id": run.run_id,
            "loop_state": loop_state}
    # torch.save writes complete storages, and Muon's weights are views of larger ones: copy them.
    copies = {name: value.detach().cpu().clone() for name, value in
              (weights.items() if run.ranks.is_main else ())}
    checkpoint.save_checkpoint(
        run.folder, step, copies, run.optimizer.state_dict(), meta, run.ranks)
    run.event("checkpoint", path=str(run.folder))
    if config.keep_checkpoints and run.ranks.is_main:
        checkpoint.remove_old(run.folder, config.keep_checkpoints, run.best_step)
    run.saved_step, run.must_save, run.saved_at_sec = step, False, time.monotonic()


def validate(run):
    """Measure and record bits per byte. Raise Diverged if they are not finite."""
    config = run.config
    result = evaluate_split(run.compiled, run.val_rows, config.device_batch_size,
                            run.tokenizer.token_bytes(), run.device, run.ranks)
    val_bpb = result.bits_per_byte
    run.event("val", **result.event_fields(), train_time_sec=run.train_time_sec)
    if not math.isfinite(val_bpb):
        raise Diverged
    if run.step == run.saved_step and val_bpb < (run.best_val_bpb or math.inf):
        run.best_step, run.best_val_bpb = run.step, val_bpb
    _check_target(run, "val_bpb", val_bpb)

    if not (run.is_last or run.reached_target):
        return
    if run.ranks.is_main:
        save_document_losses(run.log.folder / DOCUMENT_LOSSES, result,
                             run.facts["dataset_id"], run.facts["tokenizer_id"])
        if result.warning():
            warn(result.warning())


def _check_target(run, metric_name, value):
    name, threshold = run.config.target
    if run.config.stop_at_target and name == metric_name:
        run.reached_target = reaches(metric_name, value, threshold)


@contextlib.contextmanager
def stop_signals(run):
    """Note the first stop signal in the run; let a second one end the process."""

    def handle(number, _frame):
        if not run.signal_number:
            run.signal_number, run.signal_at_sec = number, time.monotonic()
            if run.ranks.is_main:  # not print: the signal may have interrupted one
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping after this step; repeat the signal to stop at once\n")
        elif time.monotonic() - run.signal_at_sec > REPEAT_SEC:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
