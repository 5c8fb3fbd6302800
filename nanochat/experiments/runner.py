"""Runs an experiment: candidates x seeds in interleaved order, one training process and one ledger row each.

What is finished is skipped, what was interrupted starts again, so the same command can be repeated until
every row is there. One lock an experiment, inherited by the training process, keeps two runners apart
even when the first was killed and its training goes on.
"""

import shlex
import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from nanochat.common import UserError, print0, read_json, utc_now
from nanochat.experiments.launch import PLANNED, experiment_lock, run_training
from nanochat.experiments.ledger import append_row, read_experiments
from nanochat.experiments.profiles import BASELINE, CANDIDATES, Profile
from nanochat.experiments.table import experiment_table, row_of
from nanochat.runlog import CONFIG, check_run_id, read_run
from nanochat.target import BEFORE_THE_CLOCK, check_target

TRAIN = "scripts.base_train"
SLACK_BPB = 0.001  # above the worst of a baseline's ends, so that each of its seeds reaches the threshold


@dataclass(frozen=True)
class Experiment:
    """What is asked for. `candidates` maps names to flags; `extra_flags` go to every run, after the profile's."""

    name: str
    profile: Profile
    candidates: dict
    seeds: tuple[int, ...]
    depths: tuple[int, ...]
    target_metric_name: str = "val_bpb"
    target_metric_threshold: float | None = None  # None: no target
    dataset: str = ""  # empty: the profile's
    extra_flags: tuple[str, ...] = ()

    def __post_init__(self):
        if self.target_metric_threshold is not None:
            check_target(self.target_metric_name, self.target_metric_threshold)
        for what, values in (("seed", self.seeds), ("depth", self.depths)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"give each {what} once, and at least one: {list(values)}")
        if len(self.seeds) < self.profile.min_seeds:
            raise UserError(f"a protocol run needs {self.profile.min_seeds} seeds, as with --seeds 0 1")
        given = self.candidates.items()
        for (name, flags), (other, others) in product(given, [*CANDIDATES.items(), *given]):
            if (name == other) != (flags == others):
                raise UserError(f"candidate {name!r} has the flags {flags!r}, {other!r} has {others!r}: one name for "
                                "one set of flags; leave out or rename one")

    @property
    def has_own_data(self):
        """Whether dataset and tokenizer are the profile's own."""
        return self.dataset in ("", self.profile.dataset)


@dataclass(frozen=True)
class PlannedRun:
    """One run to be made: its id and its base_train flags."""

    run_id: str
    candidate: str
    candidate_flags: str
    depth: int
    seed: int
    flags: list[str] = field(repr=False)


def plan(experiment):
    """Every run in its order: all candidates of a seed, then the next seed, then the next depth (A B A B ...)."""
    runs = []
    for depth, seed, (name, flags) in product(experiment.depths, experiment.seeds, experiment.candidates.items()):
        run_id = check_run_id(f"{experiment.name}.{name}.d{depth}.s{seed}")
        runs.append(PlannedRun(run_id, name, flags, depth, seed, _train_flags(experiment, run_id, flags, depth, seed)))
    return runs


def training_command(flags, nproc_per_node=1):
    """The argv that trains: one process, or torchrun with one process a device."""
    ranks = ([] if nproc_per_node == 1 else
             ["torch.distributed.run", "--standalone", f"--nproc_per_node={nproc_per_node}", "-m"])
    return [sys.executable, "-m", *ranks, TRAIN, *flags]


def finished_runs(experiment, ledger):
    """The run ids of the experiment that the ledger holds. Errors: UserError when one stands for another run."""
    planned = {run.run_id: run for run in plan(experiment)}
    rows = [row for row in _rows(ledger) if row.run_id in planned]
    target = (experiment.target_metric_name, experiment.target_metric_threshold)
    for row in rows:
        run = planned[row.run_id]
        if ((row.candidate_flags, row.depth, row.seed) != (run.candidate_flags, run.depth, run.seed)
                or (row.target_metric_name, row.target_metric_threshold) != target):
            raise UserError(f"{ledger}: {row.run_id} is there with candidate flags {row.candidate_flags!r} and target "
                            f"{row.target_metric_name} {row.target_metric_threshold}, asked are "
                            f"{run.candidate_flags!r} and {' '.join(map(str, target))}; give the same (--target-...), "
                            "or choose another --name")
    return {row.run_id for row in rows}


def run_experiment(experiment, ledger, runs_dir, command=training_command, report=print0):
    """Make every run that the ledger has not, one row each. Returns the number of runs made.

    command(flags) gives the training process's argv. Errors: UserError before anything runs when rows were made
    elsewhere or records under other flags; when a run does not start (its last line says why; no row) and when
    it was stopped by a signal (no row; the same call goes on). A run without summary gets a row with status `failed`.
    """
    made = 0
    with experiment_lock(runs_dir, experiment.name, report) as lock:
        runs = plan(experiment)
        finished = finished_runs(experiment, ledger)
        _check_records(experiment, runs, finished, ledger, Path(runs_dir))
        for number, run in enumerate(runs, start=1):
            if run.run_id in finished:
                continue
            folder = Path(runs_dir) / run.run_id
            if not _ended_well(folder):
                run_training(folder, command(run.flags), lock, f"[{number}/{len(runs)}] {run.run_id}", flags=run.flags)
                made += 1
            row = row_of(
                read_run(folder), timestamp=utc_now(), experiment_name=experiment.name, seed=run.seed, depth=run.depth,
                candidate_flags=run.candidate_flags, target_metric_name=experiment.target_metric_name,
                target_metric_threshold=experiment.target_metric_threshold)
            append_row(ledger, row)
            report(f"[{number}/{len(runs)}] {_describe(row)}")
    return made


