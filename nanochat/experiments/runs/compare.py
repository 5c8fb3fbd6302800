"""Runs side by side: the flags that differ, figures of each group of seeds, paired differences with intervals."""

from dataclasses import dataclass

import numpy as np

from nanochat.common import UserError
from nanochat.experiments.paired import paired
from nanochat.experiments.runs.listing import table
from nanochat.experiments.trials import recipe_of, seeds_label

CONFIDENCE = 0.95
METRICS = {  # heading: (name in a summary, decimals)
    "min val_bpb": ("min_val_bpb", 4), "final val_bpb": ("final_val_bpb", 4), "CORE": ("core_metric", 4),
    "time to target, s": ("time_to_target_sec_measured", 1), "tok/s": ("tok_per_sec_median", 0),
    "training, s": ("train_time_sec", 1), "tokens": ("tokens", 0), "memory, MiB": ("peak_memory_mib", 0)}
_WORLD = {"dataset_id": ("dataset", "losses and bits per byte"), "tokenizer_id": ("tokenizer", "losses and speeds"),
          "device": ("device", "times and memory")}


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed. recipe: what they have in common, by name."""

    label: str
    recipe: dict
    runs: list

    def values(self, metric):
        """{seed: value} of the finished runs that have one."""
        found = {run.seed: run.figure(metric) for run in self.runs if run.state == "finished"}
        return {seed: value for seed, value in found.items() if value is not None}


def group(runs):
    """The Groups of runs, in their order. Errors: UserError where two runs of one group have one seed."""
    groups = {}
    for run in runs:
        members = groups.setdefault(str(recipe_of(run.record)), {})
        first = members.setdefault(run.seed, run)
        if first is not run:
            raise UserError(f"{first.run_id} and {run.run_id} have the same flags and the same seed; name one of them")
    return [Group(seeds_label([run.run_id for run in members.values()]), recipe_of(next(iter(members.values())).record),
                  list(members.values())) for members in groups.values()]


def compare(runs):
    """Lines that say how runs differ: the flags, the figures, and each group of seeds against the first."""
    groups = group(runs)
    lines = [*_flags_that_differ(groups), "", *_figures(groups)]
    first = groups[0]
    for other in groups[1:]:
        lines += ["", f"{other.label} minus {first.label}, over the seeds that both have finished:"]
        found = [line for heading in METRICS if (line := _difference(heading, first, other))]
        lines += [f"  {line}" for line in found or ["none: no difference can be given"]]
        lines += [f"  note: another {what}: {figures} do not compare" for name, (what, figures) in _WORLD.items()
                  if first.recipe[name] != other.recipe[name]]
    return lines


def _flags_that_differ(groups):
    if len(groups) == 1:
        return ["the same flags, dataset and device: these runs are seeds of one candidate"]
    rows = []
    for name in dict.fromkeys(name for one in groups for name in one.recipe):
        words = ["·" if (value := one.recipe.get(name)) in (None, "") else str(value) for one in groups]
        if len(set(words)) > 1:
            rows.append((_WORLD[name][0] if name in _WORLD else f"--{name.replace('_', '-')}", *words))
    return table(rows, ("what differs", *(one.label for one in groups)), slice(1, None))


def _figures(groups):
    """One row for each run, and for several seeds the mean and standard deviation of those that finished."""
    shown = {heading: (name, digits) for heading, (name, digits) in METRICS.items()
             if any(run.figure(name) is not None for one in groups for run in one.runs)}
    rows = []
    for one in groups:
        rows += [(run.run_id, run.state, *(_formatted(run.figure(name), digits) for name, digits in shown.values()))
                 for run in one.runs]
        if len(one.runs) > 1:
            found = [(list(one.values(name).values()), digits) for name, digits in shown.values()]
            rows.append((f"  {one.label}", "mean, finished",
                         *(_formatted(np.mean(values) if values else None, digits) for values, digits in found)))
            rows.append(("", "sd", *(_formatted(np.std(values, ddof=1) if len(values) > 1 else None, digits)
                                     for values, digits in found)))
    return table(rows, ("run", "state", *shown), slice(2, None))


def _difference(heading, first, other):
    """The paired difference of one figure in words; None where no seed has it in both groups, or it is the same."""
    name, digits = METRICS[heading]
    before, after = first.values(name), other.values(name)
    seeds = [seed for seed in before if seed in after]
    if all(before[seed] == after[seed] for seed in seeds):
        return None
    found = paired([after[seed] - before[seed] for seed in seeds], CONFIDENCE)
    level = np.mean([before[seed] for seed in seeds])
    interval = ("no interval from one seed" if found.n == 1 else "all alike" if found.lo is None else
                f"{CONFIDENCE:.0%} interval {found.lo:+,.{digits}f} to {found.hi:+,.{digits}f}, n={found.n}")
    return f"{heading}: {found.mean:+,.{digits}f}" + (f" ({100 * found.mean / level:+.1f} %)" if level else "") + (
        f", {interval}")


def _formatted(value, digits):
    return "·" if value is None else f"{value:,.{digits}f}"
