"""The record of a run: config.json, metrics.jsonl and summary.json in one folder.

This module has the writer, the only reader, and the metrics of summary.json. `step` in every
event is the number of completed optimizer steps. A checkpoint at step s therefore contains
everything up to s, and a run resumed from it supersedes the later events.
"""

import contextlib
import math
import os
import statistics
import time
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import (
    UserError,
    check_name,
    json_bytes,
    parse_json,
    read_json,
    warn,
    write_json,
)
from nanochat.target import METRICS as TARGET_METRICS
from nanochat.target import evaluations_of, time_to_target

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
UNTIMED_STEPS = 11  # the first steps of a run compile; the training clock leaves them out

_Step = namedtuple("_Step", "step tokens train_time_sec tok_per_sec dt_ms")


class RunLog:
    """The writer of a run's record.

    sinks: functions of (kind, fields), such as the console and wandb, that receive the events of
    the file; one that fails is removed with a warning. locks: RunLocks that close() releases.
    """

    def __init__(self, folder, sinks=(), locks=()):
        self.folder = Path(folder)
        self.sinks = list(sinks)
        self.locks = list(locks)
        self._file = open(self.folder / METRICS, "ab")  # noqa: SIM115 (closed by close())

    @classmethod
    def create(cls, runs_dir, run_id, config, sinks=(), locks=()):
        """Start the record of a new run. Raise UserError if the id is taken or not a file name."""
        folder = check_new_run(runs_dir, run_id)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS).unlink(missing_ok=True)  # of a start that failed
            write_json(folder / CONFIG, _record(run_id=run_id, **config))
        return cls(folder, sinks, locks)

    @classmethod
    def resume(cls, runs_dir, run_id, step, sinks=(), locks=(), **fields):
        """Continue a record at `step` with a `resume` event of these fields.

        An incomplete last line, left by a kill, is removed. Raise UserError if the record is
        missing or damaged; warn if it ends before `step`.
        """
        folder = Path(runs_dir) / check_run_id(run_id)
        if not (folder / CONFIG).exists():
            raise UserError(f"run {run_id!r} has no record in {runs_dir}; start it without "
                            "--resume-from-step")
        with _writing(folder):
            (folder / SUMMARY).unlink(missing_ok=True)
            steps = [event.get("step", 0) for event in read_run(folder).of("train")]
            _remove_incomplete_line(folder / METRICS)
        if max(steps, default=0) < step:
            warn(f"{folder / METRICS} ends before the checkpoint of step {step}; the curves of "
                 "the run lack the events in between")
        log = cls(folder, sinks, locks)
        log.event("resume", step=step, **fields)
        return log

    def event(self, kind, **fields):
        """Append one event. Non-finite numbers become null and are named in `nonfinite`."""
        with _writing(self.folder):
            event = _record(kind=kind, time_unix_sec=time.time(), **fields)
            self._file.write(json_bytes(event) + b"\n")
            self._file.flush()
        for sink in list(self.sinks):
            try:
                sink(kind, fields)
            except Exception as error:  # a closed terminal or a lost service must not end the run
                self.sinks.remove(sink)
                warn(f"{type(sink).__name__} failed ({' '.join(str(error).split())}) and is not "
                     f"used any more; the run continues, its record is {self.folder}")

    def before_checkpoint(self):
        """Write the events to the disk: no checkpoint may exist without them.

        Raise UserError if that fails or if another process has taken a folder of this run.
        """
        for lock in self.locks:
            lock.check()
        self._sync()

    def finish(self, **summary):
        """Write summary.json: it exists if the run ended, and its `status` says how."""
        self._sync()
        with _writing(self.folder):
            write_json(self.folder / SUMMARY, _record(run_id=self.folder.name, **summary))

    def close(self):
        """Close the file and the sinks, and release the locks."""
        with contextlib.suppress(OSError):  # a full disk: the last event is lost
            self._file.close()
        for sink in self.sinks:
            with contextlib.suppress(Exception):
                sink.close()
        for lock in self.locks:
            lock.release()

    def _sync(self):
        with _writing(self.folder):
            os.fsync(self._file.fileno())


