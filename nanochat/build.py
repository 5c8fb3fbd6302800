"""The parts of a training run, built from its configuration: model, resume, record."""

import contextlib
import dataclasses
import math
import socket
import time
from bisect import bisect

import torch

from nanochat import checkpoint
from nanochat.attention import plan_attention
from nanochat.common import (
    RunLock,
    UserError,
    git_commit,
    is_quiet,
    locks_dir,
    print0,
    runs_dir,
    utc_now,
    versions,
    warn,
    write_json,
)
from nanochat.config import model_config, run_horizon
from nanochat.console import ConsoleSink, WandbSink
from nanochat.device import choose_compute_dtype, device_name, memory_bytes, peak_memory_mib
from nanochat.distributed import on_main
from nanochat.fp8 import check_fp8, train_in_fp8
from nanochat.gpt import GPT, parameter_counts, scaling_params
from nanochat.kernels.linear_cross_entropy import check_linear_cross_entropy
from nanochat.kernels.rms_norm import check_rms_norm
from nanochat.kernels.runtime import INTERPRETED
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.plan import in_gb, memory_within
from nanochat.runlog import CONFIG, RunLog, changes, check_new_run, figures_of, in_words, read_run
from nanochat.schedule import count_micro_batches
from nanochat.target import target_of

MEMORY_TOLERANCE = 1.1  # a run may be planned to need this multiple of the device's memory
MAX_PASSES = 10  # over the training text, without --allow-repeats

# --- checks before the work ---------------------------------------------------------------------

def check_memory(config, vocab_size, device, dtype, ranks):
    """Raise UserError if the plan exceeds the device's memory by more than 10 %.

    The error names flags that fit.
    """
    def planned_bytes(**flags):
        """Return the planned peak of the run with other flags; raise UserError if it has none."""
        changed = dataclasses.replace(config, **flags)
        shape = model_config(changed, vocab_size)
        micro_batches = count_micro_batches(
            run_horizon(changed, shape).total_batch_size_tokens, changed.device_batch_size,
            changed.max_seq_len, ranks.world_size)
        accumulation = math.ceil(micro_batches / ranks.world_size)
        *_, peak = memory_within(available, changed, shape, dtype, device, accumulation,
                                 ranks.world_size)
        return peak

    def fits(**flags):
        try:
            return planned_bytes(**flags) <= limit
        except UserError:
            return False

    available = memory_bytes(device)
    limit, planned = MEMORY_TOLERANCE * available, planned_bytes()
    if planned <= limit or config.allow_memory:
        return
    rows, depth = config.device_batch_size, config.depth
    smaller = bisect(range(1, depth), False, key=lambda layers: not fits(depth=layers))
    advice = [] if device.type == "cuda" else ["--preset laptop"]
    advice += [f"--device-batch-size {n}" for n in range(rows - 1, 0, -1)
               if fits(device_batch_size=n)][:1]
    advice += [f"--depth {smaller}"] if smaller else []
    advice = " or ".join(advice) or "a smaller --depth and --device-batch-size"
    raise UserError(f"the run needs about {in_gb(planned)} of memory per rank, and "
                    f"{in_gb(available)} are there; give {advice}, or start it nevertheless with "
                    "--allow-memory")


def check_passes(config, horizon, train_tokens):
    """Raise UserError if the horizon reads the training text more than 10 times."""
    passes = horizon.target_tokens / train_tokens
    if passes <= MAX_PASSES or config.allow_repeats:
        return
    fewer = int(horizon.num_iterations * MAX_PASSES / passes)
    advice = f"--num-iterations {fewer} or less" if fewer else "more text"
    raise UserError(f"the horizon of {horizon.target_tokens:,} tokens reads the {train_tokens:,} "
                    f"training tokens about {passes:,.0f} times; give {advice}, or accept "
                    "it with --allow-repeats")


# --- model and optimizer ------------------------------------------------------------------------

