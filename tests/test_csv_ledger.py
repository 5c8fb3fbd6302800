import csv
import io
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.csv_ledger import append_row, columns, read_rows
from nanochat.lane_b.infer.record import read_records


@dataclass(frozen=True)
class Row:
    run_id: str
    seed: int | None
    loss: float
    notes: str

    def __post_init__(self):
        if self.notes == "forbidden":
            raise UserError("notes must not be 'forbidden'")


HEADER = "run_id,seed,loss,notes\n"
ROW = Row("a", 1, 0.5, "")

# What a CSV in UTF-8 can hold: anything but lone surrogates and NUL.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
rows = st.builds(Row, run_id=texts.filter(str.strip), seed=st.none() | st.integers(),
                 loss=st.floats(allow_nan=False, allow_infinity=False), notes=texts.filter(lambda t: t != "forbidden"))
# A person's apostrophe before a formula is the guard against one, and no text.
by_hand_rows = rows.filter(lambda row: not (row.run_id.startswith("'") or row.notes.startswith("'")))


@settings(deadline=None)  # fsync takes what it takes
@given(st.lists(rows, max_size=5, unique_by=lambda row: row.run_id.strip()))
def test_rows_read_back_as_they_were_appended(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    path.write_text(HEADER)
    for row in written:
        before = path.read_bytes()
        append_row(path, row)
        assert path.read_bytes().startswith(before)
    assert read_rows(path, Row) == written


@settings(deadline=None)  # fsync takes what it takes
@given(existing=st.lists(by_hand_rows, max_size=3, unique_by=lambda row: row.run_id.strip()), bom=st.booleans(),
       eol=st.sampled_from(["\n", "\r\n"]), blank=st.sampled_from(["", "   "]), final_newline=st.booleans())
def test_bytes_a_person_left_are_kept(tmp_path_factory, existing, bom, eol, blank, final_newline):
    """Blank lines, spaces around numbers, needless quotes: another hand's style, not a mistake."""
    def by_hand(row):
        quoted = ['"' + text.replace('"', '""') + '"' for text in (row.run_id, row.notes)]
        return f"{quoted[0]}, {'' if row.seed is None else row.seed} ,{row.loss!r}  ,{quoted[1]}"

    lines = [HEADER.strip(), *(line for row in existing for line in (blank, by_hand(row)))]
    data = (("\ufeff" if bom else "") + eol.join(lines) + (eol if final_newline else "")).encode()
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    path.write_bytes(data)
    new = Row("the new row", None, 1e-300, "n")
    append_row(path, new)
    added = b"the new row,,1e-300,n"
    known = final_newline or existing  # a lone header without a newline does not show its line ending
    end = eol.encode() if known else b"\n"
    assert path.read_bytes() == data + (b"" if final_newline else end) + added + end
    assert read_rows(path, Row) == [*existing, new]


@settings(deadline=None, max_examples=30)
@given(existing=st.lists(by_hand_rows, max_size=3, unique_by=lambda row: row.run_id.strip()),
       own=st.lists(texts, max_size=3),
       names=st.permutations([*HEADER.strip().split(","), "remark", "", "2nd run"]), delimiter=st.sampled_from(",;\t"),
       bom=st.booleans(), eol=st.sampled_from(["\n", "\r\n"]))
def test_what_a_spreadsheet_made_of_it_is_read_and_kept(tmp_path_factory, existing, own, names, delimiter, bom, eol):
    """Columns of a person's own, in another order, between semicolons and with decimal commas, emptied rows."""
    def cells(row, n):
        loss = repr(row.loss) if delimiter == "," else repr(row.loss).replace(".", ",")
        typed = {"run_id": row.run_id, "seed": row.seed, "loss": loss, "notes": row.notes}
        return [typed.get(name, own[n] if n < len(own) else "") for name in names]

    sheet = io.StringIO()
    writer = csv.writer(sheet, delimiter=delimiter, lineterminator=eol, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *(cells(row, n) for n, row in enumerate(existing)), [""] * len(names)])
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    before = (("\ufeff" if bom else "") + sheet.getvalue()).encode()
    path.write_bytes(before)
    assert read_rows(path, Row) == existing
    new = Row("the new row", None, 0.125, "n")
    append_row(path, new)
    assert path.read_bytes().startswith(before) and read_rows(path, Row) == [*existing, new]
    sheet = csv.DictReader(io.StringIO(path.read_text("utf-8-sig").removeprefix("\ufeff")), delimiter=delimiter)
    added = list(sheet)[-1]
    assert added["remark"] == added["2nd run"] == "" and added["loss"] == ("0.125" if delimiter == "," else "0,125")


