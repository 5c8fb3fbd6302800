"""Training processes: one at a time, under the experiment's lock, followed to their end."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from nanochat.common import UserError, parse_json, print0, progress, write_json
from nanochat.runlog import CONFIG, METRICS, SUMMARY, check_run_id, read_run

CONSOLE = "console.txt"
PLANNED = "planned.json"  # the flags a run was asked for with


@contextlib.contextmanager
def experiment_lock(runs_dir, name, report=print0):
    """Hold the experiment's lock for the block, waiting for whoever has it; yields the open file.

    A training process inherits the file, so the lock outlives a runner that is killed beside it.
    """
    Path(runs_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(runs_dir) / f".{check_run_id(name)}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"experiment {name!r} is running (another runner, or training that one left behind): waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def run_module(module, flags):
    """Run `python -m module flags` on this console to its end. Errors: SystemExit where it ends with another code."""
    child = subprocess.Popen([sys.executable, "-m", module, *map(str, flags)])
    if code := _wait(child, child.wait):
        raise SystemExit(code)


def run_training(folder, argv, lock, title, fresh=True, environment=None, flags=()):
    """Run one training process to its end; its output goes to console.txt in the run's folder.

    fresh: whatever an earlier attempt left in the folder is removed first, else only its summary. environment:
    added to this process's. flags: kept as planned.json. Errors: UserError when the run did not start (its last
    line says why) or was stopped by a signal. A process that crashed leaves a record without summary.
    """
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        write_json(folder / PLANNED, {"flags": list(flags)})
    else:  # a process that never gets to its record must not end with the earlier one's status
        (folder / SUMMARY).unlink(missing_ok=True)
    console = folder / CONSOLE
    with open(console, "wb" if fresh else "ab") as output, progress(
            desc=title, unit="step") as bar:
        child = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, pass_fds=(lock.fileno(),),
                                 env={**os.environ, **(environment or {})})
        code = _wait(child, lambda: _follow(child, folder, bar))
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder.name} did not start: {_last_line(console)} (all of it: {console})")
    stopped = code in (-signal.SIGINT, -signal.SIGTERM) and not (folder / SUMMARY).exists()
    if stopped or read_run(folder).status == "interrupted":
        raise UserError(f"{folder.name} was stopped by a signal; give the same command again to go on")


def _wait(child, until_end):
    """What until_end() returns; on Ctrl-C or a signal to this process the child, too, saves and ends first."""
    try:
        return until_end()
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _follow(child, folder, bar):
    """Wait for the process, showing the run's steps; returns its exit code."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.wait(timeout=1.0)
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):  # no event yet, or half of one
            bar.total = bar.total or parse_json((folder / CONFIG).read_bytes()).get("num_iterations")
            with open(folder / METRICS, "rb") as file:
                file.seek(max(0, (folder / METRICS).stat().st_size - 8192))
                bar.update(parse_json(file.read().split(b"\n")[-2])["step"] - bar.n)


def _last_line(console):
    lines = console.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
