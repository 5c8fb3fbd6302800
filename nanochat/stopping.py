"""What stops a run from outside: signals of a person, a scheduler or a terminal, and its own time limit."""

import contextlib
import os
import signal
import time

# SLURM warns with USR1 or USR2 before its time limit, a terminal that closes sends HUP; ALRM is our own time limit
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM)
REPEAT_SEC = 1.0  # a scheduler's signal comes twice within it: from the scheduler, and passed on by torchrun
MARGIN_SEC = 30.0  # before a time limit, besides twice the longest save and step


class Stopped(BaseException):
    """Ends an evaluation when a signal asks to stop; no Exception, so that nothing on its way takes it for an error."""


class StopSignals:
    """Handles STOP_SIGNALS within a `with` block: the first asks to stop, another one ends the process.

    says: whether this process tells the person so; interrupts: whether a signal ends an evaluation (of several ranks
    all must end together, after a step); ends_at_sec: time.monotonic() of the time limit, or None. `number`: the
    signal that asked, on this rank or another, or 0."""

    def __init__(self, says, interrupts, ends_at_sec=None):
        self.number = 0
        self._says, self._interrupts, self._ends_at_sec = says, interrupts, ends_at_sec
        self._asked_at = 0.0
        self._in_evaluation = False

    def __enter__(self):
        self._previous = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        self.set_alarm(0.0, 0.0)
        return self

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def set_alarm(self, longest_step_sec, longest_save_sec):
        """Have the alarm ring early enough to end the step, and to save, before the time limit."""
        if self._ends_at_sec is not None and not self.number:
            left_sec = self._ends_at_sec - time.monotonic() - MARGIN_SEC - 2 * (longest_step_sec + longest_save_sec)
            signal.setitimer(signal.ITIMER_REAL, max(left_sec, 1e-3))

    @contextlib.contextmanager
    def evaluation(self):
        """A block that may take long; Stopped ends it when a signal comes, or has come."""
        self._in_evaluation = self._interrupts
        try:
            if self._in_evaluation and self.number:
                raise Stopped
            yield
        finally:
            self._in_evaluation = False

    def heard(self, number):
        """A rank was asked to stop; a signal that comes here too within REPEAT_SEC is the same one."""
        self.number, self._asked_at = self.number or number, self._asked_at or time.monotonic()

    def _ask(self, number, _frame):
        if not self.number:
            self.heard(number)
            if self._says:  # not print: it may be what the signal interrupted
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping cleanly; ask again to stop at once\n")
            if self._in_evaluation:
                raise Stopped
        elif number != signal.SIGALRM and time.monotonic() - self._asked_at > REPEAT_SEC:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
