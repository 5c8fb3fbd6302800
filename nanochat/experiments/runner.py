"""Run an experiment: candidates x seeds x depths, one training process and one ledger row each.

A run that has ended is skipped, every other one is trained from its start, so that the same command
can be repeated until every row is there. A lock per experiment, which the training
process inherits, keeps two runners apart even if the first was killed and its training is still
running.
"""

import contextlib
import fcntl
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError, checkpoints_dir, print0, read_json, utc_now, write_json
from nanochat.experiments.ledger import (
    ExperimentRow,
    append_row,
    experiment_records,
    experiment_table,
    read_rows,
    row_of,
)
from nanochat.experiments.profiles import BASELINE, Profile
from nanochat.runlog import CONFIG, SUMMARY, check_run_id, read_run

FLAGS = "flags.json"  # in the run's folder: the flags of its training process
SLACK_BPB = 0.001  # added to the worst final val_bpb of a baseline, so that all its seeds reach it
PROBE = "probe.json"  # in the probe's folder: its result
PROBE_STEPS, PROBE_RESUME_STEP = 20, 10


@dataclass(frozen=True)
class Experiment:
    """The runs of an experiment. Every run gets extra_flags after the flags of the profile."""

    name: str
    profile: Profile
    candidates: dict  # {name: flags}
    seeds: tuple[int, ...]
    depths: tuple[int, ...]
    target_metric_threshold: float | None = None
    extra_flags: tuple[str, ...] = ()


class TrainingRun(NamedTuple):
    """One run of an experiment; flags are those of its training process."""

    run_id: str
    candidate: str
    candidate_flags: str
    depth: int
    seed: int
    flags: list


class Probe(NamedTuple):
    """Result of a short run that is resumed from its middle (gate 3).

    graph_breaks: 0 in a compiled run, since a graph break stops it; None: the run was uncompiled.
    resume_difference_nats: largest difference of the losses after the resume; None: a run failed.
    """

    graph_breaks: int | None
    resume_difference_nats: float | None


def training_runs(experiment):
    """Return the runs in order: per depth and seed all candidates (A B A B ...)."""
    runs, threshold = [], experiment.target_metric_threshold
    target = [] if threshold is None else [f"--target-metric-threshold={threshold!r}"]
    for depth, seed, (name, candidate_flags) in product(
            experiment.depths, experiment.seeds, experiment.candidates.items()):
        run_id = check_run_id(f"{experiment.name}.{name}.d{depth}.s{seed}")
        flags = [*experiment.profile.command_flags(depth), *experiment.extra_flags,
                 *shlex.split(candidate_flags), f"--seed={seed}", *target,
                 f"--run-id={run_id}", f"--model-tag={run_id}"]
        runs.append(TrainingRun(run_id, name, candidate_flags, depth, seed, flags))
    return runs


