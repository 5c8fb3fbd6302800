"""The four gates: rules for the promotion of a candidate, fixed before its runs.

Each gate is a function of the rows of the baseline and one candidate; it returns (outcome,
sentence). A candidate that sets only the horizon (lane B) is timed in steps and must reach its
target, since its final loss differs by design.
"""

from dataclasses import dataclass
from math import nan
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nanochat.common import UserError
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.runner import SLACK_BPB, read_probe
from nanochat.experiments.table import (
    INTERPRETED,
    check_same,
    check_same_world,
    curve,
    on_one_clock,
)

PASS, NOT_SHOWN, FAIL = "pass", "not shown", "fail"
INSUFFICIENT, NOT_JUDGED = "insufficient", "not judged"
SPIKE_WINDOW = 50  # losses
SAME_BPB = 1e-6  # a threshold this close to one derived from the baseline counts as derived
NOT_ON_THIS_DEVICE = ("the times were measured in the Triton interpreter, so they say nothing "
                      "about the kernels and are not judged: run it on a GPU")


@dataclass(frozen=True)
class Rules:
    """The constants of the gates. Do not change them after a run: its verdict would be invalid."""

    confidence: float = 0.95  # of every interval
    min_seeds: int = 2
    horizon_min_seeds: int = 3  # for a candidate that sets only the horizon
    quality_sds: float = 2.0  # standard deviations of the baseline's seeds
    quality_floor_bpb: float = 0.0005
    spike_nats: float = 1.0  # above the median of the SPIKE_WINDOW losses before
    resume_tolerance_nats: float = 0.002
    min_depths: int = 3
    depth_time_tolerance: float = 0.01  # relative

    def describe(self):
        """Return the rules as text, one line each."""
        return [
            "gate 1, time: the time to target must be lower with every seed, with at least "
            f"{self.min_seeds} seeds. The gain is shown if its paired {self.confidence:.0%} "
            "interval is above zero and every time was measured.",
            "gate 2, quality: the mean excess of min val_bpb must not exceed the margin, which is "
            f"the larger of {self.quality_sds:g} sd of the baseline's seeds and "
            f"{self.quality_floor_bpb:g}. At every evaluation, the mean excess must not exceed "
            f"twice the larger of the margin and {self.quality_sds:g} sd of the baseline's seeds "
            "at that step.",
            "gate 3, stability: every run must end with status ok, without a graph break and "
            f"without a loss spike, which is a training loss {self.spike_nats:g} nats above the "
            f"median of the {SPIKE_WINDOW} losses before it where the baseline has none (shorter "
            "runs are insufficient). Losses after a resume must agree within "
            f"{self.resume_tolerance_nats:g} nats.",
            f"gate 4, generalisation: at least {self.min_depths} depths must show no systematic "
            "regression. That is a mean relative change of val_bpb above the margin of gate 2, or "
            f"of time above {self.depth_time_tolerance:.0%}, that is worse at every depth or has "
            "its interval above zero.",
            "A candidate that sets only the horizon has other rules. Gate 1: times are the "
            "interpolated steps to the target times the median step time of all runs, with at "
            f"least {self.horizon_min_seeds} seeds; the target must not be derived from the "
            "baseline runs being judged. Gate 2: every seed must reach the target. Gate 4: every "
            "depth must reach its own target with its own horizon, without a systematic "
            "regression of time.",
            "Decision: reject if a gate fails; not judged if records are missing or if the times "
            "of a candidate that changes more than the horizon were measured in the Triton "
            "interpreter; insufficient if a gate lacks runs; optional if all gates pass but the "
            "gain is not shown; otherwise promote.",
        ]


RULES = Rules()


class Paired(NamedTuple):
    """n paired differences: mean, sd (ddof 1), t interval and two-sided p.

    sd is NaN for one difference; the interval is NaN for one difference and for equal ones.
    """

    n: int
    mean: float
    sd: float = nan
    lo: float = nan
    hi: float = nan
    p: float = nan

    def describe(self, unit):
        """Return the statistics as text."""
        mean = f"n={self.n}, mean {self.mean:+.4g} {unit}"
        if not self.lo <= self.hi:
            return f"{mean} (no interval)"
        return (f"{mean} (interval {self.lo:+.4g} to {self.hi:+.4g}, sd {self.sd:.2g}, two-sided "
                f"p={self.p:.2g})")


