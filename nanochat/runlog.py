"""A run's record on disk: config.json, metrics.jsonl, summary.json; the writer and the only reader.

`step` in every event is the number of optimizer steps completed when it was written, so a
checkpoint at step s holds everything up to s and a resume from it supersedes what came after.
"""

import contextlib
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import UserError, check_name, json_bytes, open_binary, parse_json, read_json, warn, write_json

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
_ALWAYS = ("step", "tokens", "train_time_sec")  # numbers that every event of a curve has
UNTIMED_STEPS = 11  # a run's first steps compile; they are not on the training clock


class RunLog:
    """Writes one run's folder. Sinks (console, wandb) receive the same events the file does; one that fails is left
    out from then on, with a warning. owned: the files.RunLock folders that this run alone may write."""

    def __init__(self, folder, sinks=(), owned=()):
        self.folder = Path(folder)
        self.sinks, self.owned = list(sinks), list(owned)
        self._file = open(self.folder / METRICS, "ab")  # noqa: SIM115 (closed by close())

    @classmethod
    def create(cls, runs_dir, run_id, config, sinks=(), owned=()):
        """Start a run under `runs_dir/run_id`. Errors: UserError when the id is taken or not a file name."""
        folder = check_new_run(runs_dir, run_id)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS).unlink(missing_ok=True)
            write_json(folder / CONFIG, _record(run_id=run_id, **config))
        return cls(folder, sinks, owned)

    @classmethod
    def resume(cls, runs_dir, run_id, step, sinks=(), owned=(), **fields):
        """Add a segment to a run at `step`; a torn last line of a killed process is cut off first.

        Errors: UserError when the record is missing or damaged, as `read_run`. A record that ends before `step` is
        warned of."""
        folder = Path(runs_dir) / check_run_id(run_id)
        if not (folder / CONFIG).exists():
            raise UserError(f"run {run_id!r} has no record in {runs_dir}; start it without --resume-from-step")
        with _writing(folder):
            (folder / SUMMARY).unlink(missing_ok=True)  # whatever it held
            last = max((event.get("step", 0) for event in read_run(folder).of("train")), default=0)
            _cut_torn_tail(folder / METRICS)
        if last < step:
            warn(f"{folder / METRICS} ends at step {last}, before the checkpoint of step {step}: what was recorded in "
                 "between is lost, and the run's curves lack it")
        log = cls(folder, sinks, owned)
        try:
            log.event("resume", step=step, **fields)
        except UserError:
            with contextlib.suppress(OSError):
                log._file.close()
            raise
        return log

    def event(self, kind, **fields):
        """Append one event; numbers unrounded, non-finite ones as null and named in `nonfinite`."""
        with _writing(self.folder):
            self._file.write(json_bytes(_record(kind=kind, time_unix_sec=time.time(), **fields)) + b"\n")
            self._file.flush()
        for sink in list(self.sinks):
            try:
                sink(kind, fields)
            except Exception as error:  # a terminal or a service that is gone must not end the training
                self.sinks.remove(sink)
                warn(f"{type(sink).__name__} failed ({' '.join(str(error).split())}) and is left out from here on; the "
                     f"run goes on, its record is {self.folder}")

    def before_checkpoint(self):
        """Bring the events so far to the disk: no checkpoint is there without them.

        Errors: UserError when that fails, or another process has taken over a folder of this run.
        """
        for folder in self.owned:
            folder.check()
        with _writing(self.folder):
            os.fsync(self._file.fileno())

    def finish(self, **summary):
        """Write summary.json atomically: its presence says that the run ended, `status` says how."""
        with _writing(self.folder):
            os.fsync(self._file.fileno())  # every event has left this process already
            write_json(self.folder / SUMMARY, _record(run_id=self.folder.name, **summary))

    def close(self):
        """Close the file and the sinks, and let others have the folders. What a full disk did not take of the last
        event is lost."""
        with contextlib.suppress(OSError):
            self._file.close()
        for sink in self.sinks:
            with contextlib.suppress(Exception):
                sink.close()
        for folder in self.owned:
            folder.release()


@dataclass(frozen=True)
class RunRecord:
    """One run as read back. `events` is the effective trajectory: superseded segments are left out."""

    folder: Path
    config: dict
    events: list = field(repr=False)
    summary: dict | None

    @property
    def run_id(self):
        return self.config["run_id"]

    @property
    def status(self):
        """How the run ended: `ok`, or what stopped it; `unfinished` when it left no summary."""
        return self.summary["status"] if self.summary else "unfinished"

    def of(self, kind):
        """The events of one kind (train, val, core, sample, checkpoint, resume), in order."""
        return [event for event in self.events if event["kind"] == kind]


