"""Errors that the user can mend, and how a command reports them: one line on stderr and an exit code."""

import functools
import os
import sys


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong and what to do.

    Our own invariants are asserted.
    """

    exit_code = 2


def command(main):
    """Wrap a script's `main(argv=None)`: a UserError becomes one line on stderr and its exit code."""

    @functools.wraps(main)
    def run(argv=None):
        try:
            return main(argv)
        except UserError as error:
            line = " ".join(str(error).split())
            rank = os.environ.get("RANK", "0")  # under torchrun every rank may say the same
            print(f"error: {line}" if rank == "0" else f"error (rank {rank}): {line}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None

    return run
