"""The benchmarks meant for a GPU: rows as they come, going on after a stop; the whole script in a dry run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev.bench import trees
from dev.bench.measure import append_rows, run_jobs
from dev.bench.train_step import step_flops
from nanochat.gpt import GPTConfig, flops_per_token

ROOT = Path(__file__).parent.parent


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["job"], row["note"]) for row in csv.DictReader(file)]


def failed(name, reason):
    return {"job": name, "note": reason}


def test_rows_are_written_as_they_come_and_a_failure_costs_only_its_job(tmp_path):
    path = tmp_path / "rows.csv"

    def breaks():
        yield {"job": "b", "note": "first"}
        assert rows(path)[-1] == ("b", "first")
        raise RuntimeError("out of\n luck")

    jobs = {"a": lambda: [{"job": "a", "note": ""}], "b": breaks, "c": lambda: [{"job": "c", "note": ""}]}
    failures, left = run_jobs(jobs, path, 1, failed)
    assert list(failures) == ["b"] and not left
    assert rows(path) == [("a", ""), ("b", "first"), ("b", "failed: RuntimeError: out of luck"), ("c", "")]


def test_rows_of_another_version_of_a_bench_keep_their_columns(tmp_path):
    path = tmp_path / "rows.csv"
    append_rows(path, [{"job": "a", "old": "1,5"}])
    append_rows(path, [{"job": "b", "new": 2}, {"job": "c", "new": 3}])
    with open(path, newline="") as file:
        found = [tuple(row.values()) for row in csv.DictReader(file)]
    assert found == [("a", "1,5", ""), ("b", "", "2"), ("c", "", "3")]


def test_a_second_call_goes_on_where_the_first_ended(tmp_path):
    path, ran = tmp_path / "rows.csv", []

    def job(name, stop=False):
        def run():
            ran.append(name)
            yield {"job": name, "note": ""}
            if stop and ran.count(name) == 1:
                raise KeyboardInterrupt

        return run

    jobs = {"a": job("a"), "b": job("b", stop=True), "c": job("c")}
    assert run_jobs(jobs, path, 0, failed) == ({}, ["a", "b", "c"])  # no time
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, path, 1, failed)
    assert run_jobs(jobs, path, 1, failed) == ({}, [])
    assert ran == ["a", "b", "b", "c"]


def gpu_script(out, *arguments, **environment):
    return subprocess.run(["bash", ROOT / "dev" / "bench" / "gpu.sh", out, *arguments], capture_output=True, text=True,
                          env=os.environ | {"PYTHON": sys.executable} | environment)


def test_a_call_without_time_leaves_every_piece(tmp_path):
    run = gpu_script(tmp_path / "out", "--dry-run", MINUTES="0")
    assert run.returncode == 3 and "left: correctness step_d12 kernels" in run.stdout


@pytest.mark.slow
def test_every_piece_runs_dry_on_a_cpu(tmp_path):
    out = tmp_path / "out"
    run = gpu_script(out, "--dry-run", MINUTES="30")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.rstrip().endswith("done")
    with open(out / "train_step.csv", newline="", encoding="utf-8") as file:
        assert {row["depth"] for row in csv.DictReader(file)} == {"1", "2"}
    again = gpu_script(out, "--dry-run", MINUTES="30")
    assert again.returncode == 0 and "==" not in again.stdout


TINY_STEP = ["--depth", "1", "--head-dim", "64", "--seq-len", "32", "--rows", "1", "--vocab-size", "64", "--no-compile"]


def test_two_trees_step_in_turn(monkeypatch, capsys):
    monkeypatch.setattr(trees, "PAIRS", 3)
    assert trees.main([str(ROOT), *TINY_STEP]) == 0
    ours, others, ratio = capsys.readouterr().out.splitlines()
    assert ours.partition("loss")[2] == others.partition("loss")[2] and "3 pairs" in ratio


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, refusal):
    assert "is no checkout" in refusal(trees.main, [str(tmp_path)])


def test_a_steps_flops_are_its_matmuls():
    """d4 of the quickstart: 71 GFLOP in the model, 20 in Muon's 24 matrices."""
    config = GPTConfig(256, 8192, 4, 4, 4, 256, "L")
    square, wide = 16 * 5 * 6 * 256**3, 8 * 5 * (4 * 256**2 * 1024 + 2 * 256**3)
    gates = 2 * 5 * (4 * 4**2 * 12 + 2 * 4**3)
    assert step_flops(config, 2048) == flops_per_token(config) * 2048 + square + wide + gates
