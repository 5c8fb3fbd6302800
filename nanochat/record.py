"""A run's record: what it holds when it begins and when it ends, and what the console says of both."""

import contextlib
import socket
import sys
import time

from nanochat import checkpoint
from nanochat.build import identity
from nanochat.common import (
    RunLock,
    UserError,
    device_name,
    git_commit,
    is_quiet,
    locks_dir,
    peak_memory_mib,
    runs_dir,
    utc_now,
    versions,
)
from nanochat.console import ConsoleSink, WandbSink
from nanochat.distributed import broadcast_from_rank0
from nanochat.gpt import flops_per_token, parameter_counts, scaling_params
from nanochat.kernels.runtime import INTERPRETED
from nanochat.run_figures import curves_of, figures_of
from nanochat.runlog import CONFIG, RunLog, check_new_run, check_run_id, read_run
from nanochat.target import evaluations_of, time_to_target


class NoLog:
    """The log of ranks above 0: the record has one writer."""

    def event(self, kind, **fields):
        pass

    def before_checkpoint(self):
        pass


def new_run_id(tag, seed, ranks):
    """An id of tag, UTC time and seed, the same on every rank."""
    return broadcast_from_rank0(ranks, lambda: f"{tag[:80]}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{seed}")


def segment_facts(config, ranks, device, dtype, dtype_reason):
    """What computes from here on, as nanochat.segments has it; part of the record and of every checkpoint's meta."""
    commit, dirty = git_commit()
    return {
        "flags": config.to_dict(), "git_commit": commit, "git_dirty": dirty, "versions": versions(),
        "device": {"type": device.type, "name": device_name(device), "host": socket.gethostname(),
                   "compute_dtype": str(dtype).removeprefix("torch."), "dtype_reason": dtype_reason,
                   "world_size": ranks.world_size, "triton_interpreted": INTERPRETED},
    }


def run_config(config, data, model, horizon, segment):
    """config.json of the run's record, without its id."""
    return {
        "created_utc": utc_now(), **segment,
        **identity(config, data, horizon), "model_config": model.to_dict(),
        "n_params": parameter_counts(model)["total"], "n_scaling_params": scaling_params(model),
        "flops_per_token": flops_per_token(model), "train_tokens": data.n_train_tokens,
        "target_tokens": horizon.target_tokens,
        "target_param_data_ratio": horizon.target_tokens / scaling_params(model),
    }


def open_record(wandb_name, run_id, record, folder, resume_step, segment):
    """The run's log and its sinks, begun or continued with `segment`; checkpoints in `folder` of another run, or of
    steps that this one makes anew, are moved aside."""
    runs = runs_dir()
    if resume_step is None and record["flags"]["resume_from_step"] == "auto" and _died_early(runs / run_id, record):
        resume_step = 0
    if resume_step is None:
        check_new_run(runs, run_id)  # before wandb hears of it
    other, locks = "wait for it, stop it, or give another", locks_dir()
    with contextlib.ExitStack() as failed:
        owned = []
        for what, lock, flag in ((runs / run_id, f"run.{check_run_id(run_id)}", "--run-id"),
                                 (folder, f"checkpoints.{folder.name}", "--model-tag")):
            owned.append(RunLock(what, locks / lock, run_id, f"{other} {flag}"))
            failed.callback(owned[-1].release)
        sinks = [] if is_quiet() else [ConsoleSink(record["num_iterations"], resume_step or 0)]
        if wandb_name != "dummy":
            sinks.append(WandbSink(wandb_name, run_id, record))
        if resume_step is not None:
            curves_of(read_run(runs / run_id).events)  # what the end will need, before the work
            log = RunLog.resume(runs, run_id, resume_step, sinks, owned, **segment)
            checkpoint.set_aside(folder, after=resume_step)
        else:
            checkpoint.set_aside(folder)
            log = RunLog.create(runs, run_id, record, sinks, owned)
        failed.pop_all()
    return log


def _died_early(folder, record):
    """Whether the run of these flags is there already and ended without a checkpoint, by no success of its own."""
    if not (folder / CONFIG).exists():
        return False
    earlier = read_run(folder)
    return earlier.status != "ok" and earlier.config.get("flags") == record["flags"]


def close_record(log, status, device, target, started, loader):
    """Write the summary and close the log with its sinks; returns the summary. `started`: time.monotonic() then.

    target: (metric name, threshold or None); loader: the training stream, for how much text was read. Errors:
    UserError when the disk is full.
    """
    try:
        summary = {**summarize(log.folder, status, device, *target),
                   "distinct_tokens": loader.distinct_tokens, "epochs": loader.epochs}
        if target[1] is not None:
            reached = time_to_target(evaluations_of(read_run(log.folder).events, target[0]), *target)
            log.event("target", step=summary["steps"], **reached.summary_fields(), description=reached.describe())
        log.finish(**summary, wall_time_sec=time.monotonic() - started)
    finally:
        log.close()
    return summary


def close_failed_record(log, device, target, started, loader):
    """The same for a run that an exception ended: whatever goes wrong now must not hide it."""
    try:
        close_record(log, "error", device, target, started, loader)
    except UserError as error:
        print(f"no summary: {error}", file=sys.stderr)


def summarize(folder, status, device, target_metric_name=None, target_metric_threshold=None):
    """The fields of summary.json, computed from the run's own record (every segment of it)."""
    record = read_run(folder)
    figures = figures_of(record.events, target_metric_name, target_metric_threshold)
    stopped_at_target = status == "ok" and figures["steps"] < record.config.get("num_iterations", 0)
    return {"status": status, **figures, "stopped_at_target": stopped_at_target,
            "peak_memory_mib": peak_memory_mib(device)}


def describe(model, horizon, micro_batches, ranks, data):
    """What will be trained, on what, for how long: for the console."""
    millions = {name: f"{count / 1e6:.2f}M" for name, count in parameter_counts(model).items()}
    return (
        f"model: {model.n_layer} layers, width {model.n_embd}, {model.n_head} heads of {model.head_dim}, "
        f"{millions['total']} parameters ({millions['transformer_matrices']} matrices + {millions['lm_head']} head)\n"
        f"data: {data.dataset.dataset_id}, tokenizer {data.tokenizer.tokenizer_id} of {model.vocab_size}, "
        f"{data.n_train_tokens / 1e6:.1f}M training tokens\n"
        f"horizon: {horizon.num_iterations} steps of {horizon.total_batch_size_tokens} tokens "
        f"({micro_batches} micro-batch(es) on {ranks.world_size} rank(s)), {horizon.target_tokens / 1e6:.2f}M tokens, "
        f"{horizon.target_tokens / scaling_params(model):.2f} per scaling parameter")


def describe_end(summary, folder):
    """How the run ended, for the console."""
    bits = "" if summary["min_val_bpb"] is None else f", min val_bpb {summary['min_val_bpb']:.4f}"
    speed = "" if summary["tok_per_sec_median"] is None else f", {summary['tok_per_sec_median']:,.0f} tok/s (median)"
    at_target = ", at its target" if summary["stopped_at_target"] else ""
    return (f"{summary['status']} after {summary['steps']} steps{at_target}: "
            f"{summary['train_time_sec']:.1f} s of training{speed}{bits}, "
            f"{summary['distinct_tokens'] / 1e6:.2f}M tokens of text read {summary['epochs']:.2f} times, "
            f"peak memory {summary['peak_memory_mib']:,.0f} MiB\nrecord: {folder}")
