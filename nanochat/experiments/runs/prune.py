"""What the cache could do without: checkpoints that nothing goes on from, and what killed writers left behind.

Never a run's newest good checkpoint nor its best, unless asked for these; nothing of a run that is running, or whose
record is not there to tell.
"""

import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from nanochat.common import (
    RunLock,
    UserError,
    checkpoint_files,
    checkpoint_steps,
    is_owned,
    meta_path,
    model_path,
    read_json,
)
from nanochat.runlog import numbers_of, read_run

LEFTOVER_SEC = 86400.0  # a temporary file that nobody has written for so long is a killed writer's
_SET_ASIDE = re.compile(r"(.+)\.before-\d{8}-\d{6}(-\d+)?")
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")  # as files.atomic_path names them


@dataclass(frozen=True)
class Item:
    """Files that go together, the one that makes them count first. why: in words; run_id: whose, or ""."""

    what: str
    why: str
    paths: list = field(repr=False)
    run_id: str = ""

    @property
    def n_bytes(self):
        return sum(path.stat().st_size for path in self.paths if path.exists())


def what_to_free(checkpoints_dir, locks_dir, runs, with_last=False):
    """(Items that can be freed, Items of kept last and best checkpoints, lines about what is left alone and why).

    runs: the Runs whose checkpoints may go; with_last: their newest and best ones, too."""
    freed, kept, notes = [], [], []
    by_id = {run.run_id: run for run in runs if run.run_id == run.record.folder.name}  # a copy may lack the best's step
    for folder in sorted(path for path in Path(checkpoints_dir).glob("*") if path.is_dir()):
        if why := _taken(lock_of(locks_dir, folder)):
            notes.append(f"{folder.name}: {why}")
            continue
        by_run, unknown = {}, 0
        for step in checkpoint_steps(folder):
            try:
                meta = read_json(meta_path(folder, step), "")
            except UserError:
                unknown += 1
                continue
            by_run.setdefault(str(meta.get("run_id")), []).append((step, meta.get("good") is not False))
        if unknown:
            notes.append(f"{folder.name}: {unknown} checkpoint(s) whose meta cannot be read")
        for run_id, checkpoints in by_run.items():
            run = by_id.get(run_id)
            if run is None or not run.is_over:
                continue
            try:
                for item, is_last in _judged(folder, run, checkpoints):
                    (kept if is_last and not with_last else freed).append(item)
            except UserError as error:
                notes.append(f"{folder.name}: the record of {run_id} does not say which is best ({error})")
    return freed, kept, notes


def free(items, locks_dir):
    """Delete the items' files, under the locks that a run would take; returns (bytes freed, lines of what was not).

    A checkpoint loses its meta first: without it, it does not exist."""
    n_bytes, refused = 0, []
    for item in items:
        folder = item.paths[0].parent
        try:
            with ExitStack() as held:
                for lock in [lock_of(locks_dir, folder), Path(locks_dir) / f"run.{item.run_id}"] if item.run_id else []:
                    if why := _taken(lock):
                        raise UserError(why)
                    held.callback(RunLock(folder, lock, "scripts.runs --prune", "it is left alone").release)
                size = item.n_bytes
                for path in item.paths:
                    path.unlink(missing_ok=True)
                n_bytes += size
                if item.run_id and not any(folder.iterdir()):
                    folder.rmdir()
        except (UserError, OSError) as error:
            refused.append(f"{item.what}: {error}")
    return n_bytes, refused


def lock_of(locks_dir, folder):
    """The lock of a checkpoint folder, by whose name a run takes it."""
    return Path(locks_dir) / f"checkpoints.{folder.name}"


def _taken(lock):
    """In words: who writes what a lock stands for, or may; "" where nobody does. The lock of a machine that cannot be
    asked is not tried: to have it would end a run whose disk does not carry locks from there to here."""
    owned = is_owned(lock)
    if owned is None and lock.exists():
        return f"a process of another machine may be writing it; if none does, delete {lock}"
    return "a run is writing it" if owned else ""


def leftovers(base_dir):
    """Items of the temporary files that writers of the cache left a day ago or earlier."""
    found = [path for path in sorted(Path(base_dir).rglob(".*.tmp")) if _TEMPORARY.fullmatch(path.name)]
    return [Item(str(path.relative_to(base_dir)), "left by a writer that was killed", [path]) for path in found
            if path.is_file() and time.time() - path.stat().st_mtime > LEFTOVER_SEC]


def _judged(folder, run, checkpoints):
    """(Item, whether it is the newest good one or the best) of one run's checkpoints in a folder."""
    good = [step for step, is_good in checkpoints if is_good and model_path(folder, step).exists()]
    bits = dict(numbers_of(read_run(run.record.folder).events, "val", "step", "val_bpb"))
    best = min((step for step in good if bits.get(step) is not None), key=bits.get, default=None)
    aside = ", set aside" if _SET_ASIDE.fullmatch(folder.name) else ""
    for step, is_good in checkpoints:
        is_newest, is_best = bool(good) and step == good[-1], step == best
        what = ("diverged" if not is_good else "the newest" if is_newest else "the best" if is_best else
                "neither the newest nor the best")
        why = f"{what} of run {run.run_id}, {run.state}{aside}"
        item = Item(f"{folder.name}, step {step:,}", why, checkpoint_files(folder, step), run.run_id)
        yield item, is_newest or is_best
