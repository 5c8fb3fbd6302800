"""Ledgers (CSV files with one row per run), and runs as a pandas table.

A ledger is the plain CSV of Python's csv module and pandas: commas, decimal points, UTF-8, any line
ends. A dataclass with a `run_id` names and types its columns; people may add and reorder columns.

The table has one row per run: the ledger's columns joined with the runs' records. Numbers that are
not known are NaN. The gates, `scripts.runs` and the report read it.
"""

import csv
import dataclasses
import io
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd

from nanochat.common import UserError, atomic_path, base_dir, is_owned, locked, locks_dir
from nanochat.runlog import CONFIG, figures_of, in_words, numbers_of, part_of, read_run
from nanochat.target import METRICS

TRACKED_LEDGER = Path("dev/experiments.csv")
LEDGER_HELP = ("path of the ledger, the CSV file of runs (default: experiments.csv in the cache "
               f"folder if it has the experiment, otherwise {TRACKED_LEDGER})")
STATUSES = ("ok", "nan", "interrupted", "error", "failed")
INTERPRETED = "Triton interpreted"  # part of the device's name: such times say nothing about a GPU
RECENT_SEC = 900  # a run on another host counts as running while its record is younger
NUMBERS = (
    "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
    "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "total_tokens",
    "peak_memory_mib", "steps", "num_iterations", "training_sec", "final_val_bpb",
    "final_val_bpb_se", "core_metric")
SHOWN = {  # column: (heading, digits)
    "min_val_bpb": ("min val_bpb", 5),
    "final_val_bpb_se": ("standard error over documents", 5),
    "core_metric": ("CORE", 4),
    "time_to_target_sec": ("time to target, s", 1),
    "tok_per_sec_median": ("tokens/s", 0),
    "dt_median_ms": ("step, ms", 1),
    "peak_memory_mib": ("memory, MiB", 0),
    "total_tokens": ("tokens", 0),
}
_NOT_IN_RECIPE = {  # flags in which repeats of a recipe may differ
    "seed", "run", "run_id", "model_tag", "resume_from_step", "allow_changed", "quiet",
    "sample_every", "save_every", "save_minutes", "keep_checkpoints"}
_FLOAT = re.compile(r" *([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) *", re.ASCII)
# pandas writes integers beside empty cells as 7.0; another decimal, as in 1.966, is a separator.
_INTEGER = re.compile(r" *([+-]?\d+)(?:\.0)? *", re.ASCII)


@dataclass(frozen=True)
class ExperimentRow:
    """One run of an experiment. None (an empty cell): not measured.

    `candidate_flags` are the flags that the baseline does not have (empty: the baseline itself).
    """

    timestamp: str
    git_commit: str
    experiment_name: str
    seed: int
    depth: int
    target_metric_name: str
    target_metric_threshold: float | None
    time_to_target_sec_measured: float | None
    time_to_target_sec_extrapolated: float | None
    tok_per_sec_median: float | None
    dt_median_ms: float | None
    wall_time_sec: float | None
    min_val_bpb: float | None
    status: str
    candidate_flags: str
    dataset_id: str
    total_tokens: int | None
    device: str
    peak_memory_mib: float | None
    run_id: str

    def __post_init__(self):
        if self.status not in STATUSES:
            raise UserError(f"status is {self.status!r}, not one of {', '.join(STATUSES)}")


# --- ledgers --------------------------------------------------------------------------------------

def columns(row_type):
    """Return the ledger's columns: the dataclass's field names, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def demonstration_ledger():
    """Return the path of the ledger of demonstrations, in the cache folder."""
    return base_dir() / "experiments.csv"


def find_ledger(experiment_name):
    """Return the ledger that has the experiment: that of demonstrations or the tracked one."""
    own = demonstration_ledger()
    names = {row.experiment_name for row in read_rows(own)} if own.exists() else ()
    return own if experiment_name in names else TRACKED_LEDGER


def read_rows(path, row_type=ExperimentRow):
    """Return every row as a `row_type`, in the file's order.

    Raise UserError with file and line for a missing column, a cell or row that does not parse or
    that the dataclass refuses, and a `run_id` that is empty or repeated.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path} ({error.strerror})") from None
    return list(_parse(path, data, row_type)[1].values())


