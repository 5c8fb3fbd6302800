"""The CSV ledgers: edits by people and spreadsheets, and rows that programs append."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.experiments.ledger import (
    ExperimentRow,
    append_row,
    columns,
    read_rows,
)


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

# UTF-8 holds anything but lone surrogates; NUL is no text.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
rows = st.builds(
    Row, run_id=texts.filter(str.strip), seed=st.none() | st.integers(),
    loss=st.floats(allow_nan=False, allow_infinity=False),
    notes=texts.filter(lambda text: text != "forbidden"))
row_lists = st.lists(rows, max_size=4, unique_by=lambda row: row.run_id.strip())


@settings(deadline=None)
@given(existing=row_lists, bom=st.booleans(), end=st.sampled_from(["\n", "\r\n"]),
       blank=st.sampled_from(["", "   ", ",,,,"]), final_end=st.booleans(),
       names=st.permutations([*HEADER.strip().split(","), "remark"]))
def test_appending_keeps_every_byte_that_people_wrote(
        tmp_path_factory, existing, bom, end, blank, final_end, names):
    """Blank lines, spaces around numbers, needless quotes, another order, an own column."""
    def by_hand(row):
        cells = {"run_id": row.run_id, "notes": row.notes, "remark": "mine, \"quoted\"",
                 "seed": "" if row.seed is None else f" {row.seed} ", "loss": f"{row.loss!r}  "}
        return ",".join('"' + cells[name].replace('"', '""') + '"' for name in names)

    lines = [",".join(names), *(line for row in existing for line in (blank, by_hand(row)))]
    text = ("\ufeff" if bom else "") + end.join(lines) + (end if final_end else "")
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    path.write_bytes(text.encode())
    new = Row("the new row", None, 1e-300, "--chunked-ce")
    append_row(path, new)
    assert read_rows(path, Row) == [*existing, new]
    cells = {"run_id": "the new row", "loss": "1e-300", "notes": "--chunked-ce"}
    added = ",".join(cells.get(name, "") for name in names) + "\n"
    assert path.read_bytes().decode() == text + ("" if final_end else "\n") + added


@settings(deadline=None)
@given(row_lists)
def test_appended_rows_are_read_here_and_in_pandas(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("ledger") / "ledger.csv"
    path.write_text(HEADER)
    for row in written:
        append_row(path, row)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame.notes) == [row.notes for row in written]
    assert list(map(float, frame.loss)) == [row.loss for row in written]
    assert read_rows(path, Row) == written


@pytest.mark.parametrize(("column", "cell"), [
    *(("seed", cell) for cell in ("1.966", "1.966.080", "1,966,080", "1 966", "1_966", "1,5", "1e3",
                                  "0x10", "\u0661", "seven", "9" * 400)),
    *(("loss", cell) for cell in ("0,5", "15,565.8", "1.234.567", "1 234", "50%", "1_0.5", "nan",
                                  "inf", "", "1.5 ms", "1e999"))])
def test_a_number_has_no_separators_units_and_decimal_commas(tmp_path, column, cell):
    path = tmp_path / "ledger.csv"
    cells = {"run_id": "b", "seed": "1", "loss": "0.5", "notes": "", column: cell}
    path.write_text(HEADER + ",".join(f'"{value}"' for value in cells.values()) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"line 2: {column} is .*, not a .*number"):
        read_rows(path, Row)


@pytest.mark.parametrize("text, fault", [
    ("run_id,seed,loss\n", r"line 1: the header must have .* it has not: notes"),
    ("seed,run_id,loss,notes,seed\n", r"line 1: .* it has not: seed"),
    ("\ufeffrun_id;seed;loss;notes\r\nb;1;0,5;\r\n", r"line 1: .* between commas"),
    (HEADER + "b\t1\t0.5\t\n", r"line 2: 1 cells where the header has 4"),
    ('"run_id,seed\n', r"line 1: unexpected end"), ("\n", r"the header must have"),
    (HEADER + "b,1,0,5,\n", r"line 2: 5 cells where the header has 4 \(a comma inside a text"),
    (HEADER + " ,1,0.5,\n", r"line 2: run_id '' is empty"),
    (HEADER + "b,1,0.5,\nc,1,0.5,\nb ,2,0.6,\n", r"line 4: run_id 'b' is repeated"),
    (HEADER + 'b,1,0.5,"two\nlines"\nc,1,x,\n', r"line 4: loss"),
    (HEADER + 'b,1,0.5,"x" y\n', r"line 2: "),
    (HEADER + 'b,1,0.5,\nc,1,0.5,"never closed\n', r"line 3: unexpected end"),
    (HEADER + "b,1,0.5,forbidden\n", r"line 2: notes must not be"),
])
def test_mistakes_are_named_by_line_and_nothing_is_written(tmp_path, text, fault):
    path = tmp_path / "ledger.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    for call in (lambda: read_rows(path, Row), lambda: append_row(path, ROW)):
        with pytest.raises(UserError, match=fault):
            call()
    assert path.read_bytes() == before


@pytest.mark.parametrize("row, fault", [
    (replace(ROW, loss=float("nan")), "loss is 'nan'"), (replace(ROW, loss=None), "loss is ''"),
    (replace(ROW, seed=1.5), "seed is '1.5'"), (replace(ROW, run_id=" "), "run_id '' is empty"),
    (replace(ROW, notes="x" * 200_000), "field larger than"),
])
def test_a_row_that_would_not_read_back_is_refused(tmp_path, row, fault):
    with pytest.raises(UserError, match=fault):
        append_row(tmp_path / "ledger.csv", row)
    assert not (tmp_path / "ledger.csv").exists()


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "ledger.csv"
    with pytest.raises(UserError, match="cannot read the ledger"):
        read_rows(path, Row)
    append_row(path, ROW)
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UserError, match=r"cannot write the ledger .*No space left"):
        append_row(path, replace(ROW, run_id="b"))
    assert path.read_text() == HEADER + "a,1,0.5,\n" and not list(path.parent.glob(".*.tmp"))


def test_a_run_is_logged_once_also_through_a_symlink(tmp_path):
    (tmp_path / "real.csv").write_text(HEADER)
    (tmp_path / "link.csv").symlink_to("real.csv")
    append_row(tmp_path / "link.csv", ROW)
    with pytest.raises(UserError, match=r"run_id 'a' is already there"):
        append_row(tmp_path / "real.csv", replace(ROW, run_id=" a ", seed=2))
    assert (tmp_path / "link.csv").is_symlink() and read_rows(tmp_path / "real.csv", Row) == [ROW]


APPEND_AT_ONCE = """
import os, sys
sys.path.insert(0, "tests")
from nanochat.experiments.ledger import append_row
from test_ledger import Row
may_begin, begin = os.pipe()
for number in range(40):
    if os.fork() == 0:
        os.close(begin)
        os.read(may_begin, 1)  # until the parent has closed its end
        append_row(sys.argv[1], Row(f"run-{number}", number, 0.5, f'"{number}"\\n' * 50))
        os._exit(0)
