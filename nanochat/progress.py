"""What long work says while it goes on, and at its end: a bar on a terminal, a line every 10 % in a log, nothing where
it is to be quiet; then the command that a person would want next."""

import contextlib
import os
import shlex
import sys
import time

from tqdm import tqdm

from nanochat.ranks import print0

QUIET = "NANOCHAT_QUIET"  # in the environment, so that the programs that one starts are quiet, too
STAGE = "NANOCHAT_STAGE"  # in the environment of a program that another runs as one of its stages, and goes on after
QUIET_HELP = "no progress: say what is made, and what is wrong"
APART_SEC = 1.0  # lines of short work are at least so far apart: most of it needs none
SILENCE_SEC = 600.0  # after so long a line says that the work goes on


def progress(iterable=None, *, total=None, desc="", unit="it", unit_scale=False, shown=True):
    """A tqdm bar, or what takes its place in a log (the same methods), around `iterable` or moved by update().

    shown False: nothing is shown, as on ranks above 0."""
    if is_quiet() or not shown:
        return tqdm(iterable, total=total, disable=True)
    if sys.stderr.isatty():
        return Bar(iterable, total=total, desc=desc, unit=unit, unit_scale=unit_scale, mininterval=0.5)
    return _Lines(iterable, total, desc, unit, unit_scale)


def is_quiet():
    return bool(os.environ.get(QUIET))


def be_quiet(asked=True):
    """From here on nothing of this process and of those that it starts shows progress, where that is asked for."""
    if asked:
        os.environ[QUIET] = "1"


def say_next(module, *words):
    """Name the next useful command, as a shell takes it; not in a stage, after which there is another program's own."""
    if not os.environ.get(STAGE):
        print0(f"next: {shlex.join(['python', '-m', module, *map(str, words)])}")


class Bar(tqdm):
    """A bar whose terminal may go away. tqdm would keep its lock for ever then, and other threads wait for it."""

    def display(self, *arguments, **options):
        return self._drawn(super().display, *arguments, **options)

    def clear(self, nolock=False):
        with contextlib.nullcontext() if nolock else self._lock:
            self._drawn(super().clear, nolock=True)

    def close(self):
        self._drawn(super().close)

    def _drawn(self, draw, *arguments, **options):
        try:
            return draw(*arguments, **options)
        except (OSError, ValueError):
            self.disable = True  # as in a log that nobody reads
            return None


class Tenths:
    """When it is time for a line: at every tenth of the work, at least apart_sec after the last, and after
    SILENCE_SEC."""

    def __init__(self, apart_sec=APART_SEC):
        self.apart_sec, self._tenth, self._at = apart_sec, 0, time.monotonic()

    def is_due(self, n, total):
        """Whether to say that n of total (None: not known) are done; a tenth is due once."""
        now, tenth = time.monotonic(), 10 * n // total if total else 0
        waited = now - self._at
        if waited < SILENCE_SEC and (tenth <= self._tenth or waited < self.apart_sec):
            return False
        self._tenth, self._at = tenth, now
        return True


class _Lines:
    """As a bar, for a log."""

    disable = False

    def __init__(self, iterable, total, desc, unit, unit_scale):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.total, self.desc, self.unit, self.unit_scale = iterable, total, desc, unit, unit_scale
        self.n, self._began, self._tenths = 0, time.monotonic(), Tenths()

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, n=1):
        self.n += n
        if self._tenths.is_due(self.n, self.total):
            with contextlib.suppress(OSError, ValueError):
                print(self._line(), file=sys.stderr, flush=True)

    def set_description(self, desc):
        self.desc = desc

    def refresh(self):
        """A log has nothing to draw anew."""

    close = refresh

    def _line(self):
        done, total = (tqdm.format_sizeof(n) if self.unit_scale else f"{n:,}" for n in (self.n, self.total or 0))
        if not self.total:
            return f"{self.desc}: {done} {self.unit}"
        left = (time.monotonic() - self._began) * max(0, self.total - self.n) / max(1, self.n)
        return (f"{self.desc}: {self.n / self.total:.0%} ({done}/{total} {self.unit}), about "
                f"{tqdm.format_interval(left)} left")
