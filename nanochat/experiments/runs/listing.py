"""What runs there are: state, age and figures of each, read from its record. Takes no lock and writes nothing."""

import fnmatch
import math
import os
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nanochat.common import UserError, is_owned, open_binary, parse_json
from nanochat.runlog import CONFIG, METRICS, SUMMARY, RunRecord, figures_of, read_run
from nanochat.target import BEFORE_THE_CLOCK, check_target
from nanochat.target import METRICS as TARGET_METRICS

STATES = ("running", "finished", "stopped", "failed", "stale")
RECENT_SEC = 900.0  # a run whose process cannot be seen from here runs while its record is younger
_TAIL_BYTES = 1 << 16  # of a record's events, among which is the last one
_STATE_OF_STATUS = {"ok": "finished", "interrupted": "stopped"}  # of any other status: failed
_HEADINGS = ("run", "state", "age", "steps", "tokens", "min val_bpb", "tok/s", "target")


@dataclass(frozen=True)
class Run:
    """A run as seen from outside. state: one of STATES; age_sec: since its record was last written.

    stopped: by a signal, with a checkpoint to go on from; stale: it left no end, and no process writes it."""

    record: RunRecord = field(repr=False)
    state: str
    age_sec: float

    @property
    def run_id(self):
        return self.record.run_id

    @property
    def is_over(self):
        return self.state != "running"

    @property
    def flags(self):
        """The flags that the run was started with, by name; empty where the record does not say."""
        flags = self.record.config.get("flags")
        return flags if isinstance(flags, dict) else {}

    @property
    def seed(self):
        return number(self.record.config.get("seed"))

    @property
    def num_iterations(self):
        """Steps that the run is to have, or None."""
        return number(self.record.config.get("num_iterations"))

    @cached_property
    def figures(self):
        """As summary.json has them; of a run without one, so far. Errors: UserError for events without numbers."""
        if self.record.summary is not None:
            return self.record.summary
        name, threshold = self.flags.get("target_metric_name"), number(self.flags.get("target_metric_threshold"))
        try:
            check_target(name if name in TARGET_METRICS else "val_bpb", threshold)
        except UserError:  # it has none, or one that no run can have
            threshold = None
        return figures_of(self.record.events, name, threshold)

    def figure(self, name):
        """One of the figures, None where it is unknown or no number."""
        return number(self.figures.get(name))

    def cells(self):
        """The row of a table, as words."""
        steps, of = self.figure("steps"), self.num_iterations
        speed, bits, tokens = (self.figure(name) for name in ("tok_per_sec_median", "min_val_bpb", "tokens"))
        state = self.state if self.state != "failed" else f"failed ({self.record.status[:20]})"
        return (self.record.folder.name, state, duration(self.age_sec),
                f"{steps or 0:,.0f}" + (f"/{of:,.0f}" if of else ""), f"{(tokens or 0) / 1e6:,.2f}M",
                "·" if bits is None else f"{bits:.4f}", "·" if speed is None else f"{speed:,.0f}", self._target())

    def _target(self):
        threshold = self.figure("target_metric_threshold")
        if threshold is None:
            return "·"
        measured, extrapolated = (self.figure(f"time_to_target_sec_{how}") for how in ("measured", "extrapolated"))
        when = ("not reached" if measured is None and extrapolated is None else
                f"about {extrapolated:,.0f} s" if measured is None else
                f"{measured:,.0f} s" if measured else BEFORE_THE_CLOCK)
        return f"{threshold:g}: {when}"


def read_state(folder, locks_dir, skip_curves=False, now_unix_sec=None):
    """The Run of a record's folder. locks_dir: where running processes say what they write.

    Errors: UserError, as read_run."""
    owned = is_owned(Path(locks_dir) / f"run.{Path(folder).absolute().name}")  # first: a run ends, then lets it go
    record = read_run(folder, skip_curves)
    age_sec = max(0.0, (time.time() if now_unix_sec is None else now_unix_sec) - _written_unix_sec(record.folder))
    if record.summary is not None:
        return Run(record, _STATE_OF_STATUS.get(record.status, "failed"), age_sec)
    return Run(record, "running" if (age_sec < RECENT_SEC if owned is None else owned) else "stale", age_sec)


def list_runs(runs_dir, locks_dir, patterns=(), states=(), newest=None):
    """(Runs, the youngest record first, [(name, why)] of records that cannot be read).

    patterns: of ids, as a shell's (all when empty); states: of those that are shown; newest: so many at most."""
    runs, broken = [], []
    folders = [path for path in sorted(Path(runs_dir).glob("*")) if path.is_dir() and not path.name.startswith(".")]
    for folder in folders:
        if patterns and not any(fnmatch.fnmatchcase(folder.name, pattern) for pattern in patterns):
            continue
        try:
            run = read_state(folder, locks_dir, skip_curves=True)
            run.cells()  # what it needs of the events is read now, while an error has its place
        except (UserError, OSError) as error:
            broken.append((folder.name, " ".join(str(error).split())))
            continue
        if not states or run.state in states:
            runs.append(run)
    return sorted(runs, key=lambda run: (run.age_sec, run.run_id))[:newest], broken


def table(rows, headings=_HEADINGS, numbers=slice(2, -1)):
    """Lines of a table for the terminal; the columns `numbers` are set to the right."""
    rows = [[printable(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    to_right = range(len(widths))[numbers]
    return ["  ".join(cell.rjust(width) if at in to_right else cell.ljust(width)
                      for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]


def duration(seconds):
    """A time in one unit, as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value):
    """The value if it is a finite number (not a bool), else None: records are files that people edit."""
    return value if type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value) else None


def printable(text):
    """A record may be a stranger's: no text of it moves the cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _written_unix_sec(folder):
    """When a record was last written: by its files, or by its last event where that is older (the files are a copy)."""
    files = [path for name in (CONFIG, METRICS, SUMMARY) if (path := folder / name).exists()]
    written = max(path.stat().st_mtime for path in files)
    try:
        with open_binary(folder / METRICS) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            stamp = number(parse_json(file.read().split(b"\n")[-2]).get("time_unix_sec"))
    except (OSError, IndexError, ValueError, AttributeError):  # no events, or no such one
        stamp = None
    return written if stamp is None else min(written, stamp)