def read_run(folder, skip_curves=False):
    """Read a run's folder. Errors: UserError naming the file and line of whatever is missing or damaged.

    skip_curves: leave the events of a run with a summary unread, which says all that a list of many runs shows."""
    folder = Path(folder)
    config = read_json(folder / CONFIG, "this is no run's record, or a broken one")
    if not isinstance(config.get("run_id"), str):
        raise UserError(f"{folder / CONFIG}: no run_id; this is not a run's record")
    summary = read_json(folder / SUMMARY, "mend or delete it") if (folder / SUMMARY).exists() else None
    if summary is not None and not isinstance(summary.get("status"), str):
        raise UserError(f"{folder / SUMMARY}: no status; delete the file or the run")
    skip = skip_curves and summary is not None
    return RunRecord(folder, config, [] if skip else _effective(_read_events(folder / METRICS)), summary)


def numbers_of(events, kind, *names):
    """The named numbers of each event of a kind: a list of tuples. None: not finite, or not known.

    Errors: UserError naming the step and the name where there is something else, or no step, tokens or clock.
    """
    found = []
    for event in (event for event in events if event["kind"] == kind):
        for name in names:
            value = event.get(name, "missing")
            if not (value is None and name not in _ALWAYS) and (type(value) not in (int, float) or abs(value) > 1e300):
                raise UserError(f"a run's {kind} event of step {event.get('step', 'missing')}: {name} is "
                                f"{str(value)[:60]}, not a number; mend or remove that line of its metrics.jsonl")
        found.append(tuple(event[name] for name in names))
    return found


def find_run(name, runs_dir):
    """Read a run named by its id (under `runs_dir`) or by the path of its folder."""
    for folder in (Path(name), Path(runs_dir) / name):
        if (folder / CONFIG).exists():
            return read_run(folder)
    raise UserError(f"no run {name!r}: neither a run's folder nor an id under {runs_dir}")


def check_new_run(runs_dir, run_id):
    """The folder of a run that is to begin. Errors: UserError when the id is taken or cannot name a folder."""
    folder = Path(runs_dir) / check_run_id(run_id)
    if (folder / CONFIG).exists():
        raise UserError(f"run id {run_id!r} is taken ({folder}); choose another --run-id, "
                        "continue it with --resume-from-step latest, or delete that folder")
    return folder


def check_run_id(run_id):
    """Return `run_id` if it can name a folder, else raise UserError."""
    return check_name("run id", run_id)


@contextlib.contextmanager
def _writing(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"the run's record in {folder} cannot be written ({error.strerror or error}); make room there, "
                        "then go on from the newest checkpoint with --resume-from-step latest") from None


def _effective(events):
    kept = []
    for event in events:
        if event["kind"] == "resume":
            kept = [old for old in kept if _survives(old, event["step"])]
        kept.append(event)
    return kept


def _survives(event, resumed_step):
    """A checkpoint is of a step before the one that its event was written in, and is saved before the evaluations of
    its step, which a resumed run makes again."""
    step = event.get("step", 0)
    if event["kind"] == "checkpoint" and type(event.get("saved_step")) is int:
        step = event["saved_step"]
    return step < resumed_step or (step == resumed_step and event["kind"] in ("train", "checkpoint", "resume"))


def _read_events(path):
    try:
        with open_binary(path) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); mend or remove it") from None
    events, last = [], 0
    for number, line in enumerate(lines[:-1], start=1):  # a line without its newline was torn by a kill
        try:
            event = parse_json(line)
        except ValueError:
            event = None
        if not _is_event(event):
            raise UserError(f"{path}, line {number}: not an event; mend or remove that line")
        step = event.get("step", last)
        if step < last and event["kind"] != "resume":
            raise UserError(f"{path}, line {number}: of step {step}, after step {last}: lines are missing or have "
                            "changed places; mend or remove that line")
        last = step
        events.append(event)
    return events


def _is_event(value):
    if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
        return False
    step = value.get("step", None if value["kind"] == "resume" else 0)  # only a resume must have one
    return type(step) is int and 0 <= step < 1 << 53


def _cut_torn_tail(path):
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)


def _record(**values):
    """The values as JSON has them; what was not finite is null and named in `nonfinite`."""
    values, nonfinite = _jsonable(values)
    return {**values, "nonfinite": nonfinite} if nonfinite else values


def _jsonable(value, name=""):
    """(value with non-finite floats as None, the dotted names where that happened)."""
    if isinstance(value, dict):
        parts = {key: _jsonable(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
        return {k: v for k, (v, _) in parts.items()}, [n for _, names in parts.values() for n in names]
    if isinstance(value, (list, tuple)):
        parts = [_jsonable(item, f"{name}[{i}]") for i, item in enumerate(value)]
        return [v for v, _ in parts], [n for _, names in parts for n in names]
    if isinstance(value, float) and not math.isfinite(value):
        return None, [name]
    return value, []
