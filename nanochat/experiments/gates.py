"""The four acceptance gates: their rules, written down before any run, and the verdict they give.

Gates give figures by name; findings.py words them.
"""

from dataclasses import replace

import numpy as np

from nanochat.common import UserError
from nanochat.experiments import horizon_gates
from nanochat.experiments.comparison import (
    FAIL,
    INSUFFICIENT,
    PASS,
    RULES,
    SPIKE_WINDOW,
    Comparison,
    fewer,
    found,
    relative_change,
    series_fault,
)
from nanochat.experiments.findings import Gate, Verdict, listed
from nanochat.experiments.paired import paired
from nanochat.experiments.runner import read_probe
from nanochat.experiments.trials import INTERPRETED, check_comparable, check_same_world, split


def judge(candidate, trials, miniseries=(), probe=None):
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
    runs = Comparison(baseline, others[candidate])
    series_baseline, series_others = split(miniseries)
    series = Comparison(series_baseline, series_others.get(candidate, {}))
    check_comparable(runs.trials)
    check_same_world(runs.trials + series.trials)
    depths = sorted({trial.row.depth for trial in runs.trials})
    if len(depths) > 1:
        raise UserError(f"this experiment has depths {listed(depths)}; a candidate is judged at one depth, "
                        "several depths are gate 4's miniseries")
    gates = _gates(runs, series, probe, RULES)
    return Verdict(candidate, next(iter(runs.tried.values())).row.candidate_flags, gates, *decide(gates))


def judge_all(trials, miniseries, runs_dir, candidates=None):
    """A Verdict for each candidate (all that the trials have, when None), in the ledger's order. Errors: as judge."""
    return [judge(name, trials, miniseries, read_probe(runs_dir, trials[0].row.experiment_name, name))
            for name in candidates or split(trials)[1]]


def _gates(runs, series, probe, rules):
    """The four gates, by the rules for horizons where the candidate sets nothing else."""
    stability = stability_gate(runs, probe, rules)
    if all(trial.horizon_only for trial in runs.tried.values()):
        rules = replace(rules, min_seeds=rules.horizon_min_seeds)
        runs, series = horizon_gates.on_one_clock(runs), horizon_gates.on_one_clock(series)
        return (time_gate(runs, rules, horizon_gates.unfit(runs)), horizon_gates.reach_gate(runs, rules), stability,
                horizon_gates.generalisation_gate(series, rules))
    void = found(interpreted=any(INTERPRETED in t.row.device for t in runs.trials) or None)
    return (time_gate(runs, rules, void), quality_gate(runs, rules), stability,
            generalisation_gate(series, quality_margin(runs.baseline, rules), rules, void))


def decide(gates):
    """(decision, the gates that decided, the doubt about gate 1's gain)."""
    for outcome, decision in ((FAIL, "reject"), (INSUFFICIENT, "insufficient")):
        deciding = tuple(gate.name for gate in gates if gate.outcome == outcome)
        if deciding and outcome == INSUFFICIENT and "interpreted" in gates[0].figures:
            return "not judged", (), "interpreted"
        if deciding:
            return decision, deciding, None
    doubt = gates[0].doubt
    return "optional" if doubt else "promote", (), doubt


def time_gate(runs, rules, void=None):
    """Gate 1: the paired gain, and the seeds in which there is none. void: figures of why times say nothing."""
    name, pairs = "1 time", runs.pairs
    timed = [(b, c) for b, c in pairs if b.time_to_target_sec and c.time_to_target_sec]
    slower = [c.row.seed for b, c in pairs if c.time_to_target_sec is None and b.time_to_target_sec is not None
              and c.training_sec is not None and c.training_sec >= b.time_to_target_sec]
    slower += [c.row.seed for b, c in timed if c.time_to_target_sec >= b.time_to_target_sec]
    before = [b.row.seed for b, c in pairs if 0 in (b.time_to_target_sec, c.time_to_target_sec)]
    untimed = [b.row.seed for b, c in pairs if (b, c) not in timed and b.row.seed not in before]
    figures = {"no_times": True}
    if timed:
        times = [(b.time_to_target_sec, c.time_to_target_sec) for b, c in timed]
        figures = {"gain_percent": paired([100 * (1 - after / before) for before, after in times], rules.confidence),
                   "gain_sec": paired([before - after for before, after in times], rules.confidence),
                   "extrapolated": any(t.is_extrapolated for pair in timed for t in pair)}
    if void:
        return Gate(name, INSUFFICIENT, {**void, **figures})
    if slower:
        return Gate(name, FAIL, {"slower_seeds": slower, **figures})
    lacks = (runs.missing or found(before_clock_seeds=before, untimed_seeds=untimed)
             or fewer("seeds", len(timed), rules.min_seeds))
    return Gate(name, INSUFFICIENT if lacks else PASS, {**lacks, **figures})


def quality_margin(baseline, rules):
    """How much val_bpb may rise: max(quality_sds x sd of the baseline's min val_bpb, floor); None with one repeat."""
    ends = [t.row.min_val_bpb for t in baseline.values() if t.ok and t.row.min_val_bpb is not None]
    if len(ends) < 2:
        return None
    return max(rules.quality_sds * float(np.std(ends, ddof=1)), rules.quality_floor_bpb)