class Gate(NamedTuple):
    """One gate's outcome (pass, not shown, fail, insufficient, not judged) and the reasons."""

    name: str
    outcome: str
    sentence: str


class Verdict(NamedTuple):
    """The decision on a candidate: promote, optional, reject, insufficient or not judged."""

    candidate: str
    flags: str
    decision: str
    decided_by: str
    gates: list[Gate]

    def describe(self):
        """Return lines for the console."""
        lines = [f"{self.candidate}: {self.decision.upper()} ({self.decided_by})"]
        return lines + [f"  {g.name:<16} {g.outcome:<13} {g.sentence}" for g in self.gates]


def judge_all(table, series, runs_dir, candidates=None):
    """Return a Verdict per candidate (None: all of the table). Raise UserError as judge."""
    names = candidates or [name for name in table.candidate.unique() if name != BASELINE]
    experiment = table.experiment_name.iloc[0]
    return [judge(name, table, series, read_probe(runs_dir, experiment, name)) for name in names]


def judge(candidate, table, series=None, probe=None):
    """Return the Verdict on a candidate of an experiment_table at one depth.

    series: experiment_table of gate 4's miniseries; probe: the candidate's Probe; None: not run.
    Raise UserError for a missing candidate or baseline, several depths, and runs of different
    datasets, devices, targets or horizons.
    """
    names = list(table.candidate.unique())
    if candidate not in names or candidate == BASELINE or BASELINE not in names:
        raise UserError(f"{candidate!r} is judged against the {BASELINE!r} of an experiment that "
                        f"has both; this one has {', '.join(names)}")
    if table.depth.nunique() > 1:
        raise UserError(f"this experiment has depths {_listed(sorted(table.depth.unique()))}; a "
                        "candidate is judged at one depth, several are gate 4's miniseries")
    runs = table[table.candidate.isin([BASELINE, candidate])].reset_index(drop=True)
    series = table[:0] if series is None else series
    series = series[series.candidate.isin([BASELINE, candidate])].reset_index(drop=True)
    check_same_world(pd.concat([runs, series]))
    _check_comparable(runs)

    tried = runs[runs.candidate == candidate]
    is_interpreted = runs.device.str.contains(INTERPRETED).any()
    stability = stability_gate(runs, probe)
    if tried.horizon_only.all():
        runs, series = on_one_clock(runs), on_one_clock(series)
        time = time_gate(runs, RULES.horizon_min_seeds, target_faults(runs))
        outcomes = time, reach_gate(runs), stability, generalisation_gate(series)
    else:
        time = (NOT_JUDGED, NOT_ON_THIS_DEVICE) if is_interpreted else time_gate(runs)
        outcomes = (time, quality_gate(runs), stability,
                    generalisation_gate(series, quality_margin(runs), is_interpreted))
    names = ("1 time", "2 quality", "3 stability", "4 generalisation")
    gates = [Gate(name, *outcome) for name, outcome in zip(names, outcomes, strict=True)]
    return Verdict(candidate, tried.candidate_flags.iloc[0], *_decide(gates, runs), gates)


def _decide(gates, runs):
    """Return the decision and what decided it."""
    by_outcome = {gate.outcome: ", ".join(f"gate {other.name}" for other in gates
                                          if other.outcome == gate.outcome) for gate in gates}
    reason = f"gate 1 time: {gates[0].sentence.partition(';')[0]}"
    if FAIL in by_outcome:
        return "reject", by_outcome[FAIL]
    if NOT_JUDGED in by_outcome:
        return NOT_JUDGED, reason
    if n_missing := runs.record.isna().sum():
        return NOT_JUDGED, (f"records missing here of {n_missing} of {len(runs)} runs; the ledger "
                            f"says: {_ledger_says(runs)}")
    if INSUFFICIENT in by_outcome:
        return INSUFFICIENT, by_outcome[INSUFFICIENT]
    return ("optional", reason) if NOT_SHOWN in by_outcome else ("promote", "all four gates")


def _ledger_says(runs):
    said = []
    for name, rows in runs.groupby("candidate", sort=False):
        seconds = rows.time_to_target_sec_measured.dropna()
        when = f" after {seconds.mean():.4g} s on average" if len(seconds) else ""
        said.append(f"{name} reached the target in {len(seconds)} of {len(rows)} runs{when}, mean "
                    f"min val_bpb {rows.min_val_bpb.mean():.4f}")
    return ", ".join(said)


