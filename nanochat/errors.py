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


def command(main):
    """Wrap a script's `main(argv=None)`: a UserError becomes one line on stderr and its exit code."""

    @functools.wraps(main)
    def run(argv=None):
        _mend_streams()
        try:
            return main(argv)
        except UserError as error:
            line = " ".join(str(error).split())
            rank = os.environ.get("RANK", "0")  # under torchrun every rank may say the same
            print(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None

    return run
