"""The parts of a training run, built from its configuration: model, resume, record."""

import contextlib
import socket
import sys
import time

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
)
from nanochat.config import model_config
from nanochat.console import ConsoleSink, WandbSink
from nanochat.device import choose_compute_dtype, device_name, peak_memory_mib
from nanochat.distributed import broadcast_from_rank0
from nanochat.fp8 import check_fp8, train_in_fp8
from nanochat.gpt import GPT, flops_per_token, parameter_counts, scaling_params
from nanochat.kernels.linear_cross_entropy import check_linear_cross_entropy
from nanochat.kernels.rms_norm import check_rms_norm
from nanochat.kernels.runtime import INTERPRETED
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.runlog import (
    CONFIG,
    RunLog,
    changes,
    check_new_run,
    check_run_id,
    figures_of,
    in_words,
    part_of,
    read_run,
)
from nanochat.target import evaluations_of, time_to_target

# --- model and optimizer ------------------------------------------------------------------------

def training_dtype(device):
    """Return (compute dtype, reason); fp16 is refused because it needs loss scaling."""
    dtype, reason = choose_compute_dtype(device)
    if dtype == torch.float16:
        raise UserError("NANOCHAT_DTYPE=float16 cannot train: it needs loss scaling; use bfloat16 "
                        "or float32")
    return dtype, reason


def check_kernels(config, device, dtype):
    """Print the attention backends; raise UserError if a flag's kernel cannot run here."""
    model = model_config(config, vocab_size=1)  # the tokenizer is read later; only widths matter
    for line in plan_attention(config.attention, device, dtype, model):
        print0(line)
    if config.fp8:
        check_fp8(device, dtype, model.n_embd, config.device_batch_size * config.max_seq_len)
    if config.fused_rmsnorm:
        check_rms_norm(device, dtype)
    if config.chunked_ce:
        check_linear_cross_entropy(device, dtype)


def build_model(config, model, device, dtype):
    """Return a freshly initialised GPT of the GPTConfig `model` on `device`."""
    built = GPT(model, dtype, attention=config.attention, fused_rmsnorm=config.fused_rmsnorm,
                chunked_ce=config.chunked_ce)
    built.init_weights(config.seed)
    return built.to(device)


def build_optimizer(config, model, horizon, ranks, dtype):
    """Return Muon and AdamW with learning rates and weight decay scaled for the batch size."""
    groups = parameter_groups(
        model, embedding_lr=config.embedding_lr, unembedding_lr=config.unembedding_lr,
        matrix_lr=config.matrix_lr, scalar_lr=config.scalar_lr, weight_decay=config.weight_decay,
        batch_lr_scale=horizon.batch_lr_scale, decay_scale=horizon.decay_scale)
    return MuonAdamW(groups, ranks, matmul_dtype=dtype, compiled=not config.no_compile,
                     casts=model.keep_casts())


def compile_model(config, model, optimizer):
    """Return the model compiled for its fixed shapes (with --no-compile the model itself)."""
    if config.fp8:
        train_in_fp8(model, optimizer, compiled=not config.no_compile)
    if config.no_compile:
        return model
    print0("compiling: up to a minute before the first step, less if the code is cached ...")
    return torch.compile(model, dynamic=False, fullgraph=True)


def compile_ahead(config, compiled, optimizer, micro_batches, ranks, device):
    """With several ranks, compile before the first collective operation. Change no number.

    Otherwise a rank with cached code waits in that operation for ranks that compile, and can exceed
    the time limit of collective operations.
    """
    if ranks.world_size == 1 or config.no_compile:
        return
    shape = (2, config.device_batch_size, config.max_seq_len)
    inputs, targets = torch.zeros(shape, dtype=torch.int64, device=device).unbind(0)
    compiled(inputs, targets).backward()
    if micro_batches > ranks.world_size:
        optimizer.accumulate()
    optimizer.warm_up()
    optimizer.zero_grad()
    if config.eval_every > 0:
        compiled.eval()
        with torch.no_grad():
            compiled(inputs, targets, "none")
        compiled.train()


# --- resume -------------------------------------------------------------------------------------

def identity(config, dataset, tokenizer, horizon):
    """Return the values that must be equal for a resume: they determine data and updates."""
    return {"dataset_id": dataset.dataset_id, "tokenizer_id": tokenizer.tokenizer_id,
            "seed": config.seed, "total_batch_size_tokens": horizon.total_batch_size_tokens,
            "num_iterations": horizon.num_iterations}


def resume_step(config, folder, ranks):
    """Return the step that --resume-from-step asks for, or None for a new run."""
    if config.resume_from_step == "-1":
        return None
    if config.resume_from_step == "auto":
        return broadcast_from_rank0(ranks, lambda: checkpoint.newest_valid_step(folder))
    return checkpoint.find_checkpoint(folder, config.resume_from_step)


