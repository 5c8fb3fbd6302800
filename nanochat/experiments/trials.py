"""Trials: an experiment's ledger rows joined with the records of their runs, and what may be compared."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path

import numpy as np

from nanochat.common import UserError
from nanochat.experiments.ledger import ExperimentRow, read_experiments
from nanochat.experiments.profiles import BASELINE, candidate_name
from nanochat.runlog import CONFIG, UNTIMED_STEPS, RunRecord, numbers_of, read_run
from nanochat.target import evaluations_of, time_to_target

INTERPRETED = "Triton interpreted"  # in a device's name
_NOT_OF_THE_RECIPE = {  # flags of a run that repeats of it may differ in
    "seed", "run", "run_id", "model_tag", "resume_from_step", "quiet", "sample_every", "save_every", "save_minutes",
    "keep_checkpoints", "time_limit_minutes"}
HORIZON_FLAGS = ("--num-iterations", "--target-flops", "--target-param-data-ratio")


@dataclass(frozen=True)
class Trial:
    """One run of an experiment. Figures come from the ledger, curves from the record (None: it is not here)."""

    row: ExperimentRow
    record: RunRecord | None = field(repr=False, default=None)

    @property
    def candidate(self):
        """The name its flags are known by, else the one in the runner's run id, else the flags."""
        row, known = self.row, candidate_name(self.row.candidate_flags)
        if known != row.candidate_flags:
            return known
        head, tail = f"{row.experiment_name}.", f".d{row.depth}.s{row.seed}"
        named = row.run_id.startswith(head) and row.run_id.endswith(tail)
        return row.run_id[len(head):-len(tail)] if named else known

    @property
    def ok(self):
        return self.row.status == "ok"

    @property
    def label(self):
        return f"{self.candidate}, depth {self.row.depth}, seed {self.row.seed}"

    @property
    def own_horizon(self):
        """Whether the candidate's flags set how long it trains."""
        return any(flag in self.row.candidate_flags for flag in HORIZON_FLAGS)

    @property
    def horizon_only(self):
        """Whether the candidate's flags set how long it trains and nothing else."""
        names = {word.partition("=")[0] for word in self.row.candidate_flags.split() if word.startswith("--")}
        return bool(names) and names <= set(HORIZON_FLAGS)

    @cached_property
    def crossing_step(self):
        """The step, interpolated between evaluations, that first reaches the row's target; None: none, or unknown."""
        row = self.row
        if row.target_metric_threshold is None or self.record is None or not self.ok:
            return None
        evaluations = evaluations_of(self.record.events, row.target_metric_name)
        return time_to_target(evaluations, row.target_metric_name, row.target_metric_threshold).step_interpolated

    @property
    def time_to_target_sec(self):
        """Measured, else extrapolated, else None; None for a run that did not end well."""
        measured = self.row.time_to_target_sec_measured
        seconds = measured if measured is not None else self.row.time_to_target_sec_extrapolated
        return seconds if self.ok else None

    @property
    def is_extrapolated(self):
        return self.time_to_target_sec is not None and self.row.time_to_target_sec_measured is None

    @property
    def training_sec(self):
        """Training clock at the end of the run, or None."""
        return self.summary.get("train_time_sec")

    @property
    def summary(self):
        return (self.record.summary if self.record else None) or {}

    @cached_property
    def val_curve(self):
        """Columns step, tokens, train_time_sec, val_bpb of the evaluations with a finite value; float64 [n, 4]."""
        return self._curve("val", "val_bpb")

    @cached_property
    def loss_curve(self):
        """Columns step, tokens, train_time_sec, loss (nats/token) of the training steps; float64 [n, 4]."""
        return self._curve("train", "loss")

    @cached_property
    def step_times_ms(self):
        """Milliseconds of the steps on the training clock; float64 [n]."""
        found = numbers_of(self.record.events, "train", "step", "dt_ms") if self.record else []
        return np.array([ms for step, ms in found if step > UNTIMED_STEPS and ms is not None], dtype=np.float64)

    def _curve(self, kind, value):
        names = "step", "tokens", "train_time_sec", value
        found = numbers_of(self.record.events, kind, *names) if self.record else []
        return np.array([point for point in found if point[-1] is not None], dtype=np.float64).reshape(-1, 4)


def load_trials(ledger, experiment_name, runs_dir):
    """The trials of an experiment, in the ledger's order.

    Errors: UserError for a ledger that does not read (with the line), an unknown experiment, two runs of one
    candidate, depth and seed, one name for two sets of flags (horizons of several depths are one candidate's), and two
    names for one.
    """
    rows = read_experiments(ledger)
    names = list(dict.fromkeys(row.experiment_name for row in rows))
    if experiment_name not in names:
        there = f"it has {', '.join(names)}" if names else "it has no rows yet"
        raise UserError(f"no experiment {experiment_name!r} in {ledger}; {there}")
    trials = [Trial(row, _record(runs_dir, row)) for row in rows if row.experiment_name == experiment_name]
    for one, other in combinations(trials, 2):
        same_name, same_flags = one.candidate == other.candidate, one.row.candidate_flags == other.row.candidate_flags
        same_depth = one.row.depth == other.row.depth
        if same_flags and same_depth and one.row.seed == other.row.seed:
            raise UserError(f"{ledger}: {one.row.run_id} and {other.row.run_id} are both {other.label}; "
                            "remove one of the two lines")
        by_depth = one.horizon_only and other.horizon_only and not same_depth
        if same_name != same_flags and not by_depth:
            raise UserError(f"{ledger}: {one.row.run_id} has candidate {one.candidate!r} with flags "
                            f"{one.row.candidate_flags!r}, {other.row.run_id} has {other.candidate!r} with "
                            f"{other.row.candidate_flags!r}; keep the lines of one")
    return trials


