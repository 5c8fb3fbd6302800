"""Synthetic run records, for the tests of experiments, gates and report."""

import math

import numpy as np

from nanochat.common import runs_dir
from nanochat.runlog import RunLog, find_run
from nanochat.target import evaluations_of, time_to_target

BATCH_TOKENS = 2048


def make_run(run_id, *, candidate="baseline", depth=4, seed=0, steps=200, eval_every=20,
             step_ms=100.0, bpb_shift=0.0, threshold=1.5, device="CPU x2", dataset_id="stdlib-1",
             nan_at=None, spike_at=None, finished=True, summary=None):
    """Write a record with a falling loss, evaluations and a summary; return the RunRecord.

    summary: values in the place of the run's own.
    """
    flags = {"depth": depth, "seed": seed, "run_id": run_id, "dataset": "stdlib",
             "fused_rmsnorm": "fused" in candidate or candidate == "both",
             "chunked_ce": "chunked" in candidate or candidate == "both"}
    log = RunLog.create(runs_dir(), run_id, {
        "created_utc": "2026-11-23T12:00:00Z", "flags": flags, "git_commit": "0" * 40,
        "git_dirty": False, "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "dataset_id": dataset_id, "tokenizer_id": "abc123", "seed": seed, "num_iterations": steps,
        "device": {"type": "cpu", "name": device, "compute_dtype": "float32", "world_size": 1},
        "total_batch_size_tokens": BATCH_TOKENS})
    rng = np.random.default_rng(seed)
    clock_sec, status, bpb = 0.0, "ok", []
    for step in range(steps + 1):
        tokens = step * BATCH_TOKENS
        if step % eval_every == 0:
            shift = bpb_shift * min(1.0, step / steps * 2) + 0.001 * math.sin(seed)
            bpb.append(_bpb(step, steps, depth) + shift)
            log.event("val", step=step, tokens=tokens, val_bpb=bpb[-1], train_time_sec=clock_sec)
        if step == steps:
            break
        clock_sec += step_ms / 1000
        loss = 3 * _bpb(step, steps, depth) + 0.05 * rng.standard_normal()
        loss += 4.0 if step + 1 == spike_at else 0.0
        if step + 1 == nan_at:
            loss, status = math.nan, "nan"
        log.event("train", step=step + 1, tokens=tokens + BATCH_TOKENS, loss=loss,
                  lr_multiplier=1.0, dt_ms=step_ms * (1 + 0.05 * rng.standard_normal()),
                  tok_per_sec=BATCH_TOKENS / step_ms * 1000, train_time_sec=clock_sec, mfu=None)
        if status == "nan":
            break
    if finished:
        evaluations = evaluations_of(find_run(run_id, runs_dir()).events, "val_bpb")
        own = dict(status=status, steps=step, tokens=step * BATCH_TOKENS, min_val_bpb=min(bpb),
                   final_val_bpb=bpb[-1], core_metric=None, dt_median_ms=step_ms,
                   tok_per_sec_median=BATCH_TOKENS / step_ms * 1000, train_time_sec=clock_sec,
                   wall_time_sec=clock_sec + 5, peak_memory_mib=900.0,
                   **time_to_target(evaluations, "val_bpb", threshold).summary_fields())
        log.finish(**{**own, **(summary or {})})
    log.close()
    return find_run(run_id, runs_dir())


def make_trial(experiment, *, candidate="baseline", depth=4, seed=0, **run):
    """Write the record of a run of an experiment; return the RunRecord."""
    return make_run(f"{experiment}.{candidate}.d{depth}.s{seed}", candidate=candidate, depth=depth,
                    seed=seed, **run)


def _bpb(step, steps, depth):
    """A falling curve that ends at about 1.45 at depth 4, lower for deeper models."""
    return 1.45 - 0.05 * (depth - 4) + 1.5 * math.exp(-6 * step / steps)
