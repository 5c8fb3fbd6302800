"""Every writer killed at random moments, and several of each at once.

    PYTHONPATH=tests python tests/faults/kills.py FOLDER SEED KILLS

A process of its own, because it forks. It asserts after every kill and ends with exit code 0.
"""

import contextlib
import os
import random
import signal
import sys
from pathlib import Path

import torch
from crashes import child
from tqdm import tqdm
from writers import ONCE, WRITERS

N_AT_ONCE, LONGEST_SEC = 4, 300  # a writer that waits for ever is ended


def write_in_time(write, folder):
    signal.alarm(LONGEST_SEC)
    write(folder, 2)


def write_and_die(write, folder, at_call, writer):
    """Write 2, and die at that call of any function, Python's own in C too; else tell the pipe how many there were."""
    left = at_call

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    write_in_time(write, folder)
    sys.setprofile(None)
    os.write(writer, str(at_call - left).encode())


def kill_at_random_moments(folder, seed, n_kills):
    """After a kill the value is the old or the new one, whole, and the next writer is neither blocked nor misled."""
    source, n_killed = random.Random(seed), 0
    for name, (write, read) in WRITERS.items():
        n_calls = None
        for i in range(n_kills + 1):  # the first counts the calls
            here = folder / f"{name}{i}"
            here.mkdir(parents=True)
            write(here, 1)
            reader, writer = os.pipe()
            process = child(write_and_die, write, here, source.randint(1, n_calls) if n_calls else 1 << 60, writer)
            os.close(writer)
            with open(reader) as told:
                counted = told.read()
            _, status = os.waitpid(process, 0)
            n_calls = n_calls or int(counted)
            n_killed += os.WIFSIGNALED(status)
            after = readable(name, read, here)
            assert after == 2 if status == 0 else after in (1, 2) and i, (name, i, status, after)
            if name not in ONCE or after == 1:
                write(here, 2)
            assert read(here) == 2, (name, i)
    print(f"{n_killed} of {n_kills * len(WRITERS)} were killed before their end")
    assert n_killed > 0.6 * n_kills * len(WRITERS), "too many were done before they could be killed"


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
        processes = [child(write_in_time, write, here) for _ in range(N_AT_ONCE)]
        failed = sum(os.waitpid(process, 0)[1] != 0 for process in processes)
        assert failed == (N_AT_ONCE - 1 if name in ONCE else 0) and read(here) == 2, (name, failed)
        assert not list(here.rglob("*.tmp")), name


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread of its own before a fork
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        kill_at_random_moments(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
        write_at_once(Path(sys.argv[1]))
