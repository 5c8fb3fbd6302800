"""The record of a run: config.json, metrics.jsonl and summary.json in one folder.

`step` in every event is the number of completed optimizer steps. A checkpoint at step s therefore
contains everything up to s, and a run resumed from it supersedes the later events.
"""

import contextlib
import functools
import math
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import (
    UserError,
    check_name,
    is_owned,
    json_bytes,
    locks_dir,
    newest_in_words,
    owner_in_words,
    parse_json,
    read_json,
    warn,
    write_json,
)
from nanochat.target import evaluations_of, numbers_of, target_of

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
UNTIMED_STEPS = 11  # the first steps of a run compile; the training clock leaves them out


class RunLog:
    """The writer of a run's record.

    sinks: functions of (kind, fields), such as the console and wandb, that receive the events of
    the file; one that fails is removed with a warning. locks: RunLocks that close() releases.
    """

    def __init__(self, folder, sinks=(), locks=()):
        self.folder, self.sinks, self.locks = folder, list(sinks), locks
        self._file = open(folder / METRICS, "ab")  # noqa: SIM115 (closed by close())

    @classmethod
    def create(cls, runs_dir, run_id, config, sinks=(), locks=()):
        """Start the record of a new run. Raise UserError if the id is taken or not a file name."""
        folder = check_new_run(runs_dir, run_id)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS).unlink(missing_ok=True)  # of a start that failed
            write_json(folder / CONFIG, _finite({"run_id": run_id, **config}))
            return cls(folder, sinks, locks)

    @classmethod
    def resume(cls, runs_dir, run_id, step, sinks=(), locks=(), **fields):
        """Continue a record at `step` with a `resume` event of these fields.

        An incomplete last line, left by a kill, is removed. Raise UserError if the record is
        missing or damaged.
        """
        folder = Path(runs_dir) / check_run_id(run_id)
        _ = read_run(folder).events  # raises if the record is damaged
        with _writing(folder):
            (folder / SUMMARY).unlink(missing_ok=True)
            log = cls(folder, sinks, locks)
            data = (folder / METRICS).read_bytes()
            os.truncate(folder / METRICS, data.rfind(b"\n") + 1)
        log.event("resume", step=step, **fields)
        return log

    def event(self, kind, **fields):
        """Append one event. Non-finite numbers become null."""
        event = _finite({"kind": kind, "time_unix_sec": time.time(), **fields})
        with _writing(self.folder):
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
        """Write the events to the disk: no checkpoint may exist without them."""
        with _writing(self.folder):
            os.fsync(self._file.fileno())

    def finish(self, **summary):
        """Write summary.json: it exists if the run ended, and its `status` says how."""
        with _writing(self.folder):
            os.fsync(self._file.fileno())
            write_json(self.folder / SUMMARY, _finite({"run_id": self.folder.name, **summary}))

    def close(self):
        """Close the file and the sinks, and release the locks."""
        with contextlib.suppress(OSError):  # a full disk: the last event is lost
            self._file.close()
        for sink in self.sinks:
            with contextlib.suppress(Exception):
                sink.close()
        for lock in self.locks:
            lock.release()


@dataclass(frozen=True)
class RunRecord:
    """The record of a run; summary None: the run has not ended."""

    folder: Path
    config: dict
    summary: dict | None

    @property
    def run_id(self):
        return self.config["run_id"]

    @property
    def status(self):
        """Return the status: `ok`, the reason why the run stopped, or `unfinished` (no summary)."""
        return self.summary["status"] if self.summary else "unfinished"

    @functools.cached_property
    def events(self):
        """Return the events that no resume superseded. Raise UserError for a damaged line."""
        kept = []
        for event in _read_events(self.folder / METRICS):
            if event["kind"] == "resume":
                kept = [old for old in kept if _survives(old, event["step"])]
            kept.append(event)
        return kept

    def of(self, kind):
        """Return the events of one kind (train, val, core, sample, checkpoint, ...) in order."""
        return [event for event in self.events if event["kind"] == kind]


