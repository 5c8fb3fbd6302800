"""Laws of loss curves, compared by their errors on sizes that were left out of the fit.

python -m dev.bench.lane_b_laws tests/golden/lane_b_curves.csv

Calibrations: two ratios at the smallest size and one at the next, all choices of seeds; the same
with both seeds; and the two largest sizes that leave larger ones to predict.
"""

import csv
import itertools
import sys

import numpy as np

from nanochat.lane_b import curves as lane
from nanochat.schedule import lr_multipliers
from nanochat.target import first_crossing

TESTS = ((3, 12), (4, 4), (4, 8), (4, 12), (5, 4), (6, 4))


def read_curves(path):
    """Return {(depth, ratio, seed): Curve} of a file; the ratio is rounded."""
    groups = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            key = int(row["depth"]), round(float(row["ratio"])), int(row["seed"])
            groups.setdefault(key, []).append(row)
    found = {}
    for key, rows in groups.items():
        steps, first = np.unique([int(row["step"]) for row in rows], return_index=True)
        loss = np.array([float(rows[i]["val_bpb"]) for i in first])
        found[key] = lane.Curve(int(rows[0]["n_scaling_params"]),
                                lr_multipliers(int(rows[0]["horizon_steps"])), steps, loss)
    return found


def calibrations():
    """Return {name: keys of runs}."""
    sets = {f"A{i}{j}{k}": [(2, 4, i), (2, 8, j), (3, 4, k)]
            for i, j, k in itertools.product((0, 1), repeat=3)}
    sets["B"] = [*sets["A000"], *sets["A111"]]
    sets["C"] = [(3, 4, 0), (3, 4, 1), (3, 8, 0), (4, 4, 10)]
    sets["D"] = [*sets["A000"], (3, 8, 0), (4, 4, 10)]
    return sets


def kaplan(values, points):
    """Own idea: the limits of size and data joined before the power (arXiv:2001.08361)."""
    E, A, a, B, b, beta, C, c, kappa, k = values
    x, s = points.log_size, points.log_progress
    by_size = (np.log(A) - a * x) / beta
    by_data = (np.log(B) + b * x) / beta - s
    relaxed = 1 - np.exp(-kappa * np.exp(k * x)[:, None] * points.lags)
    gain = C * np.exp(c * x) * (points.drops * relaxed).sum(1)
    return E + (np.exp(by_size) + np.exp(by_data)) ** beta - gain


def of_fit(**options):
    """Return a law fitted to complete curves: a function of (runs, test) to losses."""
    def losses(runs, test):
        law = lane.fit(runs, **options)
        return law.predict(test.n_params, test.multipliers, test.steps)
    return losses


def final_losses(runs, test, exponent_of_data):
    """Fit E + A N^-a (+ B D^-b) to final losses; return the prediction for a test run."""
    ends = [lane.Curve(r.n_params, np.ones(r.horizon), np.array([r.horizon] * 4),
                       np.repeat(r.loss[-1], 4)) for r in runs]

    def form(values, points):
        E, A, a, B, b = values
        data = B * np.exp(-b * points.log_progress) if exponent_of_data else 0
        return E + A * np.exp(-a * points.log_size) + data

    table = {name: lane.PARAMETERS[name] for name in ("E", "A", "a", "B", "beta")}
    law = lane.fit(ends, form=form, parameters=table, starts=[{}])
    return law.final_loss(test.n_params, np.ones(test.horizon))


def chinchilla(runs, test, collapse=False):
    """Final losses by a law; the curve's shape is that of the calibrated run nearest in ratio."""
    def distance(run):
        return abs(np.log(run.horizon / run.n_params * test.n_params / test.horizon))

    nearest = min(distance(run) for run in runs)
    same = [run for run in runs if distance(run) < nearest + 0.02]
    largest = max(same, key=lambda run: run.n_params)
    end = final_losses(same if collapse else runs, test, not collapse)
    return end * largest.loss_at(test.steps / test.horizon) / largest.loss[-1]


LAWS = {"joint relaxing (iii)": of_fit(), "own: Kaplan's coupling": of_fit(form=kaplan),
        "Chinchilla and shape": chinchilla,
        "collapse at constant ratio": lambda runs, test: chinchilla(runs, test, collapse=True)}


def evaluations(test):
    """Yield (measured steps to it, val_bpb) of a run's evaluations after half of its horizon."""
    for step, loss in zip(test.steps, test.loss, strict=True):
        if step >= test.horizon / 2:
            yield first_crossing(test.steps, test.loss, loss), loss


def cases(runs, ratios=(4, 8, 12)):
    """Yield (calibration, larger runs of these ratios) of every calibration."""
    for keys in calibrations().values():
        chosen = [runs[key] for key in keys]
        largest = max(run.n_params for run in chosen)
        tests = [runs[depth, ratio, 10] for depth, ratio in TESTS if ratio in ratios]
        yield chosen, [test for test in tests if test.n_params > largest]


def compare(runs, losses, ratios):
    """Return the relative errors of times to target and of final losses on larger runs."""
    times, ends = [], []
    for chosen, tests in cases(runs, ratios):
        for test in tests:
            predicted = losses(chosen, test)
            ends.append(predicted[-1] / test.loss[-1] - 1)
            times += [first_crossing(test.steps, predicted, loss) / measured - 1
                      for measured, loss in evaluations(test)]
    return np.abs(times), np.abs(ends)


def coverage(runs):
    """Yield (width, share of measured times within the 95 % interval, factors hi / lo)."""
    forecasts = [(lane.Forecast(chosen), tests) for chosen, tests in cases(runs)]
    for width in (0.5, 0.6, 0.7, 0.8, 1.0):
        held, factors = [], []
        for forecast, tests in forecasts:
            forecast.width = width
            for test, (measured, loss) in [(t, e) for t in tests for e in evaluations(t)]:
                time = forecast.time(test.n_params, test.multipliers, loss)
                held.append(time.lo <= measured <= time.hi)
                factors.append(time.hi / time.lo if np.isfinite(time.hi) else np.inf)
        yield width, np.mean(held), np.sort(factors)


def main():
    runs = read_curves(sys.argv[1])
    print("absolute errors in %: time to target (median, 90th percentile of those reached; share "
          "not reached), final loss (median, maximum)")
    for (name, losses), ratios in itertools.product(LAWS.items(), ((4,), (4, 8, 12))):
        times, ends = (100 * errors for errors in compare(runs, losses, ratios))
        reached = times[np.isfinite(times)]
        print(f"{name:<28} ratios {ratios!s:<10} {np.median(reached):5.1f} "
              f"{np.quantile(reached, 0.9):5.1f} {100 * np.mean(np.isinf(times)):4.0f}   "
              f"{np.median(ends):5.2f} {ends.max():5.2f}")
    for width, held, factors in coverage(runs):
        print(f"width {width}: {held:.1%} of {len(factors)} measured times are covered; hi / lo: "
              f"median {factors[len(factors) // 2]:.3f}, {np.mean(np.isinf(factors)):.0%} "
              "unbounded")


if __name__ == "__main__":
    main()
