"""The four acceptance gates: their rules, written down before any run, and the verdict they give."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from nanochat.errors import UserError
from nanochat.experiments.paired import Paired, paired
from nanochat.experiments.trials import check_comparable, check_same_world, split

PASS, FAIL, INSUFFICIENT = "pass", "fail", "insufficient"
SPIKE_WINDOW = 50  # losses


@dataclass(frozen=True)
class Rules:
    """Every number the gates use. Changing one after a run makes the run's verdict worthless."""

    confidence: float = 0.95  # of every interval
    min_seeds: int = 2
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
            "decision: reject when a gate fails, insufficient when one lacks runs, optional when all pass but the gain "
            "is not shown, promote otherwise",
        ]


@dataclass(frozen=True)
class Gate:
    """One gate's outcome (pass, fail, insufficient) and the figures behind it, in words."""

    name: str
    outcome: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """A candidate's decision (promote, optional, reject, insufficient) and the gate that decided."""

    candidate: str
    flags: str
    decision: str
    decided_by: str
    gates: tuple[Gate, ...]
    gain: Paired | None  # percent of the baseline's time to target, over seeds

    def describe(self):
        """Lines for the console."""
        lines = [f"{self.candidate}: {self.decision.upper()} ({self.decided_by})"]
        return lines + [f"  {gate.name:<16} {gate.outcome:<13} {gate.detail}" for gate in self.gates]


def judge(candidate, trials, miniseries=(), probe=None, rules=Rules()):
    """The verdict on one candidate against the baseline.

    trials: those of the experiment, at one depth. miniseries: those of gate 4's experiment. probe: the candidate's
    Probe, or None. Errors: UserError when there is no such candidate or no baseline, and for trials of another
    dataset, device, target or horizon.
    """
    baseline, others = split(trials)
    if candidate not in others:
        there = ", ".join(others) or "the baseline alone"
        raise UserError(f"no candidate {candidate!r} in this experiment; it has {there}")
    if not baseline:
        raise UserError("no baseline runs in this experiment; a candidate is judged against them")
    tried = others[candidate]
    check_comparable([*baseline.values(), *tried.values()])
    series_baseline, series = split(miniseries)
    check_same_world([*baseline.values(), *tried.values(), *series_baseline.values(),
                      *series.get(candidate, {}).values()])
    depths = sorted({depth for depth, _ in (*baseline, *tried)})
    if len(depths) > 1:
        raise UserError(f"this experiment has depths {_list(depths)}; a candidate is judged at one depth, "
                        "several depths are gate 4's miniseries")
    pairs = [(baseline[key], tried[key]) for key in baseline if key in tried and baseline[key].ok and tried[key].ok]
    missing = _missing(baseline, tried)
    time, gain = time_gate(pairs, missing, rules)
    gates = (time, quality_gate(pairs, baseline, missing, rules),
             stability_gate(tried, baseline, probe, rules),
             generalisation_gate(candidate, miniseries, quality_margin(baseline, rules), rules))
    flags = next(iter(tried.values())).row.candidate_flags
    return Verdict(candidate, flags, *decide(gates, gain, any(t.is_extrapolated for pair in pairs for t in pair)),
                   gates, gain)


def decide(gates, gain, extrapolated):
    """(decision, the gate that decided), from the gates' outcomes."""
    for outcome, decision in ((FAIL, "reject"), (INSUFFICIENT, "insufficient")):
        deciding = [gate.name for gate in gates if gate.outcome == outcome]
        if deciding:
            return decision, "gate " + ", gate ".join(deciding)
    if gain.lo is None:
        return "optional", "gate 1 time: the gain has no interval"
    if gain.lo <= 0:
        return "optional", "gate 1 time: the gain's interval reaches zero"
    if extrapolated:
        return "optional", "gate 1 time: a time to target was extrapolated, not measured"
    return "promote", "all four gates"


def time_gate(pairs, missing, rules):
    """Gate 1 and the paired gain in percent (None without a pair of times)."""
    name = "1 time"
    timed = [(b, c) for b, c in pairs if b.time_to_target_sec and c.time_to_target_sec]
    slower = [c.row.seed for b, c in pairs if c.time_to_target_sec is None and b.time_to_target_sec is not None
              and c.training_sec is not None and c.training_sec >= b.time_to_target_sec]
    gain = None
    detail = "no seed has both times"
    if timed:
        seconds = paired([b.time_to_target_sec - c.time_to_target_sec for b, c in timed], rules.confidence)
        gain = paired([100 * (1 - c.time_to_target_sec / b.time_to_target_sec) for b, c in timed], rules.confidence)
        slower += [c.row.seed for b, c in timed if c.time_to_target_sec >= b.time_to_target_sec]
        kind = "extrapolated" if any(t.is_extrapolated for pair in timed for t in pair) else "measured"
        detail = f"gain {gain.describe('%')}; {seconds.describe('s', 1)}; {kind}"
    if slower:
        return Gate(name, FAIL, f"not lower in seed {_list(slower)}; {detail}"), gain
    if missing or len(timed) < max(rules.min_seeds, len(pairs)):
        untimed = [b.row.seed for b, c in pairs if (b, c) not in timed]
        why = missing or (f"no time to target in seed {_list(untimed)}" if untimed
                          else f"{len(timed)} of {rules.min_seeds} seeds")
        return Gate(name, INSUFFICIENT, f"{why}; {detail}"), gain
    return Gate(name, PASS, detail), gain


