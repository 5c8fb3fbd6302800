"""A CSV file that people edit by hand and tools append to; a dataclass with a `run_id` names and types its columns.

Tools only add rows at the end. What is already there stays byte for byte: CRLF, a byte-order mark, quoted newlines,
blank lines, spaces around numbers, columns of a person's own (notes, say) and the order of all; a missing final newline
is added before the new row, which takes the header's order, delimiter and line ending. Between semicolons or tabs, as
spreadsheets write where the comma is the decimal sign, numbers have decimal commas. Text cells are exact, number cells
may be empty where the dataclass says `| None`. There are no comments: a line that is not a row is an error with its
number.
"""

import contextlib
import csv
import dataclasses
import io
import math
import re
from pathlib import Path
from types import NoneType
from typing import NamedTuple, get_args

from nanochat.common import UserError, atomic_path, locked, read_limited, warn

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# A spreadsheet would run a text that begins so; tools write an apostrophe before it, which reading takes off again.
_FORMULA, _GUARDED = (re.compile(begin + r"[=+\-@\t\r].*", re.DOTALL) for begin in ("'*", "'+"))
_BYTE_ORDER_MARK = "\ufeff"
_DELIMITERS = ",;\t"


class _Layout(NamedTuple):
    names: list  # of the header, stripped: the dataclass's, in any order, among a person's own
    delimiter: str


def columns(row_type):
    """The ledger's header: the dataclass's field names, in order."""
    return [field.name for field in dataclasses.fields(row_type)]


def read_rows(path, row_type):
    """Every row of the ledger, typed, in the file's order.

    Errors: UserError with file and line for another header, a cell or row that does not parse (or that
    the dataclass refuses) and a `run_id` that is empty or there twice.
    """
    _, rows = _parse(path, _read(path), row_type)
    return [row for _, row in rows.values()]


def parse_cell(cell, field, decimal="."):
    """The typed value of one cell of the column `field` (a dataclass field). decimal: "," takes both signs.

    Errors: UserError.
    """
    if field.type is str:
        return cell[1:] if _GUARDED.fullmatch(cell) else cell
    kinds = get_args(field.type) or (field.type,)
    number = cell.strip()
    if not number and NoneType in kinds:
        return None
    pointed = number.replace(",", ".") if kinds[0] is float else number
    try:
        if not _NUMBER.fullmatch(pointed if decimal == "," else number):
            raise ValueError
        value = kinds[0](pointed)
    except ValueError:
        kind = "a whole number" if kinds[0] is int else "a number"
        hint = f": write {pointed}, with a point" if _NUMBER.fullmatch(pointed) and kinds[0] is float else ""
        raise UserError(f"{field.name} is {cell!r}, not {kind}{hint}") from None
    if kinds[0] is float and not math.isfinite(value):
        raise UserError(f"{field.name} is {cell!r}, beyond the range of a float")
    return value


def append_row(path, row):
    """Add `row` (a dataclass) at the end, atomically and under a lock; a missing or empty file gets the header.

    Errors: UserError as read_rows, and when the ledger already has the row's `run_id` or CSV cannot hold
    the row (NaN, text that is not UTF-8). The file is then untouched.
    """
    path = Path(path).resolve()  # a symlink stays one: what it points to is replaced
    layout, there = _Layout(columns(type(row)), ","), {}
    _format(row, layout)  # refused before a file is made
    try:
        with locked(path):
            data = _read(path) if path.exists() else b""
            if data:
                layout, there = _parse(path, data, type(row))
            if row.run_id.strip() in there:
                number, _ = there[row.run_id.strip()]
                raise UserError(f"{path}, line {number}: run_id {row.run_id.strip()!r} is already there; "
                                "remove that line to log it again")
            line = _format(row, layout)
            data = data or (",".join(columns(type(row))) + "\n").encode()
            eol = b"\r\n" if data.partition(b"\n")[0].endswith(b"\r") else b"\n"
            joint = b"" if data.endswith(b"\n") else eol
            with atomic_path(path) as temporary:
                temporary.write_bytes(data + joint + line.encode() + eol)
    except OSError as error:
        raise UserError(f"cannot write the ledger {path} ({error.strerror})") from None


