"""One law for the loss curves of models of several sizes: its fit, its forecasts and its checks.

With q = N / N_smallest, the learning-rate multipliers m_i (1 at the peak) and S their sum so far:

    L = E + A q^-a + B q^b (S / 1000)^-beta
          - C q^c  sum_k (m_k - m_k+1) (1 - exp(-kappa q^k / 1000  sum_{i > k} sqrt(m_i)))

L is in bits per byte. The second line is the gain of the decay: every decrease of the learning rate
lowers the loss with a lag. The form was chosen by its errors on sizes that were left out of the fit
(dev/bench/lane_b_laws.py).

S counts steps of one reference batch (nanochat.lane_b.calibration.Setup). All runs must have one
set of peak learning rates before these are scaled with the root of the batch.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import norm, qmc

from nanochat.target import first_crossing

FIRST_STEP, FIRST_SHARE = 300, 0.2  # earlier evaluations belong to the warm-ups and are not fitted
HUBER_LOG_LOSS = 0.002  # about the scatter of seeds
SEED_SD_FLOOR = 0.002  # smallest standard deviation of a run's log loss that is assumed
N_REPLICATES = 256  # a power of two, for Sobol numbers; with 128 the named ratio still varied
WIDTH = 0.7  # factor on the replicates' deviations, calibrated by dev/bench/lane_b_laws.py
SMALL_LOSS = 1e-6  # lower predictions are raised to this
_PIECES, _CURVE_POINTS = 64, 60  # of the decrease of a schedule; of a predicted curve

# Start of the fit, and sd of the prior around it. For POSITIVE parameters the logarithm is fitted
# and has that sd. Every fitted number stays within REACH of its start.
PARAMETERS = {"E": (0.9, 0.3), "A": (0.6, np.inf), "a": (0.3, 0.35), "B": (0.4, np.inf),
              "b": (0, 0.2), "beta": (0.4, 0.25), "C": (0.1, np.inf), "c": (0, 0.3),
              "kappa": (10, np.inf), "k": (0, 0.3)}
POSITIVE = {"A", "a", "B", "beta", "C", "kappa"}
REACH = 5
STARTS = ({"kappa": 3}, {"kappa": 10}, {"kappa": 40})


@dataclass(frozen=True)
class Curve:
    """The evaluations of a run: loss (n,) in bits per byte after `steps` (n,) of its schedule."""

    n_params: int  # scaling parameters
    multipliers: np.ndarray  # of the learning rate, (horizon,)
    steps: np.ndarray
    loss: np.ndarray

    @property
    def horizon(self):
        return len(self.multipliers)

    def late(self):
        """Return the curve without the evaluations of the warm-ups."""
        kept = (self.steps >= FIRST_STEP) & (self.steps >= FIRST_SHARE * self.horizon)
        return Curve(self.n_params, self.multipliers, self.steps[kept], self.loss[kept])

    def loss_at(self, shares):
        """Return the loss at shares of the horizon, interpolated."""
        return np.interp(np.asarray(shares) * self.horizon, self.steps, self.loss)


class Points(NamedTuple):
    """Places where the law is evaluated: ln q, ln(S/1000) (n,); drops, lags (n, pieces)."""

    log_size: np.ndarray
    log_progress: np.ndarray
    drops: np.ndarray
    lags: np.ndarray  # sum of sqrt(m) since the drop, in units of 1000 steps


def points_of(log_size, multipliers, steps):
    """Return the Points of a schedule at `steps` (from 1)."""
    steps = np.asarray(steps)
    progress = np.cumsum(multipliers)[steps - 1] / 1000
    roots = np.cumsum(np.sqrt(multipliers)) / 1000
    decrease = np.append(0, np.cumsum(np.maximum(-np.diff(multipliers), 0)))
    decay = np.flatnonzero(np.diff(decrease))
    first, last = (decay[0], decay[-1] + 1) if len(decay) else (0, 1)
    edges = np.linspace(first, last, _PIECES + 1).round().astype(int)
    drops = np.diff(decrease[edges])
    at_drop = np.interp((edges[1:] + edges[:-1] - 1) / 2, np.arange(len(roots)), roots)
    lags = np.maximum(roots[steps - 1, None] - at_drop, 0)
    return Points(np.full(len(steps), log_size), np.log(progress),
                  np.broadcast_to(drops, lags.shape), lags)


def joint_relaxing(values, points):
    """Return the law's loss (n,)."""
    E, A, a, B, b, beta, C, c, kappa, k = values
    x, s = points.log_size, points.log_progress
    rate = kappa * np.exp(k * x)
    relaxed = (points.drops * (1 - np.exp(-rate[:, None] * points.lags))).sum(1)
    return E + A * np.exp(-a * x) + B * np.exp(b * x - beta * s) - C * np.exp(c * x) * relaxed


