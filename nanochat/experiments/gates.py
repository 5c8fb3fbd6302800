"""The four gates of lane C: rules for the promotion of a candidate, fixed before its runs.

Each gate is a function of the rows of the baseline and one candidate; it returns (outcome,
sentence). Lane B has gates of its own (nanochat/lane_b/verdict.py).
"""

from math import nan
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from nanochat.common import UserError
from nanochat.experiments.ledger import (
    INTERPRETED,
    check_same,
    check_same_world,
    curve,
    curves_of,
)
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.runner import read_probe

PASS, NOT_SHOWN, FAIL = "pass", "not shown", "fail"
INSUFFICIENT, NOT_JUDGED = "insufficient", "not judged"
UNFINISHED = ("running", "stale", "interrupted")  # such a run is missing, it has not failed

# The constants of the rules. Do not change them after a run: its verdict would be invalid.
CONFIDENCE = 0.95  # of every interval
MIN_SEEDS = 2
QUALITY_SDS = 2.0  # standard deviations of the baseline's seeds
QUALITY_FLOOR_BPB = 0.0005
SPIKE_NATS = 1.0  # above the median of the SPIKE_WINDOW losses before
SPIKE_WINDOW = 50  # losses
RESUME_TOLERANCE_NATS = 0.002
MIN_DEPTHS = 3
DEPTH_TIME_TOLERANCE = 0.01  # relative
SMOKE_TEST_STEPS = 100

RULES = (
    f"gate 1, time: the time to target must be lower with every seed, with at least {MIN_SEEDS} "
    f"seeds. The gain is shown if its paired {CONFIDENCE:.0%} interval is above zero and every "
    "time was measured.",
    "gate 2, quality: the mean excess of min val_bpb must not exceed the margin, which is the "
    f"larger of {QUALITY_SDS:g} sd of the baseline's seeds and {QUALITY_FLOOR_BPB:g}. At every "
    "evaluation, the mean excess must not exceed twice the larger of the margin and "
    f"{QUALITY_SDS:g} sd of the baseline's seeds at that step.",
    "gate 3, stability: every run must end with status ok, without a graph break and without a "
    f"loss spike, which is a training loss {SPIKE_NATS:g} nats above the median of the "
    f"{SPIKE_WINDOW} losses before it where the baseline has none (shorter runs are insufficient). "
    f"Losses after a resume must agree within {RESUME_TOLERANCE_NATS:g} nats.",
    f"gate 4, generalisation: at least {MIN_DEPTHS} depths must show no systematic regression. "
    "That is a mean relative change of val_bpb above the margin of gate 2, or of the step time "
    f"above {DEPTH_TIME_TOLERANCE:.0%}, that is worse at every depth or has its interval above "
    "zero.",
    "Decision: reject if a gate fails; not judged if the times were measured in the Triton "
    f"interpreter, or if the runs have fewer than {SMOKE_TEST_STEPS} steps (smoke test); "
    "insufficient if a gate lacks runs; optional if all gates pass but the gain is not shown; "
    "otherwise promote.",
)
NOT_ON_THIS_DEVICE = ("the times were measured in the Triton interpreter, so they say nothing "
                      "about the kernels and are not judged: run it on a GPU")
SMOKE_TEST = (f"smoke test: runs of fewer than {SMOKE_TEST_STEPS} steps show that the programs "
              "work, not what a candidate gains or loses")


class Paired(NamedTuple):
    """n paired differences: mean, sd (ddof 1), t interval and two-sided p; NaN: there is none."""

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


class Verdict(NamedTuple):
    """The decision on a candidate: promote, optional, reject, insufficient or not judged.

    gates: {name: (outcome, sentence)}. Outcomes: pass, not shown, fail, insufficient, not judged.
    """

    candidate: str
    decision: str
    decided_by: str
    gates: dict


def judge_all(table, series, runs_dir):
    """Return a Verdict per candidate of an experiment_table. Raise UserError as judge."""
    names = [name for name in table.candidate.unique() if name != BASELINE]
    experiment = table.experiment_name.iloc[0]
    return [judge(name, table, series, read_probe(runs_dir, experiment, name)) for name in names]


