"""A CSV file that people edit by hand and tools append to; a dataclass with a `run_id` names and types its columns.

Tools only add rows at the end. What is already there stays byte for byte: CRLF, a byte-order mark,
quoted newlines, blank lines, spaces around numbers; a missing final newline is added before the new
row, which takes the header's line ending. Text cells are exact, number cells may be empty where the
dataclass says `| None`. There are no comments: a line that is not a row is an error with its number.
"""

import csv
import dataclasses
import io
import math
import re
from pathlib import Path
from types import NoneType
from typing import get_args

from nanochat.errors import UserError, warn
from nanochat.files import atomic_path, locked

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# A spreadsheet would run a text that begins so; tools write an apostrophe before it, which reading takes off again.
_FORMULA, _GUARDED = (re.compile(begin + r"[=+\-@\t\r].*", re.DOTALL) for begin in ("'*", "'+"))
_BYTE_ORDER_MARK = "\ufeff"


def columns(row_type):
    """The ledger's header: the dataclass's field names, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def read_rows(path, row_type):
    """Every row of the ledger, typed, in the file's order.

    Errors: UserError with file and line for another header, a cell or row that does not parse (or that
    the dataclass refuses) and a `run_id` that is empty or there twice.
    """
    return [row for _, row in _parse(path, _read(path), row_type).values()]


def parse_cell(cell, field):
    """The typed value of one cell of the column `field` (a dataclass field). Errors: UserError."""
    if field.type is str:
        return cell[1:] if _GUARDED.fullmatch(cell) else cell
    kinds = get_args(field.type) or (field.type,)
    number = cell.strip()
    if not number and NoneType in kinds:
        return None
    try:
        if not _NUMBER.fullmatch(number):
            raise ValueError
        value = kinds[0](number)
    except ValueError:
        kind = "a whole number" if kinds[0] is int else "a number"
        raise UserError(f"{field.name} is {cell!r}, not {kind}") from None
    if kinds[0] is float and not math.isfinite(value):
        raise UserError(f"{field.name} is {cell!r}, beyond the range of a float")
    return value


def append_row(path, row):
    """Add `row` (a dataclass) at the end, atomically and under a lock; a missing or empty file gets the header.

    Errors: UserError as read_rows, and when the ledger already has the row's `run_id` or CSV cannot hold
    the row (NaN, text that is not UTF-8). The file is then untouched.
    """
    path = Path(path).resolve()  # a symlink stays one: what it points to is replaced
    line = _format(row)
    try:
        with locked(path):
            data = _read(path) if path.exists() else b""
            there = _parse(path, data, type(row)) if data else {}
            if row.run_id.strip() in there:
                number, _ = there[row.run_id.strip()]
                raise UserError(f"{path}, line {number}: run_id {row.run_id.strip()!r} is already there; "
                                "remove that line to log it again")
            data = data or (",".join(columns(type(row))) + "\n").encode()
            eol = b"\r\n" if data.partition(b"\n")[0].endswith(b"\r") else b"\n"
            joint = b"" if data.endswith(b"\n") else eol
            with atomic_path(path) as temporary:
                temporary.write_bytes(data + joint + line.encode() + eol)
    except OSError as error:
        raise UserError(f"cannot write the ledger {path} ({error.strerror})") from None


def _read(path):
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the ledger {path} ({error.strerror})") from None


def _parse(path, data, row_type):
    """{run id: (line number, row)} of a ledger's bytes, in their order."""
    try:
        text = data.decode().removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if not text.endswith("\n") and "\n" in text:
        warn(f"{path}: the last line has no line end; if it was cut, mend its last cell")
    records = _records(path, text)
    line, header = next(records, (1, []))
    if [cell.strip() for cell in header] != columns(row_type):
        raise UserError(f"{path}, line {line}: another header than this ledger's, which is "
                        f"{','.join(columns(row_type))}; restore it or use another file")
    rows = {}
    for line, cells in records:
        try:
            row = _typed(cells, row_type)
            run_id = row.run_id.strip()
            if run_id in rows:
                raise ValueError(f"run_id {run_id!r} is on line {rows[run_id][0]} too")
        except ValueError as error:  # UserError too: the dataclass's own refusals get their line
            raise UserError(f"{path}, line {line}: {error}; mend or remove that line") from None
        rows[run_id] = line, row
    return rows


def _records(path, text):
    """Yield (number of the record's first line, cells), blank lines skipped."""
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    first = 1
    try:
        for cells in reader:
            if len(cells) > 1 or "".join(cells).strip():
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {first}: not CSV ({error}); mend or remove that line") from None


def _typed(cells, row_type):
    fields = dataclasses.fields(row_type)
    if len(cells) != len(fields):
        raise ValueError(f"{len(cells)} cells where the header has {len(fields)}")
    row = row_type(*map(parse_cell, cells, fields))
    if not row.run_id.strip():
        raise ValueError("run_id is empty")
    return row


def _format(row):
    """The row as one CSV record without its line ending, checked to read back as it is."""
    buffer = io.StringIO(newline="")
    # "\r\n" as terminator so that a cell with either character gets its quotes
    csv.writer(buffer, lineterminator="\r\n").writerow([_cell(row, field) for field in dataclasses.fields(row)])
    line = buffer.getvalue().removesuffix("\r\n")
    try:
        line.encode()
        back = [_typed(cells, type(row)) for _, cells in _records("the row", line)]
    except ValueError as error:
        raise UserError(f"the ledger cannot hold this row: {error}") from None
    if back != [row]:
        raise UserError(f"the ledger cannot hold this row: {row} would read back as {back}")
    return line


def _cell(row, field):
    value = getattr(row, field.name)
    if value is None or isinstance(value, str):
        return f"'{value}" if _FORMULA.fullmatch(value or "") else value or ""
    return repr(float(value)) if float in (get_args(field.type) or (field.type,)) else str(value)