@dataclass(frozen=True)
class Law:
    """A fitted law; `n_smallest`: the scaling parameters of q = 1."""

    values: dict
    n_smallest: int
    form: object = joint_relaxing

    def at(self, points):
        return np.maximum(self.form(self.values.values(), points), SMALL_LOSS)

    def predict(self, n_params, multipliers, steps):
        """Return the loss (n,) of a run of this size and schedule at `steps`."""
        return self.at(points_of(np.log(n_params / self.n_smallest), multipliers, steps))

    def final_loss(self, n_params, multipliers):
        return float(self.predict(n_params, multipliers, [len(multipliers)])[0])

    def floor(self, n_params, total_drop):
        """Return the loss of this size for an unlimited horizon whose rate falls by total_drop."""
        v, q = self.values, n_params / self.n_smallest
        return v["E"] + v["A"] * q**-v["a"] - v["C"] * q ** v["c"] * total_drop


def fit(curves, *, form=joint_relaxing, parameters=PARAMETERS, starts=STARTS, shifts=0,
        prior_draw=0):
    """Fit the law to the late evaluations of all curves by least squares with a Huber loss.

    shifts: added to the log loss, one per curve. prior_draw: standard normal numbers, one per
    parameter, which move the means of the priors. The priors lie inside the Huber loss.
    """
    curves = [curve.late() for curve in curves]
    n_smallest = min(curve.n_params for curve in curves)
    parts = [points_of(np.log(c.n_params / n_smallest), c.multipliers, c.steps) for c in curves]
    points = Points(*map(np.concatenate, zip(*parts, strict=True)))
    observed = np.log(np.concatenate([curve.loss for curve in curves]))
    observed += np.repeat(shifts + np.zeros(len(curves)), [len(c.loss) for c in curves])

    is_log = np.array([name in POSITIVE for name in parameters])
    defaults = {name: start for name, (start, _) in parameters.items()}
    sd = np.array([sd for _, sd in parameters.values()])
    pull = HUBER_LOG_LOSS * np.sqrt(len(observed) / len(curves)) / sd

    def free(values):
        return np.array([np.log(value) if name in POSITIVE else value
                         for name, value in values.items()])

    def law(fitted):
        values = np.where(is_log, np.exp(fitted), fitted).tolist()
        return Law(dict(zip(parameters, values, strict=True)), n_smallest, form)

    def residuals(fitted):
        return np.append(np.log(law(fitted).at(points)) - observed, pull * (fitted - mean))

    middle = free(defaults)
    mean = middle + prior_draw * np.where(np.isinf(sd), 0, sd)
    lo, hi = middle - REACH, middle + REACH
    solutions = [least_squares(
        residuals, np.clip(free(defaults | start), lo + 1e-6, hi - 1e-6), bounds=(lo, hi),
        loss="huber", f_scale=HUBER_LOG_LOSS, x_scale="jac", max_nfev=300) for start in starts]
    return law(min(solutions, key=lambda solution: solution.cost).x)