def judge(candidate, table, series=None, probe=None):
    """Return the Verdict on a candidate of an experiment_table at one depth.

    series: experiment_table of gate 4's miniseries; probe: the candidate's Probe; None: not run.
    Raise UserError for runs that cannot be judged or compared.
    """
    names = list(table.candidate.unique())
    if candidate not in names or candidate == BASELINE or BASELINE not in names:
        raise UserError(f"{candidate!r} is judged against the {BASELINE!r} of an experiment that "
                        f"has both; this one has {', '.join(names)}")
    if table.depth.nunique() > 1:
        raise UserError("a candidate is judged at one depth; give an experiment of several depths "
                        "as --miniseries")
    series = table[:0] if series is None else series
    runs, series = (rows[rows.candidate.isin([BASELINE, candidate])] for rows in (table, series))
    check_same_world(pd.concat([runs, series]))
    _check_comparable(runs)

    stability = stability_gate(runs, probe)
    if runs.num_iterations.max() < SMOKE_TEST_STEPS:
        return Verdict(candidate, NOT_JUDGED, SMOKE_TEST, {"3 stability": stability})
    is_interpreted = runs.device.str.contains(INTERPRETED).any()
    gates = {"1 time": (NOT_JUDGED, NOT_ON_THIS_DEVICE) if is_interpreted else time_gate(runs),
             "2 quality": quality_gate(runs),
             "3 stability": stability,
             "4 generalisation": generalisation_gate(series, quality_margin(runs), is_interpreted)}
    return Verdict(candidate, *decide(gates), gates)


def decide(gates):
    """Return the decision and the gates that decided it."""
    for outcome, decision in ((FAIL, "reject"), (NOT_JUDGED, NOT_JUDGED),
                              (INSUFFICIENT, INSUFFICIENT), (NOT_SHOWN, "optional")):
        decisive = [name for name, (found, _) in gates.items() if found == outcome]
        if decisive:
            return decision, f"gate {', '.join(decisive)}"
    return "promote", "all gates"


def gate_lines(gates):
    """Return a line per gate."""
    return [f"  {name:<16} {outcome:<13} {sentence}"
            for name, (outcome, sentence) in gates.items()]


def time_gate(runs, min_seeds=MIN_SEEDS):
    """Gate 1: time to target per seed."""
    b, c = pairs(runs)
    before, after = b.time_to_target_sec, c.time_to_target_sec
    timed = (before > 0) & (after > 0)
    never = after.isna() & (c.training_sec >= before)
    faults = _about("not lower in seed", b.seed[timed & (after >= before) | never])
    gaps = missing_runs(runs) + _about(
        "target not reached, or before the clock starts, in seed", b.seed[~timed])
    gaps = gaps or _fewer("seeds", timed.sum(), min_seeds)
    if not timed.any():
        return outcome_of(faults, gaps)

    gain = paired(100 * (1 - after / before)[timed])
    is_extrapolated = (b.is_extrapolated | c.is_extrapolated)[timed].any()
    notes = [f"gain {gain.describe('%')}", f"mean {(before - after)[timed].mean():+.4g} s"]
    doubt = ("the gain has no interval" if not gain.lo <= gain.hi else
             "the gain's interval reaches zero" if gain.lo <= 0 else
             "a time to target was extrapolated, not measured" if is_extrapolated else "")
    if doubt and not faults and not gaps:
        return NOT_SHOWN, "; ".join([doubt, *notes])
    return outcome_of(faults, gaps, notes)


def quality_margin(runs):
    """Return how much val_bpb may rise, by the spread of the baseline's seeds (None: one seed)."""
    ends = runs[(runs.candidate == BASELINE) & runs.ok].min_val_bpb.dropna()
    if len(ends) < 2:
        return None
    return max(QUALITY_SDS * float(ends.std()), QUALITY_FLOOR_BPB)


