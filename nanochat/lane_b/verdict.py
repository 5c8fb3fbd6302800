"""Lane B's gates: the named run against ratio 12 at the smallest depth that reaches the target."""

import math

from nanochat.experiments.gates import reach_gate, spikes, target_faults, time_gate
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.table import check_same, check_same_world, on_one_clock, runs_table

SEEDS = (10, 11, 12)  # others than those of the calibration
RULES = (
    "gate 1, time: steps to the interpolated crossing of the target times the median seconds per "
    f"step of each depth must be lower with every one of {len(SEEDS)} seeds; the gain is shown if "
    "its paired 95% interval is above zero. The target must not be derived from these runs.",
    "gate 2, reach: every named run must reach the target.",
    "gate 3, stability: every named run must end with status ok and without a loss spike where the "
    "baseline of that seed has none.",
    "Decision: reject if a gate fails, insufficient if one lacks runs, optional if all pass but "
    "the gain is not shown, otherwise promote.")


def judge(named, baseline, calibration):
    """Return the verdict as lines, from records of named runs, baseline and calibration.

    Raise UserError for runs of different texts, devices or targets.
    """
    table = on_one_clock(runs_table([*named, *baseline]))
    check_same_world(table)
    check_same("target", table, "target_metric_threshold")
    table["candidate"] = ["lane B"] * len(named) + [BASELINE] * len(baseline)
    table["depth"] = table.depth.iloc[0]  # so that runs of equal seeds are pairs

    void = target_faults(table)
    time = ("insufficient", "; ".join(void)) if void else time_gate(table, len(SEEDS))
    tried = table[table.candidate == "lane B"]
    before = table[table.candidate == BASELINE].set_index("seed").record
    faults = [f"{run.run_id}: {run.status}" for run in tried[~tried.ok].itertuples()]
    faults += [f"{run.run_id} has a loss spike" for run in tried.itertuples()
               if spikes(run.record) - spikes(before.get(run.seed))]  # not those of a hard batch
    stability = ("fail" if faults else "pass", "; ".join(faults) or "no NaN and no new loss spike")
    gates = {"1 time": time, "2 reach": reach_gate(table), "3 stability": stability}

    outcomes = [outcome for outcome, _ in gates.values()]
    decision = ("reject" if "fail" in outcomes else
                "insufficient" if "insufficient" in outcomes else
                "optional" if "not shown" in outcomes else "promote")
    lines = [f"lane B: {decision.upper()}"]
    lines += [f"  {name:<12} {outcome:<13} {reason}" for name, (outcome, reason) in gates.items()]
    return [*lines, _price(table, calibration)]


def _price(table, calibration):
    """Return a sentence with the calibration's seconds and the number of runs that pay them."""
    seconds = sum(record.summary["steps"] * record.summary["dt_median_ms"] / 1000
                  for record in calibration)
    times = table.set_index(["candidate", "seed"]).time_to_target_sec
    gain = (times[BASELINE] - times["lane B"]).dropna()
    saved = gain.mean() if len(gain) else 0.0
    paid = (f"{saved:.0f} s saved per run pay for it after {math.ceil(seconds / saved)} runs"
            if saved > 0 else "no saving pays for it")
    return f"the calibration took {seconds:.0f} s of training; {paid}"