def training_command(flags, nproc_per_node=1):
    """Return the argv of a training: one process, or torchrun with one process per device."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}", "-m"]
    return [sys.executable, "-m", *(torchrun if nproc_per_node > 1 else []), "scripts.base_train",
            *flags]


def has_ended(folder):
    """Return whether the record in a folder says how its run ended, other than by a signal."""
    return (folder / SUMMARY).exists() and read_run(folder).status != "interrupted"


def run_experiment(experiment, ledger, runs_dir, command=training_command, report=print0):
    """Train every run that has not ended, and log it in the ledger; return the number trained.

    command(flags) returns the argv of the training process. A run that diverges or fails is logged
    with its status; one that was killed is trained again by the next call. Raise UserError before
    anything runs if a record was made with other flags, and when a training does not start or is
    stopped by a signal.
    """
    n_trained, runs = 0, training_runs(experiment)
    with _experiment_lock(runs_dir, experiment.name, report) as lock:
        rows = read_rows(ledger, ExperimentRow) if Path(ledger).exists() else []
        logged = {row.run_id for row in rows}
        for run in runs:
            if run.run_id in logged or has_ended(Path(runs_dir) / run.run_id):
                _check_flags(Path(runs_dir) / run.run_id, run.flags)
        for number, run in enumerate(runs, start=1):
            folder, title = Path(runs_dir) / run.run_id, f"[{number}/{len(runs)}] {run.run_id}"
            if not has_ended(folder):
                report(title)
                _train_anew(folder, run.flags, command, lock)
                n_trained += 1
            if not has_ended(folder):
                report(f"{title}: was killed; repeat the command to train it again")
            elif run.run_id not in logged:
                row = row_of(read_run(folder), timestamp=utc_now(), seed=run.seed, depth=run.depth,
                             experiment_name=experiment.name, candidate_flags=run.candidate_flags)
                append_row(ledger, row)
                report(f"{title}: {row.status}")
    return n_trained


def threshold_from(baseline_name, experiment_name, runs_dir):
    """Return the worst min val_bpb of an experiment's baseline seeds plus SLACK_BPB.

    An experiment that has runs keeps their threshold. Raise UserError unless at least two baseline
    seeds ended well, all at one depth.
    """
    for _, record in experiment_records(experiment_name, runs_dir):
        if threshold := record.config["flags"].get("target_metric_threshold"):
            return threshold
    table = experiment_table(baseline_name, runs_dir)
    runs = table[table.ok & (table.candidate == BASELINE)]
    if len(runs) < 2 or runs.depth.nunique() > 1:
        raise UserError(f"--target-from needs two baseline seeds of {baseline_name!r} that ended "
                        f"well, at one depth; {runs_dir} has {len(runs)}; name another experiment, "
                        "or train this one with more seeds at one depth")
    return float(runs.min_val_bpb.max()) + SLACK_BPB


def probe_candidates(experiment, runs_dir, command=training_command, report=print0):
    """Probe each candidate except the baseline at the first depth and seed, unless done."""
    first = experiment.depths[0], experiment.seeds[0]
    with _experiment_lock(runs_dir, experiment.name, report) as lock:
        for run in training_runs(experiment):
            if (run.depth, run.seed) != first or run.candidate == BASELINE:
                continue
            folder = _probe_folder(runs_dir, experiment.name, run.candidate)
            flags = [*run.flags, f"--run-id={folder.name}", f"--model-tag={folder.name}",
                     f"--num-iterations={PROBE_STEPS}", "--eval-every=-1",
                     f"--save-every={PROBE_RESUME_STEP}"]
            if not (folder / PROBE).exists():
                report(folder.name)
                write_json(folder / PROBE, _probe(folder, flags, command, lock)._asdict())
            report(f"{folder.name}: {read_probe(runs_dir, experiment.name, run.candidate)}")


def read_probe(runs_dir, experiment_name, candidate):
    """Return the Probe of a candidate, or None if it was not run."""
    path = _probe_folder(runs_dir, experiment_name, candidate) / PROBE
    if not path.exists():
        return None
    result = read_json(path, "delete it and probe again (scripts.experiment --probe)")
    return Probe(result.get("graph_breaks"), result.get("resume_difference_nats"))


def _probe_folder(runs_dir, experiment_name, candidate):
    return Path(runs_dir) / f"{experiment_name}.{candidate}.probe"


def _probe(folder, flags, command, lock):
    """Train, then resume from the middle; return the Probe."""
    _train_anew(folder, flags, command, lock)
    first = read_run(folder)
    losses = _losses(first)  # read now: the resume writes to the same file
    (folder / SUMMARY).unlink(missing_ok=True)  # a resume that fails must not keep this status
    _train(folder, command([*flags, f"--resume-from-step={PROBE_RESUME_STEP}"]), lock)
    second = read_run(folder)
    shutil.rmtree(checkpoints_dir() / folder.name, ignore_errors=True)

    resumed, difference = _losses(second), None
    # a record that was not resumed has the losses of the first process, which equal themselves
    if second.status == "ok" and second.of("resume") and set(losses) == set(resumed):
        difference = max(abs(losses[step] - resumed[step]) for step in losses)
    is_compiled = not first.config.get("flags", {}).get("no_compile")
    return Probe(0 if is_compiled else None, difference)


def _losses(record):
    """Return {step: loss} of the finite losses."""
    return {event["step"]: event["loss"] for event in record.of("train")
            if event["loss"] is not None}


def _check_flags(folder, flags):
    """Raise UserError unless the run in `folder` is there and was made with the same flags."""
    remedy = "choose another --name (in runs/*.sh: TAG=...)"
    before = read_json(folder / FLAGS, f"the run was made elsewhere; {remedy}").get("flags", [])
    if before != flags:
        changed = [flag for flag in [*before, *flags] if (flag in before) != (flag in flags)]
        raise UserError(f"{folder} was made with other flags, they differ in {' '.join(changed)}; "
                        f"{remedy}")


# --- processes ------------------------------------------------------------------------------------

@contextlib.contextmanager
def _experiment_lock(runs_dir, name, report):
    """Hold the lock of an experiment for the block, waiting for it; yield its open file."""
    Path(runs_dir).mkdir(parents=True, exist_ok=True)
    with open(Path(runs_dir) / f".{check_run_id(name)}.lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"experiment {name!r} is running in another process: waiting for it to end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def run_module(module, flags):
    """Run `python -m module flags` on this console; raise SystemExit with its code if it fails."""
    if code := _run([sys.executable, "-m", module, *map(str, flags)]):
        raise SystemExit(code)


def _run(argv, **options):
    """Return the exit code of a process; when SIGTERM or Ctrl-C ends this one, end it first."""
    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    child = subprocess.Popen(argv, **options)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _train_anew(folder, flags, command, lock):
    """Train in an empty folder; delete the files of an interrupted attempt before."""
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / FLAGS, {"flags": flags})
    _train(folder, command(flags), lock)


def _train(folder, argv, lock):
    """Run a training process to its end; one that crashes leaves a record without a summary.

    Raise UserError if it did not start or was stopped by a signal.
    """
    code = _run(argv, pass_fds=(lock.fileno(),))
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder.name} did not start (exit code {code}); its error is above")
    killed = code in (-signal.SIGINT, -signal.SIGTERM) and not (folder / SUMMARY).exists()
    if killed or read_run(folder).status == "interrupted":
        raise UserError(f"{folder.name} was stopped by a signal; repeat the command to continue")