def choose_dtype(config, device, ranks):
    """Return the compute dtype; print device, dtype and attention backends.

    Raise UserError if a flag's kernel cannot run here. fp16 is refused: it needs loss scaling.
    """
    dtype, reason = choose_compute_dtype(device)
    if dtype == torch.float16:
        raise UserError("NANOCHAT_DTYPE=float16 cannot train; use bfloat16 or float32")
    print0(f"device: {device_name(device)}, {ranks.world_size} rank(s), compute dtype {dtype}: "
           f"{reason}")
    shape = model_config(config, vocab_size=1)  # the tokenizer is read later; only widths matter
    print0(plan_attention(config.attention, device, dtype, shape))
    if config.fp8:
        check_fp8(device, dtype, shape.n_embd, config.device_batch_size * config.max_seq_len)
    if config.fused_rmsnorm:
        check_rms_norm(device, dtype)
    if config.chunked_ce:
        check_linear_cross_entropy(device, dtype)
    return dtype


def build_model(config, shape, device, dtype):
    """Return a freshly initialised GPT of the GPTConfig `shape` on `device`."""
    model = GPT(shape, dtype, attention=config.attention, fused_rmsnorm=config.fused_rmsnorm,
                chunked_ce=config.chunked_ce)
    model.init_weights(config.seed)
    return model.to(device)


def build_optimizer(config, model, horizon, ranks, dtype):
    """Return Muon and AdamW with learning rates and weight decay scaled for the batch size."""
    groups = parameter_groups(
        model, embedding_lr=config.embedding_lr, unembedding_lr=config.unembedding_lr,
        matrix_lr=config.matrix_lr, scalar_lr=config.scalar_lr, weight_decay=config.weight_decay,
        batch_lr_scale=horizon.batch_lr_scale, decay_scale=horizon.decay_scale)
    return MuonAdamW(groups, ranks, matmul_dtype=dtype, compiled=not config.no_compile,
                     casts=model.keep_casts())


def compile_model(config, model, optimizer, recompute=False):
    """Return the model compiled for its fixed shapes (with --no-compile the model itself).

    recompute: recompute elementwise results in the backward pass, a third less memory.
    """
    if config.fp8:
        train_in_fp8(model, optimizer, compiled=not config.no_compile)
    if config.no_compile:
        return model
    print0("compiling: up to a minute before the first step, less if the code is cached ...")
    torch._functorch.config.ban_recompute_materialized_backward = not recompute
    return torch.compile(model, dynamic=False, fullgraph=True)


def compile_ahead(run):
    """With several ranks, compile before the first collective operation. Change no number.

    Otherwise a rank with cached code waits in that operation for ranks that compile, and can exceed
    the time limit of collective operations.
    """
    if run.ranks.world_size == 1 or run.config.no_compile:
        return
    shape = (2, run.config.device_batch_size, run.config.max_seq_len)
    inputs, targets = torch.zeros(shape, dtype=torch.int64, device=run.device).unbind(0)
    run.compiled(inputs, targets).backward()
    if run.micro_batches > run.ranks.world_size:
        run.optimizer.accumulate()
    run.optimizer.warm_up()
    run.optimizer.zero_grad()
    if run.config.eval_every > 0:
        run.compiled.eval()
        with torch.no_grad():
            run.compiled(inputs, targets, "none")
        run.compiled.train()


# --- resume -------------------------------------------------------------------------------------

def resume_step(config, folder, ranks):
    """Return the step that --resume-from-step asks for, or None for a new run."""
    if config.resume_from_step == "-1":
        return None
    if config.resume_from_step == "auto":
        return on_main(ranks, lambda: checkpoint.newest_valid_step(folder))
    return checkpoint.find_checkpoint(folder, config.resume_from_step)


