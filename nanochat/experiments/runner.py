"""Run an experiment: candidates x seeds x depths, one training process and one ledger row each.

Finished runs are skipped and interrupted ones start again, so that the same command can be repeated
until every row is there. A lock per experiment, which the training process inherits, keeps two
runners apart even if the first was killed and its training is still running.
"""

import contextlib
import fcntl
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from nanochat.common import UserError, checkpoints_dir, print0, read_json, utc_now, write_json
from nanochat.experiments.ledger import append_row, read_experiments
from nanochat.experiments.profiles import BASELINE, CANDIDATES, Profile
from nanochat.experiments.table import row_of
from nanochat.runlog import CONFIG, SUMMARY, check_run_id, read_run
from nanochat.target import check_target

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
    target_metric_name: str = "val_bpb"
    target_metric_threshold: float | None = None
    dataset: str = ""  # empty: that of the profile
    extra_flags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.target_metric_threshold is not None:
            check_target(*self.target)
        if len(set(self.seeds)) < self.profile.min_seeds:
            raise UserError(f"this protocol needs {self.profile.min_seeds} seeds; give --seeds 0 1")
        known = [*CANDIDATES.items(), *self.candidates.items()]
        for (name, flags), (other, others) in product(self.candidates.items(), known):
            if (name == other) != (flags == others):
                raise UserError(f"candidate {name!r} has the flags {flags!r} and {other!r} has "
                                f"{others!r}; give each set of flags one name")

    @property
    def target(self):
        return self.target_metric_name, self.target_metric_threshold

    @property
    def has_own_data(self):
        """Return whether dataset and tokenizer are those of the profile."""
        return self.dataset in ("", self.profile.dataset)


@dataclass(frozen=True)
class TrainingRun:
    """One run of an experiment; flags are those of its training process."""

    run_id: str
    candidate: str
    candidate_flags: str
    depth: int
    seed: int
    flags: list


def training_runs(experiment):
    """Return the runs in order: per depth and seed all candidates (A B A B ...)."""
    runs, profile = {}, experiment.profile
    tokenizer = [f"--tokenizer-dir={profile.tokenizer_dir()}"] if experiment.has_own_data else []
    metric, threshold = experiment.target
    target = [] if threshold is None else [
        f"--target-metric-name={metric}", f"--target-metric-threshold={threshold!r}"]
    for depth, seed, (name, candidate_flags) in product(
            experiment.depths, experiment.seeds, experiment.candidates.items()):
        run_id = check_run_id(f"{experiment.name}.{name}.d{depth}.s{seed}")
        flags = [*profile.command_flags(depth), *tokenizer, *experiment.extra_flags,
                 *shlex.split(candidate_flags),
                 f"--dataset={experiment.dataset or profile.dataset}", f"--seed={seed}", *target,
                 f"--run-id={run_id}", f"--model-tag={run_id}"]
        runs[run_id] = TrainingRun(run_id, name, candidate_flags, depth, seed, flags)
    return list(runs.values())


def training_command(flags, nproc_per_node=1):
    """Return the argv of a training: one process, or torchrun with one process per device."""
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}", "-m"]
    return [sys.executable, "-m", *(torchrun if nproc_per_node > 1 else []), "scripts.base_train",
            *flags]


def finished_runs(experiment, ledger):
    """Return the run ids of the experiment that the ledger has."""
    return {run.run_id for run in training_runs(experiment)} & {
        row.run_id for row in _rows(ledger)}


def run_experiment(experiment, ledger, runs_dir, command=training_command, report=print0):
    """Train every run that the ledger does not have, one row each; return the number trained.

    command(flags) returns the argv of the training process, which prints on this console. A run
    that crashes or diverges gets a row with its status. Raise UserError before anything runs if a
    record is missing or was made with other flags, and when a training does not start or is stopped
    by a signal.
    """
    n_trained = 0
    with experiment_lock(runs_dir, experiment.name, report) as lock:
        runs, finished = training_runs(experiment), finished_runs(experiment, ledger)
        _check_records(experiment, runs, finished, ledger, Path(runs_dir))
        for number, run in enumerate(runs, start=1):
            if run.run_id in finished:
                continue
            folder, title = Path(runs_dir) / run.run_id, f"[{number}/{len(runs)}] {run.run_id}"
            if not _ended_well(folder):
                report(title)
                _train_anew(folder, run.flags, command, lock)
                n_trained += 1
            metric, threshold = experiment.target
            row = row_of(read_run(folder), timestamp=utc_now(), experiment_name=experiment.name,
                         seed=run.seed, depth=run.depth, candidate_flags=run.candidate_flags,
                         target_metric_name=metric, target_metric_threshold=threshold)
            append_row(ledger, row)
            report(f"{title}: {_describe(row)}")
    return n_trained


def threshold_from(ledger, baseline_name, experiment_name):
    """Return the worst min val_bpb of an experiment's baseline seeds plus SLACK_BPB.

    An experiment that has rows keeps their threshold. Raise UserError unless at least two baseline
    seeds ended well, all at one depth.
    """
    thresholds = {row.target_metric_threshold for row in _rows(ledger)
                  if row.experiment_name == experiment_name}
    if len(thresholds) == 1 and None not in thresholds:
        return thresholds.pop()
    rows = [row for row in _rows(ledger) if row.experiment_name == baseline_name
            and row.candidate_flags == CANDIDATES[BASELINE]
            and row.status == "ok" and row.min_val_bpb is not None]
    if len(rows) < 2 or len({row.depth for row in rows}) > 1:
        raise UserError(f"--target-from needs two baseline seeds of {baseline_name!r} that ended "
                        f"well, at one depth; {ledger} has {len(rows)}; name another experiment, "
                        "or train this one with more seeds at one depth")
    return max(row.min_val_bpb for row in rows) + SLACK_BPB


