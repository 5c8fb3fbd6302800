"""What the gates share: their rules, written down before any run, the runs they compare, and a change over depths."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from nanochat.experiments.findings import Change, Gate
from nanochat.experiments.paired import paired
from nanochat.experiments.trials import check_comparable

PASS, FAIL, INSUFFICIENT = "pass", "fail", "insufficient"
SPIKE_WINDOW = 50  # losses


@dataclass(frozen=True)
class Rules:
    """Every number the gates use. Changing one after a run makes the run's verdict worthless."""

    confidence: float = 0.95  # of every interval
    min_seeds: int = 2
    horizon_min_seeds: int = 3  # of a candidate that sets nothing but the horizon
    quality_sds: float = 2.0  # standard deviations of the baseline's repeats
    quality_floor_bpb: float = 0.0005
    spike_nats: float = 1.0  # above the median of the SPIKE_WINDOW losses before
    resume_tolerance_nats: float = 0.002
    min_depths: int = 3
    depth_time_tolerance: float = 0.01  # relative

    def describe(self):
        """The rules in words, one line each."""
        return [
            f"1 time: lower time to target in every seed, at least {self.min_seeds} seeds; the gain is shown when its "
            f"paired {self.confidence:.0%} interval lies above zero and every time was measured",
            f"2 quality: mean excess of min val_bpb at most {self.quality_sds:g} sd of the baseline's seeds or "
            f"{self.quality_floor_bpb:g}, whichever is more (the margin); at every evaluation, mean excess at most "
            f"twice the larger of the margin and {self.quality_sds:g} sd of the baseline's seeds at that step",
            f"3 stability: every run ends well, no train loss {self.spike_nats:g} nats above the median of the "
            f"{SPIKE_WINDOW} before it where the baseline has none (shorter runs are not checked: insufficient), no "
            f"graph break, losses after a resume within {self.resume_tolerance_nats:g} nats",
            f"4 generalisation: over at least {self.min_depths} depths no systematic regression, which is a mean "
            f"relative change of val_bpb above gate 2's margin, or of time above {self.depth_time_tolerance:.0%}, that "
            "is worse at every depth or has its interval above zero",
            "a candidate that sets nothing but the horizon: 1 by interpolated crossings times the median step time of "
            f"all runs, in at least {self.horizon_min_seeds} seeds, at a recorded target that is no end of the "
            "baseline's own seeds; 2 it reaches the target in every seed; 4 the same at each depth with a horizon and "
            "a target of its own, and no systematic regression of time",
            "decision: reject when a gate fails; not judged when times are the Triton interpreter's (of a candidate "
            "that sets more than the horizon; they fail no gate); insufficient when a gate lacks runs, optional when "
            "all pass but the gain is not shown, promote otherwise",
        ]


RULES = Rules()


@dataclass(frozen=True)
class Comparison:
    """The baseline's and a candidate's trials of one experiment, each by (depth, seed)."""

    baseline: dict
    tried: dict

    @property
    def trials(self):
        return [*self.baseline.values(), *self.tried.values()]

    @property
    def pairs(self):
        """(baseline, candidate) wherever both ended well."""
        return [(b, self.tried[key]) for key, b in self.baseline.items()
                if key in self.tried and b.ok and self.tried[key].ok]

    @property
    def missing(self):
        """Figures of what keeps the seeds from pairing; empty when nothing does."""
        absent = [(other, *key) for group, rest, other in (
            (self.tried, self.baseline, "baseline"), (self.baseline, self.tried, "candidate"))
            for key in group if key not in rest]
        failed = [(trial.label, trial.row.status) for trial in self.trials if not trial.ok]
        return found(absent=absent, failed=failed)


def found(**figures):
    """The figures that there are: what is empty or None is left out."""
    return {name: value for name, value in figures.items() if value is not None and value != []}


def fewer(what, n, least):
    """The figure of too few seeds or depths; empty when there are enough."""
    return {what: (n, least)} if n < least else {}


def series_fault(series, rules):
    """Gate 4 where the runs over depths do not let it judge, or None."""
    name = "4 generalisation"
    if not series.tried or not series.baseline:
        return Gate(name, INSUFFICIENT, {"no_miniseries": True})
    check_comparable(series.trials)
    failed = [(t.label, t.row.status) for t in series.tried.values() if not t.ok]
    if failed:
        return Gate(name, FAIL, {"failed": failed})
    lacks = series.missing or fewer("depths", len({b.row.depth for b, _ in series.pairs}), rules.min_depths)
    return Gate(name, INSUFFICIENT, lacks) if lacks else None


def relative_change(what, pairs, value_of, tolerance, rules):
    """The Change of one figure, or None when a value is missing."""
    by_depth = {}
    for b, c in pairs:
        before, after = value_of(b), value_of(c)
        if before is None or after is None:
            return None
        by_depth.setdefault(b.row.depth, []).append(after / before - 1)
    changes = [float(np.mean(by_depth[depth])) for depth in sorted(by_depth)]
    n_worse, n_moved = sum(change > 0 for change in changes), sum(change != 0 for change in changes)
    sign_p = stats.binomtest(n_worse, n_moved, alternative="greater").pvalue if n_moved else 1.0
    return Change(what, paired(changes, rules.confidence), tolerance, n_worse, float(sign_p))