def append_row(path, row):
    """Append `row` (a dataclass), atomically and under a file lock; a new file gets the header.

    Every byte that is there is kept. Raise UserError as read_rows, for a `run_id` that is already
    there, and for a row that would not read back; the file is then unchanged.
    """
    path = Path(path).resolve()  # a symlink stays a symlink
    cells = {name: repr(float(value)) if isinstance(value, float) else str(value)
             for name, value in vars(row).items() if value is not None}
    try:
        with locked(path), atomic_path(path) as temporary:
            data = path.read_bytes() if path.exists() else b""
            data = data or _line(columns(type(row))) + b"\n"
            names, rows = _parse(path, data, type(row))
            if row.run_id.strip() in rows:
                raise UserError(f"{path}: run_id {row.run_id.strip()!r} is already there; remove "
                                "its line to log the run again")
            line = _line(cells.get(name, "") for name in names)
            _parse("the new row", _line(names) + b"\n" + line + b"\n", type(row))
            end = re.search(rb"\r\n|\n|\r|$", data).group() or b"\n"
            joint = b"" if data.endswith((b"\n", b"\r")) else end
            temporary.write_bytes(data + joint + line + end)
    except OSError as error:
        raise UserError(f"cannot write the ledger {path} ({error.strerror})") from None


def parse_cell(cell, field):
    """Return the typed value of a cell of the column `field` (a dataclass field).

    Raise UserError for a number with separators or a decimal comma.
    """
    kind, *optional = get_args(field.type) or (field.type,)
    if kind is str:
        return cell
    if optional and not cell.strip(" "):
        return None
    match = (_INTEGER if kind is int else _FLOAT).fullmatch(cell)
    if not match or not math.isfinite(float(match[1])):
        what = "a whole number" if kind is int else "a number with a decimal point"
        raise UserError(f"{field.name} is {cell!r}, not {what} and nothing else")
    return kind(match[1])


def _parse(path, data, row_type):
    """Return (header names, {run id: row}) of a ledger's bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((data[:error.start] + b"?").splitlines())
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    reader, rows = csv.reader(io.StringIO(text, newline=""), strict=True), {}
    try:
        names = [name.strip() for name in next(reader, [])]
        if faults := [name for name in columns(row_type) if names.count(name) != 1]:
            raise ValueError("the header must have each of the ledger's columns once, between "
                             f"commas; it has not: {','.join(faults)}")
        for cells in filter(lambda cells: any(map(str.strip, cells)), reader):
            if len(cells) != len(names):
                raise ValueError(f"{len(cells)} cells where the header has {len(names)} (a comma "
                                 "inside a text needs quotes, a number needs a decimal point)")
            cell_of = dict(zip(names, cells, strict=True))
            row = row_type(*(parse_cell(cell_of[f.name], f) for f in dataclasses.fields(row_type)))
            run_id = row.run_id.strip()
            if not run_id or run_id in rows:
                raise ValueError(f"run_id {run_id!r} is {'repeated' if run_id else 'empty'}")
            rows[run_id] = row
    except (csv.Error, ValueError) as error:  # a UserError is a ValueError
        raise UserError(f"{path}, line {reader.line_num}: {error}; fix or remove that line"
                        ) from None
    return names, rows


def _line(cells):
    """Return the cells as a line of CSV, without its end."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # quotes cells with \r or \n
    return buffer.getvalue().removesuffix("\r\n").encode(errors="backslashreplace")


# --- tables ---------------------------------------------------------------------------------------

