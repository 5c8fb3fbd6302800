"""How well a law predicts times to target that were measured: t*(H), D* and H* with their intervals.

    python -m dev.study.curve_crossings CURVES.csv --out TABLE.csv

For every cell and every calibration of two or three neighbouring horizons: thresholds are the ends of measured
horizons (mean over seeds) and of those midway between two, from the shortest calibration run to 1.5 times the longest.
Measured D*: the ends, interpolated in the logarithm of the horizon. Measured t*(H): interpolated between the horizons
that were run and D*, where t* = D*.
"""

import argparse
import csv
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.interpolate import PchipInterpolator

from dev.study.curve_laws import read_cells
from nanochat.common import command
from nanochat.lane_b.infer.crossing import MAX_EXTRAPOLATION, Prediction, first_crossing, lack_of_fit, slope_test
from nanochat.lane_b.infer.curve_law import FORMS
from nanochat.schedule import lr_multipliers

COLUMNS = ("cell", "form", "calibration", "lack_of_fit_f", "lack_of_fit_p", "slopes", "threshold",
           "whole_measured", "whole", "whole_lo", "whole_hi", "horizon_run", "time_measured", "time", "time_lo",
           "time_hi", "reaches", "chosen", "chosen_lo", "chosen_hi", "chosen_time_measured", "best_horizon",
           "best_time_measured")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--form", choices=FORMS, default="relaxing")
    parser.add_argument("--copies", type=int, default=200)
    return parser.parse_args(argv)


class Measured:
    """What the runs of one cell, all horizons, say themselves."""

    def __init__(self, by_horizon):
        self.by_horizon = by_horizon
        self.horizons = np.array(sorted(by_horizon))
        ends = [np.mean([run.loss[-1] for run in by_horizon[horizon]]) for horizon in self.horizons]
        self.end = PchipInterpolator(np.log(self.horizons), ends)

    def whole(self, threshold):
        grid = np.linspace(np.log(self.horizons[0]), np.log(self.horizons[-1]), 4001)
        return math.exp(first_crossing(grid, self.end(grid), threshold))

    def times(self, horizon, threshold):
        """The first crossing of each seed's run (infinity: none)."""
        return [first_crossing(run.progress.steps, run.loss, threshold) for run in self.by_horizon[horizon]]

    def time_curve(self, threshold):
        """(horizons, mean t*) from D* on, of the horizons run whose every seed crosses."""
        whole = self.whole(threshold)
        points = [(whole, whole)]
        for horizon in self.horizons[self.horizons > 1.01 * whole]:
            time = np.mean(self.times(horizon, threshold))
            if math.isfinite(time):
                points.append((horizon, time))
        return np.array(points).T


def thresholds(measured, calibration):
    """Ends of horizons from the shortest calibration run to 1.5 times the longest, and midway between two."""
    whole = [h for h in measured.horizons if calibration[0] <= h <= MAX_EXTRAPOLATION * calibration[-1]]
    between = [math.sqrt(a * b) for a, b in pairwise(whole)]
    return [(h, float(measured.end(math.log(h)))) for h in sorted([*whole, *between])]


def calibrations(horizons):
    for count in (2, 3):
        for start in range(len(horizons) - count + 1):
            yield list(horizons[start:start + count])


def study(cells, form, copies):
    """A row for every cell, calibration, threshold and measured horizon (empty: D* and H* alone)."""
    for cell, by_horizon in cells.items():
        measured = Measured(by_horizon)
        for calibration in calibrations(measured.horizons):
            runs = [run.late() for horizon in calibration for run in by_horizon[horizon]]
            prediction = Prediction(form, runs, lr_multipliers, copies)
            misfit = lack_of_fit(prediction.law, runs)
            head = {"cell": cell, "form": form.name, "lack_of_fit_f": misfit.ratio,
                    "lack_of_fit_p": misfit.p, "calibration": "+".join(map(str, calibration)),
                    "slopes": slope_test(runs).says}
            longest = MAX_EXTRAPOLATION * calibration[-1]
            for whole, threshold in thresholds(measured, calibration):
                yield from rows_of(measured, prediction, {**head, "threshold": threshold, "whole_measured": whole},
                                   longest)


def rows_of(measured, prediction, head, longest):
    """Rows of one threshold: one of D* and H*, one of each measured horizon up to `longest`."""
    threshold = head["threshold"]
    quickest = prediction.quickest(threshold)
    horizons, times = measured.time_curve(threshold)
    allowed = horizons <= longest
    best = np.argmin(np.where(allowed, times, np.inf))
    row = {"whole": quickest.whole, "whole_lo": quickest.whole_lo,
           "whole_hi": quickest.whole_hi, "chosen_lo": quickest.chosen_lo, "chosen_hi": quickest.chosen_hi,
           "best_horizon": horizons[best], "best_time_measured": times[best]}
    if quickest.chosen:
        at = math.log(max(quickest.chosen.steps, horizons[0]))
        row |= {"chosen": quickest.chosen.steps, "time": quickest.chosen.time, "time_lo": quickest.chosen.lo,
                "time_hi": quickest.chosen.hi, "reaches": quickest.chosen.reaches,
                "chosen_time_measured": np.interp(at, np.log(horizons), times)}
    yield head | row
    for horizon in measured.horizons[(measured.horizons >= head["whole_measured"]) & (measured.horizons <= longest)]:
        predicted, _ = prediction.horizon(int(horizon), threshold)
        for time in measured.times(horizon, threshold):
            yield head | {"horizon_run": horizon, "time_measured": time, "time": predicted.time,
                          "time_lo": predicted.lo, "time_hi": predicted.hi, "reaches": predicted.reaches}


@command
def main(argv=None):
    args = parse_args(argv)
    with open(args.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in study(read_cells(args.curves), FORMS[args.form], args.copies):
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


if __name__ == "__main__":
    raise SystemExit(main())
