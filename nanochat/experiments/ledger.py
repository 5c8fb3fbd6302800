"""CSV ledgers: one row per run, appended by programs and edited by people.

A ledger is the plain CSV of Python's csv module and pandas: commas, decimal points, UTF-8, any line
ends. Semicolons, decimal commas, thousands separators and local dates are refused with their line.
A dataclass with a `run_id` names and types the columns; people may add and reorder columns.
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

from nanochat.common import UserError, atomic_path, base_dir, locked, warn
from nanochat.target import METRICS, check_target

TRACKED_LEDGER = Path("dev/experiments.csv")
LEDGER_HELP = ("path of the ledger, the CSV file of runs (default: experiments.csv in the cache "
               f"folder if it has the experiment, otherwise {TRACKED_LEDGER})")
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
    """One run of an experiment. None (an empty cell): not measured.

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


def demonstration_ledger():
    """Return the path of the ledger of demonstrations, in the cache folder."""
    return base_dir() / "experiments.csv"


def find_ledger(experiment_name):
    """Return the ledger that has the experiment: that of demonstrations or the tracked one."""
    own = demonstration_ledger()
    names = {row.experiment_name for row in read_experiments(own)} if own.exists() else ()
    return own if experiment_name in names else TRACKED_LEDGER


def read_rows(path, row_type):
    """Return every row as a `row_type`, in the file's order.

    Raise UserError with file and line for a missing column, a cell or row that does not parse or
    that the dataclass refuses, and a `run_id` that is empty or repeated.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path} ({error.strerror})") from None
    _, rows = _parse(path, data, row_type)
    return [row for _, row in rows.values()]


read_experiments = partial(read_rows, row_type=ExperimentRow)


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
            data = data or ",".join(columns(type(row))).encode() + b"\n"
            names, rows = _parse(path, data, type(row))
            if row.run_id.strip() in rows:
                number, _ = rows[row.run_id.strip()]
                raise UserError(f"{path}, line {number}: run_id {row.run_id.strip()!r} is already "
                                "there; remove that line to log the run again")
            line = _line(cells.get(name, "") for name in names)
            _parse("the new row", _line(names) + b"\n" + line + b"\n", type(row))
            end = re.search(rb"\r\n|\n|\r|$", data).group() or b"\n"
            joint = b"" if data.endswith((b"\n", b"\r")) else end
            temporary.write_bytes(data + joint + line + end)
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
    if not match or not math.isfinite(float(match[1])):
        what = "a whole number" if kind is int else "a number with a decimal point"
        raise UserError(f"{field.name} is {cell!r}, not {what} and nothing else")
    return kind(match[1])


def _parse(path, data, row_type):
    """Return (header names, {run id: (line number, row)}) of a ledger's bytes."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len((data[:error.start] + b"?").splitlines())
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if text and not text.endswith(("\n", "\r")):
        warn(f"{path}: the last line has no line end; check that its last cell is complete")
    line, names, rows = 1, [], {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            is_blank = not any(map(str.strip, cells))
            if not names and not is_blank:
                names = [name.strip() for name in cells]
                _check_header(names, row_type)
            elif not is_blank:
                row = _typed(cells, row_type, names)
                first, _ = rows.setdefault(row.run_id.strip(), (line, row))
                if first != line:
                    raise ValueError(f"run_id {row.run_id.strip()!r} is also on line {first}")
            line = reader.line_num + 1
        _check_header(names, row_type)
    except (csv.Error, ValueError) as error:  # a UserError is a ValueError
        raise UserError(f"{path}, line {line}: {error}; fix or remove that line") from None
    return names, rows


def _check_header(names, row_type):
    faults = [name for name in columns(row_type) if names.count(name) != 1]
    if faults:
        raise ValueError("the header must have each of the ledger's columns once, between commas; "
                         f"it has not: {','.join(faults)}")


def _typed(cells, row_type, names):
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells where the header has {len(names)} (a comma inside a "
                         "text needs quotes, a number needs a decimal point)")
    cell_of = dict(zip(names, cells, strict=True))
    row = row_type(*(parse_cell(cell_of[f.name], f) for f in dataclasses.fields(row_type)))
    if not row.run_id.strip():
        raise ValueError("run_id is empty")
    return row


def _line(cells):
    """Return the cells as a line of CSV, without its end."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)  # quotes cells with \r or \n
    return buffer.getvalue().removesuffix("\r\n").encode(errors="backslashreplace")
