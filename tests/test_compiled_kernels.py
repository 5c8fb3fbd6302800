"""Budgets of the kernels as the GPUs' own compilers compile them: no GPU is needed for that.

The interpreter takes programs that a compiler refuses, and shows neither registers nor the width of a load.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels import runtime

pytestmark = pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed")

# a thread: 64 let an SM hold 1,024 threads, 80 (RoPE's backward) 768
MOST_REGISTERS = {"rows": 64, "norm": 64, "rope": 80, "embedding": 48}
MOST_INSTRUCTIONS = {"bf16": (8, 19), "fp32": (26, 33)}  # an element, in the loops of the loss and of the gradient


def compiled(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-m", "dev.bench.compiled_kernels", *arguments], text=True,
                         capture_output=True, cwd=Path(__file__).parent.parent,
                         env=environment | {"TRITON_CACHE_DIR": str(folder)})
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_within_budget(row):
    kind = row["kernel"].split()[0]
    assert row["spilled"] == 0 and row["wide"] > 0, row
    # besides the tile: the target, its logit, the loss and the scale, of up to four rows; a row's range, its positions
    assert row["narrow"] <= {"rows": 14 if "V=1000" in row["kernel"] else 5, "embedding": 7}.get(kind, 0), row
    if row["target"].startswith("gfx"):
        assert row["registers"] <= 128, row  # of 512 for four waves a SIMD
        return
    assert row["registers"] <= MOST_REGISTERS[kind], row
    if kind == "rows" and row["kernel"].endswith("gradient"):
        special = 2 if row["dtype"] == "bf16" else 3  # exp2 with the hardware's tanh; without, exp2 and a division too
        for (instructions, functions), most in zip(row["loops"], MOST_INSTRUCTIONS[row["dtype"]], strict=False):
            assert instructions <= most and functions == special, row


def test_on_hopper(tmp_path):
    """One variant of each kernel, the vocabulary no power of two: it costs no masks."""
    rows = compiled(tmp_path, "--few", "--targets", "sm_90")
    assert [row["kernel"].split()[0] for row in rows] == ["rows", "norm", "rope", "embedding"]
    for row in rows:
        assert_within_budget(row)
    assert len(rows[0]["loops"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_variant_on_every_target(tmp_path, target):
    rows = compiled(tmp_path, "--targets", target)
    assert len(rows) == 48
    for row in rows:
        assert_within_budget(row)
