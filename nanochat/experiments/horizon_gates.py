"""The gates of a candidate that sets nothing but the horizon (lane B): what takes the place of the kernels' rules.

A step is the baseline's own, so times are interpolated crossings in steps, on one clock. Its run ends elsewhere by
design, so quality is to reach the target, and the target must come from outside.
"""

from dataclasses import dataclass

import numpy as np

from nanochat.experiments.comparison import FAIL, INSUFFICIENT, PASS, Comparison, found, relative_change, series_fault
from nanochat.experiments.findings import Gate
from nanochat.experiments.runner import SLACK_BPB
from nanochat.experiments.trials import Trial

SAME_BPB = 1e-6  # a threshold this near an end of the baseline's is that end


@dataclass(frozen=True)
class StepTimed(Trial):
    """A trial whose times are its steps at step_sec each, whatever the machine's load was when it ran."""

    step_sec: float | None = None

    @property
    def time_to_target_sec(self):
        if self.crossing_step is None or self.step_sec is None:
            return None
        return self.crossing_step * self.step_sec if self.row.time_to_target_sec_measured else 0.0

    @property
    def training_sec(self):
        steps = self.summary.get("steps")
        return None if steps is None or self.step_sec is None else steps * self.step_sec


def one_clock(trials):
    """A function from a trial to its StepTimed, at the median over `trials` of its depth of their median step times."""
    times_ms = {}
    for trial in trials:
        if trial.row.dt_median_ms is not None:
            times_ms.setdefault(trial.row.depth, []).append(trial.row.dt_median_ms)
    step_sec = {depth: float(np.median(values)) / 1000 for depth, values in times_ms.items()}
    return lambda trial: StepTimed(trial.row, trial.record, step_sec.get(trial.row.depth))


def on_one_clock(runs):
    """The Comparison with its trials on one_clock."""
    timed = one_clock(runs.trials)
    return Comparison(*({key: timed(trial) for key, trial in group.items()} for group in (runs.baseline, runs.tried)))


def unfit(runs):
    """Figures of what makes times to target void; empty when nothing does.

    No threshold was recorded; it is an end of the baseline's own seeds (one of them, their mean or median, the worst
    plus the slack that the runner adds), which half of them miss by construction; the batches differ.
    """
    own = []
    for depth in dict.fromkeys(depth for depth, _ in runs.baseline):
        there = [t.row for (at, _), t in runs.baseline.items() if at == depth and t.row.target_metric_name == "val_bpb"]
        ends = [row.min_val_bpb for row in there if row.min_val_bpb is not None]
        threshold = there[0].target_metric_threshold if there else None
        if threshold is not None and ends:
            known = (*ends, np.mean(ends), np.median(ends), max(ends) + SLACK_BPB)
            own += [(threshold, depth)] if min(abs(threshold - end) for end in known) < SAME_BPB else []
    batches = {(t.row.depth, t.record.config.get("total_batch_size_tokens")) for t in runs.trials if t.record}
    several = sorted({size for _, size in batches}) if len(batches) > len({depth for depth, _ in batches}) else []
    return found(no_target=without_target(runs), own_ends=own, batches=several)


def without_target(runs):
    """The labels of the runs that were not trained for a target."""
    return [t.label for t in runs.trials if t.row.target_metric_threshold is None]


def reach_gate(runs, rules):
    """Gate 2: the target is reached in every seed."""
    name, missed = "2 quality", missed_by(runs.tried)
    if missed:
        return Gate(name, FAIL, {"missed": missed})
    lacks, n_seeds = runs.missing or found(no_target=without_target(runs)), len(runs.pairs)
    if not lacks and n_seeds < rules.min_seeds:
        lacks = {"seeds": (n_seeds, rules.min_seeds)}
    return Gate(name, INSUFFICIENT if lacks else PASS, lacks or {"reached_seeds": n_seeds})


def missed_by(tried):
    """The labels of the runs that ended well without reaching their target; [] of those without one."""
    return [t.label for t in tried.values()
            if t.ok and t.row.target_metric_threshold is not None and t.row.time_to_target_sec_measured is None]


def generalisation_gate(series, rules):
    """Gate 4: at each depth its own horizon reaches its own target in every seed; the relative change of time."""
    name = "4 generalisation"
    fault, missed, void = series_fault(series, rules), missed_by(series.tried), unfit(series)
    if fault and (fault.outcome == FAIL or not missed):
        return fault
    if missed:
        return Gate(name, FAIL, {"missed": missed})
    change = relative_change("time to target", series.pairs, lambda t: t.time_to_target_sec or None,
                             rules.depth_time_tolerance, rules)
    if void or change is None:
        return Gate(name, INSUFFICIENT, void or {"no_figures": True})
    return Gate(name, FAIL if change.is_regression else PASS, {"changes": [change]})
