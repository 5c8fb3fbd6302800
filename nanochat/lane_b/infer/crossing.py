"""When a run first reaches a target, by a law of whole curves: t*(H), the shortest whole schedule D*, the quickest H*.

All in optimizer steps. A schedule is a function from a horizon to its learning-rate multipliers: its form is fixed, the
horizon alone is free. To first order a slightly longer horizon crosses sooner exactly where the slope of the ends,
-dL_end/d ln D, is steeper than a run's own landing, -dL/d ln t at its end (`slope_test`); how much longer, and what it
gains (2 % or 20 %), only the law says.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import f as f_distribution
from scipy.stats import t as t_distribution

from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.curve_law import ALPHA, ALPHA_LOG_SD, Progress, fit
from nanochat.target import first_crossing

CONFIDENCE = 0.95
MAX_EXTRAPOLATION = 1.5  # times the longest calibration run: further out too little has been measured
LONGEST_OVER_SHORTEST = 2.0  # H* is looked for up to this many D*
MIN_REACHES = 0.9  # of the copies of a horizon that may be chosen
FLAT = 0.01  # horizons within this share of the quickest count as equally quick; the shortest of them is taken
_HORIZONS = 33
_CURVE_POINTS = 200
_NUMBERS_PER_RUN = 2  # independent numbers that a run's curve is worth: a level and a slope


def central_interval(values):
    """(lo, hi) holding the middle CONFIDENCE of the values; infinite ones keep their place in the order."""
    tail = (1 - CONFIDENCE) / 2
    lo, hi = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(lo), float(hi)


def curve_steps(horizon):
    """The steps at which a predicted curve is looked at: the last four fifths of the horizon."""
    return np.unique(np.linspace(max(1, horizon / 5), horizon, _CURVE_POINTS).round().astype(int))


def time_to(law, schedule, horizon, threshold):
    """t*(H): the step at which the law's curve of a run of `horizon` steps first crosses; infinity: it does not."""
    progress = Progress(schedule(horizon), curve_steps(horizon))
    return first_crossing(progress.steps, law.at(progress), threshold)


def end_of(law, schedule, horizon):
    return float(law.at(Progress(schedule(horizon), np.array([horizon])))[0])


def shortest_whole(law, schedule, threshold, shortest, longest):
    """D*: the shortest horizon (steps) in [shortest, longest] whose end is at most `threshold`; infinity: none."""
    lo, hi = int(shortest), int(longest)
    if end_of(law, schedule, hi) > threshold:
        return math.inf
    while lo < hi:  # ends fall with the horizon
        middle = (lo + hi) // 2
        lo, hi = (lo, middle) if end_of(law, schedule, middle) <= threshold else (middle + 1, hi)
    return hi


def by_horizon(runs):
    """{horizon: its runs}, shortest first."""
    return {horizon: [run for run in runs if run.horizon == horizon] for horizon in sorted({r.horizon for r in runs})}


def pooled_variance(groups):
    """(variance of one number, degrees of freedom) from repeats: each group's numbers differ by noise alone."""
    squares = sum(((np.asarray(group) - np.mean(group)) ** 2).sum() for group in groups)
    freedom = sum(len(group) - 1 for group in groups)
    return (squares / freedom if freedom else math.nan), freedom


@dataclass(frozen=True)
class Slopes:
    """Bits per byte per unit of ln: how ends fall with the horizon, how a run falls at its end, and the difference."""

    envelope: float
    landing: float
    se: float  # of envelope - landing, from the scatter of seeds
    degrees_of_freedom: int

    @property
    def says(self):
        """longer: a horizon beyond D* crosses sooner; shorter: D* itself does; undecided: within the noise."""
        margin = self.se * t_distribution.ppf((1 + CONFIDENCE) / 2, self.degrees_of_freedom)
        difference = self.envelope - self.landing
        return "undecided" if not abs(difference) > margin else "longer" if difference > 0 else "shorter"


def landing_slope(run):
    """-dL/d ln t at the end of a run: a parabola in ln t through its last quarter."""
    last = run.late(0.75, 1)
    if len(last.loss) < 5:
        raise Refusal(f"{len(last.loss)} evaluations in the last quarter of a run of {run.horizon} steps do not give "
                      "its slope (need 5); lower --eval-every")
    return -float(np.polyfit(np.log(last.shares), last.loss, 2)[1])


def slope_test(runs):
    """Envelope against landing between the two longest horizons, where both are means over the two."""
    groups = by_horizon(runs)
    if len(groups) < 2:
        raise Refusal("one horizon gives no slope of the ends; add calibration runs with another")
    first, second = list(groups)[-2:]
    log_ratio = math.log(second / first)
    ends = {horizon: [run.loss[-1] for run in group] for horizon, group in groups.items()}
    landings = {horizon: [landing_slope(run) for run in group] for horizon, group in groups.items()}
    envelope = (np.mean(ends[first]) - np.mean(ends[second])) / log_ratio
    landing = (np.mean(landings[first]) + np.mean(landings[second])) / 2
    share = 1 / len(groups[first]) + 1 / len(groups[second])
    (end_variance, freedom), (landing_variance, _) = (pooled_variance(g.values()) for g in (ends, landings))
    se = math.sqrt(share * (end_variance / log_ratio**2 + landing_variance / 4))
    return Slopes(float(envelope), float(landing), se, freedom)


@dataclass(frozen=True)
class LackOfFit:
    """The F ratio of a law's misfit to the pure error of seeds, and its p-value; nan: no repeats to tell by."""

    ratio: float
    p: float


