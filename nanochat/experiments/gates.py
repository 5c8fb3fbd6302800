"""The four gates: rules for the promotion of a candidate, fixed before its runs.

Each gate is a function of the rows of the baseline and one candidate; it returns (outcome,
sentence). A candidate that sets only the horizon (lane B) is timed in steps and must reach its
target, since its final loss differs by design.
"""

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
SAME_BPB = 1e-6  # a threshold this close to one derived from the baseline counts as derived

# The constants of the rules. Do not change them after a run: its verdict would be invalid.
CONFIDENCE = 0.95  # of every interval
MIN_SEEDS = 2
HORIZON_MIN_SEEDS = 3  # for a candidate that sets only the horizon
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
    "That is a mean relative change of val_bpb above the margin of gate 2, or of time above "
    f"{DEPTH_TIME_TOLERANCE:.0%}, that is worse at every depth or has its interval above zero.",
    "A candidate that sets only the horizon has other rules. Gate 1: times are the interpolated "
    "steps to the target times the median step time of all runs, with at least "
    f"{HORIZON_MIN_SEEDS} seeds; the target must not be derived from the baseline runs being "
    "judged. Gate 2: every seed must reach the target. Gate 4: every depth must reach its own "
    "target with its own horizon, without a systematic regression of time.",
    "Decision: reject if a gate fails; not judged if records are missing, if the times of a "
    "candidate that changes more than the horizon were measured in the Triton interpreter, or if "
    f"the runs have fewer than {SMOKE_TEST_STEPS} steps (smoke test); insufficient if a gate lacks "
    "runs; optional if all gates pass but the gain is not shown; otherwise promote.",
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


def judge_all(table, series, runs_dir, candidates=None):
    """Return a Verdict per candidate (None: all of the table). Raise UserError as judge."""
    names = candidates or [name for name in table.candidate.unique() if name != BASELINE]
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
        raise UserError(f"this experiment has the depths {_listed(sorted(table.depth.unique()))}; "
                        "a candidate is judged at one depth, several are gate 4's miniseries")
    series = table[:0] if series is None else series
    runs, series = (rows[rows.candidate.isin([BASELINE, candidate])] for rows in (table, series))
    check_same_world(pd.concat([runs, series]))
    _check_comparable(runs)

    stability = stability_gate(runs, probe)
    if runs.num_iterations.max() < SMOKE_TEST_STEPS:
        return Verdict(candidate, NOT_JUDGED, SMOKE_TEST, {"3 stability": stability})
    if runs[runs.candidate == candidate].horizon_only.all():
        runs, series = on_one_clock(runs), on_one_clock(series)
        void = target_faults(runs)
        time = (INSUFFICIENT, "; ".join(void)) if void else time_gate(runs, HORIZON_MIN_SEEDS)
        quality, generalisation = reach_gate(runs), generalisation_gate(series)
    else:
        is_interpreted = runs.device.str.contains(INTERPRETED).any()
        time = (NOT_JUDGED, NOT_ON_THIS_DEVICE) if is_interpreted else time_gate(runs)
        quality = quality_gate(runs)
        generalisation = generalisation_gate(series, quality_margin(runs), is_interpreted)
    gates = {"1 time": time, "2 quality": quality, "3 stability": stability,
             "4 generalisation": generalisation}
    return Verdict(candidate, *_decide(gates, runs), gates)


def _decide(gates, runs):
    """Return the decision and what decided it."""
    time = f"gate 1 time: {gates['1 time'][1].partition(';')[0]}"
    by_outcome = {}
    for name, (outcome, _) in gates.items():
        by_outcome.setdefault(outcome, []).append(f"gate {name}")
    if FAIL in by_outcome:
        return "reject", ", ".join(by_outcome[FAIL])
    if NOT_JUDGED in by_outcome:
        return NOT_JUDGED, time
    if n_missing := runs.record.isna().sum():
        return NOT_JUDGED, (f"records missing here of {n_missing} of {len(runs)} runs; the ledger "
                            f"says: {_ledger_says(runs)}")
    if INSUFFICIENT in by_outcome:
        return INSUFFICIENT, ", ".join(by_outcome[INSUFFICIENT])
    return ("optional", time) if NOT_SHOWN in by_outcome else ("promote", "all four gates")