def _read(path):
    try:
        return read_limited(path)
    except OSError as error:
        raise UserError(f"cannot read the ledger {path} ({error.strerror})") from None


def _parse(path, data, row_type):
    """(_Layout, {run id: (line number, row)}) of a ledger's bytes, the rows in their order."""
    try:
        text = data.decode().removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    if not text.endswith("\n") and "\n" in text:
        warn(f"{path}: the last line has no line end; if it was cut, mend its last cell")
    layout, records = _open(path, text, columns(row_type))
    rows = {}
    for line, cells in records:
        try:
            row = _typed(cells, row_type, layout)
            run_id = row.run_id.strip()
            if run_id in rows:
                raise ValueError(f"run_id {run_id!r} is on line {rows[run_id][0]} too")
        except ValueError as error:  # UserError too: the dataclass's own refusals get their line
            raise UserError(f"{path}, line {line}: {error}; mend or remove that line") from None
        rows[run_id] = line, row
    return layout, rows


def _open(path, text, wanted):
    """(_Layout, the records after the header), by the delimiter that gives the header most of the columns wanted."""
    found = []
    for delimiter in _DELIMITERS:
        records = _records(path, text, delimiter)
        with contextlib.suppress(UserError):  # quotes make no sense between other delimiters
            line, header = next(records, (1, []))
            layout = _Layout([cell.strip() for cell in header], delimiter)
            found.append((sum(name in layout.names for name in wanted), line, layout, records))
    if not found:
        next(_records(path, text, ","))
    _, line, layout, records = max(found, key=lambda one: one[0])
    faults = [f"{how} {', '.join(names)}" for how, names in (
        ("it lacks", [name for name in wanted if name not in layout.names]),
        ("it has twice", [name for name in wanted if layout.names.count(name) > 1])) if names]
    if faults:
        raise UserError(f"{path}, line {line}: another header than this ledger's, which is {','.join(wanted)}: "
                        f"{' and '.join(faults)}; restore it or use another file")
    return layout, records


def _records(path, text, delimiter):
    """Yield (number of the record's first line, cells); lines without any text in a cell are skipped."""
    reader = csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True)
    first = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield first, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {first}: not CSV ({error}); mend or remove that line") from None


def _typed(cells, row_type, layout):
    if len(cells) != len(layout.names):
        more = f" (a text with {layout.delimiter!r} in it needs quotes)" if len(cells) > len(layout.names) else ""
        raise ValueError(f"{len(cells)} cells where the header has {len(layout.names)}{more}")
    cell_of, decimal = dict(zip(layout.names, cells, strict=True)), "." if layout.delimiter == "," else ","
    row = row_type(*(parse_cell(cell_of[field.name], field, decimal) for field in dataclasses.fields(row_type)))
    if not row.run_id.strip():
        raise ValueError("run_id is empty")
    return row


def _format(row, layout):
    """The row as one CSV record without its line ending, checked to read back as it is."""
    cell_of = {field.name: _cell(row, field, layout.delimiter) for field in dataclasses.fields(row)}
    buffer = io.StringIO(newline="")
    # "\r\n" as terminator so that a cell with either character gets its quotes
    csv.writer(buffer, delimiter=layout.delimiter, lineterminator="\r\n").writerow(
        [cell_of.get(name, "") for name in layout.names])
    line = buffer.getvalue().removesuffix("\r\n")
    try:
        line.encode()
        back = [_typed(cells, type(row), layout) for _, cells in _records("the row", line, layout.delimiter)]
    except ValueError as error:
        raise UserError(f"the ledger cannot hold this row: {error}") from None
    if back != [row]:
        raise UserError(f"the ledger cannot hold this row: {row} would read back as {back}")
    return line


def _cell(row, field, delimiter):
    value = getattr(row, field.name)
    if value is None or isinstance(value, str):
        return f"'{value}" if _FORMULA.fullmatch(value or "") else value or ""
    if float in (get_args(field.type) or (field.type,)):
        return repr(float(value)).replace(".", "." if delimiter == "," else ",")
    return str(value)
