"""Runs as a pandas table, one row per run: the ledger's columns joined with the runs' records.

`experiment_table` reads a ledger, `runs_table` needs records only. Numbers that are not known are
NaN. The gates, `scripts.runs` and the report read these tables.
"""

import os
import re
import time
from pathlib import Path

import pandas as pd

from nanochat.common import UserError, is_owned, locks_dir
from nanochat.experiments.ledger import ExperimentRow, columns, read_experiments
from nanochat.experiments.profiles import candidate_name
from nanochat.runlog import CONFIG, SUMMARY, figures_of, numbers_of, part_of, read_run
from nanochat.target import METRICS, evaluations_of, time_to_target

INTERPRETED = "Triton interpreted"  # part of the device's name: such times say nothing about a GPU
HORIZON_FLAGS = {"--num-iterations", "--target-flops", "--target-param-data-ratio"}
RECENT_SEC = 900  # a run on another host counts as running while its record is younger
NUMBERS = (
    "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
    "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "total_tokens",
    "peak_memory_mib", "steps", "num_iterations", "training_sec", "final_val_bpb",
    "final_val_bpb_se", "core_metric", "total_batch_size_tokens")
_NOT_IN_RECIPE = {  # flags in which repeats of a recipe may differ
    "seed", "run", "run_id", "model_tag", "resume_from_step", "allow_changed", "allow_memory",
    "allow_repeats", "quiet", "sample_every", "save_every", "save_minutes", "keep_checkpoints"}


def experiment_table(ledger, experiment_name, runs_dir):
    """Return the table of an experiment, in the ledger's order.

    Columns: the ledger's, NUMBERS, candidate, label, ok, own_horizon, horizon_only, crossing_step,
    time_to_target_sec, is_extrapolated, tokenizer_id, state and record (a RunRecord, or None where
    it is not on this machine). Raise UserError for an unreadable ledger, an unknown experiment, and
    candidates that are not one set of flags with one run per depth and seed.
    """
    rows = read_experiments(ledger)
    names = dict.fromkeys(row.experiment_name for row in rows)
    rows = [row for row in rows if row.experiment_name == experiment_name]
    if not rows:
        raise UserError(f"no experiment {experiment_name!r} in {ledger}; it has "
                        f"{', '.join(names) or 'no rows yet'}")
    folders = [Path(runs_dir) / row.run_id for row in rows]
    records = [read_run(folder) if (folder / CONFIG).exists() else None for folder in folders]
    cells = [{**(_cells_of(record) if record else {}), **vars(row)}
             for row, record in zip(rows, records, strict=True)]
    table = _table(cells, records, [_candidate_of(row) for row in rows])

    for (name, depth), runs in table.groupby(["candidate", "depth"]):
        twice = runs[runs.seed.duplicated(keep=False)]
        if len(twice):
            raise UserError(f"{ledger}: {' and '.join(twice.run_id)} are both {name} depth {depth} "
                            f"seed {twice.seed.iloc[0]}; remove one of the lines")
        # Each depth has its own horizon.
        same = runs if runs.horizon_only.all() else table[table.candidate == name]
        if same.candidate_flags.nunique() > 1:
            flags = " and ".join(map(repr, same.candidate_flags.unique()))
            raise UserError(f"{ledger}: candidate {name!r} has the flags {flags}; keep the lines "
                            "of one")
    return table


def runs_table(records):
    """Return the same table for records without a ledger; unfinished runs have numbers so far.

    Runs that differ only in their seed are one candidate, named after their ids: mine-s{0,1}.
    """
    records = list(records)
    recipes = [str(recipe_of(record)) for record in records]
    groups = {}
    for recipe, record in zip(recipes, records, strict=True):
        groups.setdefault(recipe, []).append(record.run_id)
    return _table(list(map(_cells_of, records)), records,
                  [_seeds_label(groups[recipe]) for recipe in recipes])


def curve(record, kind, value):
    """Return the columns step, tokens, train_time_sec and "value" of a run's events, as floats.

    kind, value: for example "val", "val_bpb" or "train", "loss". Only finite values are returned,
    the last of each step; a record of None has none.
    """
    names = ("step", "tokens", "train_time_sec", value)
    points = numbers_of(record.events, kind, *names) if record else []
    points = pd.DataFrame(points, columns=[*names[:3], "value"], dtype=float)
    return points.dropna(subset="value").drop_duplicates("step", keep="last", ignore_index=True)


def on_one_clock(table):
    """Return the table with times that are steps times the median step time of a depth.

    A step costs the same for every horizon, whatever the load of the machine was. The time to
    target is that of the interpolated crossing.
    """
    step_sec = table.groupby("depth").dt_median_ms.transform("median") / 1000
    seconds = (table.crossing_step * step_sec).mask(table.time_to_target_sec_measured == 0, 0.0)
    return table.assign(time_to_target_sec=seconds, training_sec=table.steps * step_sec,
                        is_extrapolated=False)


def check_same_world(table):
    """Raise UserError unless the runs share dataset, device and, where known, tokenizer."""
    for what, column in (("dataset", "dataset_id"), ("device", "device"),
                         ("tokenizer", "tokenizer_id")):
        check_same(what, table, column)


def check_same(what, table, column):
    """Raise UserError when the known values of a column differ, naming two runs."""
    known = table[table[column].notna() & (table[column] != "")].drop_duplicates(column)
    if len(known) > 1:
        first, other = known.iloc[0], known.iloc[1]
        raise UserError(f"not comparable, another {what}: {first.run_id} has {first[column]}, "
                        f"{other.run_id} has {other[column]}; compare runs of one {what}")


