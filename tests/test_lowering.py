"""Budgets of the training step on an H100, from Inductor's code for a faked one: launches and bytes are counted, no
time is measured."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# (Triton launches of the model's graphs, the compiler's and ours, their GB, launches of the optimizer)
BUDGETS = {"none": (180, 12.9, 140), "both": (180, 10.6, 140)}


def check(rows, flags):
    """A table's rows of the protocol's step against the budgets of `flags`."""
    by_phase = {row["phase"]: row for row in rows
                if (row["depth"], row["seq_len"], row["flags"]) == ("12", "512", flags)}
    model = [by_phase["forward"], by_phase["backward"]]
    launches, gigabytes, optimizer_launches = BUDGETS[flags]
    assert all(int(row["graph_breaks"]) == 0 for row in by_phase.values())
    assert sum(int(row[f"{kind}_launches"]) for row in model for kind in ("triton", "own")) <= launches
    assert sum(float(row[f"{kind}_gb"]) for row in model for kind in ("triton", "own")) <= gigabytes
    assert all(row["dense_mask"] == "none" for row in by_phase.values())
    update = by_phase["optimizer"]
    counts = ("triton_launches", "extern_calls", "eager_launches")
    assert sum(int(update[name]) for name in counts) <= optimizer_launches
    assert int(by_phase["backward"]["n_by_v_buffers"]) == 0  # the loss's gradient is written over the logits
    if flags == "both":  # the chunked loss holds a part of the logits at a time
        assert sum(int(row["n_by_v_buffers"]) for row in by_phase.values()) == 0


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags", BUDGETS)
def test_the_kept_table_is_within_the_budgets(flags):
    check(read(ROOT / "dev" / "lowered_h100.csv"), flags)  # its last rows of a case count


def test_no_lowered_step_has_a_dense_mask():
    windows = [row for row in read(ROOT / "dev" / "lowered_h100.csv") if "varlen" in row["attention"]]
    assert {row["depth"] for row in windows} and all(row["dense_mask"] == "none" for row in windows)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") or torch.version.cuda is not None, reason="needs g++, and torch for a CPU")
@pytest.mark.parametrize("flags", BUDGETS)
def test_the_protocols_step_stays_within_the_budgets(flags, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dev.lowering", "--depth", "12", "--seq-len", "512", "--flags", flags]
    done = subprocess.run([*command, "--out", str(tmp_path / "rows.csv")], cwd=ROOT, capture_output=True, text=True,
                          env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    check(read(tmp_path / "rows.csv"), flags)
