"""What people and machines do to the programs, each in a process of its own.

    PYTHONPATH=tests python tests/faults/situations.py FOLDER

Every situation of situation_list.py runs in a fork of this process, in a fresh copy of one made world, without rights
that a file does not give. It is fine, refused in one line, or a fault: a traceback, a hang, wrong in silence, or lost.
"""

import argparse
import contextlib
import ctypes
import importlib
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
from situation_list import FINE, PROGRAMS, REFUSED, make_world, situations

TRACEBACK, HANG, SILENT, LOST = "traceback", "hang", "wrong in silence", "lost"
CLASSES = (FINE, REFUSED, TRACEBACK, HANG, SILENT, LOST)
CPU_SEC, IDLE_SEC, ADDRESS_SPACE = 30, 20, 24 << 30  # beyond these it hangs; what it may have


def without_rights():
    """root obeys the permissions of files from here on, in this process."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, none)


def child(function, world, said):
    """Fork: function() with its output in the files `said`.out, `said`.err; returns the process id."""
    process = os.fork()
    if process:
        return process
    os.setsid()
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, f"{said}.out", os.O_RDWR | os.O_CREAT | os.O_TRUNC),
                                (2, f"{said}.err", os.O_RDWR | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(path, flags, 0o600), number)
    os.chdir(world)
    code = 1
    try:
        code = function()
    except SystemExit as stopped:
        code = stopped.code
        if isinstance(code, str):
            os.write(2, code.encode())
            code = 1
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(2, traceback.format_exc().encode(errors="replace"))
    with contextlib.suppress(BaseException):
        threading._shutdown()  # as at an interpreter's end: waits for threads
    os._exit(finished(code))


def finished(code):
    """The exit code, once what is left has been written: Python's own end says 120 where that fails."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            return 120
    return code if isinstance(code, int) else 0


def play(situation):
    """In the child: the situation's environment, then the program."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SEC, CPU_SEC + 1))
    without_rights()
    for name, value in situation.env.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    sys.argv = [situation.program, *situation.argv]
    if situation.within:
        situation.within()
    for number, name in enumerate(("stdin", "stdout", "stderr")):  # as at Python's start
        setattr(sys, name, None)
        with contextlib.suppress(OSError):
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding=situation.encoding, closefd=False))
    return importlib.import_module(situation.program).main(list(situation.argv))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(situation, master, world):
    """(class, what it said) of one situation."""
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(master, world, symlinks=True)
    if situation.change:
        situation.change(world)
    kept = ("cache/runs/done", "cache/base_checkpoints/done")
    before = {name: contents(world / name) for name in kept} if situation.keep else {}
    said = world.with_name("said")
    status = ended(child(lambda: play(situation), world, said))
    os.chmod(world, 0o755)
    return classify(situation, status, Path(f"{said}.err").read_text(errors="replace"), world, before)


def ended(process):
    """The exit status of a child, negative for the signal that ended it; SIGXCPU too when it waits for ever."""
    cpu, since_sec = None, time.monotonic()
    while True:
        found, state = os.waitpid(process, os.WNOHANG)
        if found:
            break
        with contextlib.suppress(OSError):
            used = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if used[0] == "R" or used[11:15] != cpu:
                cpu, since_sec = used[11:15], time.monotonic()
        if time.monotonic() - since_sec > IDLE_SEC:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return -signal.SIGXCPU
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it left running
    return os.waitstatus_to_exitcode(state)


def classify(situation, status, error, world, before):
    if status == -signal.SIGXCPU:
        return HANG, error
    if any(contents(world / name) != files for name, files in before.items()):
        return LOST, error
    lines = [line for line in error.splitlines() if line.startswith(("error: ", "error (rank")) or ": error: " in line]
    is_refused = status in (2, 3, 130) and (len(lines) == 1 or (situation.mute and not error))
    if "Traceback" in error or "Exception ignored" in error or not (status == 0 or is_refused or status > 128):
        return TRACEBACK, f"exit {status}: {error}"
    right = situation.expect in (None, FINE if status == 0 else REFUSED)
    if not right or (status == 0 and situation.check and not situation.check(world)):
        return SILENT, f"exit {status}, expected {situation.expect}: {error}"
    return (FINE if status == 0 else REFUSED), error


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="situations with this in their names")
    parser.add_argument("--every", type=int, default=1, help="one of so many")
    parser.add_argument("--first", type=int, default=0, help="leave out so many")
    parser.add_argument("-v", action="store_true", help="say what each said")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for program in PROGRAMS:
        importlib.import_module(program)  # once for all children
    master, world = args.folder.absolute() / "master", args.folder.absolute() / "world"
    world.mkdir(parents=True)
    code = os.waitpid(child(lambda: make_world(world), world, args.folder.absolute() / "made"), 0)[1]
    assert code == 0, (args.folder / "made.err").read_text()
    shutil.copytree(world, master, symlinks=True)
    counts, faults, started = Counter(), [], time.monotonic()
    chosen = [situation for situation in situations() if args.only in situation.name]
    chosen = chosen[args.first::args.every]
    for situation in chosen:
        found, said = run(situation, master, world)
        counts[found] += 1
        if args.v or found not in (FINE, REFUSED):
            print(f"{found}: {situation.name}: {' '.join(said.split())[-1500 if args.v else -600:]}", flush=True)
        if found not in (FINE, REFUSED):
            faults.append(situation.name)
    print(f"{len(chosen)} situations in {time.monotonic() - started:.0f} s: "
          + ", ".join(f"{counts[name]} {name}" for name in CLASSES))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
