"""Runs as a pandas table, and ledgers: CSV files with one row per run.

The table is made from the runs' records only; numbers that are not known are NaN. The gates,
`scripts.runs` and the report read it.

A ledger is a log to keep and commit. It is the plain CSV of Python's csv module and pandas: commas,
decimal points, UTF-8, any line ends. A dataclass with a `run_id` names and types its columns;
people may add and reorder columns.
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

from nanochat.common import (
    UserError,
    atomic_path,
    base_dir,
    is_owned,
    locked,
    locks_dir,
    newest_in_words,
)
from nanochat.runlog import CONFIG, figures_of, in_words, numbers_of, part_of, read_run
from nanochat.target import METRICS

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
    "sample_every", "save_every", "save_minutes", "keep_checkpoints", "allow_memory",
    "allow_repeats"}
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


# --- ledgers --------------------------------------------------------------------------------------

def columns(row_type):
    """Return the ledger's columns: the dataclass's field names, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def read_rows(path, row_type):
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
            data = data or _line(columns(type(row)))
            names, rows = _parse(path, data, type(row))
            if row.run_id.strip() in rows:
                raise UserError(f"{path}: run_id {row.run_id.strip()!r} is already there; remove "
                                "its line to log the run again")
            line = _line(cells.get(name, "") for name in names)
            _parse("the new row", _line(names) + line, type(row))
            joint = b"" if data.endswith((b"\n", b"\r")) else b"\n"
            temporary.write_bytes(data + joint + line)
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
    text = io.StringIO(data.decode("utf-8-sig", "replace"), newline="")
    reader, rows = csv.reader(text, strict=True), {}
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
    """Return the cells as a line of CSV."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # quotes cells with \r or \n
    return buffer.getvalue().removesuffix("\r\n").encode(errors="backslashreplace") + b"\n"


# --- tables ---------------------------------------------------------------------------------------

def experiment_records(experiment_name, runs_dir):
    """Return [(candidate, RunRecord)] of an experiment, in the order in which they were started."""
    run_id = re.compile(re.escape(experiment_name) + r"\.([^.]+)\.d\d+\.s\d+")
    matches = [run_id.fullmatch(path.parent.name) for path in Path(runs_dir).glob(f"*/{CONFIG}")]
    found = [(match[1], read_run(Path(runs_dir) / match[0])) for match in matches if match]
    return sorted(found, key=lambda run: (str(run[1].config.get("created_utc")), run[1].run_id))


def experiment_table(experiment_name, runs_dir):
    """Return the table of an experiment's runs.

    Columns: those of ExperimentRow, NUMBERS, candidate, ok, time_to_target_sec, is_extrapolated,
    tokenizer_id and record (the RunRecord). Raise UserError for an unknown experiment, and
    for runs of one candidate and depth with different flags.
    """
    found = experiment_records(experiment_name, runs_dir)
    if not found:
        raise UserError(_missing_records(experiment_name, runs_dir))
    candidates, records = zip(*found, strict=True)
    table = _table(records, candidates).assign(experiment_name=experiment_name)
    for (name, _), runs in table.groupby(["candidate", "depth"]):
        if len({str(_repeated_flags(record)) for record in runs.record}) > 1:
            raise UserError(f"the runs {', '.join(runs.run_id)} of candidate {name!r} differ in "
                            "their flags; remove some of their folders")
    return table


def _missing_records(experiment_name, runs_dir):
    """Return the message for an experiment without records; a ledger may have its rows."""
    for ledger in (Path("dev") / "experiments.csv", base_dir() / "experiments.csv"):
        rows = read_rows(ledger, ExperimentRow) if ledger.exists() else []
        statuses = [row.status for row in rows if row.experiment_name == experiment_name]
        if statuses:
            counts = ", ".join(f"{statuses.count(status)} {status}"
                               for status in dict.fromkeys(statuses))
            return (f"the ledger {ledger} has runs of experiment {experiment_name!r} (status: "
                    f"{counts}), but their records, which are needed here, are not in {runs_dir}; "
                    "copy the records from the machine that trained the runs, or train the "
                    "experiment again under another name")
    return f"no experiment {experiment_name!r} in {runs_dir}; {newest_in_words(runs_dir)}"


def runs_table(records):
    """Return the same table for any records; unfinished runs have numbers so far.

    Runs that differ only in their seed are one candidate, named after their ids: mine-s{0,1}.
    """
    records = list(records)
    recipes = [str(recipe_of(record)) for record in records]
    groups = {}
    for recipe, record in zip(recipes, records, strict=True):
        groups.setdefault(recipe, []).append(record.run_id)
    return _table(records, [_seeds_label(groups[recipe]) for recipe in recipes])


def text_table(table):
    """Return the known metrics as text: a row per run, and mean ± sd per candidate and depth."""
    names = [name for name in SHOWN if table[name].notna().any()]
    rows = {}
    for (candidate, depth), runs in table.groupby(["candidate", "depth"], sort=False, dropna=False):
        for _, run in runs.iterrows():
            rows[run.run_id] = [_status_in_words(run), *(
                _mean_sd(runs[name][runs.run_id == run.run_id], SHOWN[name][1]) for name in names)]
        if len(runs) > 1:
            rows[f"{candidate}, depth {depth}"] = [f"mean ± sd of {runs.ok.sum()}", *(
                _mean_sd(runs[name][runs.ok], SHOWN[name][1]) for name in names)]
    headings = ["status", *(SHOWN[name][0] for name in names)]
    return pd.DataFrame.from_dict(rows, orient="index", columns=headings)


def curve(record, kind, value):
    """Return the columns step, tokens, train_time_sec and "value" of a run's events, as floats.

    kind, value: for example "val", "val_bpb" or "train", "loss". Only finite values are returned,
    the last of each step.
    """
    names = ("step", "tokens", "train_time_sec", value)
    points = numbers_of(record.events, kind, *names)
    points = pd.DataFrame(points, columns=[*names[:3], "value"], dtype=float)
    return points.dropna(subset="value").drop_duplicates("step", keep="last", ignore_index=True)


def curves_of(table, kind, value):
    """Return the curves of all runs in one table, with the runs' id, candidate, depth and seed."""
    return pd.concat([
        curve(run.record, kind, value).assign(
            run_id=run.run_id, candidate=run.candidate, depth=run.depth, seed=run.seed)
        for run in table.itertuples()
    ], ignore_index=True)


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
    config = record.config
    return {**_repeated_flags(record), "dataset_id": config.get("dataset_id"),
            "tokenizer_id": config.get("tokenizer_id"), "device": _device_of(config)}