def check_comparable(trials):
    """Raise UserError unless the trials share data, device and target, and at each depth the horizon in tokens.

    A candidate whose own flags set the horizon may differ from the others in it; one that sets nothing else has a
    target at each depth.
    """
    check_same_world(trials)
    depths = {t.row.depth for t in trials}
    for scope in [{depth} for depth in depths] if any(t.horizon_only for t in trials) else [depths]:
        _same("target", [t for t in trials if t.row.depth in scope],
              lambda t: (t.row.target_metric_name, t.row.target_metric_threshold))
    for depth in depths:
        _same(f"horizon at depth {depth}", [t for t in trials if t.row.depth == depth and t.ok and not t.own_horizon],
              lambda t: t.row.total_tokens)


def check_same_world(trials):
    """Raise UserError unless the trials share data, device and, where their records are here, tokenizer."""
    for what, value_of in (("dataset", lambda t: t.row.dataset_id), ("device", lambda t: t.row.device),
                           ("tokenizer", lambda t: t.record and t.record.config.get("tokenizer_id"))):
        _same(what, [t for t in trials if value_of(t)], value_of)


def row_of(record, **cells):
    """The ledger's row of a RunRecord, status `failed` without a summary; `cells` stand in place of what it says."""
    config, summary = record.config, record.summary or {}
    measured = {name: summary.get(name) for name in (
        "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
        "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "peak_memory_mib")}
    return ExperimentRow(**{
        "timestamp": config.get("created_utc", ""), "git_commit": config.get("git_commit") or "",
        "experiment_name": "", "candidate_flags": record.run_id, "seed": config.get("seed"),
        "depth": config.get("flags", {}).get("depth"), "status": summary.get("status", "failed"),
        "target_metric_name": summary.get("target_metric_name") or "val_bpb", "dataset_id": config.get("dataset_id"),
        "total_tokens": summary.get("tokens"), "device": _device_of(config), "run_id": record.run_id,
        **measured, **cells})


def _device_of(config):
    """The device as ledgers and comparisons name it, from a record's config: its name, the ranks if several, and
    whether Triton was interpreted, since such times say nothing of a GPU's."""
    device = config.get("device")
    if not isinstance(device, dict) or not isinstance(device.get("name"), str):
        return ""
    ranks = device.get("world_size", 1)
    return (device["name"] + (f" ({ranks} ranks)" if ranks > 1 else "")
            + (f", {INTERPRETED}" if device.get("triton_interpreted") else ""))


def recipe_of(record):
    """What runs that are repeats of each other have in common, by name: the flags but for the seed, names and what is
    printed or saved; dataset, tokenizer, device."""
    config = record.config
    flags = config.get("flags") if isinstance(config.get("flags"), dict) else {}
    return {**{name: value for name, value in flags.items() if name not in _NOT_OF_THE_RECIPE},
            "dataset_id": config.get("dataset_id"), "tokenizer_id": config.get("tokenizer_id"),
            "device": _device_of(config)}


def seeds_label(run_ids):
    """One name for the runs of one recipe: books-r8-s{0,1}. Different runs never share one."""
    alike = next((at for at, letters in enumerate(zip(*run_ids, strict=False)) if len(set(letters)) > 1),
                 min(map(len, run_ids)))
    rests = ",".join(run_id[alike:] for run_id in run_ids)
    return run_ids[0] if len(run_ids) == 1 else f"{run_ids[0][:alike]}{{{rests}}}"


def split(trials):
    """(baseline trials by (depth, seed), {candidate: its trials by (depth, seed)}), the candidates in order."""
    groups = {}
    for trial in trials:
        groups.setdefault(trial.candidate, {})[trial.row.depth, trial.row.seed] = trial
    return groups.pop(BASELINE, {}), groups


def _same(what, trials, value_of):
    for trial in trials[1:]:
        if value_of(trial) != value_of(trials[0]):
            raise UserError(f"not comparable, another {what}: {trials[0].row.run_id} has {value_of(trials[0])}, "
                            f"{trial.row.run_id} has {value_of(trial)}; compare runs of one {what.split()[0]}")


def _record(runs_dir, row):
    folder = Path(runs_dir) / row.run_id
    if not (folder / CONFIG).exists():
        return None
    record = read_run(folder)
    if record.run_id != row.run_id:
        raise UserError(f"{folder}: its config.json says run_id {record.run_id!r}; one of two runs has the other's id")
    return record


def facts_of(trials, states=()):
    """(name, value) pairs of what the trials have in common: how many, target, dataset, device, seeds, depths.

    states: of runs without a summary, by id, where that is known."""
    known = [trial.row for trial in trials if trial.row.device]
    targets = {"none" if t.row.target_metric_threshold is None else
               f"{t.row.target_metric_name} {t.row.target_metric_threshold:.5g}" for t in trials}
    running = sum(dict(states).get(trial.row.run_id, "").startswith("running") for trial in trials)
    failed = sum(not trial.ok for trial in trials) - running
    return [("runs", f"{len(trials)}" + (f", {running} running" if running else "")
             + (f", {failed} failed" if failed else "")),
            ("target", ", ".join(sorted(targets))),
            ("dataset", known[0].dataset_id if known else "not known"),
            ("device", known[0].device if known else "not known"),
            ("seeds", ", ".join(sorted({str(t.row.seed) for t in trials}))),
            ("depths", ", ".join(str(d) for d in sorted({t.row.depth for t in trials}, key=str)))]