def check_resume(config, folder, step, expected, segment):
    """Return (meta of the checkpoint to resume from, changes since it was saved).

    expected: `identity` and the model's configuration. segment: flags, device, versions and
    commit of this process. Raise UserError if the checkpoint belongs to another run or to a run
    that diverged, or if a setting that changes the numbers differs without --allow-changed.
    """
    meta = checkpoint.read_meta(folder, step)
    where = f"step {step} in {folder}"
    if "loader" not in (meta.get("loop_state") or {}):
        raise UserError(f"{where} was not saved by this program and cannot be resumed; "
                        "scripts.base_eval can evaluate it")
    if not meta.get("good", True):
        raise UserError(f"the run had diverged at {where}: weights or validation are not finite; "
                        "resume an earlier step, or start again with lower learning rates")

    flags = part_of(meta, "user_config")
    saved = {"crop": flags.get("crop"), **meta, **meta["model_config"]}
    expected = {**expected, "crop": config.crop}
    different = [(name, saved.get(name), value) for name, value in expected.items()
                 if saved.get(name) != value]
    if different:
        raise UserError(f"cannot resume {where}, it belongs to another run: "
                        f"{in_words(different)}; give the flags of the run that saved it")

    fixed = config.fixed_on_resume()
    before = {**part_of(meta, "segment"), "flags": {**fixed, **flags}}
    changed = changes(before, segment, fixed)
    if changed and not config.allow_changed:
        raise UserError(f"cannot resume {where} with equal numbers: {in_words(changed)}; "
                        "undo that, or accept it with --allow-changed")
    if changed:
        print0(f"warning: resumed with changes: {in_words(changed)}")
    commits = before.get("git_commit"), segment["git_commit"]
    if all(commits) and commits[0] != commits[1]:
        print0(f"warning: {where} was saved by commit {commits[0]:.12}, this is commit "
               f"{commits[1]:.12}; if they compute differently, the run changes from here on")
    return meta, changed


def restore(model, optimizer, folder, step, meta, device, ranks):
    """Load weights and this rank's share of the optimizer state, saved by any number of ranks."""
    state = checkpoint.load_model_state(folder, step, meta, device)
    checkpoint.load_state(model, state, folder, step)
    optimizer.write_casts()
    n_shards = checkpoint.n_optimizer_shards(meta)
    if n_shards == ranks.world_size:
        state = checkpoint.load_optimizer_state(folder, step, meta, device, ranks.rank)
        optimizer.load_state_dict(state)
        return
    print0(f"optimizer state saved by {n_shards} rank(s) is distributed over {ranks.world_size}")
    shards = (checkpoint.load_optimizer_state(folder, step, meta, "cpu", rank)
              for rank in range(n_shards))
    optimizer.load_shards(shards, n_shards)


# --- record -------------------------------------------------------------------------------------

class NoLog:
    """The log of ranks above 0: only rank 0 writes the record."""

    def event(self, kind, **fields):
        pass

    def before_checkpoint(self):
        pass


def new_run_id(tag, seed, ranks):
    """Return an id made from tag, UTC time and seed, the same on every rank."""
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return broadcast_from_rank0(ranks, lambda: f"{tag[:80]}-{now}-s{seed}")


def segment_facts(config, ranks, device, dtype, dtype_reason):
    """Return flags, commit, versions and device of this process, for record and checkpoints."""
    commit, dirty = git_commit()
    return {
        "flags": config.to_dict(), "git_commit": commit, "git_dirty": dirty,
        "versions": versions(),
        "device": {"type": device.type, "name": device_name(device), "host": socket.gethostname(),
                   "compute_dtype": str(dtype).removeprefix("torch."),
                   "dtype_reason": dtype_reason, "world_size": ranks.world_size,
                   "triton_interpreted": INTERPRETED},
    }


def run_facts(model, horizon, expected, segment, n_train_tokens):
    """Return the content of config.json of the run's record, without its id."""
    n_scaling = scaling_params(model)
    return {
        "created_utc": utc_now(), **segment, **expected, "model_config": model.to_dict(),
        "n_params": parameter_counts(model)["total"], "n_scaling_params": n_scaling,
        "flops_per_token": flops_per_token(model), "train_tokens": n_train_tokens,
        "target_tokens": horizon.target_tokens,
        "target_param_data_ratio": horizon.target_tokens / n_scaling,
    }


def open_record(config, run_id, facts, folder, step, segment):
    """Begin the record of a run, or continue it from a checkpoint's `step`; return its RunLog.

    Checkpoints in `folder` of another run, or of steps that this run will repeat, are moved away.
    """
    runs = runs_dir()
    if step is None and config.resume_from_step == "auto" and _died_early(runs / run_id, facts):
        step = 0
    if step is None:
        check_new_run(runs, run_id)  # before wandb starts a run with this id

    remedy = "wait for it, stop it, or give another"
    with contextlib.ExitStack() as on_failure:
        locks = []
        for what, name, flag in (
                (runs / run_id, f"run.{check_run_id(run_id)}", "--run-id"),
                (folder, f"checkpoints.{folder.name}", "--model-tag")):
            lock = RunLock(what, locks_dir() / name, run_id, f"{remedy} {flag}")
            on_failure.callback(lock.release)
            locks.append(lock)

        sinks = []
        if not is_quiet():
            sinks.append(ConsoleSink(facts["num_iterations"], step or 0))
        if config.run != "dummy":
            sinks.append(WandbSink(config.run, run_id, facts))
        if step is None:
            checkpoint.set_aside(folder)
            log = RunLog.create(runs, run_id, facts, sinks, locks)
        else:
            figures_of(read_run(runs / run_id).events)  # raises now if the record is damaged
            log = RunLog.resume(runs, run_id, step, sinks, locks, **segment)
            checkpoint.set_aside(folder, after=step)
        on_failure.pop_all()
    return log


