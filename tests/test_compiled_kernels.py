"""Budgets of the kernels as the GPUs' own compilers compile them; that needs no GPU.

The interpreter accepts programs that a compiler refuses, and shows neither registers nor the width
of a load.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.kernels import runtime

pytestmark = pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed")

# per thread: with 64 an SM holds 1,024 threads, with 80 (RoPE's backward) 768
MOST_REGISTERS = {"rows": 64, "norm": 64, "rope": 80, "embedding": 48}
# per element, in the loops of the loss and of the gradient
MOST_INSTRUCTIONS = {"bf16": (8, 19), "fp32": (26, 33)}


def compiled(folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "dev.bench.compiled_kernels", *arguments], text=True,
        capture_output=True, cwd=Path(__file__).parent.parent,
        env=environment | {"TRITON_CACHE_DIR": str(folder)})
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_within_budget(row):
    kind = row["kernel"].split()[0]
    assert row["spilled"] == 0 and row["wide"] > 0, row
    # narrow loads and stores are those of scalars per row: targets, their logits, losses, ranges
    rows_limit = 14 if "V=1000" in row["kernel"] else 5
    assert row["narrow"] <= {"rows": rows_limit, "embedding": 7}.get(kind, 0), row
    if row["target"].startswith("gfx"):
        assert row["registers"] <= 128, row  # of 512, for four waves per SIMD
        return
    assert row["registers"] <= MOST_REGISTERS[kind], row
    if row["kernel"].endswith("gradient"):
        special = 2 if row["dtype"] == "bf16" else 3  # exp2 and tanh, or exp2 twice and a division
        limits = MOST_INSTRUCTIONS[row["dtype"]]
        for (instructions, functions), most in zip(row["loops"], limits, strict=False):
            assert instructions <= most and functions == special, row


def test_on_hopper(tmp_path):
    """One variant of each kernel; the vocabulary is no power of two, which must cost no masks."""
    rows = compiled(tmp_path, "--few", "--targets", "sm_90")
    assert [row["kernel"].split()[0] for row in rows] == ["rows", "norm", "rope", "embedding"]
    for row in rows:
        assert_within_budget(row)
    assert len(rows[0]["loops"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_every_variant_on_every_target(tmp_path, target):
    rows = compiled(tmp_path, "--targets", target)
    assert len(rows) == 36
    for row in rows:
        assert_within_budget(row)
