"""Runs as a pandas table, one row per run: the ledger's columns joined with the runs' records.

`experiment_table` reads a ledger, `runs_table` needs records only. Numbers that are not known are
NaN. The gates, `scripts.runs` and the report all read these tables.
"""

import itertools
import math
import os
import time
from pathlib import Path

import pandas as pd

from nanochat.common import UserError, is_owned, locks_dir
from nanochat.experiments.ledger import ExperimentRow, read_experiments
from nanochat.experiments.profiles import candidate_name
from nanochat.runlog import CONFIG, METRICS, SUMMARY, figures_of, numbers_of, read_run
from nanochat.target import check_target, evaluations_of, time_to_target

INTERPRETED = "Triton interpreted"  # part of the device's name
HORIZON_FLAGS = ("--num-iterations", "--target-flops", "--target-param-data-ratio")
RECENT_SEC = 900.0  # a run on another host counts as running while its record is younger
# Flags in which repeats of one recipe may differ.
_NOT_IN_RECIPE = {
    "seed", "run", "run_id", "model_tag", "resume_from_step", "allow_changed", "quiet",
    "sample_every", "save_every", "save_minutes", "keep_checkpoints"}
_LEDGER_NUMBERS = (
    "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
    "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "peak_memory_mib")
_RECORD_NUMBERS = ("steps", "tokens", "final_val_bpb", "core_metric", "train_time_sec",
                   "num_iterations", "total_batch_size_tokens")


def experiment_table(ledger, experiment_name, runs_dir):
    """Return the table of an experiment, in the ledger's order.

    Beside the ledger's columns it has: candidate, label, ok, own_horizon, horizon_only,
    crossing_step, time_to_target_sec, is_extrapolated, training_sec, steps, num_iterations,
    final_val_bpb, core_metric, total_batch_size_tokens, state, record (RunRecord, or None where the
    record is not on this machine).

    Raise UserError for an unreadable ledger (with the line), an unknown experiment, two runs of one
    candidate, depth and seed, one candidate name for two sets of flags, and two names for one set.
    Horizons of several depths count as one candidate.
    """
    rows = read_experiments(ledger)
    names = list(dict.fromkeys(row.experiment_name for row in rows))
    if experiment_name not in names:
        there = f"it has {', '.join(names)}" if names else "it has no rows yet"
        raise UserError(f"no experiment {experiment_name!r} in {ledger}; {there}")
    rows = [row for row in rows if row.experiment_name == experiment_name]
    records = [_record_of(runs_dir, row.run_id) for row in rows]
    table = _table([vars(row) for row in rows], records)
    table.insert(0, "candidate", [_candidate_of(row) for row in table.itertuples()])
    table["label"] = [f"{row.candidate}, depth {row.depth}, seed {row.seed}"
                      for row in table.itertuples()]
    _check_candidates(ledger, table)
    return table


def runs_table(records):
    """Return the same table for records without a ledger.

    Runs that differ only in their seed have one candidate, named after their ids: mine-s{0,1}.
    A run without a summary has its statistics so far. Extra column: age_sec since the last write.
    """
    records = list(records)
    table = _table([_ledger_cells(record, _statistics(record)) for record in records], records)
    groups = {}
    for record in records:
        groups.setdefault(str(recipe_of(record)), []).append(record.run_id)
    labels = [seeds_label(groups[str(recipe_of(record))]) for record in records]
    table.insert(0, "candidate", labels)
    table["label"] = table.run_id
    table["age_sec"] = [age_sec(record) for record in records]
    return table


def curve(record, kind, value):
    """Return step, tokens, train_time_sec and value of a run's events, as a DataFrame of floats.

    kind, value: "val", "val_bpb" or "train", "loss" or "train", "dt_ms", for example. Events
    without a finite value are left out. The column is always called "value".
    """
    names = ("step", "tokens", "train_time_sec", value)
    points = numbers_of(record.events, kind, *names) if record else []
    points = [point for point in points if point[-1] is not None]
    return pd.DataFrame(points, columns=["step", "tokens", "train_time_sec", "value"], dtype=float)


def on_one_clock(table):
    """Return the table with times in steps, at the median step time of all its runs per depth.

    Comparisons of horizons need it: a step costs the same for every horizon, whatever the load of
    the machine was. The time to target is that of the interpolated crossing.
    """
    step_sec = table.groupby("depth").dt_median_ms.transform("median") / 1000
    times = (table.crossing_step * step_sec).mask(table.time_to_target_sec_measured == 0, 0.0)
    return table.assign(time_to_target_sec=times, training_sec=table.steps * step_sec,
                        is_extrapolated=False)


def check_same_world(table):
    """Raise UserError unless the runs share dataset, device and, where known, tokenizer."""
    for what, column in (("dataset", "dataset_id"), ("device", "device"),
                         ("tokenizer", "tokenizer_id")):
        check_same(what, table, table[column])


def check_same(what, table, values):
    """Raise UserError when the values that are known differ, naming two runs."""
    known = [(run_id, value) for run_id, value in zip(table.run_id, values, strict=True)
             if value and value == value]
    for run_id, value in known[1:]:
        if value != known[0][1]:
            raise UserError(f"not comparable, another {what}: {known[0][0]} has {known[0][1]}, "
                            f"{run_id} has {value}; compare runs of one {what.split()[0]}")


def facts_of(table):
    """Return (name, value) pairs of what the runs share: number, target, dataset, device, ..."""
    n_running = int((table.state == "running").sum())
    n_failed = int((~table.ok).sum()) - n_running
    targets = {f"{row.target_metric_name} {row.target_metric_threshold:.5g}"
               if row.target_metric_threshold == row.target_metric_threshold else "none"
               for row in table.itertuples()}
    counts = [f"{len(table)}", f"{n_running} running" if n_running else "",
              f"{n_failed} failed" if n_failed else ""]

    def values(column):
        return ", ".join(dict.fromkeys(map(str, table[column].sort_values()))) or "not known"

    return [("runs", ", ".join(filter(None, counts))), ("target", ", ".join(sorted(targets))),
            ("dataset", values("dataset_id")), ("device", values("device")),
            ("seeds", values("seed")), ("depths", values("depth"))]


def row_of(record, **cells):
    """Return the ledger's row of a RunRecord; `cells` replace what the record says.

    The status is `failed` when the run left no summary. Raise UserError for impossible cells.
    """
    own = {**_ledger_cells(record, record.summary or {}), "candidate_flags": record.run_id}
    return ExperimentRow(**{**own, **cells})


def recipe_of(record):
    """Return, by name, what repeats of a run share: flags, dataset, tokenizer and device."""
    config = record.config
    flags = {name: value for name, value in _flags(record).items() if name not in _NOT_IN_RECIPE}
    return {**flags, "dataset_id": config.get("dataset_id"),
            "tokenizer_id": config.get("tokenizer_id"), "device": _device_of(config)}


def seeds_label(run_ids):
    """Return one name for the runs of one recipe: books-r8-s{0,1}."""
    if len(run_ids) == 1:
        return run_ids[0]
    shared = len(os.path.commonprefix(run_ids))  # noqa: RUF071 (characters are what is meant)
    return f"{run_ids[0][:shared]}{{{','.join(run_id[shared:] for run_id in run_ids)}}}"


def number(value):
    """Return a finite number as it is and anything else as None: people edit records."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def state_of(record):
    """Return running, finished, stopped (by a signal), failed or stale (died without a summary)."""
    if record.summary is not None:
        return {"ok": "finished", "interrupted": "stopped"}.get(record.status, "failed")
    owned = is_owned(locks_dir() / f"run.{record.folder.absolute().name}")
    if owned is None:  # another host, or no lock file
        owned = age_sec(record) < RECENT_SEC
    just_ended = (record.folder / SUMMARY).exists()  # written since the record was read
    return "running" if owned or just_ended else "stale"


def age_sec(record):
    """Return the seconds since the record was written; a copy is as old as its last event."""
    paths = [record.folder / name for name in (CONFIG, METRICS, SUMMARY)]
    written = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
    stamp = number(record.events[-1].get("time_unix_sec")) if record.events else None
    return max(0.0, time.time() - min(written, stamp or written))


def _table(cells, records):
    """Return the table of ledger cells (one dict per run) and records, but for candidates."""
    named = [{**_record_cells(record), **row} for row, record in zip(cells, records, strict=True)]
    numbers = [*_LEDGER_NUMBERS, *_RECORD_NUMBERS, "total_tokens"]
    table = pd.DataFrame(named).astype(dict.fromkeys(numbers, float))
    table = table.rename(columns={"train_time_sec": "training_sec"})
    table["record"] = pd.Series(records, dtype=object)
    table["ok"] = table.status == "ok"

    words = [{word.partition("=")[0] for word in flags.split() if word.startswith("--")}
             for flags in table.candidate_flags]
    table["own_horizon"] = [bool(names & set(HORIZON_FLAGS)) for names in words]
    table["horizon_only"] = [bool(names) and names <= set(HORIZON_FLAGS) for names in words]

    seconds = table.time_to_target_sec_measured.fillna(table.time_to_target_sec_extrapolated)
    table["time_to_target_sec"] = seconds.where(table.ok)
    measured = table.time_to_target_sec_measured.notna()
    table["is_extrapolated"] = table.time_to_target_sec.notna() & ~measured
    table["crossing_step"] = [_crossing_step(row) for row in table.itertuples()]
    return table


def _record_of(runs_dir, run_id):
    """Return the RunRecord, or None where it is not on this machine."""
    folder = Path(runs_dir) / run_id
    if not (folder / CONFIG).exists():
        return None
    record = read_run(folder)
    if record.run_id != run_id:
        raise UserError(f"{folder}: its config.json says run_id {record.run_id!r}; "
                        "one of two runs has the other's id")
    return record


def _record_cells(record):
    """Return what only the record knows; NaN without one."""
    if record is None:
        return {**dict.fromkeys(_RECORD_NUMBERS, math.nan), "tokenizer_id": None, "state": ""}
    known = {**record.config, **_statistics(record)}
    return {**{name: number(known.get(name)) for name in _RECORD_NUMBERS},
            "tokenizer_id": record.config.get("tokenizer_id"), "state": state_of(record)}


def _ledger_cells(record, statistics):
    """Return the ledger's columns from a record and the statistics of its summary, or so far."""
    config = record.config
    return {
        **{name: number(statistics.get(name)) for name in _LEDGER_NUMBERS},
        "timestamp": config.get("created_utc", ""), "git_commit": config.get("git_commit") or "",
        "experiment_name": "", "candidate_flags": "", "run_id": record.run_id,
        "seed": number(config.get("seed")), "depth": number(_flags(record).get("depth")),
        "target_metric_name": statistics.get("target_metric_name") or "val_bpb",
        "status": statistics.get("status", "failed"), "dataset_id": config.get("dataset_id"),
        "total_tokens": number(statistics.get("tokens")), "device": _device_of(config)}


def _statistics(record):
    """Return the statistics of the summary, or those so far of a run without one."""
    if record.summary is not None:
        return record.summary
    name = _flags(record).get("target_metric_name") or "val_bpb"
    threshold = number(_flags(record).get("target_metric_threshold"))
    try:
        check_target(name, threshold)
    except (UserError, TypeError):  # no target, or an impossible one
        name = threshold = None
    return figures_of(record.events, name, threshold)


def _flags(record):
    flags = record.config.get("flags")
    return flags if isinstance(flags, dict) else {}


def _device_of(config):
    """Return the device's name as ledgers have it, with the number of ranks if several.

    It says whether Triton was interpreted: such times say nothing about a GPU.
    """
    device = config.get("device")
    if not isinstance(device, dict) or not isinstance(device.get("name"), str):
        return ""
    ranks = number(device.get("world_size")) or 1
    return (device["name"] + (f" ({ranks} ranks)" if ranks > 1 else "")
            + (f", {INTERPRETED}" if device.get("triton_interpreted") else ""))


def _candidate_of(row):
    """Return the name known for its flags, else the one in the runner's run id, else the flags."""
    known = candidate_name(row.candidate_flags)
    head, tail = f"{row.experiment_name}.", f".d{row.depth}.s{row.seed}"
    is_named = row.run_id.startswith(head) and row.run_id.endswith(tail)
    if known == row.candidate_flags and is_named:
        return row.run_id[len(head):-len(tail)]
    return known


def _crossing_step(row):
    """Return the interpolated step at which the run first reaches its target, or NaN."""
    if math.isnan(row.target_metric_threshold) or row.record is None or not row.ok:
        return math.nan
    evaluations = evaluations_of(row.record.events, row.target_metric_name)
    reached = time_to_target(evaluations, row.target_metric_name, row.target_metric_threshold)
    return math.nan if reached.step_interpolated is None else reached.step_interpolated


def _check_candidates(ledger, table):
    """Raise UserError unless names, flags and seeds of the candidates are one to one."""
    for one, other in itertools.combinations(table.itertuples(), 2):
        same_flags = one.candidate_flags == other.candidate_flags
        if same_flags and (one.depth, one.seed) == (other.depth, other.seed):
            raise UserError(f"{ledger}: {one.run_id} and {other.run_id} are both {other.label}; "
                            "remove one of the two lines")
        by_depth = one.horizon_only and other.horizon_only and one.depth != other.depth
        if (one.candidate == other.candidate) != same_flags and not by_depth:
            raise UserError(
                f"{ledger}: {one.run_id} has candidate {one.candidate!r} with flags "
                f"{one.candidate_flags!r}, {other.run_id} has {other.candidate!r} with "
                f"{other.candidate_flags!r}; keep the lines of one")