def row_of(record, **cells):
    """Return the ledger row of a RunRecord; `cells` replace values of the record."""
    own = {**_cells_of(record), "candidate_flags": record.run_id, **cells}
    return ExperimentRow(**{name: own[name] for name in columns(ExperimentRow)})


def recipe_of(record):
    """Return {name: value} of flags, dataset, tokenizer and device, equal for all seeds."""
    config, flags = record.config, part_of(record.config, "flags")
    flags = {name: value for name, value in flags.items() if name not in _NOT_IN_RECIPE}
    return {**flags, "dataset_id": config.get("dataset_id"),
            "tokenizer_id": config.get("tokenizer_id"), "device": _device_of(config)}


def number(value):
    """Return a finite number as it is and anything else as None: people edit records."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def state_of(record):
    """Return running, finished, stopped (by a signal), failed or stale (died without a summary)."""
    if record.summary is not None:
        return {"ok": "finished", "interrupted": "stopped"}.get(str(record.status), "failed")
    owned = is_owned(locks_dir() / f"run.{record.folder.absolute().name}")
    if owned is None:  # another host, or no lock file
        owned = age_sec(record) < RECENT_SEC
    ended_since = (record.folder / SUMMARY).exists()
    return "running" if owned or ended_since else "stale"


def age_sec(record):
    """Return the seconds since a file of the record was written."""
    return max(0.0, time.time() - max(path.stat().st_mtime for path in record.folder.iterdir()))


def _table(cells, records, candidates):
    """Return the table of cells (a dict per run), records and candidate names."""
    names = dict.fromkeys([*columns(ExperimentRow), *NUMBERS, "tokenizer_id"])
    table = pd.DataFrame(cells, columns=[*names]).astype(dict.fromkeys(NUMBERS, float))
    table.insert(0, "candidate", candidates)
    table["state"] = [state_of(record) if record else "" for record in records]
    table["record"] = pd.Series(records, dtype=object)
    table["ok"] = table.status == "ok"

    table["label"] = [f"{row.candidate} depth {row.depth} seed {row.seed}"
                      for row in table.itertuples()]

    flags = [{word.partition("=")[0] for word in flags.split() if word.startswith("--")}
             for flags in table.candidate_flags]
    table["own_horizon"] = [bool(names & HORIZON_FLAGS) for names in flags]
    table["horizon_only"] = [bool(names) and names <= HORIZON_FLAGS for names in flags]

    measured = table.time_to_target_sec_measured
    seconds = measured.fillna(table.time_to_target_sec_extrapolated)
    table["time_to_target_sec"] = seconds.where(table.ok)
    table["is_extrapolated"] = table.time_to_target_sec.notna() & measured.isna()
    crossings = [_crossing_step(row) for row in table.itertuples()]
    table["crossing_step"] = pd.Series(crossings, dtype=float)
    return table


def _cells_of(record):
    """Return the cells of a record, from its config and its summary (or the metrics so far)."""
    config, flags, summary = record.config, part_of(record.config, "flags"), record.summary
    if summary is None:
        threshold = number(flags.get("target_metric_threshold"))
        summary = figures_of(record.events, _metric_of(flags), threshold)
    known = {**config, **summary, "total_tokens": summary.get("tokens"),
             "training_sec": summary.get("train_time_sec")}
    texts = {name: config.get(name) for name in ("git_commit", "dataset_id", "tokenizer_id")}
    texts |= {"timestamp": config.get("created_utc"), "status": summary.get("status", "failed")}
    return {
        **{name: number(known.get(name)) for name in NUMBERS},
        **{name: value if isinstance(value, str) else "" for name, value in texts.items()},
        "experiment_name": "", "candidate_flags": "", "run_id": record.run_id,
        "seed": number(config.get("seed")), "depth": number(flags.get("depth")),
        "target_metric_name": _metric_of(summary), "device": _device_of(config)}


def _metric_of(fields):
    name = fields.get("target_metric_name")
    return name if isinstance(name, str) and name in METRICS else "val_bpb"


def _device_of(config):
    """Return the device's name, the number of ranks if several, and INTERPRETED if so."""
    device = part_of(config, "device")
    if not isinstance(device.get("name"), str):
        return ""
    ranks = number(device.get("world_size")) or 1
    return (device["name"] + (f" ({ranks} ranks)" if ranks > 1 else "")
            + (f", {INTERPRETED}" if device.get("triton_interpreted") else ""))


def _seeds_label(run_ids):
    """Return one name for the runs of one recipe: books-r8-s{0,1}."""
    if len(run_ids) == 1:
        return run_ids[0]
    shared = len(os.path.commonprefix(run_ids))  # noqa: RUF071 (of characters)
    return f"{run_ids[0][:shared]}{{{','.join(run_id[shared:] for run_id in run_ids)}}}"


def _candidate_of(row):
    """Return the candidate in the runner's run id, else the name of the flags."""
    run_id = re.escape(row.experiment_name) + r"\.(.+)\.d\d+\.s\d+"
    match = re.fullmatch(run_id, row.run_id)
    return match[1] if match else candidate_name(row.candidate_flags)


def _crossing_step(row):
    """Return the interpolated step at which a run first reaches its target; None: unknown."""
    if row.record is None or not row.ok or pd.isna(row.target_metric_threshold):
        return None
    evaluations = evaluations_of(row.record.events, row.target_metric_name)
    return time_to_target(evaluations, row.target_metric_name,
                          row.target_metric_threshold).step_interpolated