def time_gate(runs, min_seeds=RULES.min_seeds, void=()):
    """Gate 1: time to target per seed. void: reasons why times cannot be compared."""
    b, c = pairs(runs)
    before, after = b.time_to_target_sec, c.time_to_target_sec
    timed = (before > 0) & (after > 0)
    if not timed.any():
        notes, doubt = ["no seed has both times"], ""
    else:
        gain = paired(100 * (1 - after / before)[timed])
        seconds = paired((before - after)[timed])
        is_extrapolated = (b.is_extrapolated | c.is_extrapolated)[timed].any()
        notes = [f"gain {gain.describe('%')}", seconds.describe("s"),
                 "extrapolated" if is_extrapolated else "measured"]
        doubt = ("the gain has no interval" if not gain.lo <= gain.hi else
                 "the gain's interval reaches zero" if gain.lo <= 0 else
                 "a time to target was extrapolated, not measured" if is_extrapolated else "")
    if void:
        return _outcome([], void, notes)

    never = after.isna() & (c.training_sec >= before)
    slower = b.seed[timed & (after >= before) | never]
    faults = _about("not lower in seed", slower)
    gaps = (missing(runs) + _about("target reached before the clock starts in seed",
                                   b.seed[(before == 0) | (after == 0)])
            + _about("no time to target in seed", b.seed[before.isna() | after.isna()]))
    gaps = gaps or _fewer("seeds", timed.sum(), min_seeds)
    if doubt and not faults and not gaps:
        return NOT_SHOWN, "; ".join([doubt, *notes])
    return _outcome(faults, gaps, notes)


def target_faults(runs):
    """Return the reasons why a horizon's times to target are void.

    About half of the seeds miss a threshold that was derived from their own final losses (one of
    them, their mean or median, the worst plus the runner's slack).
    """
    faults = _without_target(runs)
    for depth, rows in runs[runs.candidate == BASELINE].groupby("depth"):
        threshold, ends = rows.target_metric_threshold.iloc[0], rows.min_val_bpb.dropna()
        derived = np.array([*ends, ends.mean(), ends.median(), ends.max() + SLACK_BPB])
        if (abs(derived - threshold) < SAME_BPB).any():
            faults.append(f"the threshold {threshold:.6g} at depth {depth} was derived from the "
                          "baseline runs being judged: give an independent one")
    if (runs.groupby("depth").total_batch_size_tokens.nunique() > 1).any():
        sizes = sorted(runs.total_batch_size_tokens.dropna().astype(int).unique())
        faults.append(f"batches of {_listed(sizes)} tokens, so steps differ: give "
                      "--total-batch-size")
    return faults


def quality_margin(runs):
    """Return how much val_bpb may rise, by the spread of the baseline's seeds (None: one seed)."""
    ends = runs[(runs.candidate == BASELINE) & runs.ok].min_val_bpb.dropna()
    if len(ends) < 2:
        return None
    return max(RULES.quality_sds * float(ends.std()), RULES.quality_floor_bpb)


def quality_gate(runs):
    """Gate 2: the excess of val_bpb at the end of the run and at the worst evaluation."""
    b, c = pairs(runs)
    margin, excesses = quality_margin(runs), (c.min_val_bpb - b.min_val_bpb).dropna()
    if margin is None or excesses.empty:
        return _outcome([], missing(runs) or ["two baseline seeds and one pair need a val_bpb"])
    excess, worst = paired(excesses), _worst_excess(runs, margin)
    notes = [f"min val_bpb {excess.describe('bpb')}, margin {margin:.5f}"]
    notes += document_notes(b.record, c.record)
    if worst:
        notes.append(f"worst of the run {worst[0]:+.5f} at step {worst[2]:.0f}, allowed "
                     f"{worst[1]:.5f}")
    if excess.mean > margin or (worst and worst[0] > worst[1]):
        return FAIL, "; ".join(notes)
    gaps = missing(runs) or _fewer("seeds", len(excesses), max(RULES.min_seeds, len(b)))
    if not gaps and not worst and not c.own_horizon.any():
        gaps = ["the runs' curves are not here"]
    return _outcome([], gaps, notes)


