"""The measurements of the first day on a GPU, as far as a CPU can run them."""

import csv
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from dev import gpu_day
from dev.bench import trees
from dev.bench.train_step import step_flops
from nanochat import plan
from nanochat.gpt import GPTConfig, flops_per_token

ROOT = Path(__file__).parent.parent
NOT_OK = re.compile("WRONG|failed|stopped")


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", gpu_day.PIECES)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler and the compiler
def test_every_piece_runs_at_toy_sizes(tmp_path, name):
    torch._dynamo.reset()
    assert gpu_day.run_piece(name, tmp_path / "rows.csv", dry_run=True) == 0
    rows = read_rows(tmp_path / "rows.csv")
    assert rows and all(row["piece"] == name and row["name"] for row in rows)
    assert not [row for row in rows if NOT_OK.search(row["note"])]
    assert all(row["value"] == "" or float(row["value"]) is not None for row in rows)


@pytest.mark.parametrize("pieces", [
    ["trainer"], pytest.param([], marks=pytest.mark.slow)], ids=["one", "all"])
def test_a_dry_run_needs_no_optional_package(tmp_path, pieces):
    missing = tmp_path / "missing"
    missing.mkdir()
    for package in ("rustbpe", "wandb", "matplotlib", "liger_kernel", "flash_attn_interface"):
        (missing / f"{package}.py").write_text("raise ImportError('not installed')")
    words = ["--dry-run", "--out", tmp_path / "out", "--state", tmp_path / "state"]
    done = subprocess.run(
        [sys.executable, "-m", "dev.gpu_day", *words, *(["--pieces", *pieces] if pieces else [])],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(missing)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "out" / "gpu_day.tar.gz") as archive:
        assert {"gpu_day.csv", "status.json", "trainer.log"} <= set(archive.getnames())
    rows = read_rows(tmp_path / "state" / "gpu_day.csv")
    ends = {row["piece"]: row["note"] for row in rows if row["name"] == "piece"}
    assert ends == dict.fromkeys(pieces or gpu_day.PIECES, "ok")


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Return a function that runs a command with faked pieces: {piece: exit code or "slow"}."""

    def command(outcomes, *flags, minutes=9, state="state"):
        ran = []

        def run(words, *, timeout, **_):
            name = words[words.index("--piece") + 1]
            ran.append(name)
            outcome = outcomes.get(name, 0)
            if outcome == "slow":
                raise subprocess.TimeoutExpired(words, timeout)
            return subprocess.CompletedProcess(words, outcome)

        monkeypatch.setattr(subprocess, "run", run)
        code = gpu_day.main(["--out", str(tmp_path / "out"), "--state", str(tmp_path / state),
                             "--minutes", str(minutes), *flags])
        return code, ran

    return command


def test_a_later_command_continues_and_repeats_failures_once(day, capsys):
    failing = {"machine": 1, "attention": "slow"}
    pieces = ["--pieces", "machine", "correctness", "attention", "d24 16x2048"]
    assert day(failing, *pieces, minutes=0.8) == (3, ["machine", "attention"]), "others need more"
    assert day(failing, *pieces) == (1, ["correctness", "d24 16x2048", "machine", "attention"])
    assert "left: nothing; failed: machine, attention" in capsys.readouterr().out
    assert day(failing, *pieces) == (1, [])


def test_a_piece_that_the_end_of_a_command_stops_is_left(day, tmp_path):
    slow = {"correctness": "slow"}
    assert day(slow, "--pieces", "correctness", minutes=1.2) == (3, ["correctness"])
    assert day(slow, "--pieces", "correctness") == (1, ["correctness"])
    rows = read_rows(tmp_path / "state" / "gpu_day.csv")
    assert [row["note"] for row in rows] == ["stopped after 72 s", "stopped after 120 s"]


def test_another_machine_continues_from_the_archive(day, tmp_path, refusal):
    day({}, "--pieces", "machine")
    archive = str(tmp_path / "out" / "gpu_day.tar.gz")
    pieces = ["--pieces", "machine", "attention"]
    code, ran = day({}, *pieces, "--resume-from", archive, state="other")
    assert (code, ran) == (0, ["attention"])
    status = json.loads((tmp_path / "other" / "status.json").read_text())
    assert status == {"machine": "ok", "attention": "ok"}
    (tmp_path / "bad.tar.gz").write_text("no archive")
    bad = ["--resume-from", str(tmp_path / "bad.tar.gz"), "--state", str(tmp_path / "third")]
    assert "cannot be read" in refusal(gpu_day.main, ["--out", str(tmp_path), *bad])
    assert "--out is missing" in refusal(gpu_day.main, [])


def test_a_wrong_result_fails_its_piece(tmp_path, monkeypatch):
    rows = [gpu_day.gpu_checks.verdict("close", 0.1, 0.2),
            gpu_day.gpu_checks.verdict("not a number", float("nan"), 0.2)]
    for found, code in ((rows[:1], 0), (rows, 1)):
        monkeypatch.setitem(gpu_day.PIECES, "machine", (1, lambda lab, found=found: found))
        assert gpu_day.run_piece("machine", tmp_path / "rows.csv", dry_run=True) == code


@pytest.mark.parametrize(("kernel", "kind"), [
    ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", "matmul"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16>(Params)", "matmul"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>",
     "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true>(float*)", "attention"),
    ("triton_red_fused_add_mm_mul_12", "Triton"),
    ("_rows_kernel", "Triton"),
    ("Memcpy DtoD (Device -> Device)", "other"),
    ("void at::native::radixSortKVInPlace<2, -1, 128, 32>(long*)", "other"),
])
def test_kernels_are_told_apart_by_name(kernel, kind):
    assert gpu_day.kind_of(kernel) == kind


def test_the_page_names_constants_that_the_plan_has():
    page = (ROOT / "dev" / "GPU_DAY.md").read_text(encoding="utf-8")
    constants = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", page))
    assert constants and not [name for name in constants if not hasattr(plan, name)]
    assert set(gpu_day.CONSTANTS.values()) <= constants


# --- other benchmarks -----------------------------------------------------------------------------

def test_two_trees_step_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(trees, "PAIRS", 3)
    size = ["--depth", "1", "--head-dim", "64", "--seq-len", "32", "--rows", "1",
            "--vocab-size", "64", "--no-compile"]
    assert trees.main([str(ROOT), *size]) == 0
    ours, others, ratio = capsys.readouterr().out.splitlines()
    assert ours.partition("loss")[2] == others.partition("loss")[2] and "3 pairs" in ratio


def test_the_flops_of_a_step_are_those_of_its_matmuls():
    """d4 of the quickstart: 71 GFLOP in the model, 20 in Muon's 24 matrices."""
    config = GPTConfig(256, 8192, 4, 4, 4, 256, "L")
    square, wide = 16 * 5 * 6 * 256**3, 8 * 5 * (4 * 256**2 * 1024 + 2 * 256**3)
    gates = 2 * 5 * (4 * 4**2 * 12 + 2 * 4**3)
    assert step_flops(config, 2048) == flops_per_token(config) * 2048 + square + wide + gates