os.close(begin)
sys.exit(any(os.wait()[1] for _ in range(40)))
"""


def test_processes_that_append_at_once_lose_no_row(tmp_path):
    path = tmp_path / "ledger.csv"
    command = [sys.executable, "-c", APPEND_AT_ONCE, str(path)]
    assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == 0
    found = read_rows(path, Row)
    assert sorted(row.seed for row in found) == list(range(40))
    assert all(row.notes == f'"{row.seed}"\n' * 50 for row in found)

def test_the_committed_ledger_has_the_plans_columns_and_reads_in_pandas():
    path = Path(__file__).parents[1] / "dev" / "experiments.csv"
    assert ",".join(columns(ExperimentRow)) == (
        "timestamp,git_commit,experiment_name,seed,depth,target_metric_name,"
        "target_metric_threshold,time_to_target_sec_measured,time_to_target_sec_extrapolated,"
        "tok_per_sec_median,dt_median_ms,wall_time_sec,min_val_bpb,status,candidate_flags,"
        "dataset_id,total_tokens,device,peak_memory_mib,run_id")
    frame, rows = pd.read_csv(path), read_rows(path, ExperimentRow)
    assert list(frame.columns) == columns(ExperimentRow) and len(rows) > 40
    assert list(frame.run_id) == [row.run_id for row in rows]
    assert list(frame.min_val_bpb) == pytest.approx([row.min_val_bpb for row in rows])