def _ledger_says(runs):
    said = []
    for name, rows in runs.groupby("candidate", sort=False):
        seconds = rows.time_to_target_sec_measured.dropna()
        when = f" after {seconds.mean():.4g} s on average" if len(seconds) else ""
        said.append(f"{name} reached the target in {len(seconds)} of {len(rows)} runs{when}, mean "
                    f"min val_bpb {rows.min_val_bpb.mean():.4f}")
    return ", ".join(said)


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
        return _outcome(faults, gaps)

    gain, seconds = paired(100 * (1 - after / before)[timed]), paired((before - after)[timed])
    is_extrapolated = (b.is_extrapolated | c.is_extrapolated)[timed].any()
    notes = [f"gain {gain.describe('%')}", seconds.describe("s"),
             "extrapolated" if is_extrapolated else "measured"]
    doubt = ("the gain has no interval" if not gain.lo <= gain.hi else
             "the gain's interval reaches zero" if gain.lo <= 0 else
             "a time to target was extrapolated, not measured" if is_extrapolated else "")
    if doubt and not faults and not gaps:
        return NOT_SHOWN, "; ".join([doubt, *notes])
    return _outcome(faults, gaps, notes)


def target_faults(runs):
    """Return why a horizon's times are void: its target was derived from the baseline's losses.

    About half of the seeds miss one of their own final losses, their mean or median; none misses
    the worst plus the runner's slack.
    """
    faults = _without_target(runs)
    for depth, rows in runs[runs.candidate == BASELINE].groupby("depth"):
        threshold, ends = rows.target_metric_threshold.iloc[0], rows.min_val_bpb.dropna()
        derived = np.array([*ends, ends.mean(), ends.median(), ends.max() + SLACK_BPB])
        if (abs(derived - threshold) < SAME_BPB).any():
            faults.append(f"the threshold {threshold:.6g} at depth {depth} was derived from the "
                          "baseline runs being judged: give an independent one")
    return faults


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
        return _outcome([], missing_runs(runs) or ["two baseline seeds and one pair need val_bpb"])
    end = paired(excesses)
    notes = [f"min val_bpb {end.describe('bpb')}, margin {margin:.5f}"]
    notes += document_notes(b.record, c.record)
    gaps = missing_runs(runs) or _fewer("seeds", len(excesses), max(MIN_SEEDS, len(b)))
    is_worse = end.mean > margin
    if not c.own_horizon.any():  # curves of other horizons differ by design
        excess, allowed = _excess_curves(runs, margin)
        if excess.empty:
            gaps = gaps or ["the runs' curves are not here"]
        else:
            step = (excess - allowed).idxmax()
            is_worse |= excess[step] > allowed[step]
            notes.append(f"worst of the run {excess[step]:+.5f} at step {step:.0f}, allowed "
                         f"{allowed[step]:.5f}")
    return (FAIL, "; ".join(notes)) if is_worse else _outcome([], gaps, notes)


def _excess_curves(runs, margin):
    """Return the mean excess of val_bpb and the allowed one by step; empty without all curves."""
    b, c = pairs(runs)
    baseline = runs[(runs.candidate == BASELINE) & runs.ok]
    before, after, every = (
        pd.DataFrame([curve(record, "val", "val_bpb").set_index("step").value
                      for record in rows.record]).T.sort_index() for rows in (b, c, baseline))
    excess = (after - before).mean(axis=1).dropna()  # a row per step, a column per run
    if pd.concat([before, after], axis=1).isna().all().any():
        excess = excess[:0]
    excess = excess[excess.index > 0]
    sds = every.std(axis=1).fillna(0.0).reindex(excess.index)
    return excess, 2 * (QUALITY_SDS * sds).clip(lower=margin)


def document_notes(records, others):
    """Return the mean difference of final val_bpb and its standard error over documents."""
    from nanochat.loss_eval import load_document_losses, paired_difference  # torch takes seconds

    pairs_of_paths = [[record.folder / "validation.npz" for record in pair]
                      for pair in zip(records, others, strict=True) if all(pair)]
    try:
        found = [paired_difference(load_document_losses(after), load_document_losses(before))
                 for before, after in pairs_of_paths if before.exists() and after.exists()]
    except UserError as error:
        return [f"no standard error over documents: {error}"]
    if not found:
        return []
    mean, error = np.mean(found, axis=0)
    return [f"final val_bpb {mean:+.5f} with standard error {error:.5f} over documents, per seed"]


