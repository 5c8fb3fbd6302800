"""Lane B's gates: the named run against ratio 12 at the smallest depth that reaches the target."""

import math

import pandas as pd

from nanochat.experiments.gates import (
    INSUFFICIENT,
    decide,
    failures,
    gate_lines,
    outcome_of,
    time_gate,
)
from nanochat.experiments.ledger import check_same, check_same_world, runs_table
from nanochat.experiments.profiles import BASELINE
from nanochat.target import evaluations_of, time_to_target

SEEDS = (10, 11, 12)  # others than those of the calibration
SAME_BPB = 1e-6  # a target this close to a final loss of the baseline counts as derived
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
    table = _on_one_clock(runs_table([*named, *baseline]))
    check_same_world(table)
    check_same("target", table, "target_metric_threshold")
    table["candidate"] = ["lane B"] * len(named) + [BASELINE] * len(baseline)
    table["depth"] = table.depth.iloc[0]  # so that runs of equal seeds are pairs

    time = time_gate(table, len(SEEDS))
    if _is_derived(table):
        time = (INSUFFICIENT, "the target was derived from the baseline runs being judged, about "
                "half of which miss it; use an independent one")
    tried = table[table.candidate == "lane B"]
    n_missed = (tried.ok & tried.time_to_target_sec.isna()).sum()
    missed = f"{n_missed} of {len(tried)} runs miss the target"
    reach = outcome_of([missed] if n_missed else [], [], [] if n_missed else [missed])
    faults = failures(table)
    stability = outcome_of(faults, [], [] if faults else ["no NaN and no new loss spike"])
    gates = {"1 time": time, "2 reach": reach, "3 stability": stability}
    decision, _ = decide(gates)
    return [f"lane B: {decision.upper()}", *gate_lines(gates), _price(table, calibration)]


def _on_one_clock(table):
    """Return the table with times that are steps times the median step time of a depth.

    A step costs the same for every horizon, whatever the load of the machine was. The time to
    target is that of the interpolated crossing.
    """
    step_sec = table.groupby("depth").dt_median_ms.transform("median") / 1000
    targets = [time_to_target(evaluations_of(run.record.events, "val_bpb"), "val_bpb",
                              run.target_metric_threshold) for run in table.itertuples()]
    crossings = pd.Series([target.step_interpolated for target in targets], dtype=float)
    seconds = (crossings * step_sec).where(table.ok)
    return table.assign(time_to_target_sec=seconds, training_sec=table.steps * step_sec,
                        is_extrapolated=False)


def _is_derived(table):
    """Return whether the target is a final loss of the baseline's seeds, their mean or median."""
    ends = table.min_val_bpb[table.candidate == BASELINE].dropna()
    derived = [*ends, ends.mean(), ends.median()]
    return any(abs(end - table.target_metric_threshold.iloc[0]) < SAME_BPB for end in derived)


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
