"""A rank that dies or hangs: the job ends within a minute and says which, or torchrun brings it back by itself."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import TINY_FLAGS

from nanochat.common import runs_dir
from nanochat.distributed import Ranks
from nanochat.runlog import read_run
from nanochat.watchdog import BUSY, LEFT, TRAINING, WAITING, Watchdog
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")

STEPS = 12
FLAGS = [*TINY_FLAGS, "--depth", "1", "--aspect-ratio", "32", "--total-batch-size", "384", "--eval-every", "6",
         "--device-type", "cpu", "--num-iterations", str(STEPS), "--save-every", "3", "--resume-from-step", "auto"]


class Store(dict):
    """A process group's store, within this process."""

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def ranks():
    """Watchdogs of three ranks with a limit of 30 s, without their threads."""
    found = [Watchdog(Ranks(rank, rank, 3, Store()), 30.0) for rank in range(3)]
    for watchdog in found:
        watchdog._store = found[0]._ranks.store
    return found


def seen(ranks, now_sec, silent=()):
    """What rank 0 finds at a time by the clock, after all but the silent ranks have given a sign of life."""
    watch = ranks[0]
    for second in range(int(watch._looked_sec or now_sec), now_sec + 1):
        for rank, watchdog in enumerate(ranks):
            if rank not in silent:
                watchdog._beat(second)
        found = watch._look(float(second))
    return found


@pytest.mark.parametrize("doing", [BUSY, WAITING])
def test_a_rank_that_is_busy_or_waits_for_one_has_no_limit_while_its_heart_beats(ranks, doing):
    ranks[1].at(5, doing)
    assert not any(seen(ranks, now_sec) for now_sec in range(3601))
    assert not any(seen(ranks, now_sec, silent=[2]) for now_sec in range(3601, 3631))
    assert "rank 2 (pid " in seen(ranks, 3631, silent=[2])


def test_a_process_that_was_stopped_itself_blames_nobody(ranks):
    ranks[1].at(5, TRAINING)
    assert not seen(ranks, 10)
    assert not ranks[0]._look(5000.0) and not ranks[0]._look(5001.0)
    assert not seen(ranks, 5029, silent=[2])
    assert "rank 2 (pid " in seen(ranks, 5060, silent=[2])


def test_of_ranks_that_stay_in_their_share_of_a_step_the_one_behind_is_named(ranks):
    """The others may be a step further, and wait within it: a GPU works while Python is ahead."""
    for rank, step in enumerate((8, 8, 7)):
        ranks[rank].at(step, TRAINING)
    assert not seen(ranks, 0) and not seen(ranks, 30)
    assert "rank 2 (pid " in seen(ranks, 31)
    assert "hangs: 30 s (--rank-timeout-sec) in" in seen(ranks, 32) and "its last step was 7" in seen(ranks, 33)
    ranks[2].at(8, TRAINING)
    assert "rank 0 (pid " in seen(ranks, 34)


def test_progress_is_what_counts_not_time(ranks):
    for now_sec in range(0, 1000, 20):
        ranks[1].at(7, TRAINING)
        assert not seen(ranks, now_sec)


def test_a_collective_in_which_all_wait_is_named_as_such(ranks):
    for watchdog in ranks:
        watchdog.at(9, WAITING)
    assert not seen(ranks, 0)
    assert seen(ranks, 31) == "all ranks wait for each other since step 9: a collective hangs"


def test_a_rank_that_has_left_is_not_gone_and_one_that_is_gone_is_found_sooner_when_torchrun_ends_the_job(ranks):
    ranks[1].at(3, LEFT)
    assert not seen(ranks, 0)
    assert not seen(ranks, 20, silent=[1, 2])
    ranks[0]._failing = True
    assert "rank 2 (pid " in seen(ranks, 20, silent=[1, 2])


def torchrun(corpus, fault, rank, step, *more, world_size=2, max_restarts=0):
    """How the run `job` ended with a fault on one rank, and when, by time.time()."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}",
               f"--max-restarts={max_restarts}", str(Path(__file__).parent / "faulty_rank.py"), fault, str(rank),
               str(step), *FLAGS, "--dataset", corpus, "--run-id", "job", "--model-tag", "job", *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    return done, time.time()


def said(done):
    """What the ranks themselves said of the end."""
    return [line for line in done.stderr.splitlines() if line.startswith("error")]


def losses(run_id):
    record = read_run(runs_dir() / run_id)
    return [event["loss"] for event in record.of("train")], [event["val_bpb"] for event in record.of("val")]


@pytest.mark.parametrize(("fault", "rank"), [
    ("asleep", 1), *(pytest.param(fault, rank, marks=pytest.mark.slow)
                     for fault, rank in (("asleep", 0), ("killed", 0), ("killed", 1), ("stopped", 1)))])
def test_a_rank_that_hangs_or_dies_ends_the_job_and_is_named_with_its_last_step(corpus, fault, rank):
    done, end_sec = torchrun(corpus, fault, rank, 7, "--rank-timeout-sec", "8")
    last_step_sec = read_run(runs_dir() / "job").of("train")[-1]["time_unix_sec"]
    assert done.returncode != 0 and end_sec - last_step_sec < 60, done.stderr
    assert len(said(done)) == 1, done.stderr
    [line] = said(done)
    assert f"rank {rank} (pid " in line and "its last step was 7" in line, line
    assert ("faulty_rank.py, line" in line and "hangs" in line) == (fault == "asleep"), line


def test_a_job_whose_rank_is_killed_restarts_by_itself_and_ends_with_the_losses_of_a_whole_one(corpus):
    assert main([*FLAGS, "--dataset", corpus, "--run-id", "whole", "--model-tag", "whole"]) == 0
    rank, step = random.randrange(2), random.randrange(STEPS)
    done, _ = torchrun(corpus, "killed", rank, step, max_restarts=1)
    assert done.returncode == 0, done.stderr
    [line] = said(done)
    assert f"rank {rank} (pid " in line and f"is gone; its last step was {step};" in line, line
    assert read_run(runs_dir() / "job").status == "ok"
    for found, expected in zip(losses("job"), losses("whole"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
