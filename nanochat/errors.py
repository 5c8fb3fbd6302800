"""Errors that the user can mend, and how a command reports them: one line on stderr and an exit code."""

import contextlib
import functools
import os
import sys


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong and what to do.

    Our own invariants are asserted.
    """

    exit_code = 2


def warn(line):
    """One line on stderr, wherever that goes."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def say(*values, **options):
    """Print at once. Where the output is gone (a pipe that closed, a full disk) a warning says so, and what follows
    goes nowhere: a program that works for hours does not die of its console."""
    try:
        print(*values, **{"flush": True, **options})
    except (OSError, ValueError) as error:
        warn(f"the output cannot be written ({error}); nothing more is printed")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the process's own from here on)


def _mend_streams():
    """Streams that were closed lead nowhere, lest a file opened later gets their number; an ASCII terminal shows what
    it can of other text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _flush():
    """Write what the streams hold; where that fails, forget it: Python's end would change the exit code for it."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError) as error:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (the process's own from here on)
            warn(f"the output could not all be written ({error})")


def command(main):
    """Wrap a script's `main(argv=None)`: a UserError, and what the machine refuses, become one line on stderr and an
    exit code."""

    @functools.wraps(main)
    def run(argv=None):
        _mend_streams()
        try:
            result = main(argv)
            _flush()
            return result
        except KeyboardInterrupt:
            line, exit_code = "interrupted; what was whole is kept", 130
        except UserError as error:
            line, exit_code = str(error), error.exit_code
        except (OSError, MemoryError, RuntimeError) as error:
            line, exit_code = _refused_by_the_machine(error), UserError.exit_code
            if line is None:
                raise
        rank = os.environ.get("RANK", "0")  # under torchrun every rank may say the same
        with contextlib.suppress(OSError):
            print("error: " if rank == "0" else f"error (rank {rank}): ", " ".join(line.split()), sep="",
                  file=sys.stderr)
        _flush()
        raise SystemExit(exit_code)

    return run


def _refused_by_the_machine(error):
    """In words: a file, memory, or another rank that is gone; None for a fault of the program. torch reports the last
    two as RuntimeErrors, known by their words."""
    said = str(error)
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        reason = (said.strip().splitlines() or ["no more is to be had"])[0][:200]
        return (f"out of memory ({reason}); lower --device-batch-size, --max-seq-len or --depth, or end what else runs "
                "here")
    if isinstance(error, OSError):
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}; mend that, or name another"
    lost = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in said for word in lost):
        late = any(word in said.lower() for word in ("timed out", "timeout", "time-out"))
        which = "another rank did not come to a collective within its time limit" if late else "another rank is gone"
        return f"{which}: see what it said above; go on with --resume-from-step latest"
    return None
