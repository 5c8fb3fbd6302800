"""Laws of loss curves, compared by their errors on sizes that were left out of the fit.

python -m dev.bench.lane_b_laws CURVES.csv               errors of five laws
python -m dev.bench.lane_b_laws CURVES.csv --coverage    coverage of the 95 % intervals by width

CURVES.csv has the columns depth, n_scaling_params, horizon_steps, seed, step and val_bpb.
Calibrations: two ratios at the smallest size and one at the next, all choices of seeds; the same
with both seeds; and the two largest sizes that leave larger ones to predict.
"""

import argparse
import csv
import itertools

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
                                lr_multipliers(int(rows[0]["horizon_steps"])), steps, loss, key[2])
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
    return E + (np.exp(by_size) + np.exp(by_data)) ** beta - gain, None


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
        return E + A * np.exp(-a * points.log_size) + data, None

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


def thresholds(test):
    """Yield (measured steps, threshold) of a run's evaluations after half of its horizon."""
    for step, loss in zip(test.steps, test.loss, strict=True):
        if step >= test.horizon / 2:
            yield first_crossing(test.steps, test.loss, loss), loss


def errors(runs_by_key, losses):
    """Return the relative errors of time to target (finite) and of final losses, sizes left out."""
    times, ends = [], []
    for keys in calibrations().values():
        runs = [runs_by_key[key] for key in keys]
        for depth, ratio in TESTS:
            test = runs_by_key[depth, ratio, 10]
            if test.n_params <= max(run.n_params for run in runs) or ratio == 12:
                continue
            predicted = losses(runs, test)
            ends.append(predicted[-1] / test.loss[-1] - 1)
            for measured, threshold in thresholds(test):
                time = first_crossing(test.steps, predicted, threshold)
                times.append(time / measured - 1)
    return np.abs(times), np.abs(ends)


def coverage(runs_by_key, widths):
    """Print how often the 95 % intervals of time to target hold the measured time, by width."""
    forecasts = []
    for keys in calibrations().values():
        runs = [runs_by_key[key] for key in keys]
        tests = [runs_by_key[depth, ratio, 10] for depth, ratio in TESTS]
        largest = max(run.n_params for run in runs)
        forecasts.append((lane.Forecast(runs), [t for t in tests if t.n_params > largest]))
    for width in widths:
        held, factors = [], []
        for forecast, tests in forecasts:
            forecast.width = width
            for test in tests:
                for measured, threshold in thresholds(test):
                    time = forecast.time(test.n_params, test.multipliers, threshold)
                    held.append(time.lo <= measured <= time.hi)
                    factors.append(time.hi / time.lo if np.isfinite(time.hi) else np.inf)
        middle, far = np.quantile(factors, [0.5, 0.8], method="inverted_cdf")
        print(f"width {width:.2f}: covered {np.mean(held):.1%} of {len(held)}, hi/lo median "
              f"{middle:.3f}, 80th percentile {far:.3f}, unbounded "
              f"{np.mean(np.isinf(factors)):.0%}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("curves")
    parser.add_argument("--coverage", action="store_true")
    args = parser.parse_args()
    runs = read_curves(args.curves)
    if args.coverage:
        coverage(runs, (0.4, 0.5, 0.6, 0.7, 0.8, 1.0))
        return
    print(f"{'absolute errors in %':<28}time: median  p90  not reached   final loss: median  max")
    for name, losses in LAWS.items():
        times, ends = errors(runs, losses)
        reached = times[np.isfinite(times)]
        print(f"{name:<28}{100 * np.median(reached):>12.1f} {100 * np.quantile(reached, 0.9):>4.1f}"
              f" {100 * np.mean(np.isinf(times)):>12.0f} {100 * np.median(ends):>20.2f}"
              f" {100 * ends.max():>4.2f}")


if __name__ == "__main__":
    main()