@pytest.mark.parametrize("text, fault", [
    ("run_id,seed,loss\n", r"line 1: another header .*: it lacks notes; restore it"),
    ("run_id;seed;notes\n", r"line 1: another header .*: it lacks loss; restore it"),
    ("run_id|seed|loss|notes\n", r"line 1: another header .*: it lacks run_id, seed, loss, notes"),
    ("sep=;\nrun_id;seed;loss;notes\n", r"line 1: another header"),
    ("seed,run_id,loss,notes,seed\n", r"line 1: another header .*: it has twice seed"),
    ('"run_id,seed\n', r"line 1: not CSV"),
    ("\n", r"line 1: another header"),
    (HEADER + "b,1,0.5\n", r"line 2: 3 cells where the header has 4"),
    (HEADER + "b,1,0.5,,\n", r"line 2: 5 cells where the header has 4 \(a text with ',' in it needs quotes\)"),
    (HEADER + "b,1,0,5,\n", r"line 2: 5 cells"),
    ("run_id;seed;loss;notes\nb;1,5;0,5;\n", r"line 2: seed is '1,5', not a whole number"),
    ("run_id;seed;loss;notes\nb;1;1.234,5;\n", r"line 2: loss is '1.234,5', not a number"),
    (HEADER + "b,1,0.5,\n\n# a comment\n", r"line 4: 1 cells"),
    (HEADER + "b,one,0.5,\n", r"line 2: seed is 'one', not a whole number"),
    (HEADER + "b,1.5,0.5,\n", r"line 2: seed is '1.5', not a whole number"),
    (HEADER + "b,1,nan,\n", r"line 2: loss is 'nan', not a number"),
    (HEADER + "b,1,1e999,\n", r"line 2: loss is '1e999', beyond"),
    (HEADER + 'b,1,"0,5",\n', r"line 2: loss is '0,5', not a number: write 0.5, with a point"),
    (HEADER + "b,1,,\n", r"line 2: loss is '', not a number"),
    (HEADER + ",1,0.5,\n", r"line 2: run_id is empty"),
    (HEADER + "b,1,0.5,\nc,1,0.5,\nb ,2,0.6,\n", r"line 4: run_id 'b' is on line 2 too"),
    (HEADER + 'b,1,0.5,"two\nlines"\nc,1,x,\n', r"line 4: loss"),
    (HEADER + 'b,1,0.5,"x" y\n', r"line 2: not CSV"),
    (HEADER + 'b,1,0.5,\nc,1,0.5,"never closed\n', r"line 3: not CSV"),
    (HEADER + "b,1,0.5,forbidden\n", r"line 2: notes must not be"),
    (HEADER + "b,1,0.5,\n\ufeff,1,0.5,\0\n", r"line 3"),
])
def test_mistakes_are_named_by_line_and_nothing_is_written(tmp_path, text, fault):
    path = tmp_path / "ledger.csv"
    path.write_bytes(text.encode())
    if "\0" not in text or sys.version_info < (3, 11):  # newer csv modules read a NUL as any character
        with pytest.raises(UserError, match=fault):
            read_rows(path, Row)
        with pytest.raises(UserError, match=fault):
            append_row(path, ROW)
        assert path.read_bytes() == text.encode()


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path):
    path = tmp_path / "ledger.csv"
    path.write_bytes(HEADER.encode() + b"b,1,0.5,\nc,1,0.5,caf\xe9\n")
    with pytest.raises(UserError, match="line 3: not UTF-8"):
        append_row(path, ROW)


@pytest.mark.parametrize("row, fault", [
    (replace(ROW, loss=float("nan")), "loss is 'nan'"),
    (replace(ROW, loss=None), "loss is ''"),
    (replace(ROW, seed=1.5), "seed is '1.5'"),
    (replace(ROW, notes=None), "would read back as"),
    (replace(ROW, notes="\ud800"), "surrogates"),
    (replace(ROW, notes="x" * 200_000), "field larger than"),
    (replace(ROW, run_id=" "), "run_id is empty"),
])
def test_a_row_that_csv_cannot_hold_is_refused(tmp_path, row, fault):
    path = tmp_path / "ledger.csv"
    with pytest.raises(UserError, match=fault):
        append_row(path, row)
    assert not path.exists()