def close_record(log, status, device, target, started_sec, loader):
    """Write the summary, close the log and its sinks; return the summary.

    target: (metric name, threshold or None). started_sec: time.monotonic() at the start of the
    process. Raise UserError if the disk is full.
    """
    try:
        summary = {**summarize(log.folder, status, device, *target),
                   "distinct_tokens": loader.distinct_tokens, "epochs": loader.epochs}
        if target[1] is not None:
            evaluations = evaluations_of(read_run(log.folder).events, target[0])
            reached = time_to_target(evaluations, *target)
            log.event("target", step=summary["steps"], **reached.summary_fields(),
                      description=reached.describe())
        log.finish(**summary, wall_time_sec=time.monotonic() - started_sec)
    finally:
        log.close()
    return summary


def close_failed_record(log, device, target, started_sec, loader):
    """Close the record of a run that ended with an exception, without hiding the exception."""
    try:
        close_record(log, "error", device, target, started_sec, loader)
    except UserError as error:
        print(f"no summary was written: {error}", file=sys.stderr)


def summarize(folder, status, device, metric_name=None, threshold=None):
    """Return the fields of summary.json, computed from the run's own record."""
    record = read_run(folder)
    summary = figures_of(record.events, metric_name, threshold)
    n_steps = record.config.get("num_iterations", 0)
    return {"status": status, **summary,
            "stopped_at_target": status == "ok" and summary["steps"] < n_steps,
            "peak_memory_mib": peak_memory_mib(device)}


def describe(model, horizon, micro_batches, ranks, dataset, tokenizer, n_train_tokens):
    """Describe model, data and horizon for the console."""
    counts = {name: f"{n / 1e6:.2f}M" for name, n in parameter_counts(model).items()}
    ratio = horizon.target_tokens / scaling_params(model)
    return "\n".join([
        f"model: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads of "
        f"{model.head_dim}, {counts['total']} parameters ({counts['transformer_matrices']} in "
        f"matrices, {counts['lm_head']} in the head)",
        f"data: {dataset.dataset_id}, {n_train_tokens / 1e6:.1f}M training tokens, tokenizer "
        f"{tokenizer.tokenizer_id} of {model.vocab_size} tokens",
        f"horizon: {horizon.num_iterations} steps of {horizon.total_batch_size_tokens} tokens "
        f"({micro_batches} micro-batch(es) on {ranks.world_size} rank(s)), "
        f"{horizon.target_tokens / 1e6:.2f}M tokens, {ratio:.2f} per scaling parameter"])


def describe_end(summary, folder):
    """Describe how the run ended, for the console."""
    parts = [f"{summary['train_time_sec']:.1f} s of training"]
    if summary["tok_per_sec_median"] is not None:
        parts.append(f"{summary['tok_per_sec_median']:,.0f} tok/s (median)")
    if summary["final_val_bpb"] is not None:
        error = summary.get("final_val_bpb_se")
        error = "" if error is None else f" ± {error:.4f}"
        parts.append(f"final val_bpb {summary['final_val_bpb']:.4f}{error}")
    if summary["min_val_bpb"] is not None:
        parts.append(f"min val_bpb {summary['min_val_bpb']:.4f}")
    parts.append(f"{summary['distinct_tokens'] / 1e6:.2f}M distinct tokens read "
                 f"{summary['epochs']:.2f} times")
    parts.append(f"peak memory {summary['peak_memory_mib']:,.0f} MiB")
    at_target = " at the target" if summary["stopped_at_target"] else ""
    return (f"{summary['status']} after {summary['steps']} steps{at_target}: {', '.join(parts)}\n"
            f"record: {folder}")


def warn_of_short_horizon(config, num_iterations):
    """Warn if the learning rates never stay at their peak."""
    decay_steps = round(config.warmdown_ratio * num_iterations)
    if config.warmup_steps + decay_steps > num_iterations:
        warn(f"the horizon of {num_iterations} steps is shorter than warm-up plus decay "
             f"({config.warmup_steps} + {decay_steps} steps): the learning rates jump; lower "
             "--warmup-steps or --warmdown-ratio, or train longer")


def _died_early(folder, facts):
    """Return whether an earlier run with these flags exists that did not succeed."""
    if not (folder / CONFIG).exists():
        return False
    earlier = read_run(folder)
    return earlier.status != "ok" and earlier.config.get("flags") == facts["flags"]
