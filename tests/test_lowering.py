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
# (launches of the model's graphs, their GB in Triton's kernels, launches of the optimizer); 48 of "both" are ours
BUDGETS = {"none": (190, 15.6, 140), "both": (170, 10.2, 140)}


def check(rows, flags):
    """A table's rows of the protocol's step against the budgets of `flags`."""
    by_phase = {row["phase"]: row for row in rows
                if (row["depth"], row["seq_len"], row["flags"]) == ("12", "512", flags)}
    model = [by_phase["forward"], by_phase["backward"]]
    launches, gigabytes, optimizer_launches = BUDGETS[flags]
    assert all(int(row["graph_breaks"]) == 0 for row in by_phase.values())
    assert sum(int(row["triton_launches"]) for row in model) <= launches
    assert sum(float(row["triton_gb"]) for row in model) <= gigabytes
    update = by_phase["optimizer"]
    counts = ("triton_launches", "extern_calls", "eager_launches")
    assert sum(int(update[name]) for name in counts) <= optimizer_launches
    if flags == "both":  # the chunked loss holds a part of the logits at a time
        assert sum(int(row["n_by_v_buffers"]) for row in by_phase.values()) == 0
        assert int(by_phase["forward"]["custom_ops"]) == 1  # and that loss alone is opaque


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