def test_a_disk_that_is_full_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "ledger.csv"
    append_row(path, ROW)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"cannot write the ledger .*No space left"):
        append_row(path, replace(ROW, run_id="b"))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_ledger_that_cannot_be_there_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write in"):
        append_row(tmp_path / "file" / "ledger.csv", ROW)


def test_a_duplicate_is_refused_with_the_line_of_the_first(tmp_path):
    path = tmp_path / "ledger.csv"
    append_row(path, replace(ROW, run_id="first"))
    append_row(path, ROW)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"line 3: run_id 'a' is already there"):
        append_row(path, replace(ROW, seed=2))
    assert path.read_bytes() == before


def test_a_missing_ledger_starts_with_the_header_and_cannot_be_read_before(tmp_path):
    path = tmp_path / "new" / "ledger.csv"
    with pytest.raises(UserError, match="cannot read the ledger"):
        read_rows(path, Row)
    append_row(path, ROW)
    assert path.read_text() == HEADER + "a,1,0.5,\n"
    assert columns(Row) == ["run_id", "seed", "loss", "notes"]


@pytest.mark.parametrize("text", ["=1+1", "+a", "-b", "@c", "'=d", "''-e", "\t=f", "--chunked-ce"])
def test_no_cell_that_a_tool_writes_is_a_formula(tmp_path, text):
    path = tmp_path / "ledger.csv"
    append_row(path, replace(ROW, notes=text))
    assert f",'{text}" in path.read_text()
    assert read_rows(path, Row) == [replace(ROW, notes=text)]
    path.write_text(HEADER + "a,1,0.5,--by-hand\n")
    assert read_rows(path, Row) == [replace(ROW, notes="--by-hand")]


def test_a_last_line_without_its_end_is_warned_of(tmp_path, capsys):
    path = tmp_path / "ledger.csv"
    append_row(path, replace(ROW, notes="whole"))
    assert read_rows(path, Row) and not capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-3])
    assert read_rows(path, Row) == [replace(ROW, notes="who")]
    assert "the last line has no line end; if it was cut, mend its last cell" in capsys.readouterr().err


def test_a_symlinked_ledger_stays_a_symlink(tmp_path):
    (tmp_path / "real.csv").write_text(HEADER)
    (tmp_path / "link.csv").symlink_to("real.csv")
    append_row(tmp_path / "link.csv", ROW)
    assert (tmp_path / "link.csv").is_symlink()
    assert read_rows(tmp_path / "real.csv", Row) == [ROW]


APPEND_AT_ONCE = """
import os, sys
from pathlib import Path
from nanochat.experiments.change_log import add_entry
from nanochat.lane_b.infer.record import LaneBRecord, append_record
folder = Path(sys.argv[1])
empty = dict.fromkeys(LaneBRecord.__dataclass_fields__)
may_begin, begin = os.pipe()
for number in range(100):
    if os.fork() == 0:
        os.close(begin)
        os.read(may_begin, 1)  # until the parent has closed its end
        append_record(folder / "ledger.csv", LaneBRecord(**{**empty, "timestamp_utc": "t", "git_commit": "c",
            "run_id": f"run-{number}", "seed": number, "dataset_id": "d", "target_metric_name": "val_bpb",
            "lane_b_decision": "inferred", "status": "ok", "notes": f'alpha_source=theory, "{number}"\\n' * 50}))
        assert add_entry(folder / "LOG.md", f"## 2026-01-01 entry {number}\\n\\n" + f"{number} " * 500)
        os._exit(0)
os.close(begin)
sys.exit(any(os.wait()[1] for _ in range(100)))
"""


def test_a_hundred_processes_appending_at_once_leave_whole_rows_and_entries(tmp_path):
    (tmp_path / "LOG.md").write_text("# Log\n")
    assert subprocess.run([sys.executable, "-c", APPEND_AT_ONCE, str(tmp_path)]).returncode == 0
    found = read_records(tmp_path / "ledger.csv")
    assert sorted(row.seed for row in found) == list(range(100))
    assert all(row.notes == f'alpha_source=theory, "{row.seed}"\n' * 50 for row in found)
    title, *entries = (tmp_path / "LOG.md").read_text().split("\n\n## 2026-01-01 ")
    assert title == "# Log" and sorted(entry.strip() for entry in entries) == sorted(
        f"entry {number}\n\n" + (f"{number} " * 500).strip() for number in range(100))