def lack_of_fit(law, runs, bins=3):
    """The law's misfit against the pure error of seeds, on the mean residuals of `bins` spans of each run.

    A span counts as one number: evaluations within it are far from independent.
    """
    cells = []
    for group in by_horizon(runs).values():
        means = [[part.mean() for part in np.array_split(np.log(run.loss) - np.log(law.at(run.progress)), bins)]
                 for run in group]
        cells += list(np.array(means).T)
    variance, freedom = pooled_variance(cells)
    misfit_freedom = len(cells) - len(law.values)
    if not freedom or not variance or misfit_freedom < 1:
        return LackOfFit(math.nan, math.nan)
    misfit = sum(len(cell) * np.mean(cell) ** 2 for cell in cells) / misfit_freedom
    ratio = float(misfit / variance)
    return LackOfFit(ratio, float(f_distribution.sf(ratio, misfit_freedom, freedom)))


@dataclass(frozen=True)
class Horizon:
    """What a law says of one horizon, in steps: its first crossing with a 95 % interval (infinity: none)."""

    steps: int
    time: float
    lo: float
    hi: float
    reaches: float  # share of the copies whose run crosses before its end


@dataclass(frozen=True)
class Quickest:
    """The prediction for one threshold, in steps; `horizons`: all that were looked at, shortest first."""

    whole: float  # D*, infinity where no horizon allowed reaches the threshold
    whole_lo: float
    whole_hi: float
    chosen: Horizon | None  # H*, None beside an infinite D*
    chosen_lo: float
    chosen_hi: float
    horizons: tuple[Horizon, ...]


class Prediction:
    """A law with its uncertainty: the fit repeated on copies of the runs with the residual curves of whole runs.

    A copy's noise is the residual curve of a run drawn at random, its sign and size too: evaluations of a run are not
    independent, whole runs nearly are. A copy's runs to come share one such noise, whatever their horizon (a seed's
    runs see the same text), so intervals are of one run, and horizons are compared within a seed. noise_factor: of all
    noise, for a law that misses its runs by more than their seeds differ.
    """

    def __init__(self, form, runs, schedule, copies=200, seed=0, noise_factor=1.0):
        self.law, self.runs, self.schedule = fit(form, runs), runs, schedule
        rng = np.random.default_rng(seed)
        fitted = [np.log(self.law.at(run.progress)) for run in runs]
        residuals = [(run.shares, np.log(run.loss) - log_loss) for run, log_loss in zip(runs, fitted, strict=True)]
        freedom = max(_NUMBERS_PER_RUN * len(runs) - len(self.law.values), 1)

        def noise(scale):
            """A curve of log L over the share of the horizon, drawn anew."""
            at, residual = residuals[rng.integers(len(residuals))]
            size = scale * rng.standard_normal()
            return lambda shares: size * np.interp(shares, at, residual)

        self.copies = []  # (law, noise of its runs to come)
        for scale in noise_factor * np.sqrt(_NUMBERS_PER_RUN * len(runs) / rng.chisquare(freedom, copies)):
            noisy = [replace(run, loss=np.exp(log_loss + noise(scale)(run.shares)))
                     for run, log_loss in zip(runs, fitted, strict=True)]
            alpha = ALPHA * math.exp(ALPHA_LOG_SD * rng.standard_normal())
            self.copies.append((fit(form, noisy, self.law.values, alpha), noise(scale)))

    def horizon(self, steps, threshold):
        """The Horizon of `steps` steps, and the crossings of its copies."""
        progress = Progress(self.schedule(steps), curve_steps(steps))
        at = progress.steps
        times = np.array([first_crossing(at, law.at(progress) * np.exp(noise(at / steps)), threshold)
                          for law, noise in self.copies])
        point = first_crossing(at, self.law.at(progress), threshold)
        return Horizon(steps, point, *central_interval(times), float(np.isfinite(times).mean())), times

    def quickest(self, threshold):
        """H*, D* and all horizons between the shortest run and MAX_EXTRAPOLATION times the longest."""
        shortest, longest = (pick(run.horizon for run in self.runs) for pick in (min, max))
        grid = np.unique(np.geomspace(shortest, MAX_EXTRAPOLATION * longest, _HORIZONS).astype(int))
        found = [self.horizon(int(steps), threshold) for steps in grid]
        horizons, times = [horizon for horizon, _ in found], np.array([times for _, times in found])
        ends = [Progress(self.schedule(int(steps)), np.array([steps])) for steps in grid]

        def whole(law, log_noise):
            return first_crossing(grid, np.exp(log_noise) * np.array([law.at(end)[0] for end in ends]), threshold)

        d_star = whole(self.law, 0.0)
        wholes = [whole(law, noise(1.0)) for law, noise in self.copies]
        reached = np.isfinite(times).any(0)
        quickest = np.where(reached, grid[(times <= (1 + FLAT) * times.min(0)).argmax(0)], np.inf)
        return Quickest(d_star, *central_interval(wholes), choose(horizons, d_star), *central_interval(quickest),
                        tuple(horizons))


def choose(horizons, whole):
    """The rule for H*: of the horizons in [D*, 2 D*] that nearly always get there, the shortest of the quickest."""
    allowed = [h for h in horizons if whole <= h.steps <= LONGEST_OVER_SHORTEST * whole and h.reaches >= MIN_REACHES]
    best = min((horizon.time for horizon in allowed), default=math.inf)
    return next((horizon for horizon in allowed if horizon.time <= (1 + FLAT) * best), None)