@dataclass(frozen=True)
class RunRecord:
    """The record of a run. `events` leaves out events that a resume superseded."""

    folder: Path
    config: dict
    events: list = field(repr=False)
    summary: dict | None

    @property
    def run_id(self):
        return self.config["run_id"]

    @property
    def status(self):
        """Return the status: `ok`, the reason why the run stopped, or `unfinished` (no summary)."""
        return self.summary["status"] if self.summary else "unfinished"

    def of(self, kind):
        """Return the events of one kind (train, val, core, sample, checkpoint, ...) in order."""
        return [event for event in self.events if event["kind"] == kind]


def read_run(folder, skip_curves=False):
    """Read the record in a folder. Raise UserError that names the missing or damaged file.

    skip_curves: do not read the events of a run that has a summary.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG, "this is not the record of a run; list runs with python -m "
                       "scripts.runs")
    summary = None
    if (folder / SUMMARY).exists():
        summary = read_json(folder / SUMMARY, "fix or delete it")
    if "run_id" not in config or (summary and "status" not in summary):
        raise UserError(f"{folder} is not the record of a run: {CONFIG} needs a run_id and "
                        f"{SUMMARY} a status")
    if skip_curves and summary:
        return RunRecord(folder, config, [], summary)
    return RunRecord(folder, config, _effective(_read_events(folder / METRICS)), summary)


def numbers_of(events, kind, *names):
    """Return tuples of the named numbers, one per event of a kind; None: not finite.

    Raise UserError if an event lacks a number.
    """
    rows = []
    for event in events:
        if event["kind"] != kind:
            continue
        for name in names:
            if not isinstance(event.get(name, ""), (int, float, type(None))):
                raise UserError(f"the {kind} event of step {event.get('step')} in a {METRICS} has "
                                f"no number {name}; fix or remove that line")
        rows.append(tuple(event[name] for name in names))
    return rows


def find_run(name, runs_dir):
    """Read the record of a run by its id (a folder in `runs_dir`) or by the path of its folder."""
    for folder in (Path(name), Path(runs_dir) / name):
        if (folder / CONFIG).exists():
            return read_run(folder)
    raise UserError(f"no run {name!r}: it is neither the folder of a run nor an id in {runs_dir}; "
                    "list the ids with python -m scripts.runs")


def check_new_run(runs_dir, run_id):
    """Return the folder for a new run. Raise UserError if the id is taken or not a file name."""
    folder = Path(runs_dir) / check_run_id(run_id)
    if (folder / CONFIG).exists():
        raise UserError(f"run id {run_id!r} is taken ({folder}); choose another --run-id, resume "
                        "the run with --resume-from-step latest, or delete the folder")
    return folder


def check_run_id(run_id):
    """Return `run_id` if it can name a folder, else raise UserError."""
    return check_name("run id", run_id)


# --- metrics of a run ----------------------------------------------------------------------------


def curves_of(events):
    """Return the numbers of the training steps, the values of val_bpb and those of CORE.

    Raise UserError if an event lacks a number.
    """
    train = [_Step(*numbers) for numbers in numbers_of(events, "train", *_Step._fields)]
    return train, *([e.metric for e in evaluations_of(events, name)] for name in TARGET_METRICS)


def figures_of(events, target_metric_name=None, target_metric_threshold=None):
    """Return the metrics of summary.json from a run's events; None: not measured or not finite."""
    train, bits, core = curves_of(events)
    timed = [step for step in train if step.step > UNTIMED_STEPS]
    errors = [event.get("val_bpb_se") for event in events if event["kind"] == "val"]
    metrics = {
        "steps": train[-1].step if train else 0,
        "tokens": train[-1].tokens if train else 0,
        "min_val_bpb": min((value for value in bits if value is not None), default=None),
        "final_val_bpb": bits[-1] if bits else None,
        "final_val_bpb_se": errors[-1] if errors else None,
        "core_metric": core[-1] if core else None,
        "tok_per_sec_median": _median(step.tok_per_sec for step in timed),
        "dt_median_ms": _median(step.dt_ms for step in timed),
        "train_time_sec": train[-1].train_time_sec if train else 0.0,
    }
    if target_metric_threshold is None:
        return {**metrics, "target_metric_name": None, "target_metric_threshold": None,
                "time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": None}
    evaluations = evaluations_of(events, target_metric_name)
    target = time_to_target(evaluations, target_metric_name, target_metric_threshold)
    return {**metrics, **target.summary_fields()}