def seed_sd(law, curves):
    """Return the standard deviation of a run's log loss over seeds, pooled, at least the floor."""
    groups = {}
    for curve in map(Curve.late, curves):
        predicted = law.predict(curve.n_params, curve.multipliers, curve.steps)
        residual = np.log(curve.loss / predicted).mean()
        groups.setdefault((curve.n_params, curve.horizon), []).append(residual)
    freedom = sum(len(group) - 1 for group in groups.values())
    squares = sum(np.var(group) * len(group) for group in groups.values())
    return max(SEED_SD_FLOOR, np.sqrt(squares / freedom) if freedom else 0.0)


class Time(NamedTuple):
    """Steps to a target, 95 % interval and 90th percentile; infinity: not within the horizon."""

    steps: float
    lo: float
    hi: float
    p90: float


class Forecast:
    """The law of curves, and replicates of it for intervals.

    A replicate is the fit to the same curves, each moved by the noise of a seed, with priors whose
    means are drawn from the priors. The run that is forecast has the noise of its own seed. All
    numbers are one Sobol sequence: with 60 random replicates the named ratio varied by 10 %.
    """

    def __init__(self, curves, seed=0, n_replicates=N_REPLICATES, width=WIDTH):
        self.law, self.width = fit(curves), width
        self.seed_sd = seed_sd(self.law, curves)
        sequence = qmc.Sobol(len(curves) + len(PARAMETERS) + 1, seed=seed).random(n_replicates)
        shifts, priors, own = np.split(norm.ppf(sequence), [len(curves), -1], axis=1)
        self.replicates = [
            fit(curves, starts=[self.law.values], shifts=self.seed_sd * shift, prior_draw=prior)
            for shift, prior in zip(shifts, priors, strict=True)]
        self.own_noise = self.seed_sd * own[:, 0]

    def curves(self, n_params, multipliers):
        """Return (steps, the law's loss, the replicates' losses) of a run's last three quarters."""
        horizon = len(multipliers)
        steps = np.unique(np.linspace(horizon / 4, horizon, _CURVE_POINTS).round().astype(int))
        points = points_of(np.log(n_params / self.law.n_smallest), multipliers, steps)
        loss = self.law.at(points)
        deviations = np.log([law.at(points) for law in self.replicates]) - np.log(loss)
        return steps, loss, loss * np.exp(self.width * deviations + self.own_noise[:, None])

    def time(self, n_params, multipliers, threshold):
        """Return the Time at which a run of this size and schedule reaches the threshold."""
        steps, loss, replicates = self.curves(n_params, multipliers)
        times = [first_crossing(steps, one, threshold) for one in replicates]
        lo, hi, p90 = np.quantile(times, [0.025, 0.975, 0.9], method="inverted_cdf")
        return Time(first_crossing(steps, loss, threshold), float(lo), float(hi), float(p90))


def collapse_gap(curves):
    """Return the largest gap of L / L_end between sizes of one ratio on shares 0.5 to 0.9."""
    shares, gap = np.linspace(0.5, 0.9, 9), 0.0
    for one, other in combinations(curves, 2):
        ratio = one.horizon / one.n_params * other.n_params / other.horizon
        if one.n_params != other.n_params and abs(np.log(ratio)) < 0.02:
            shapes = [curve.loss_at(shares) / curve.loss[-1] for curve in (one, other)]
            gap = max(gap, float(np.abs(shapes[0] - shapes[1]).max()))
    return gap


def holdout_error(curves):
    """Return the largest relative error of the law without the largest size, at its final losses.

    None if fewer than two sizes remain: the exponent of the size would be the prior's.
    """
    largest = max(curve.n_params for curve in curves)
    rest = [curve for curve in curves if curve.n_params < largest]
    if len({curve.n_params for curve in rest}) < 2:
        return None
    law = fit(rest)
    return max(abs(law.final_loss(curve.n_params, curve.multipliers) / curve.loss[-1] - 1)
               for curve in curves if curve.n_params == largest)