def _repeated_flags(record):
    return {name: value for name, value in part_of(record.config, "flags").items()
            if name not in _NOT_IN_RECIPE}


def status_of(record):
    """Return the status of the summary; without one, running or stale (died)."""
    if record.summary is not None:
        return str(record.status)
    owned = is_owned(locks_dir() / f"run.{record.folder.absolute().name}")
    if owned is None:  # another host, or no lock file
        owned = age_sec(record) < RECENT_SEC
    return "running" if owned else "stale"


def age_sec(record):
    """Return the seconds since a file of the record was written."""
    return max(0.0, time.time() - max(path.stat().st_mtime for path in record.folder.iterdir()))


def _table(records, candidates):
    """Return the table of records and their candidates' names."""
    names = dict.fromkeys([*columns(ExperimentRow), *NUMBERS, "tokenizer_id"])
    table = pd.DataFrame(map(_cells_of, records), columns=[*names])
    table = table.astype(dict.fromkeys(NUMBERS, float))
    table.insert(0, "candidate", candidates)
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
    texts |= {"timestamp": config.get("created_utc"), "status": status_of(record)}
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


def _status_in_words(run):
    """Return how a run ended or how far it is, and the settings that a resumption changed."""
    words = [run.status]
    if run.status == "running":
        words = [f"running, step {run.steps:,.0f} of {run.num_iterations:,.0f}"]
    threshold = run.target_metric_threshold
    if run.ok and pd.notna(threshold) and pd.isna(run.time_to_target_sec_measured):
        words.append(f"target {threshold:g} not reached"
                     + (", time extrapolated" if run.is_extrapolated else ""))
    for event in run.record.of("resume"):
        words += [in_words([change]) for change in event.get("changed") or ()]
    return "; ".join(words)


def _mean_sd(values, digits):
    """Return the mean ± standard deviation of the known values as text."""
    values = values.dropna()
    if values.empty:
        return "·"
    sd = f" ± {values.std():,.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():,.{digits}f}{sd}"


def _seeds_label(run_ids):
    """Return one name for the runs of one recipe: books-r8-s{0,1}."""
    if len(run_ids) == 1:
        return run_ids[0]
    shared = len(os.path.commonprefix(run_ids))  # noqa: RUF071 (of characters)
    return f"{run_ids[0][:shared]}{{{','.join(run_id[shared:] for run_id in run_ids)}}}"