def quality_gate(runs):
    """Gate 2: the excess of val_bpb at the end of the run and at the worst evaluation."""
    b, c = pairs(runs)
    margin, excesses = quality_margin(runs), (c.min_val_bpb - b.min_val_bpb).dropna()
    if margin is None or excesses.empty:
        return outcome_of([], ["two baseline seeds and one pair need val_bpb"])
    end, ended = paired(excesses), runs[runs.ok]
    notes = [f"min val_bpb {end.describe('bpb')}, margin {margin:.5f}"]
    notes += document_notes(b.record, c.record)
    gaps = missing_runs(runs) or _fewer("seeds", len(excesses), max(MIN_SEEDS, len(b)))
    is_worse = end.mean > margin

    excess = excess_of(ended).dropna().mean(axis=1)
    baseline = curves_of(ended[ended.candidate == BASELINE], "val", "val_bpb")
    sds = baseline.groupby("step").value.std().fillna(0.0).reindex(excess.index)
    if excess.empty:
        gaps = gaps or ["the runs have no evaluation at the same step"]
    else:
        allowed = 2 * (QUALITY_SDS * sds).clip(lower=margin)
        step = (excess - allowed).idxmax()
        is_worse |= excess[step] > allowed[step]
        notes.append(f"worst of the run {excess[step]:+.5f} at step {step:.0f}, allowed "
                     f"{allowed[step]:.5f}")
    return (FAIL, "; ".join(notes)) if is_worse else outcome_of([], gaps, notes)


def excess_of(runs):
    """Return val_bpb minus that of the baseline of equal depth and seed: a column per run."""
    val, keys = curves_of(runs, "val", "val_bpb"), ["depth", "seed", "step"]
    val = val[val.step > 0]
    baseline = val[val.candidate == BASELINE][[*keys, "value"]]
    both = val[val.candidate != BASELINE].merge(baseline, on=keys, suffixes=("", "_of_baseline"))
    both["excess"] = both.value - both.value_of_baseline
    return both.pivot(index="step", columns=["candidate", "run_id"], values="excess")


def document_notes(records, others):
    """Return the mean difference of final val_bpb and its standard error over documents."""
    from nanochat.loss_eval import load_document_losses, paired_difference  # torch takes seconds

    pairs_of_paths = [[record.folder / "validation.npz" for record in pair]
                      for pair in zip(records, others, strict=True)]
    try:
        found = [paired_difference(load_document_losses(after), load_document_losses(before))
                 for before, after in pairs_of_paths if before.exists() and after.exists()]
    except UserError as error:
        return [f"no standard error over documents: {error}"]
    if not found:
        return []
    mean, error = np.mean(found, axis=0)
    return [f"final val_bpb {mean:+.5f} with standard error {error:.5f} over documents, per seed"]


def stability_gate(runs, probe):
    """Gate 3: how runs end, loss spikes, graph breaks, and losses after a resume."""
    tried = runs[runs.candidate != BASELINE]
    faults, gaps = failures(runs), []
    for row in tried[tried.ok].itertuples():
        n = len(curve(row.record, "train", "loss"))
        if n <= SPIKE_WINDOW:
            gaps.append(f"seed {row.seed} has {n} losses: too few to look for a spike")
    if probe is None:
        return outcome_of(faults, [*gaps, "no save/resume probe"])
    if probe.graph_breaks is None:
        gaps.append("graph breaks were not looked for: the probe ran uncompiled")
    difference = probe.resume_difference_nats
    if difference is None:
        faults.append("a run did not end well after a resume")
    elif difference > RESUME_TOLERANCE_NATS:
        faults.append(f"losses differ by {difference:.2g} nats after a resume")
    if faults or gaps:
        return outcome_of(faults, gaps)
    return PASS, (f"{len(tried)} runs without NaN, spike or graph break; losses after a resume "
                  f"differ by at most {difference:.2g} nats")


def failures(runs):
    """Return the candidate's runs that did not end well or have spikes the baseline has not."""
    tried = runs[runs.candidate != BASELINE]
    baseline = runs[runs.candidate == BASELINE].set_index(["depth", "seed"]).record
    faults = _failed(runs)
    for row in tried.itertuples():
        steps = spikes(row.record)
        if (row.depth, row.seed) in baseline:
            steps -= spikes(baseline[row.depth, row.seed])
        faults += [f"{row.run_id} has a loss spike at step {min(steps):.0f}"] if steps else []
    return faults