def read_run(folder):
    """Read the record in a folder; its events are read when they are first used.

    Raise UserError that names the missing or damaged file.
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
    return RunRecord(folder, config, summary)


def find_run(name, runs_dir):
    """Read the record of a run by its id, the path of its folder, or its model tag.

    The run of a tag is the newest one whose id was made from the tag.
    """
    runs_dir = Path(runs_dir)
    pattern = re.escape(str(name)) + r"-\d{8}-\d{6}-s\d+"  # as nanochat.build makes it
    of_tag = [path for path in runs_dir.glob("*") if re.fullmatch(pattern, path.name)]
    for folder in (Path(name), runs_dir / name, *sorted(of_tag, reverse=True)):
        if (folder / CONFIG).exists():
            return read_run(folder)
    raise UserError(f"no run {str(name)!r} in {runs_dir}; {newest_in_words(runs_dir)}")


def check_new_run(runs_dir, run_id):
    """Return the folder for a new run. Raise UserError if the id is taken or not a file name."""
    folder = Path(runs_dir) / check_run_id(run_id)
    if (folder / CONFIG).exists():
        lock = locks_dir() / f"run.{run_id}"
        if read_run(folder).status == "unfinished" and is_owned(lock):
            raise UserError(f"{owner_in_words(lock)} is running; choose another --run-id, or stop "
                            "that run")
        raise UserError(f"run id {run_id!r} is taken ({folder}); choose another --run-id, or "
                        "resume the run with --resume-from-step latest")
    return folder


def check_run_id(run_id):
    """Return `run_id` if it can name a folder, else raise UserError."""
    return check_name("run id", run_id)


# --- metrics of a run ----------------------------------------------------------------------------

def figures_of(events, target_metric_name=None, target_metric_threshold=None):
    """Return the metrics of summary.json from a run's events; None: not measured or not finite.

    Raise UserError if an event lacks a number.
    """
    train = numbers_of(events, "train", "step", "tokens", "train_time_sec", "tok_per_sec", "dt_ms")
    step, tokens, train_time_sec = train[-1][:3] if train else (0, 0, 0.0)
    timed = [row[3:] for row in train if row[0] > UNTIMED_STEPS and None not in row]
    speeds, times_ms = zip(*timed, strict=True) if timed else ([None], [None])
    bits, core = ([evaluation.metric for evaluation in evaluations_of(events, name)]
                  for name in ("val_bpb", "core"))
    errors = [event.get("val_bpb_se") for event in events if event["kind"] == "val"]
    metrics = {
        "steps": step,
        "tokens": tokens,
        "min_val_bpb": min((value for value in bits if value is not None), default=None),
        "final_val_bpb": bits[-1] if bits else None,
        "final_val_bpb_se": errors[-1] if errors else None,
        "core_metric": core[-1] if core else None,
        "tok_per_sec_median": statistics.median(speeds),
        "dt_median_ms": statistics.median(times_ms),
        "train_time_sec": train_time_sec,
    }
    if target_metric_threshold is None:
        return metrics
    target = target_of(events, target_metric_name, target_metric_threshold)
    return {**metrics, **target.summary_fields()}


# --- changes between a run and its resumption ----------------------------------------------------

def changes(before, now, flags):
    """Return [(name, was, is)] of the settings that change a run's numbers.

    before, now: dicts with `flags`, `versions` and `device`, as in config.json and `resume`
    events. flags: the flags to compare. Settings that one of the two lacks count as equal. The
    commit is left out: most change no number, and a fix may be why a run is resumed. So is the
    number of ranks: it changes rounding only, and a preempted job gets what is available.
    """
    names = [("device", "name"), ("device", "compute_dtype"), ("device", "triton_interpreted"),
             ("versions", "torch"), ("versions", "triton"), *(("flags", flag) for flag in flags)]
    changed = []
    for part, name in names:
        was, now_is = part_of(before, part).get(name), part_of(now, part).get(name)
        if None not in (was, now_is) and was != now_is:
            flag = f"--{name.replace('_', '-')}"
            shown = {"flags": flag, "device": f"device {name}"}.get(part, name)
            changed.append((shown, was, now_is))
    return changed


def in_words(changed):
    """Return the result of `changes` as text: name was X, is Y; ..."""
    return "; ".join(f"{name} was {was}, is {now}" for name, was, now in changed)


def part_of(values, name):
    """Return the dict of that name in a dict; an empty one if there is none."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


# --- events --------------------------------------------------------------------------------------

@contextlib.contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the run's record in {folder} ({error.strerror or error}); "
                        "free some space there, then resume with --resume-from-step latest"
                        ) from None


def _survives(event, resumed_step):
    """Return whether an event is part of the checkpoint of `resumed_step`.

    The checkpoint of a step is saved before the evaluations of that step, which a resumed run
    repeats.
    """
    step = event.get("step", 0)
    is_saved = event["kind"] in ("train", "checkpoint", "resume")
    return step < resumed_step or (step == resumed_step and is_saved)


def _read_events(path):
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):  # the last is empty, or cut off by a kill
        try:
            event = parse_json(line)
            is_event = type(event["kind"]) is str and type(event.get("step", 0)) is int
        except (ValueError, TypeError, KeyError):
            is_event = False
        if not is_event or (event["kind"] == "resume" and "step" not in event):
            raise UserError(f"{path}, line {number}: not an event; fix or remove that line")
        yield event


def _finite(value):
    """Return a value with None in the place of non-finite numbers, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