def quality_margin(baseline, rules):
    """How much val_bpb may rise: max(quality_sds x sd of the baseline's min val_bpb, floor); None with one repeat."""
    ends = [t.row.min_val_bpb for t in baseline.values() if t.ok and t.row.min_val_bpb is not None]
    if len(ends) < 2:
        return None
    return max(rules.quality_sds * float(np.std(ends, ddof=1)), rules.quality_floor_bpb)


def quality_gate(pairs, baseline, missing, rules):
    """Gate 2: the end of the run and the largest excess over it."""
    name = "2 quality"
    margin = quality_margin(baseline, rules)
    if margin is None:
        return Gate(name, INSUFFICIENT, "the margin needs two baseline seeds that ended well")
    ended = [(b, c) for b, c in pairs if None not in (b.row.min_val_bpb, c.row.min_val_bpb)]
    if not ended:
        return Gate(name, INSUFFICIENT, missing or "no seed has both val_bpb")
    excess = paired([c.row.min_val_bpb - b.row.min_val_bpb for b, c in ended], rules.confidence)
    detail = f"min val_bpb {excess.describe('bpb', 5)}, margin {margin:.5f}"
    worst = _worst_excess(pairs, baseline, margin, rules)
    if worst is not None:
        detail += f"; worst of the run {worst[0]:+.5f} at step {worst[2]:.0f}, allowed {worst[1]:.5f}"
    if excess.mean > margin or (worst is not None and worst[0] > worst[1]):
        return Gate(name, FAIL, detail)
    if missing or len(ended) < max(rules.min_seeds, len(pairs)):
        return Gate(name, INSUFFICIENT, f"{missing or f'{len(ended)} of {rules.min_seeds} seeds'}; {detail}")
    if worst is None and not any(c.own_horizon for _, c in pairs):
        return Gate(name, INSUFFICIENT, f"the runs' curves are not here; {detail}")
    return Gate(name, PASS, detail)


def stability_gate(tried, baseline, probe, rules):
    """Gate 3: ends, spikes, graph breaks, resume."""
    name = "3 stability"
    faults = [f"seed {t.row.seed} ended as {t.row.status!r}" for t in tried.values() if not t.ok]
    gaps = []
    for key, trial in tried.items():
        steps = spikes(trial, rules) - (spikes(baseline[key], rules) if key in baseline else set())
        if steps:
            faults.append(f"seed {trial.row.seed} has a loss spike at step {min(steps)}")
        if trial.ok and len(trial.loss_curve) <= SPIKE_WINDOW:
            gaps.append(f"seed {trial.row.seed} has {len(trial.loss_curve)} losses: too short to look for a spike"
                        if len(trial.loss_curve) else f"seed {trial.row.seed}'s losses are not here")
    if probe is None:
        return Gate(name, FAIL if faults else INSUFFICIENT, "; ".join([*faults, *gaps, "no save/resume probe"]))
    difference = probe.resume_difference_nats
    if probe.graph_breaks is None:
        gaps.append("graph breaks were not looked for: the probe ran uncompiled")
    elif probe.graph_breaks:
        faults.append(f"compiles with {probe.graph_breaks} graph breaks")
    if difference is None:
        faults.append("a run did not end well after a resume")
    elif difference > rules.resume_tolerance_nats:
        faults.append(f"losses differ by {difference:.2g} nats after a resume")
    if faults or gaps:
        return Gate(name, FAIL if faults else INSUFFICIENT, "; ".join(faults + gaps))
    return Gate(name, PASS, f"{len(tried)} runs without NaN, spike or graph break; losses after a resume differ by "
                            f"{difference:.2g} nats at most")


def spikes(trial, rules):
    """The steps whose train loss is spike_nats above the median of the SPIKE_WINDOW before; a set of int."""
    loss = trial.loss_curve[:, 3]
    if len(loss) <= SPIKE_WINDOW:
        return set()
    before = np.median(np.lib.stride_tricks.sliding_window_view(loss[:-1], SPIKE_WINDOW), axis=1)
    return set(trial.loss_curve[SPIKE_WINDOW:, 0][loss[SPIKE_WINDOW:] > before + rules.spike_nats].astype(int).tolist())