def _worst_excess(runs, margin):
    """Return (mean excess, allowed excess, step) of the worst evaluation, or None without one."""
    def losses(records):
        curves = [curve(record, "val", "val_bpb").set_index("step").value for record in records]
        return pd.DataFrame(curves).T.sort_index()  # a row per step, a column per run

    b, c = pairs(runs)
    if c.own_horizon.any():
        return None
    before, after = losses(b.record), losses(c.record)
    sds = losses(runs[(runs.candidate == BASELINE) & runs.ok].record).std(axis=1).fillna(0.0)
    allowed = 2 * (RULES.quality_sds * sds).clip(lower=margin)
    excess = (after - before).mean(axis=1)
    beyond = (excess - allowed)[lambda values: values.index > 0].dropna()
    if beyond.empty or pd.concat([before, after], axis=1).isna().all().any():
        return None
    step = beyond.idxmax()
    return excess[step], allowed[step], step


def document_notes(records, others):
    """Return the mean difference of final val_bpb and its standard error over documents."""
    paths = [[record.folder / "validation.npz" for record in pair if record]
             for pair in zip(records, others, strict=True)]
    paths = [pair for pair in paths if len(pair) == 2 and all(path.exists() for path in pair)]
    if not paths:
        return []
    from nanochat.loss_eval import load_document_losses, paired_difference  # torch takes seconds
    try:
        found = [paired_difference(load_document_losses(after), load_document_losses(before))
                 for before, after in paths]
    except UserError as error:
        return [f"no standard error over documents: {error}"]
    mean, error = np.mean(found, axis=0)
    return [f"final val_bpb {mean:+.5f} with standard error {error:.5f} over documents, per seed"]


def reach_gate(runs):
    """Gate 2 of a horizon: every seed reaches the target."""
    n = len(pairs(runs)[0])
    gaps = missing(runs) or _without_target(runs) or _fewer("seeds", n, RULES.horizon_min_seeds)
    missed = _missed(runs)
    return _outcome(missed, gaps, [] if missed or gaps else [f"target reached in all {n} seeds"])


def stability_gate(runs, probe):
    """Gate 3: how runs end, loss spikes, graph breaks, and losses after a resume."""
    tried = runs[runs.candidate != BASELINE]
    baseline = runs[runs.candidate == BASELINE].set_index("seed").record
    faults = [f"{_label(row)}: {row.status}" for row in tried[~tried.ok].itertuples()]
    gaps, notes = [], [f"{len(tried)} runs without NaN, spike or graph break"]
    for row in tried.itertuples():
        steps = spikes(row.record) - spikes(baseline.get(row.seed))
        faults += [f"seed {row.seed} has a loss spike at step {min(steps):.0f}"] if steps else []
        n = len(curve(row.record, "train", "loss"))
        if row.ok and n <= SPIKE_WINDOW:
            gaps.append(f"seed {row.seed} has {n} losses here: too few to look for a spike")
    if probe is None:
        return _outcome(faults, [*gaps, "no save/resume probe"])
    if probe.graph_breaks is None:
        gaps.append("graph breaks were not looked for: the probe ran uncompiled")
    elif probe.graph_breaks:
        faults.append(f"compiles with {probe.graph_breaks} graph breaks")
    difference = probe.resume_difference_nats
    if difference is None:
        faults.append("a run did not end well after a resume")
    elif difference > RULES.resume_tolerance_nats:
        faults.append(f"losses differ by {difference:.2g} nats after a resume")
    else:
        notes.append(f"losses after a resume differ by at most {difference:.2g} nats")
    return _outcome(faults, gaps, [] if faults or gaps else notes)


def spikes(record):
    """Return the steps with a train loss spike_nats above the median of the SPIKE_WINDOW before."""
    losses = curve(record, "train", "loss")
    before = losses.value.rolling(SPIKE_WINDOW).median().shift(1)
    return set(losses.step[losses.value > before + RULES.spike_nats])


