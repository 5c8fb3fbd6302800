"""Several ranks: their environment, time limits, errors, and a rank that is killed."""

import contextlib
import io
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from corpus import TINY_FLAGS
from ranks import run_on_ranks

from nanochat.common import UserError, command, runs_dir
from nanochat.distributed import Ranks, on_main, start_ranks, stop_ranks
from nanochat.runlog import METRICS, read_run
from scripts.base_train import main

STEPS = 40
FLAGS = [*TINY_FLAGS, "--depth", "1", "--aspect-ratio", "32", "--total-batch-size", "384",
         "--eval-every", "20", "--device-type", "cpu", "--num-iterations", str(STEPS),
         "--save-every", "3", "--resume-from-step", "auto"]


def set_environment(monkeypatch, text):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in text.split():
        monkeypatch.setenv(*word.split("="))


@pytest.mark.parametrize(("environment", "ranks"), [
    ("", Ranks(0, 0, 1)), ("RANK=0 LOCAL_RANK=0 WORLD_SIZE=1", Ranks(0, 0, 1)),
    ("RANK=9 LOCAL_RANK=1 WORLD_SIZE=16 MASTER_ADDR=host MASTER_PORT=1", Ranks(9, 1, 16))])
def test_ranks_come_from_torchruns_environment(monkeypatch, environment, ranks):
    set_environment(monkeypatch, environment)
    assert Ranks.from_environment() == ranks and ranks.is_main == (ranks.rank == 0)


@pytest.mark.parametrize("environment", [
    "RANK=0", "RANK=0 LOCAL_RANK=0", "WORLD_SIZE=2", "RANK=zero LOCAL_RANK=0 WORLD_SIZE=1",
    "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2", "RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=host"])
def test_an_incomplete_environment_is_one_line(monkeypatch, environment):
    set_environment(monkeypatch, environment)
    with pytest.raises(UserError, match="start several ranks with torchrun"):
        start_ranks(torch.device("cpu"))


def shared_values(rank, world_size):
    ranks = Ranks(rank, rank, world_size)

    def fail():
        raise UserError("the disk is full")

    values = [on_main(ranks, lambda: f"from {rank}")]
    try:
        on_main(ranks, fail)
    except UserError as error:
        values.append(str(error))
    except SystemExit as error:
        values.append(error.code)
    return values


def test_rank_0_shares_values_and_its_error_ends_all_ranks():
    assert run_on_ranks(2, shared_values) == [["from 0", "the disk is full"], ["from 0", 2]]


def wait_for_a_late_rank(rank, world_size):
    @command
    def program(argv=None):
        start_ranks(torch.device("cpu"), timeout_minutes=0.05)
        if rank == 1:
            time.sleep(10)
        else:
            dist.all_reduce(torch.zeros(1))

    began = time.monotonic()
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            program()
    except SystemExit:
        return stderr.getvalue(), time.monotonic() - began
    finally:
        stop_ranks()


def test_a_collective_ends_the_job_at_its_time_limit():
    (printed, sec), _ = run_on_ranks(2, wait_for_a_late_rank, group=False)
    assert printed.startswith("error: another rank did not join a collective within --rank-timeout")
    assert sec < 9


def losses(run_id):
    record = read_run(runs_dir() / run_id)
    return [event["loss"] for event in record.of("train")]


def test_a_killed_rank_ends_the_job_and_torchrun_restarts_it_with_the_same_losses(corpus, fp32):
    assert main([*FLAGS, "--dataset", corpus, "--run-id", "one", "--model-tag", "one"]) == 0
    rank, step = random.randrange(2), random.randrange(1, STEPS - 10)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "--max-restarts=1", Path(__file__).parent / "faulty_rank.py", str(rank), str(step),
         runs_dir() / "job" / METRICS, *FLAGS, "--dataset", corpus, "--run-id", "job",
         "--model-tag", "job"], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    assert "Traceback (most recent call last)" not in done.stderr
    assert read_run(runs_dir() / "job").status == "ok" and len(losses("job")) == STEPS
    assert losses("job") == pytest.approx(losses("one"), rel=1e-5)