def generalisation_gate(candidate, miniseries, margin_bpb, rules):
    """Gate 4: the relative change of val_bpb and of time at each depth, mean over its seeds."""
    name = "4 generalisation"
    baseline, others = split(miniseries)
    tried = others.get(candidate, {})
    if not tried or not baseline:
        return Gate(name, INSUFFICIENT, "no miniseries of this candidate and the baseline")
    check_comparable([*baseline.values(), *tried.values()])
    failed = [t for t in tried.values() if not t.ok]
    if failed:
        return Gate(name, FAIL, "; ".join(f"{t.label} ended as {t.row.status!r}" for t in failed))
    pairs = [(baseline[key], tried[key]) for key in baseline if key in tried and baseline[key].ok]
    depths = sorted({b.row.depth for b, _ in pairs})
    missing = _missing(baseline, tried)
    if missing or len(depths) < rules.min_depths:
        return Gate(name, INSUFFICIENT, missing or f"{len(depths)} of {rules.min_depths} depths")
    level = float(np.mean([b.row.min_val_bpb for b, _ in pairs if b.row.min_val_bpb is not None]))
    if margin_bpb is None:
        return Gate(name, INSUFFICIENT, "gate 2's margin needs two baseline seeds that ended well")
    results = [_depth_change("val_bpb", pairs, depths, lambda t: t.row.min_val_bpb, margin_bpb / level, rules),
               _time_change(pairs, depths, rules)]
    if None in results:
        return Gate(name, INSUFFICIENT, "a run has no val_bpb or no time")
    return Gate(name, FAIL if any(bad for bad, _ in results) else PASS, "; ".join(text for _, text in results))


def _time_change(pairs, depths, rules):
    """Time to target where every run has one, else the time of a step: the steps are equally many."""
    if all(t.time_to_target_sec for pair in pairs for t in pair):
        return _depth_change("time to target", pairs, depths, lambda t: t.time_to_target_sec,
                             rules.depth_time_tolerance, rules)
    return _depth_change("step time", pairs, depths, lambda t: t.row.dt_median_ms, rules.depth_time_tolerance, rules)


def _depth_change(what, pairs, depths, value_of, tolerance, rules):
    """(is it a systematic regression, the figures in words), or None when a value is missing."""
    if any(value_of(t) is None for pair in pairs for t in pair):
        return None
    changes = [float(np.mean([value_of(c) / value_of(b) - 1 for b, c in pairs if b.row.depth == depth]))
               for depth in depths]
    worse = sum(change > 0 for change in changes)
    moved = sum(change != 0 for change in changes)
    sign_p = stats.binomtest(worse, moved, alternative="greater").pvalue if moved else 1.0
    mean = paired(changes, rules.confidence)
    bad = mean.mean > tolerance and (worse == len(changes) or (mean.lo is not None and mean.lo > 0))
    interval = "no interval" if mean.lo is None else f"interval {100 * mean.lo:+.2f} to {100 * mean.hi:+.2f}"
    text = (f"{what} {100 * mean.mean:+.2f} % ({interval}, tolerance {100 * tolerance:.2f}), "
            f"worse at {worse} of {len(changes)} depths (sign test p={sign_p:.2g})")
    return bad, text


def _worst_excess(pairs, baseline, margin, rules):
    """(mean excess of val_bpb over the seeds, what is allowed, step) of the evaluation that most exceeds it.

    None without curves.
    """
    if not pairs or any(c.own_horizon or not len(c.val_curve) or not len(b.val_curve) for b, c in pairs):
        return None
    excess, repeats = {}, {}
    for trial in baseline.values():
        for step, _, _, bpb in trial.val_curve if trial.ok else ():
            repeats.setdefault(step, []).append(bpb)
    for b, c in pairs:
        reference = {step: bpb for step, _, _, bpb in b.val_curve}
        for step, _, _, bpb in c.val_curve:
            if step > 0 and step in reference:
                excess.setdefault(step, []).append(bpb - reference[step])
    sds = {step: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for step, values in repeats.items()}
    found = [(float(np.mean(values)), 2 * max(margin, rules.quality_sds * sds[step]), step)
             for step, values in excess.items()]
    return max(found, key=lambda worst: worst[0] - worst[1], default=None)


def _missing(baseline, tried):
    """What keeps the seeds from pairing, in words; empty when nothing does."""
    parts = [f"no run of {other} depth {depth} seed {seed}" for group, rest, other in
             ((tried, baseline, "the baseline at"), (baseline, tried, "the candidate at"))
             for depth, seed in group if (depth, seed) not in rest]
    parts += [f"{t.label} ended as {t.row.status!r}" for t in (*baseline.values(), *tried.values()) if not t.ok]
    return "; ".join(parts)


def _list(numbers):
    return ", ".join(map(str, numbers))