def quality_gate(runs, rules):
    """Gate 2: the end of the run and the largest excess over it."""
    name, pairs = "2 quality", runs.pairs
    margin = quality_margin(runs.baseline, rules)
    if margin is None:
        return Gate(name, INSUFFICIENT, {"no_margin": True})
    excesses = [c.row.min_val_bpb - b.row.min_val_bpb for b, c in pairs
                if None not in (b.row.min_val_bpb, c.row.min_val_bpb)]
    if not excesses:
        return Gate(name, INSUFFICIENT, runs.missing or {"no_val_bpb": True})
    excess, worst = paired(excesses, rules.confidence), _worst_excess(runs, margin, rules)
    figures = found(excess_and_margin_bpb=(excess, margin), worst_bpb=worst)
    if excess.mean > margin or (worst is not None and worst[0] > worst[1]):
        return Gate(name, FAIL, figures)
    no_curves = worst is None and not any(c.own_horizon for _, c in pairs)
    lacks = (runs.missing or fewer("seeds", len(excesses), max(rules.min_seeds, len(pairs)))
             or found(no_curves=no_curves or None))
    return Gate(name, INSUFFICIENT if lacks else PASS, {**lacks, **figures})


def _worst_excess(runs, margin, rules):
    """(mean excess of val_bpb over the seeds, what is allowed, step) of the evaluation that most exceeds it.

    None without curves.
    """
    pairs = runs.pairs
    if not pairs or any(c.own_horizon or not len(c.val_curve) or not len(b.val_curve) for b, c in pairs):
        return None
    excess, repeats = {}, {}
    for trial in runs.baseline.values():
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


def stability_gate(runs, probe, rules):
    """Gate 3: ends, spikes, graph breaks, resume."""
    name = "3 stability"
    failed = [(t.row.seed, t.row.status) for t in runs.tried.values() if not t.ok]
    steps = {key: spikes(t, rules) - (spikes(runs.baseline[key], rules) if key in runs.baseline else set())
             for key, t in runs.tried.items()}
    faults = found(failed_seeds=failed, spikes=[(seed, min(at)) for (_, seed), at in steps.items() if at])
    gaps = found(losses_not_enough=[(t.row.seed, len(t.loss_curve)) for t in runs.tried.values()
                                     if t.ok and len(t.loss_curve) <= SPIKE_WINDOW])
    if probe is None:
        gaps["no_probe"] = True
    else:
        difference = probe.resume_difference_nats
        if probe.graph_breaks is None:
            gaps["uncompiled"] = True
        elif probe.graph_breaks:
            faults["graph_breaks"] = probe.graph_breaks
        if difference is None:
            faults["not_resumed"] = True
        elif difference > rules.resume_tolerance_nats:
            faults["resume_differs_nats"] = difference
    if faults or gaps:
        return Gate(name, FAIL if faults else INSUFFICIENT, faults | gaps)
    return Gate(name, PASS, {"stable_runs": len(runs.tried), "resume_within_nats": difference})


def spikes(trial, rules):
    """The steps whose train loss is spike_nats above the median of the SPIKE_WINDOW before; a set of int."""
    loss = trial.loss_curve[:, 3]
    if len(loss) <= SPIKE_WINDOW:
        return set()
    before = np.median(np.lib.stride_tricks.sliding_window_view(loss[:-1], SPIKE_WINDOW), axis=1)
    return set(trial.loss_curve[SPIKE_WINDOW:, 0][loss[SPIKE_WINDOW:] > before + rules.spike_nats].astype(int).tolist())


def generalisation_gate(series, margin_bpb, rules, void=None):
    """Gate 4: the relative change of val_bpb and of time (not where it is void) at each depth, mean over its seeds."""
    name, pairs, fault = "4 generalisation", series.pairs, series_fault(series, rules)
    if fault or margin_bpb is None:
        return fault or Gate(name, INSUFFICIENT, {"no_margin_of_gate_2": True})
    level = float(np.mean([b.row.min_val_bpb for b, _ in pairs if b.row.min_val_bpb is not None]))
    # time to target where every run has one, else the time of a step: the steps are equally many
    what, value_of = (("time to target", lambda t: t.time_to_target_sec)
                      if all(t.time_to_target_sec for pair in pairs for t in pair)
                      else ("step time", lambda t: t.row.dt_median_ms))
    changes = [relative_change("val_bpb", pairs, lambda t: t.row.min_val_bpb, margin_bpb / level, rules)]
    if not void:
        changes.append(relative_change(what, pairs, value_of, rules.depth_time_tolerance, rules))
    if None in changes:
        return Gate(name, INSUFFICIENT, {"no_figures": True})
    if any(change.is_regression for change in changes):
        return Gate(name, FAIL, {"changes": changes})
    return Gate(name, INSUFFICIENT if void else PASS, {**(void or {}), "changes": changes})