def experiment_table(ledger, experiment_name, runs_dir):
    """Return the table of an experiment, in the ledger's order.

    Columns: the ledger's, NUMBERS, candidate, ok, time_to_target_sec, is_extrapolated,
    tokenizer_id, state and record (a RunRecord, or None if it is not on this machine). Raise
    UserError for an unreadable ledger, an unknown experiment, and candidates that are not one set
    of flags with one run per depth and seed.
    """
    rows = read_rows(ledger)
    names = dict.fromkeys(row.experiment_name for row in rows)
    rows = [row for row in rows if row.experiment_name == experiment_name]
    if not rows:
        raise UserError(f"no experiment {experiment_name!r} in {ledger}; it has "
                        f"{', '.join(names) or 'no rows yet'}")
    folders = [Path(runs_dir) / row.run_id for row in rows]
    records = [read_run(folder) if (folder / CONFIG).exists() else None for folder in folders]
    cells = [{**(_cells_of(record) if record else {}), **vars(row)}
             for row, record in zip(rows, records, strict=True)]
    table = _table(cells, records, map(_candidate_of, rows))

    for name, runs in table.groupby("candidate"):
        if runs.candidate_flags.nunique() > 1:
            flags = " and ".join(map(repr, runs.candidate_flags.unique()))
            raise UserError(f"{ledger}: candidate {name!r} has the flags {flags}; keep the lines "
                            "of one")
        twice = runs[runs.duplicated(["depth", "seed"], keep=False)]
        if len(twice):
            raise UserError(f"{ledger}: {' and '.join(twice.run_id)} have the same candidate, "
                            "depth and seed; remove one of the lines")
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


def text_table(table):
    """Return the known metrics as text: a row per run, and mean ± sd per candidate and depth."""
    names = [name for name in SHOWN if table[name].notna().any()]
    rows = {}
    for (candidate, depth), runs in table.groupby(["candidate", "depth"], sort=False, dropna=False):
        for _, run in runs.iterrows():
            rows[run.run_id] = [_state_in_words(run), *(
                _mean_sd(run[[name]].dropna(), SHOWN[name][1]) for name in names)]
        if len(runs) > 1:
            means = [_mean_sd(runs[name][runs.ok].dropna(), SHOWN[name][1]) for name in names]
            rows[f"{candidate}, depth {depth}"] = [f"mean ± sd of {runs.ok.sum()}", *means]
    headings = ["state", *(SHOWN[name][0] for name in names)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=headings)


def curve(record, kind, value):
    """Return the columns step, tokens, train_time_sec and "value" of a run's events, as floats.

    kind, value: for example "val", "val_bpb" or "train", "loss". Only finite values are returned,
    the last of each step; a record of None has none.
    """
    names = ("step", "tokens", "train_time_sec", value)
    points = numbers_of(record.events, kind, *names) if record else []
    points = pd.DataFrame(points, columns=[*names[:3], "value"], dtype=float)
    return points.dropna(subset="value").drop_duplicates("step", keep="last", ignore_index=True)


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
    own = {**_cells_of(record), **cells}
    return ExperimentRow(**{name: own[name] for name in columns(ExperimentRow)})


def recipe_of(record):
    """Return {name: value} of flags, dataset, tokenizer and device, equal for all seeds."""
    config, flags = record.config, part_of(record.config, "flags")
    flags = {name: value for name, value in flags.items() if name not in _NOT_IN_RECIPE}
    return {**flags, "dataset_id": config.get("dataset_id"),
            "tokenizer_id": config.get("tokenizer_id"), "device": _device_of(config)}


def state_of(record):
    """Return running, finished, stopped (by a signal), failed or stale (died without a summary)."""
    if record.summary is not None:
        return {"ok": "finished", "interrupted": "stopped"}.get(str(record.status), "failed")
    owned = is_owned(locks_dir() / f"run.{record.folder.absolute().name}")
    if owned is None:  # another host, or no lock file
        owned = age_sec(record) < RECENT_SEC
    return "running" if owned else "stale"


def age_sec(record):
    """Return the seconds since a file of the record was written."""
    return max(0.0, time.time() - max(path.stat().st_mtime for path in record.folder.iterdir()))


