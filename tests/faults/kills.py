"""Every writer killed at random moments, and several of each at once.

    PYTHONPATH=tests python tests/faults/kills.py FOLDER SEED KILLS

A process of its own, because it forks. It asserts after every kill and ends with exit code 0.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from crashes import child
from tqdm import tqdm
from writers import ONCE, WRITERS

N_AT_ONCE = 4


def started(write, folder, value):
    """A child that says that it begins, then writes: its process id."""
    reader, writer = os.pipe()

    def begin():
        os.write(writer, b".")
        write(folder, value)

    process = child(begin)
    os.close(writer)
    assert os.read(reader, 1)
    os.close(reader)
    return process


def kill_at_random_moments(folder, seed, n_kills):
    """After a kill the value is the old or the new one, whole, and the next writer is neither blocked nor misled."""
    source, n_killed = random.Random(seed), 0
    for name, (write, read) in WRITERS.items():
        duration_sec = 0.0
        for i in range(n_kills + 1):  # the first is timed
            here = folder / f"{name}{i}"
            here.mkdir(parents=True)
            write(here, 1)
            begun = time.monotonic()
            process = started(write, here, 2)
            if i:
                time.sleep(source.uniform(0, 0.8 * duration_sec))
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            duration_sec = duration_sec or time.monotonic() - begun
            n_killed += os.WIFSIGNALED(status)
            assert i or status == 0, name
            after = readable(name, read, here)
            assert after in (1, 2) if i else after == 2, (name, i, after)
            if name not in ONCE or after == 1:
                write(here, 2)
            assert read(here) == 2, (name, i)
    print(f"{n_killed} of {n_kills * len(WRITERS)} were killed before their end")
    assert n_killed > n_kills * len(WRITERS) / 8, "nearly all were done before they could be killed"


def readable(name, read, folder):
    """The value; 1 where a tokenizer's files say that they do not belong together, as they may."""
    try:
        return read(folder)
    except ValueError as error:
        assert name == "tokenizer" and "different tokenizers" in str(error), (name, error)
        return 1


def write_at_once(folder):
    """Several processes write the same: it is there, whole, and none fails but of a row that is there already."""
    for name, (write, read) in WRITERS.items():
        if name in ("record", "checkpoint"):  # have an owner: the second is refused (test_base_train)
            continue
        here = folder / f"{name} at once"
        here.mkdir(parents=True)
        write(here, 1)
        processes = [child(write, here, 2) for _ in range(N_AT_ONCE)]
        failed = sum(os.waitpid(process, 0)[1] != 0 for process in processes)
        assert failed == (N_AT_ONCE - 1 if name in ONCE else 0) and read(here) == 2, (name, failed)
        assert not list(here.rglob("*.tmp")), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own before a fork
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        kill_at_random_moments(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        write_at_once(Path(sys.argv[1]))