def _median(values):
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# --- changes between a run and its resumption ----------------------------------------------------


def changes(before, now, flags):
    """Return [(name, was, is)] of the settings that change a run's numbers.

    before, now: dicts with `flags`, `versions` and `device`, as in config.json and `resume`
    events. flags: the flags to compare. Settings that one of the two lacks count as equal.
    """
    was, current = _settings(before, flags), _settings(now, flags)
    return [(name, was[name], current[name]) for name in was
            if None not in (was[name], current[name]) and was[name] != current[name]]


def in_words(changed):
    """Return the result of `changes` as text: name was X, is Y; ..."""
    return "; ".join(f"{name} was {was}, is {now}" for name, was, now in changed)


def part_of(values, name):
    """Return the dict of that name in a dict; an empty one if there is none."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _settings(segment, flags):
    """Return the settings that change numbers.

    The commit is left out: most change no number, and a fix may be why a run is resumed. So is
    the number of ranks: it changes rounding only, and a preempted job gets what is available.
    """
    device, versions, given = (part_of(segment, name) for name in ("device", "versions", "flags"))
    settings = {"device": device.get("name")}
    settings |= {name: device.get(name) for name in ("compute_dtype", "triton_interpreted")}
    settings |= {name: versions.get(name) for name in ("torch", "triton")}
    return settings | {f"--{name.replace('_', '-')}": given.get(name) for name in flags}


# --- events --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the run's record in {folder} ({error.strerror or error}); "
                        "free some space there, then resume with --resume-from-step latest"
                        ) from None


def _effective(events):
    """Return the events that no later `resume` event supersedes."""
    kept = []
    for event in events:
        if event["kind"] == "resume":
            kept = [old for old in kept if _survives(old, event["step"])]
        kept.append(event)
    return kept


def _survives(event, resumed_step):
    """Return whether an event is part of the checkpoint of `resumed_step`.

    The checkpoint of a step is saved before the evaluations of that step, which a resumed run
    repeats. Its event can come some steps later, and names the step it belongs to.
    """
    step = event.get("saved_step", event.get("step", 0))
    if step == resumed_step:
        return event["kind"] in ("train", "checkpoint", "resume")
    return step < resumed_step


def _read_events(path):
    if not path.exists():
        return []
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last is empty, or cut off by a kill
        try:
            event = parse_json(line)
            is_event = type(event["kind"]) is str and type(event.get("step", 0)) is int
        except (ValueError, TypeError, KeyError):
            is_event = False
        if not is_event or (event["kind"] == "resume" and "step" not in event):
            raise UserError(f"{path}, line {number}: not an event; fix or remove that line")
        events.append(event)
    return events


def _remove_incomplete_line(path):
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)


def _record(**values):
    """Return values that JSON can hold; null and an entry in `nonfinite` for non-finite floats."""
    nonfinite = []
    values = _finite(values, "", nonfinite)
    return {**values, "nonfinite": nonfinite} if nonfinite else values


def _finite(value, name, nonfinite):
    if isinstance(value, dict):
        return {key: _finite(item, f"{name}.{key}" if name else str(key), nonfinite)
                for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{name}[{i}]", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value