def check_resume(run):
    """Return (meta of the checkpoint to resume from, changes since it was saved).

    Raise UserError if the checkpoint belongs to another run, or if a setting that changes the
    numbers differs without --allow-changed.
    """
    config, where = run.config, f"step {run.resumed_step} in {run.folder}"
    meta = checkpoint.read_meta(run.folder, run.resumed_step)
    if "loader" not in (meta.get("loop_state") or {}):
        raise UserError(f"{where} was not saved by this program and cannot be resumed; "
                        "scripts.base_eval can evaluate it")

    saved = {**meta, **meta["model_config"], "crop": meta["user_config"].get("crop")}
    now = {**run.facts, **run.facts["model_config"], "crop": config.crop}
    names = ("dataset_id", "tokenizer_id", "seed", "total_batch_size_tokens", "crop",
             *run.facts["model_config"])
    different = [(name, saved[name], now[name]) for name in names if saved[name] != now[name]]
    horizon = ("num_iterations", saved["num_iterations"], now["num_iterations"])
    different += [horizon] if horizon[2] < horizon[1] else []
    if different:
        raise UserError(f"cannot resume {where}, it belongs to another run: "
                        f"{in_words(different)}; give the flags of the run that saved it")

    before = {**meta, "flags": meta["user_config"]}
    changed = changes(before, run.facts, config.fixed_on_resume())
    changed += [horizon] if horizon[2] > horizon[1] else []
    if changed and not config.allow_changed:
        raise UserError(f"cannot resume {where} with equal numbers: {in_words(changed)}; "
                        "undo that, or accept it with --allow-changed")
    if changed:
        print0(f"warning: resumed with changes: {in_words(changed)}")
    return meta, changed


def restore(run, meta):
    """Load weights and this rank's share of the optimizer state, saved by any number of ranks."""
    folder, step, ranks = run.folder, run.resumed_step, run.ranks
    run.model.load_state_dict(checkpoint.load_model_state(folder, step, meta, run.device))
    run.optimizer.write_casts()
    n_shards = sum(name.startswith("optim_") for name in meta["files_sha256"])
    if n_shards == ranks.world_size:
        state = checkpoint.load_optimizer_state(folder, step, meta, run.device, ranks.rank)
        run.optimizer.load_state_dict(state)
        return
    print0(f"optimizer state saved by {n_shards} rank(s) is distributed over {ranks.world_size}")
    shards = (checkpoint.load_optimizer_state(folder, step, meta, "cpu", rank)
              for rank in range(n_shards))
    run.optimizer.load_shards(shards, n_shards)


# --- record -------------------------------------------------------------------------------------

def facts_of(run, dataset, dtype):
    """Return the facts for config.json, the `resume` events and the meta of the checkpoints."""
    commit, dirty = git_commit()
    return {
        "created_utc": utc_now(), "flags": run.config.to_dict(), "git_commit": commit,
        "git_dirty": dirty, "versions": versions(),
        "device": {"type": run.device.type, "name": run.device_name, "host": socket.gethostname(),
                   "compute_dtype": str(dtype).removeprefix("torch."),
                   "world_size": run.ranks.world_size, "triton_interpreted": INTERPRETED},
        "dataset_id": dataset.dataset_id, "tokenizer_id": run.tokenizer.tokenizer_id,
        "seed": run.config.seed, "train_tokens": run.train_tokens,
        "total_batch_size_tokens": run.horizon.total_batch_size_tokens,
        "num_iterations": run.horizon.num_iterations, "target_tokens": run.horizon.target_tokens,
        "model_config": run.shape.to_dict(), "n_params": parameter_counts(run.shape)["total"],
        "n_scaling_params": scaling_params(run.shape)}