def _rows(ledger):
    return read_experiments(ledger) if Path(ledger).exists() else []


def _check_records(experiment, runs, finished, ledger, runs_dir):
    """Raise UserError for rows without a record here, and for records made with other flags."""
    logged = [row.run_id for row in _rows(ledger) if row.experiment_name == experiment.name]
    for run_id in {*logged, *finished}:
        if not (runs_dir / run_id / CONFIG).exists():
            raise UserError(f"{ledger} has {run_id}, whose record is not in {runs_dir}: it was "
                            "made elsewhere; choose another --name (in runs/*.sh: TAG=...)")
    for run in runs:
        if run.run_id in finished or _ended_well(runs_dir / run.run_id):
            _check_flags(runs_dir / run.run_id, run.flags)


def _check_flags(folder, flags):
    """Raise UserError unless the run in `folder` was made with the same flags."""
    before = read_json(folder / FLAGS, "delete that folder to train it again").get("flags", [])
    changed = [flag for flag in [*before, *flags] if (flag in before) != (flag in flags)]
    if before != flags:
        raise UserError(f"{folder} was made with other flags, they differ in {' '.join(changed)}; "
                        "choose another --name (in runs/*.sh: TAG=...)")


def _ended_well(folder):
    return (folder / CONFIG).exists() and read_run(folder).status == "ok"


def _describe(row):
    if row.status != "ok" or row.min_val_bpb is None:
        return row.status
    result = f"val_bpb {row.min_val_bpb:.5f}"
    if row.target_metric_threshold is None:
        return result
    seconds = row.time_to_target_sec_measured
    return f"{result}, target {'not reached' if seconds is None else f'after {seconds:.1f} s'}"


# --- processes ------------------------------------------------------------------------------------

@contextlib.contextmanager
def experiment_lock(runs_dir, name, report=print0):
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
    folder.mkdir(parents=True)
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


# --- stability probe ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Probe:
    """Result of a short run that is resumed from its middle (gate 3).

    resume_difference_nats: largest difference of the losses after the resume; None: a run failed.
    graph_breaks: 0 in a compiled run, since a graph break stops it; None: the run was uncompiled.
    """

    graph_breaks: int | None
    resume_difference_nats: float | None
    steps_compared: int


def probe_candidates(experiment, runs_dir, command=training_command, report=print0):
    """Probe each candidate except the baseline at the first depth and seed, unless done."""
    first = experiment.depths[0], experiment.seeds[0]
    with experiment_lock(runs_dir, experiment.name, report) as lock:
        for run in training_runs(experiment):
            if (run.depth, run.seed) != first or run.candidate == BASELINE:
                continue
            folder = Path(runs_dir) / _probe_id(experiment.name, run.candidate)
            flags = [*run.flags, f"--run-id={folder.name}", f"--model-tag={folder.name}",
                     f"--num-iterations={PROBE_STEPS}", "--eval-every=-1",
                     f"--save-every={PROBE_RESUME_STEP}"]
            if (folder / PROBE).exists():
                _check_flags(folder, flags)
            else:
                report(folder.name)
                write_json(folder / PROBE, asdict(_probe(folder, flags, command, lock)))
            report(f"{folder.name}: {read_probe(runs_dir, experiment.name, run.candidate)}")


def read_probe(runs_dir, experiment_name, candidate):
    """Return the Probe of a candidate, or None if it was not run."""
    path = Path(runs_dir) / _probe_id(experiment_name, candidate) / PROBE
    remedy = "delete it and probe again (scripts.experiment --probe)"
    return Probe(**read_json(path, remedy)) if path.exists() else None


def _probe(folder, flags, command, lock):
    _train_anew(folder, flags, command, lock)
    first = read_run(folder)
    (folder / SUMMARY).unlink(missing_ok=True)  # a resume that fails must not keep this status
    _train(folder, command([*flags, f"--resume-from-step={PROBE_RESUME_STEP}"]), lock)
    second = read_run(folder)
    shutil.rmtree(checkpoints_dir() / folder.name, ignore_errors=True)

    steps = range(PROBE_RESUME_STEP + 1, PROBE_STEPS + 1)
    losses, resumed = ({event["step"]: event["loss"] for event in record.of("train")}
                       for record in (first, second))
    pairs = [(losses.get(step), resumed.get(step)) for step in steps]
    difference = None
    # a record that was not resumed has the losses of the first process, which equal themselves
    did_resume = any(event["step"] == PROBE_RESUME_STEP for event in second.of("resume"))
    if second.status == "ok" and did_resume and all(None not in pair for pair in pairs):
        difference = max(abs(one - other) for one, other in pairs)
    is_compiled = not first.config.get("flags", {}).get("no_compile")
    return Probe(0 if is_compiled else None, difference, len(steps))


def _probe_id(experiment_name, candidate):
    return f"{experiment_name}.{candidate}.probe"
