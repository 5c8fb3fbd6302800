"""The benchmarks for a GPU, as far as a CPU can run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.bench import trees
from dev.bench.train_step import step_flops
from nanochat.gpt import GPTConfig, flops_per_token

ROOT = Path(__file__).parent.parent
TINY_STEP = ["--depth", "1", "--head-dim", "64", "--seq-len", "32", "--rows", "1", "--vocab-size",
             "64", "--no-compile"]


@pytest.mark.slow
def test_every_piece_runs_on_a_cpu_in_a_dry_run(tmp_path):
    out = tmp_path / "out"
    done, again = (subprocess.run(
        ["bash", ROOT / "dev" / "bench" / "gpu.sh", out, "--dry-run"], capture_output=True,
        text=True, env=os.environ | {"PYTHON": sys.executable, "MINUTES": "30"}) for _ in range(2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "train_step.csv").exists() and (out / "kernels.csv").exists()
    assert again.returncode == 0 and "==" not in again.stdout, "finished pieces are not repeated"


def test_two_trees_step_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(trees, "PAIRS", 3)
    assert trees.main([str(ROOT), *TINY_STEP]) == 0
    ours, others, ratio = capsys.readouterr().out.splitlines()
    assert ours.partition("loss")[2] == others.partition("loss")[2] and "3 pairs" in ratio


def test_the_flops_of_a_step_are_those_of_its_matmuls():
    """d4 of the quickstart: 71 GFLOP in the model, 20 in Muon's 24 matrices."""
    config = GPTConfig(256, 8192, 4, 4, 4, 256, "L")
    square, wide = 16 * 5 * 6 * 256**3, 8 * 5 * (4 * 256**2 * 1024 + 2 * 256**3)
    gates = 2 * 5 * (4 * 4**2 * 12 + 2 * 4**3)
    assert step_flops(config, 2048) == flops_per_token(config) * 2048 + square + wide + gates