def check_asked(folder, flags):
    """Raise UserError, naming the first flag that differs, unless the run in `folder` was planned with `flags`."""
    given = read_json(folder / PLANNED, "delete that folder to train it again").get("flags", [])
    before, asked = ({"crop": "drop", **_parsed(words)} for words in (given, flags))  # before --crop, all dropped
    for name in {**asked, **before}:
        was, now = before.get(name, "not given"), asked.get(name, "not given")
        if was != now and _number(was) != _number(now):
            raise UserError(f"{folder}: this run was made with --{name} {was}, now it is {now}; "
                            "choose another --name (with the scripts in runs/: TAG=...)")


def threshold_in_use(ledger, experiment_name):
    """The val_bpb threshold of the experiment's rows, or None when they have none. Errors: UserError when several."""
    found = {row.target_metric_threshold for row in _rows(ledger) if row.experiment_name == experiment_name
             and row.target_metric_name == "val_bpb"} - {None}
    if len(found) > 1:
        raise UserError(f"{ledger}: the rows of {experiment_name!r} have the thresholds "
                        f"{', '.join(map(str, sorted(found)))}; choose another --name")
    return next(iter(found), None)


def threshold_from(ledger, experiment_name, runs_dir):
    """A val_bpb that every baseline seed of a finished experiment reached: the worst of their ends, plus a slack.

    Errors: UserError with fewer than two baseline runs that ended well, or at several depths.
    """
    table = experiment_table(ledger, experiment_name, runs_dir)
    baseline = table[table.candidate == BASELINE]
    ends = baseline.min_val_bpb[baseline.ok].dropna()
    if len(ends) < 2 or baseline.depth.nunique() > 1:
        raise UserError(f"a threshold needs two baseline seeds of {experiment_name!r} that ended well, at one depth; "
                        f"it has {len(ends)}")
    return float(ends.max()) + SLACK_BPB


def _train_flags(experiment, run_id, candidate_flags, depth, seed):
    profile = experiment.profile
    tokenizer = [f"--tokenizer-dir={profile.tokenizer_dir()}"] if experiment.has_own_data else []
    target = [] if experiment.target_metric_threshold is None else [
        f"--target-metric-name={experiment.target_metric_name}",
        f"--target-metric-threshold={experiment.target_metric_threshold!r}"]
    return [*profile.command_flags(depth), *tokenizer, *experiment.extra_flags, *shlex.split(candidate_flags),
            f"--dataset={experiment.dataset or profile.dataset}", f"--seed={seed}", *target,
            f"--run-id={run_id}", f"--model-tag={run_id}"]


def _rows(ledger):
    return read_experiments(ledger) if Path(ledger).exists() else []


def _check_records(experiment, runs, finished, ledger, runs_dir):
    """Refuse rows whose records are not here, and records (with a row or to be logged) made under other flags."""
    there = [row.run_id for row in _rows(ledger) if row.experiment_name == experiment.name or row.run_id in finished]
    absent = [run_id for run_id in there if not (runs_dir / run_id / CONFIG).exists()]
    if absent:
        raise UserError(f"{len(absent)} of {len(there)} rows of {experiment.name!r} in {ledger} have no record in "
                        f"{runs_dir}, so they were made elsewhere; choose another --name (with the scripts in runs/: "
                        "TAG=...), or another --ledger")
    for run in runs:
        if run.run_id in finished or _ended_well(runs_dir / run.run_id):
            check_asked(runs_dir / run.run_id, run.flags)


def _ended_well(folder):
    return (folder / CONFIG).exists() and read_run(folder).status == "ok"


def _parsed(flags):
    """{name: its last value in words, or True} of a command line's flags."""
    parsed, name = {}, None
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            parsed[name] = value if equals else True
        elif name is not None:
            parsed[name] = word
    return parsed


def _number(word):
    """A flag's value as a number where it is one: 0.50 is 0.5."""
    try:
        return float(word)
    except ValueError:
        return word


def _describe(row):
    if row.status != "ok":
        return f"{row.run_id}: {row.status}"
    reached = ("not known" if row.time_to_target_sec_extrapolated is None
               else f"{row.time_to_target_sec_extrapolated:.1f} s extrapolated")
    if row.time_to_target_sec_measured is not None:
        reached = f"{row.time_to_target_sec_measured:.1f} s" if row.time_to_target_sec_measured else BEFORE_THE_CLOCK
    figures = [f"val_bpb {row.min_val_bpb:.5f}" if row.min_val_bpb is not None else "no val_bpb",
               f"time to target {reached}",
               f"{row.tok_per_sec_median:,.0f} tokens/s" if row.tok_per_sec_median is not None else "no rate"]
    return f"{row.run_id}: {', '.join(figures)}"