def open_record(run):
    """Begin the record of a run, or continue it from its checkpoint; set run.log.

    Checkpoints of another run, or of steps that this run will repeat, are moved away.
    """
    config, run_id, folder, step = run.config, run.run_id, run.folder, run.resumed_step
    runs = runs_dir()
    if step is None and config.resume_from_step == "auto" and (runs / run_id / CONFIG).exists():
        earlier = read_run(runs / run_id)
        if earlier.status != "ok" and earlier.config.get("flags") == run.facts["flags"]:
            step = 0  # it died before its first checkpoint
    if step is None:
        check_new_run(runs, run_id)  # before wandb starts a run with this id

    with contextlib.ExitStack() as on_failure:
        locks = []
        for what, lock, flag in ((runs / run_id, f"run.{run_id}", "--run-id"),
                                 (folder, f"checkpoints.{folder.name}", "--model-tag")):
            remedy = f"wait for it, stop it, or give another {flag}"
            locks.append(RunLock(what, locks_dir() / lock, run_id, remedy))
            on_failure.callback(locks[-1].release)

        sinks = [] if is_quiet() else [ConsoleSink(run.horizon.num_iterations, step or 0)]
        if config.run != "dummy":
            sinks.append(WandbSink(config.run, run_id, run.facts))
        if step is None:
            checkpoint.set_aside(folder)
            run.log = RunLog.create(runs, run_id, run.facts, sinks, locks)
        else:
            figures_of(read_run(runs / run_id).events)  # raises now if the record is damaged
            run.log = RunLog.resume(
                runs, run_id, step, sinks, locks, **run.facts, changed=run.changed)
            checkpoint.set_aside(folder, after=step)
            horizon = {name: run.facts[name] for name in ("num_iterations", "target_tokens")}
            write_json(runs / run_id / CONFIG, {**read_run(runs / run_id).config, **horizon})
        on_failure.pop_all()


def close_record(run, status, started_sec):
    """Write the summary, close the log and print how the run ended.

    started_sec: time.monotonic() at the start of the process. Raise UserError if the disk is full.
    """
    log, target = run.log, run.config.target
    try:
        events = read_run(log.folder).events
        summary = {"status": status, **figures_of(events, *target),
                   "distinct_tokens": run.loader.distinct_tokens, "epochs": run.loader.epochs,
                   "peak_memory_mib": peak_memory_mib(run.device)}
        log.finish(**summary, wall_time_sec=time.monotonic() - started_sec)
    finally:
        log.close()

    error, word = summary["final_val_bpb_se"], "final" if status == "ok" else "last"
    parts = {
        "{:.1f} s of training": summary["train_time_sec"],
        "{:,.0f} tok/s (median)": summary["tok_per_sec_median"],
        f"{word} val_bpb {{:.4f}}" + (f" ± {error:.4f}" if error else ""): summary["final_val_bpb"],
        "min val_bpb {:.4f}": summary["min_val_bpb"],
        "{:.2f}M distinct tokens": summary["distinct_tokens"] / 1e6,
        "read {:.2f} times": summary["epochs"],
        "peak memory {:,.0f} MiB": summary["peak_memory_mib"]}
    words = ", ".join(text.format(value) for text, value in parts.items() if value is not None)
    print0(f"{status} after {summary['steps']} steps: {words}\nrecord: {log.folder}")
    if target[1] is not None:
        print0(target_of(events, *target).describe())


def describe_start(run):
    """Describe model, data and horizon for the console."""
    shape, horizon, facts = run.shape, run.horizon, run.facts
    return (
        f"model: {shape.n_layer} layers, width {shape.n_embd}, {shape.n_head} heads, "
        f"{facts['n_params'] / 1e6:.2f}M parameters\n"
        f"data: {facts['dataset_id']}, {run.train_tokens / 1e6:.1f}M training tokens, tokenizer "
        f"{facts['tokenizer_id']} of {shape.vocab_size} tokens\n"
        f"horizon: {horizon.num_iterations} steps of {horizon.total_batch_size_tokens} tokens "
        f"({run.micro_batches} micro-batch(es) on {run.ranks.world_size} rank(s)), "
        f"{horizon.target_tokens / 1e6:.2f}M tokens, "
        f"{horizon.target_tokens / facts['n_scaling_params']:.2f} per scaling parameter")


def warn_of_short_horizon(config, num_iterations):
    """Warn if the learning rates never stay at their peak."""
    decay_steps = round(config.warmdown_ratio * num_iterations)
    if config.warmup_steps + decay_steps > num_iterations:
        warn(f"the horizon of {num_iterations} steps is shorter than warm-up plus decay "
             f"({config.warmup_steps} + {decay_steps} steps): the learning rates jump; lower "
             "--warmup-steps or --warmdown-ratio, or train longer")
