"""Budgets of a training step on an H100: launches and bytes in the code of inductor."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "dev" / "lowered_h100.csv"
# (Triton launches of the model, the compiler's and ours; their GB; launches of the optimizer)
BUDGETS = {"none": (180, 12.9, 145), "both": (180, 10.6, 145)}


def check(rows, flags):
    """Check the rows of the d12 protocol's step against the budgets of `flags`."""
    case = ("12", "512", flags)
    phases = {row["phase"]: row for row in rows
              if (row["depth"], row["seq_len"], row["flags"]) == case}

    def total(names, *columns):
        return sum(float(phases[name][column]) for name in names for column in columns)

    launches, gigabytes, optimizer_launches = BUDGETS[flags]
    model = ("forward", "backward")
    assert total(model, "triton_launches", "own_launches") <= launches
    assert total(model, "triton_gb", "own_gb") <= gigabytes
    optimizer = total(["optimizer"], "triton_launches", "extern_calls", "eager_launches")
    assert optimizer <= optimizer_launches
    assert total(["backward"], "n_by_v_buffers") == 0  # the gradient is written over the logits
    if flags == "both":  # the chunked loss never stores all logits
        assert total(phases, "n_by_v_buffers") == 0
    assert all(row["dense_mask"] == "none" for row in phases.values())


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("flags", BUDGETS)
def test_the_stored_table_is_within_the_budgets(flags):
    check(read(TABLE), flags)


def test_no_lowered_step_has_a_dense_mask():
    windows = [row for row in read(TABLE) if "varlen" in row["attention"]]
    assert windows and all(row["dense_mask"] == "none" for row in windows)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") or torch.version.cuda is not None,
                    reason="needs g++, and torch without CUDA")
@pytest.mark.parametrize("flags", BUDGETS)
def test_the_step_lowered_now_is_within_the_budgets(flags, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "dev.lowering", "--depth", "12", "--seq-len", "512", "--flags",
         flags, "--out", str(tmp_path / "rows.csv")],
        cwd=ROOT, capture_output=True, text=True, env={**environment, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    check(read(tmp_path / "rows.csv"), flags)
