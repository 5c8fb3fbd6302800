"""CSV ledgers: one row per run, appended by tools and edited by people.

A ledger is the plain CSV that Python's csv module and pandas write: commas, decimal points, UTF-8
with or without a byte-order mark, any line ends. Semicolons, decimal commas, thousands separators
and local dates are refused with their line. A dataclass with a `run_id` names and types the
columns. People may add and reorder columns; appending keeps every byte that is there.
"""

import csv
import dataclasses
import io
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from nanochat.common import UserError, atomic_path, locked, warn
from nanochat.target import METRICS, check_target

STATUSES = ("ok", "nan", "interrupted", "error", "failed")
# A target may be reached before the clock starts; a run may end without a step.
_MAY_BE_ZERO = ("seed", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
                "total_tokens")
_FLOAT = re.compile(r" *([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?) *", re.ASCII)
# pandas writes integers beside empty cells as 7.0; another decimal, as in 1.966, is a separator.
_INTEGER = re.compile(r" *([+-]?\d+)(?:\.0)? *", re.ASCII)
_LOCAL_DATE = re.compile(r" *\d+[./]\d+[./]\d+.*")


@dataclass(frozen=True)
class ExperimentRow:
    """One run in dev/experiments.csv. None (an empty cell): not measured.

    `candidate_flags` are the flags that the baseline does not have (empty: the baseline itself).
    Raise UserError for values that no run can have.
    """

    timestamp: str
    git_commit: str
    experiment_name: str
    seed: int | None
    depth: int | None
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
        for name in ("seed", "depth", "dataset_id", "device"):
            if str(getattr(self, name)).strip() in ("", "None"):
                raise UserError(f"{name} is empty")
        for name, known in (("status", STATUSES), ("target_metric_name", METRICS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}")
        if self.target_metric_threshold is not None:
            check_target(self.target_metric_name, self.target_metric_threshold)
        for name, value in vars(self).items():
            if isinstance(value, str) or value is None or name == "target_metric_threshold":
                continue
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise UserError(f"{name} is {value}, which no run can have")


def columns(row_type):
    """Return the ledger's columns: the dataclass's field names, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def read_rows(path, row_type):
    """Return every row as a `row_type`, in the file's order.

    Raise UserError with file and line for a missing column, a cell or row that does not parse or
    that the dataclass refuses, and a `run_id` that is empty or repeated.
    """
    _, rows = _parse(path, _read(path), row_type)
    return [row for _, row in rows.values()]


read_experiments = partial(read_rows, row_type=ExperimentRow)


def append_row(path, row):
    """Append `row` (a dataclass), atomically and under a file lock; a new file gets the header.

    Raise UserError as read_rows, for a `run_id` that is already there, and for a row that CSV
    cannot hold (NaN, text that is not UTF-8). The file is then unchanged.
    """
    path = Path(path).resolve()  # a symlink stays a symlink
    names, rows = columns(type(row)), {}
    header = ",".join(names).encode() + b"\n"
    _line(row, names)  # refuse a bad row before a file is made
    try:
        with locked(path), atomic_path(path) as temporary:
            data = _read(path) if path.exists() else b""
            if data:
                names, rows = _parse(path, data, type(row))
            if row.run_id.strip() in rows:
                number, _ = rows[row.run_id.strip()]
                raise UserError(f"{path}, line {number}: run_id {row.run_id.strip()!r} is already "
                                "there; remove that line to log the run again")
            data = data or header
            end = re.search(rb"\r\n|\n|\r|$", data).group() or b"\n"
            joint = b"" if data.endswith((b"\n", b"\r")) else end
            temporary.write_bytes(data + joint + _line(row, names).encode() + end)
    except OSError as error:
        raise UserError(f"cannot write the ledger {path} ({error.strerror})") from None


def parse_cell(cell, field):
    """Return the typed value of a cell of the column `field` (a dataclass field).

    Raise UserError for a number with separators or a decimal comma, and for a local date.
    """
    kind, *optional = get_args(field.type) or (field.type,)
    if kind is str:
        if field.name.startswith("timestamp") and _LOCAL_DATE.fullmatch(cell):
            raise UserError(f"{field.name} is {cell!r}; write the date as 2026-11-23T10:00:00Z")
        return cell
    if optional and not cell.strip(" "):
        return None
    match = (_INTEGER if kind is int else _FLOAT).fullmatch(cell)
    if not match:
        what = "a whole number" if kind is int else "a number with a decimal point"
        raise UserError(f"{field.name} is {cell!r}, not {what} and nothing else")
    value = kind(match[1])
    if not math.isfinite(value):
        raise UserError(f"{field.name} is {cell!r}, beyond the range of a float")
    return value


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path} ({error.strerror})") from None


def _parse(path, data, row_type):
    """Return (header names, {run id: (line number, row)}) of a ledger's bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((data[:error.start] + b"?").splitlines())
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if text and not text.endswith(("\n", "\r")):
        warn(f"{path}: the last line has no line end; check that its last cell is complete")
    records = _records(path, text)
    line, header = next(records, (1, []))
    names, wanted = [name.strip() for name in header], columns(row_type)
    faults = [name for name in wanted if names.count(name) != 1]
    if faults:
        raise UserError(f"{path}, line {line}: the header must have each of the ledger's columns "
                        f"once, between commas; it has not: {','.join(faults)}")
    rows = {}
    for line, cells in records:
        try:
            row = _typed(cells, row_type, names)
            run_id = row.run_id.strip()
            if run_id in rows:
                raise ValueError(f"run_id {run_id!r} is also on line {rows[run_id][0]}")
        except ValueError as error:  # a UserError is one, too
            raise UserError(f"{path}, line {line}: {error}; fix or remove that line") from None
        rows[run_id] = line, row
    return names, rows


def _records(path, text):
    """Yield (number of its first line, cells) per record; skip records without any text."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {first}: not CSV ({error}); fix or remove it") from None


def _typed(cells, row_type, names):
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells where the header has {len(names)} (a comma inside a "
                         "text needs quotes, a number needs a decimal point)")
    cell_of = dict(zip(names, cells, strict=True))
    row = row_type(*(parse_cell(cell_of[f.name], f) for f in dataclasses.fields(row_type)))
    if not row.run_id.strip():
        raise ValueError("run_id is empty")
    return row


def _line(row, names):
    """Return the row as a line of CSV. Raise UserError if it would not read back as it is."""
    cells = {name: repr(float(value)) if isinstance(value, float) else str(value)
             for name, value in vars(row).items() if value is not None}
    buffer = io.StringIO(newline="")
    # The line end quotes cells that have one of its characters.
    csv.writer(buffer, lineterminator="\r\n").writerow([cells.get(name, "") for name in names])
    line = buffer.getvalue().removesuffix("\r\n")
    try:
        line.encode()
        back = [_typed(cells, type(row), names) for _, cells in _records("the row", line)]
    except ValueError as error:
        raise UserError(f"the ledger cannot hold this row: {error}") from None
    if back != [row]:
        raise UserError(f"the ledger cannot hold this row: {row} would read back as {back}")
    return line
