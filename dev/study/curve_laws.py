"""Which law of whole curves predicts runs it has not seen: every form, every cell, on horizons left out.

    python -m dev.study.curve_laws CURVES.csv --out TABLE.csv

Splits: `left_out`: all other horizons are fitted, those of more than 1.5 times the longest fitted are not asked for;
`next`: the three horizons before one (or more, to the shortest) are fitted, as a calibration does. Errors are of the
mean over seeds, at the left-out horizon: its end (bits per byte), the first crossing of two thresholds (its own end
in the worse seed; the mean end of the next shorter horizon) and D* for its mean end, both in per cent.
"""

import argparse
import csv
import math
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np

from dev.study.other_forms import OTHER_FORMS
from nanochat.common import command
from nanochat.lane_b.infer.crossing import MAX_EXTRAPOLATION, first_crossing, shortest_whole
from nanochat.lane_b.infer.curve_law import ALPHA_LOG_SD, FORMS, Progress, Run, fit
from nanochat.schedule import lr_multipliers

COLUMNS = ("cell", "split", "fitted_horizons", "horizon", "form", "prior", "first_step", "rms_log_loss",
           "end_error_bpb", "late_rms_bpb", "crossing_own_error_pct", "crossing_shorter_error_pct",
           "shortest_whole_error_pct", "at_bound")
SHORTEST_STEPS = 300
PRIORS = (ALPHA_LOG_SD, 1e6)  # with the exponent's prior and without


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--first-steps", type=int, nargs="+", default=[100, 200, 300, 400])
    return parser.parse_args(argv)


def read_cells(path):
    """{cell: {horizon: [a Run for each seed]}} of a file of dev.study.curve_runs; step 0 is left out."""
    cells = defaultdict(lambda: defaultdict(lambda: ([], [])))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]):
                steps, losses = cells[row["cell"]][int(row["horizon_steps"]), int(row["seed"])]
                steps.append(int(row["step"]))
                losses.append(float(row["val_bpb"]))
    found = {}
    for cell, runs in cells.items():
        found[cell] = defaultdict(list)
        for (horizon, seed), (steps, losses) in sorted(runs.items()):
            found[cell][horizon].append(Run(Progress(lr_multipliers(horizon), np.array(steps)), np.array(losses), seed))
    return found


def splits(horizons):
    """(name, fitted horizons, the one left out) of a cell, as the module says."""
    for index, left_out in enumerate(horizons):
        others = [horizon for horizon in horizons if horizon != left_out]
        if len(others) >= 3 and left_out <= MAX_EXTRAPOLATION * others[-1]:
            yield "left_out", others, left_out
        for count in range(2, index + 1):
            fitted = horizons[index - count:index]
            if left_out <= MAX_EXTRAPOLATION * fitted[-1]:
                yield "next", fitted, left_out


def measured_crossing(runs, threshold):
    """Mean over the seeds of the first crossing, steps; infinity where one never crosses."""
    return float(np.mean([first_crossing(run.progress.steps, run.loss, threshold) for run in runs]))


def errors(law, runs, shorter):
    """The errors of one law at the horizon of `runs`; `shorter`: the runs of the next shorter horizon, or None."""
    horizon = runs[0].horizon
    steps = np.arange(max(1, round(0.25 * horizon)), horizon + 1)
    predicted = law.at(Progress(lr_multipliers(horizon), steps))
    ends = [run.loss[-1] for run in runs]
    late = [run.late() for run in runs]
    observed = np.mean([run.loss for run in late], axis=0)
    row = {"end_error_bpb": predicted[-1] - np.mean(ends),
           "shortest_whole_error_pct": 100 * (shortest_whole(law, lr_multipliers, np.mean(ends), SHORTEST_STEPS,
                                                            3 * horizon) / horizon - 1)}
    if law.form.ends_only:
        return row
    row["late_rms_bpb"] = np.sqrt(np.mean((law.at(late[0].progress) - observed) ** 2))
    thresholds = {"own": max(ends), "shorter": shorter and np.mean([run.loss[-1] for run in shorter])}
    for name, threshold in thresholds.items():
        if threshold:
            measured = measured_crossing(runs, threshold)
            # a curve that ends above the threshold crosses later by its last slope
            crossing = first_crossing(steps, predicted, threshold)
            if not math.isfinite(crossing):
                crossing = horizon + (predicted[-1] - threshold) / max((predicted[-1 - horizon // 20] - predicted[-1])
                                                                      / (horizon // 20), 1e-9)
            row[f"crossing_{name}_error_pct"] = 100 * (crossing / measured - 1)
    return row


def study(cells, first_steps):
    """A row of COLUMNS for every cell, split, form, with and without the exponent's prior, and first step."""
    for (cell, by_horizon), form in product(cells.items(), (FORMS | OTHER_FORMS).values()):
        horizons = sorted(by_horizon)
        for (split, fitted, left_out), log_sd, first_step in product(
                splits(horizons), PRIORS, first_steps[:1] if form.ends_only else first_steps):
            if form.ends_only and log_sd != ALPHA_LOG_SD and len(fitted) < 3:
                continue  # nothing would determine it
            runs = [run.late(first_step=first_step) for horizon in fitted for run in by_horizon[horizon]]
            law = fit(form, runs, alpha_log_sd=log_sd)
            shorter = [horizon for horizon in horizons if horizon < left_out]
            yield {"cell": cell, "split": split, "fitted_horizons": "+".join(map(str, fitted)), "horizon": left_out,
                   "form": form.name, "prior": log_sd == ALPHA_LOG_SD, "first_step": first_step,
                   "rms_log_loss": law.rms_log_loss, "at_bound": " ".join(law.at_bound),
                   **errors(law, by_horizon[left_out], shorter and by_horizon[shorter[-1]])}


@command
def main(argv=None):
    args = parse_args(argv)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in study(read_cells(args.curves), args.first_steps):
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    raise SystemExit(main())