def reach_gate(runs):
    """Gate 2 of a horizon: every seed reaches the target."""
    n = len(pairs(runs)[0])
    gaps = missing_runs(runs) or _without_target(runs) or _fewer("seeds", n, HORIZON_MIN_SEEDS)
    missed = _missed(runs)
    return _outcome(missed, gaps, [] if missed or gaps else [f"target reached in all {n} seeds"])


def stability_gate(runs, probe):
    """Gate 3: how runs end, loss spikes, graph breaks, and losses after a resume."""
    tried = runs[runs.candidate != BASELINE]
    baseline = runs[runs.candidate == BASELINE].set_index("seed").record
    faults, gaps = _failed(tried), []
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
    difference = probe.resume_difference_nats
    if difference is None:
        faults.append("a run did not end well after a resume")
    elif difference > RESUME_TOLERANCE_NATS:
        faults.append(f"losses differ by {difference:.2g} nats after a resume")
    if faults or gaps:
        return _outcome(faults, gaps)
    return PASS, (f"{len(tried)} runs without NaN, spike or graph break; losses after a resume "
                  f"differ by at most {difference:.2g} nats")


def spikes(record):
    """Return the steps with a train loss SPIKE_NATS above the median of the SPIKE_WINDOW before."""
    losses = curve(record, "train", "loss")
    before = losses.value.rolling(SPIKE_WINDOW).median().shift(1)
    return set(losses.step[losses.value > before + SPIKE_NATS])


def generalisation_gate(series, margin=None, is_interpreted=False):
    """Gate 4: the relative change over depths of time and, but for a horizon, of val_bpb."""
    if series.candidate.nunique() < 2:
        return INSUFFICIENT, "no miniseries of this candidate and the baseline"
    _check_comparable(series)
    b, c = pairs(series)
    tried = series[series.candidate != BASELINE]
    faults = _failed(tried)
    gaps = missing_runs(series) or _fewer("depths", b.depth.nunique(), MIN_DEPTHS)
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
        tolerance = DEPTH_TIME_TOLERANCE
        if what == "val_bpb":
            tolerance = margin / b.min_val_bpb.mean()
        changes = ratios.groupby(level="depth").mean() - 1
        mean, n_worse = paired(100 * changes), int((changes > 0).sum())
        notes.append(f"{what} {mean.describe('%')}, tolerance {100 * tolerance:.2f} %, worse at "
                     f"{n_worse} of {mean.n} depths")
        if mean.mean > 100 * tolerance and (n_worse == mean.n or mean.lo > 0):
            faults.append(what)
    return FAIL if faults else NOT_JUDGED if is_interpreted else PASS, "; ".join(notes)


def paired(differences, confidence=CONFIDENCE):
    """Return Student's t statistics (Paired) of at least one difference."""
    d = np.asarray(differences, dtype=np.float64)
    sd = float(d.std(ddof=1)) if len(d) > 1 else nan
    if not sd > 1e-12 * abs(d).max():  # one difference, or equal ones but for rounding
        return Paired(len(d), float(d.mean()), sd)
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(confidence)
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


def _check_comparable(runs):
    """Raise UserError unless the runs share target and, per depth, horizon in tokens.

    A candidate that sets only the horizon has a target per depth, and is timed in steps, which
    must have one size.
    """
    targets = runs.assign(target=runs.target_metric_name + " "
                          + runs.target_metric_threshold.map(str))
    if not runs.horizon_only.any():
        check_same("target", targets, "target")
    for _, rows in targets.groupby("depth"):
        if runs.horizon_only.any():
            check_same("target", rows, "target")
            check_same("batch size", rows, "total_batch_size_tokens")
        check_same("horizon", rows[rows.ok & ~rows.own_horizon], "total_tokens")


def _outcome(faults, gaps, notes=()):
    outcome = FAIL if faults else INSUFFICIENT if gaps else PASS
    return outcome, "; ".join([*faults, *gaps, *notes])


def _failed(tried):
    return (tried.label + ": " + tried.status)[~tried.ok].tolist()


def _missed(runs):
    missed = runs.target_metric_threshold.notna() & runs.time_to_target_sec_measured.isna()
    return _about("target not reached:",
                  runs.label[missed & runs.ok & (runs.candidate != BASELINE)])


def _without_target(runs):
    return _about("give an independent target, none is recorded of",
                  runs.label[runs.target_metric_threshold.isna()])


def _fewer(what, n, least):
    return [f"{n} of {least} {what}"] if n < least else []


def _about(words, values):
    listed = _listed(values)
    return [f"{words} {listed}"] if listed else []


def _listed(values):
    return ", ".join(map(str, values))