def spikes(record):
    """Return the steps with a train loss SPIKE_NATS above the median of the SPIKE_WINDOW before."""
    losses = curve(record, "train", "loss")
    before = losses.value.rolling(SPIKE_WINDOW).median().shift(1)
    return set(losses.step[losses.value > before + SPIKE_NATS])


def generalisation_gate(series, margin, is_interpreted):
    """Gate 4: the relative changes of val_bpb and of the step time over depths."""
    if series.candidate.nunique() < 2:
        return INSUFFICIENT, "no miniseries of this candidate and the baseline"
    _check_comparable(series)
    b, c = pairs(series)
    faults = _failed(series)
    gaps = missing_runs(series) or _fewer("depths", b.depth.nunique(), MIN_DEPTHS)
    if margin is None:
        gaps = gaps or ["gate 2's margin needs two baseline seeds that ended well"]
    if faults or gaps:
        return outcome_of(faults, gaps)

    limits = {"val_bpb": ("min_val_bpb", margin / b.min_val_bpb.mean())}
    notes = [NOT_ON_THIS_DEVICE] if is_interpreted else []
    if not is_interpreted:
        limits["step time"] = ("dt_median_ms", DEPTH_TIME_TOLERANCE)
    for what, (column, tolerance) in limits.items():
        ratios = c[column] / b[column]
        if not (ratios > 0).all():
            return INSUFFICIENT, f"a run has no {what}"
        percent = 100 * (ratios.groupby(level="depth").mean() - 1)
        change, n_worse = paired(percent), (percent > 0).sum()
        notes.append(f"{what} {change.describe('%')}, tolerance {100 * tolerance:.2f} %, worse at "
                     f"{n_worse} of {change.n} depths")
        if change.mean > 100 * tolerance and (n_worse == change.n or change.lo > 0):
            faults.append(what)
    return FAIL if faults else NOT_JUDGED if is_interpreted else PASS, "; ".join(notes)


def paired(differences):
    """Return Student's t statistics (Paired) of at least one difference."""
    d = np.asarray(differences, dtype=np.float64)
    sd = float(d.std(ddof=1)) if len(d) > 1 else nan
    if not sd > 1e-12 * abs(d).max():  # one difference, or equal ones but for rounding
        return Paired(len(d), float(d.mean()), sd)
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(CONFIDENCE)
    return Paired(len(d), float(d.mean()), sd, float(low), float(high), float(test.pvalue))


def pairs(runs):
    """Return the rows of baseline and candidate with equal depth and seed that both ended well."""
    ended = runs[runs.ok].set_index(["depth", "seed"], drop=False)
    b, c = ended[ended.candidate == BASELINE], ended[ended.candidate != BASELINE]
    b = b[b.index.isin(c.index)]
    return b, c.loc[b.index]


def missing_runs(runs):
    """Return the reasons why seeds do not pair: runs that are absent or did not end well."""
    cells = runs.pivot(index=["depth", "seed"], columns="candidate", values="status")
    cells = cells.fillna("was not run").stack()
    return [f"{name} depth {depth} seed {seed}: {status}"
            for (depth, seed, name), status in cells[cells != "ok"].items()]


def outcome_of(faults, gaps, notes=()):
    """Return fail, insufficient or pass, and the reasons and notes as one sentence."""
    outcome = FAIL if faults else INSUFFICIENT if gaps else PASS
    return outcome, "; ".join([*faults, *gaps, *notes])


def _check_comparable(runs):
    """Raise UserError unless the runs share target and, per depth, horizon in tokens."""
    check_same("target", runs, "target_metric_threshold")
    for _, rows in runs[runs.ok].groupby("depth"):
        check_same("horizon", rows, "total_tokens")


def _failed(runs):
    failed = runs[(runs.candidate != BASELINE) & ~runs.ok & ~runs.status.isin(UNFINISHED)]
    return [f"{run.run_id}: {run.status}" for run in failed.itertuples()]


def _fewer(what, n, least):
    return [f"{n} of {least} {what}"] if n < least else []


def _about(words, values):
    return [f"{words} {', '.join(map(str, values))}"] if len(values) else []