def generalisation_gate(series, margin=None, is_interpreted=False):
    """Gate 4: the relative change over depths of time and, but for a horizon, of val_bpb."""
    if series.candidate.nunique() < 2:
        return INSUFFICIENT, "no miniseries of this candidate and the baseline"
    _check_comparable(series)
    b, c = pairs(series)
    tried = series[series.candidate != BASELINE]
    faults = [f"{_label(row)}: {row.status}" for row in tried[~tried.ok].itertuples()]
    gaps = missing(series) or _fewer("depths", b.depth.nunique(), RULES.min_depths)
    columns = {"time to target": "time_to_target_sec"}
    if tried.horizon_only.all():
        faults += _missed(series)
        gaps = gaps or target_faults(series)
    else:
        if margin is None:
            gaps = gaps or ["gate 2's margin needs two baseline seeds that ended well"]
        if not (pd.concat([b, c]).time_to_target_sec > 0).all():
            columns = {"step time": "dt_median_ms"}  # the number of steps is the same
        columns = {"val_bpb": "min_val_bpb", **({} if is_interpreted else columns)}
    if faults or gaps:
        return _outcome(faults, gaps)

    notes = [NOT_ON_THIS_DEVICE] if is_interpreted else []
    for what, column in columns.items():
        ratios = c[column].where(c[column] > 0) / b[column].where(b[column] > 0)
        if ratios.isna().any():
            return INSUFFICIENT, f"a run has no {what}"
        tolerance = RULES.depth_time_tolerance
        if what == "val_bpb":
            tolerance = margin / b.min_val_bpb.mean()
        changes = ratios.groupby(level="depth").mean() - 1
        mean, n_worse = paired(100 * changes), int((changes > 0).sum())
        notes.append(f"{what} {mean.describe('%')}, tolerance {100 * tolerance:.2f} %, worse at "
                     f"{n_worse} of {mean.n} depths")
        if mean.mean > 100 * tolerance and (n_worse == mean.n or mean.lo > 0):
            faults.append(what)
    return FAIL if faults else NOT_JUDGED if is_interpreted else PASS, "; ".join(notes)


def paired(differences, confidence=RULES.confidence):
    """Return Student's t statistics (Paired) of at least one difference."""
    d = np.asarray(differences, dtype=np.float64)
    n, mean = len(d), float(d.mean())
    sd = float(d.std(ddof=1)) if n > 1 else nan
    if not sd > 1e-12 * abs(d).max():  # one difference, or equal ones but for rounding
        return Paired(n, mean, sd)
    error = sd / n**0.5
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, sd, mean - half, mean + half, p)


def pairs(runs):
    """Return the rows of baseline and candidate with equal depth and seed that both ended well."""
    ended = runs[runs.ok].set_index(["depth", "seed"], drop=False)
    b, c = ended[ended.candidate == BASELINE], ended[ended.candidate != BASELINE]
    b = b[b.index.isin(c.index)]
    return b, c.loc[b.index]


def missing(runs):
    """Return the reasons why seeds do not pair: runs that are absent or did not end well."""
    cells = runs.pivot(index=["depth", "seed"], columns="candidate", values="status")
    cells = cells.fillna("was not run").stack()
    return [f"{name} depth {depth} seed {seed}: {status}"
            for (depth, seed, name), status in cells[cells != "ok"].items()]


def _check_comparable(runs):
    """Raise UserError unless the runs share target and, per depth, horizon in tokens.

    A candidate that sets only the horizon has a target per depth.
    """
    targets = runs.assign(target=runs.target_metric_name + " "
                          + runs.target_metric_threshold.map(str))
    for _, rows in targets.groupby("depth") if runs.horizon_only.any() else [(None, targets)]:
        check_same("target", rows, "target")
    for _, rows in runs[runs.ok & ~runs.own_horizon].groupby("depth"):
        check_same("horizon", rows, "total_tokens")


def _outcome(faults, gaps, notes=()):
    outcome = FAIL if faults else INSUFFICIENT if gaps else PASS
    return outcome, "; ".join([*faults, *gaps, *notes])


def _missed(runs):
    rows = runs[(runs.candidate != BASELINE) & runs.ok & runs.target_metric_threshold.notna()
                & runs.time_to_target_sec_measured.isna()]
    return _about("target not reached:", map(_label, rows.itertuples()))


def _without_target(runs):
    rows = runs[runs.target_metric_threshold.isna()]
    return _about("give an independent target, none is recorded of", map(_label, rows.itertuples()))


def _fewer(what, n, least):
    return [f"{n} of {least} {what}"] if n < least else []


def _about(words, values):
    listed = _listed(values)
    return [f"{words} {listed}"] if listed else []


def _label(row):
    return f"{row.candidate} depth {row.depth} seed {row.seed}"


def _listed(values):
    return ", ".join(map(str, values))