def _table(cells, records, candidates):
    """Return the table of cells (a dict per run), records and candidate names."""
    names = dict.fromkeys([*columns(ExperimentRow), *NUMBERS, "tokenizer_id"])
    table = pd.DataFrame(cells, columns=[*names]).astype(dict.fromkeys(NUMBERS, float))
    table.insert(0, "candidate", list(candidates))
    table["state"] = [state_of(record) if record else "" for record in records]
    table["record"] = pd.Series(records, dtype=object)
    table["ok"] = table.status == "ok"
    measured = table.time_to_target_sec_measured
    seconds = measured.fillna(table.time_to_target_sec_extrapolated)
    table["time_to_target_sec"] = seconds.where(table.ok)
    table["is_extrapolated"] = table.time_to_target_sec.notna() & measured.isna()
    return table


def _cells_of(record):
    """Return the cells of a record, from its config and its summary (or the metrics so far)."""
    config, flags, summary = record.config, part_of(record.config, "flags"), record.summary
    if summary is None:
        threshold = _number(flags.get("target_metric_threshold"))
        summary = figures_of(record.events, _metric_of(flags), threshold)
    known = {**config, **summary, "total_tokens": summary.get("tokens"),
             "training_sec": summary.get("train_time_sec")}
    texts = {name: config.get(name) for name in ("git_commit", "dataset_id", "tokenizer_id")}
    texts |= {"timestamp": config.get("created_utc"), "status": summary.get("status", "failed")}
    return {
        **{name: _number(known.get(name)) for name in NUMBERS},
        **{name: value if isinstance(value, str) else "" for name, value in texts.items()},
        "experiment_name": "", "candidate_flags": "", "run_id": record.run_id,
        "seed": _number(config.get("seed")), "depth": _number(flags.get("depth")),
        "target_metric_name": _metric_of(summary), "device": _device_of(config)}


def _number(value):
    """Return a finite number as it is and anything else as None: people edit records."""
    return value if type(value) in (int, float) and abs(value) < 1e300 else None


def _metric_of(fields):
    name = fields.get("target_metric_name")
    return name if isinstance(name, str) and name in METRICS else "val_bpb"


def _device_of(config):
    """Return the device's name, the number of ranks if several, and INTERPRETED if so."""
    device = part_of(config, "device")
    if not isinstance(device.get("name"), str):
        return ""
    ranks = _number(device.get("world_size")) or 1
    return (device["name"] + (f" ({ranks} ranks)" if ranks > 1 else "")
            + (f", {INTERPRETED}" if device.get("triton_interpreted") else ""))


def _state_in_words(run):
    """Return how a run ended or how far it is, and the settings that a resumption changed."""
    words = [run.state if run.state in ("running", "stale") else run.status]
    if run.state == "running":
        words = [f"running, step {run.steps:,.0f} of {run.num_iterations:,.0f}"]
    if run.is_extrapolated:
        words.append("target not reached: time extrapolated")
    for event in run.record.of("resume") if run.record else ():
        words += [in_words([change]) for change in event.get("changed") or ()]
    return "; ".join(words)


def _mean_sd(values, digits):
    """Return the mean ± standard deviation of known values as text."""
    if not len(values):
        return "·"
    sd = f" ± {values.std():,.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():,.{digits}f}{sd}"


def _seeds_label(run_ids):
    """Return one name for the runs of one recipe: books-r8-s{0,1}."""
    if len(run_ids) == 1:
        return run_ids[0]
    shared = len(os.path.commonprefix(run_ids))  # noqa: RUF071 (of characters)
    return f"{run_ids[0][:shared]}{{{','.join(run_id[shared:] for run_id in run_ids)}}}"


def _candidate_of(row):
    """Return the candidate in the runner's run id, else its flags."""
    run_id = re.escape(row.experiment_name) + r"\.(.+)\.d\d+\.s\d+"
    match = re.fullmatch(run_id, row.run_id)
    return match[1] if match else row.candidate_flags or "baseline"
