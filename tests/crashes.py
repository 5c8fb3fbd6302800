"""Save checkpoints in child processes and kill them at every moment: crashes.py FOLDER.

It is a program because it forks, with one thread. It asserts after every kill and exits with 0.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from nanochat.checkpoint import (
    find_checkpoint,
    load_model_state,
    load_optimizer_state,
    read_meta,
    remove_old,
    save_checkpoint,
)

CALLS_ON_DISK = ((torch, "save"), (os, "fsync"), (os, "replace"), (Path, "touch"), (Path, "unlink"))


def save(folder, step, value, numel=1000, keep=0):
    """Save one checkpoint as the training program does, and remove old ones."""
    weights = {"w": torch.full((numel,), value)}
    moments = {"state": {0: {"m": torch.full((9,), value)}}}
    meta = {"model_config": {}, "loop_state": {"step": step, "value": value}}
    save_checkpoint(folder, step, weights, moments, meta)
    if keep:
        remove_old(folder, step, keep)


def read(folder, step):
    """The value a checkpoint was saved with; all its parts must hold it."""
    meta = read_meta(folder, step)
    weights = load_model_state(folder, step, meta, "cpu")["w"]
    moments = load_optimizer_state(folder, step, meta, "cpu")["state"][0]["m"]
    values = {meta["loop_state"]["value"], *weights.tolist(), *moments.tolist()}
    assert len(values) == 1, f"parts of {len(values)} checkpoints"
    return values.pop()


def child(function, *arguments):
    """Fork; the child calls function(*arguments). Returns its process id."""
    process = os.fork()
    if process:
        return process
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def save_and_die(folder, at_call, after, value, keep=0):
    """Save step 2, dying before (or after) the at_call-th call that touches the disk."""
    count = 0

    def deadly(call):
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            dying = count == at_call
            if dying and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **options)
            if dying:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return counted

    for owner, name in CALLS_ON_DISK:
        setattr(owner, name, deadly(getattr(owner, name)))
    save(folder, 2, value, keep=keep)


def kill_at_every_call(folder):
    """Step 1 is there; step 2 is saved for the first time, then over an older one."""
    save(folder, 1, 1.0)
    n_kills = 0
    for after in (False, True):
        for older in (None, 2.0):
            for at_call in range(1, 1000):
                for path in folder.glob("*_000002*"):
                    path.unlink()
                if older:
                    save(folder, 2, older)
                _, status = os.waitpid(child(save_and_die, folder, at_call, after, 3.0), 0)
                if status == 0:  # there were fewer calls
                    break
                assert os.WTERMSIG(status) == signal.SIGKILL, status
                n_kills += 1
                assert read(folder, 1) == 1.0
                latest = find_checkpoint(folder)
                assert read(folder, latest) in ((2.0, 3.0) if latest == 2 else (1.0,))
                save(folder, 2, 4.0)
                assert read(folder, 2) == 4.0
                assert not list(folder.glob(".*")), "a killed save left a torn file for good"
    assert n_kills > 40, n_kills


def kill_while_old_ones_go(folder):
    """Step 2 takes the place of step 1."""
    n_kills = 0
    for after in (False, True):
        for at_call in range(1, 1000):
            save(folder, 1, 1.0)
            _, status = os.waitpid(child(save_and_die, folder, at_call, after, 2.0, 1), 0)
            latest = find_checkpoint(folder)
            assert read(folder, latest) == latest
            save(folder, 3, 3.0, keep=1)
            left = {path.name.split("_")[1][:6] for path in folder.iterdir()}
            assert left == {"000003"}, f"older ones are still there: {left}"
            for path in folder.glob("*_00000*"):
                path.unlink()
            if status == 0:
                break
            n_kills += 1
    assert n_kills > 20, n_kills


def save_for_ever(folder, numel, saved):
    """Save step after step, writing a byte to the pipe `saved` after each."""
    step = find_checkpoint(folder)
    while True:
        step += 1
        save(folder, step, float(step), numel, keep=2)
        os.write(saved, b".")


def kill_at_random_moments(folder, n_kills=15, numel=1_000_000):
    save(folder, 1, 1.0)
    latest = 1
    for _ in range(n_kills):
        reader, writer = os.pipe()
        process = child(save_for_ever, folder, numel, writer)
        os.close(writer)
        assert os.read(reader, 1), "the child ended before it saved anything"
        time.sleep(random.uniform(0.01, 0.15))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        os.close(reader)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        before, latest = latest, find_checkpoint(folder)
        assert latest > before and read(folder, latest) == latest


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_every_call(Path(sys.argv[1]) / "calls")
    kill_while_old_ones_go(Path(sys.argv[1]) / "old")
    kill_at_random_moments(Path(sys.argv[1]) / "moments")
