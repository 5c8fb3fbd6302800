"""Time to target: training seconds until a metric reaches a threshold.

It is measured if an evaluation reaches the threshold. Otherwise it is extrapolated from the
evaluations before the learning-rate decay, with metric = asymptote + slope * tokens^-exponent and
independent normal noise of equal size. The decay bends the curve, so evaluations within it are
not used, and the extrapolated time is that of a run that continues without decay.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from nanochat.common import UserError

METRICS = {"val_bpb": "lower", "core": "higher"}  # the metric and the direction that is better
INTERVAL = 0.9  # confidence level
MIN_EVALUATIONS = 6  # three parameters and three degrees of freedom for the noise
WARMUP_FRACTION = 0.1  # evaluations in this first share of the tokens are not on the curve
MAX_TOKENS_RATIO = 10.0  # longest extrapolation, as a multiple of the tokens seen
BEFORE_THE_CLOCK = "before the clock starts"  # instead of 0 s: the first steps are not timed
_EXPONENTS = (0.02, 2.0)
_EVENTS = {"val_bpb": ("val", "val_bpb"), "core": ("core", "core_metric")}
_BEST = {"val_bpb": 0.0, "core": 1.0}  # no model is better


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: steps, tokens and training seconds so far, and the metric.

    metric None: not finite. lr_multiplier None: unknown.
    """

    step: int
    tokens: int
    metric: float | None
    train_time_sec: float
    lr_multiplier: float | None = None


@dataclass(frozen=True)
class TimeToTarget:
    """The result: one of measured_sec, extrapolated_sec and reason is set.

    extrapolated_hi_sec None beside an extrapolated_sec: the interval has no upper bound within
    MAX_TOKENS_RATIO. step_interpolated: the crossing of the line between two evaluations.
    """

    metric_name: str
    threshold: float
    measured_sec: float | None = None
    measured_step: int | None = None
    step_interpolated: float | None = None
    extrapolated_sec: float | None = None
    extrapolated_lo_sec: float | None = None
    extrapolated_hi_sec: float | None = None
    reason: str | None = None  # why it is not extrapolated

    def summary_fields(self):
        """Return the fields for summary.json."""
        return {
            "target_metric_name": self.metric_name,
            "target_metric_threshold": self.threshold,
            "time_to_target_sec_measured": self.measured_sec,
            "time_to_target_sec_extrapolated": self.extrapolated_sec,
            "time_to_target_extrapolated_lo_sec": self.extrapolated_lo_sec,
            "time_to_target_extrapolated_hi_sec": self.extrapolated_hi_sec,
        }

    def describe(self):
        """Return one line for the console."""
        if self.measured_sec is not None:
            after = f"after {self.measured_sec:.1f} s of training"
            return (f"target {self.threshold:g} reached by {self.metric_name} "
                    f"{after if self.measured_sec else BEFORE_THE_CLOCK}, at step "
                    f"{self.measured_step} (interpolated: step {self.step_interpolated:.1f})")
        head = f"target {self.threshold:g} not reached by {self.metric_name}"
        if self.extrapolated_sec is None:
            return f"{head}, not extrapolated: {self.reason}"
        high_sec = self.extrapolated_hi_sec
        high = "no upper bound" if high_sec is None else f"{high_sec:.1f} s"
        return (f"{head}; extrapolated without learning-rate decay: "
                f"{self.extrapolated_sec:.1f} s of training ({INTERVAL:.0%} interval "
                f"{self.extrapolated_lo_sec:.1f} s to {high})")


def check_metric_name(metric_name):
    """Raise UserError if the metric cannot be a target."""
    if metric_name not in METRICS:
        raise UserError(f"--target-metric-name {metric_name!r} is unknown; use one of "
                        f"{', '.join(METRICS)}")


def check_target(metric_name, threshold):
    """Raise UserError if no run can reach the target."""
    check_metric_name(metric_name)
    if threshold is None or not math.isfinite(threshold):
        problem = "is not a number"
    elif metric_name == "val_bpb" and threshold <= 0:
        problem = "is impossible: bits per byte are above 0"
    elif metric_name == "core" and threshold >= 1:
        problem = "is impossible: CORE is below 1"
    else:
        return
    raise UserError(f"--target-metric-threshold {threshold} {problem}")


def reaches(metric_name, value, threshold):
    """Return whether a value (None: not finite) reaches the target."""
    if value is None or not math.isfinite(value):
        return False
    return value <= threshold if METRICS[metric_name] == "lower" else value >= threshold


def numbers_of(events, kind, *names):
    """Return tuples of the named numbers, one per event of a kind; None: not finite.

    Raise UserError if an event lacks a number.
    """
    rows = []
    for event in events:
        if event["kind"] != kind:
            continue
        for name in names:
            if not isinstance(event.get(name, ""), (int, float, type(None))):
                raise UserError(f"the {kind} event of step {event.get('step')} has no number "
                                f"{name}; fix or remove that line of metrics.jsonl")
        rows.append(tuple(event[name] for name in names))
    return rows


def evaluations_of(events, metric_name):
    """Return the Evaluations of a metric in a run's events. Raise UserError if a number lacks."""
    kind, field = _EVENTS[metric_name]
    multipliers = {event.get("step"): event.get("lr_multiplier")
                   for event in events if event["kind"] == "train"}
    return [Evaluation(*row, lr_multiplier=multipliers.get(row[0]))
            for row in numbers_of(events, kind, "step", "tokens", field, "train_time_sec")]


def target_of(events, metric_name, threshold):
    """Return the TimeToTarget of a run's events."""
    return time_to_target(evaluations_of(events, metric_name), metric_name, threshold)


def first_crossing(steps, metric, threshold):
    """Return the step at which a falling metric reaches the threshold, infinity for never.

    The metric is interpolated linearly between evaluations.
    """
    below = np.flatnonzero(np.asarray(metric) <= threshold)
    if not len(below):
        return math.inf
    at = below[0]
    if at == 0:
        return float(steps[0])
    share = (metric[at - 1] - threshold) / (metric[at - 1] - metric[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def time_to_target(evaluations, metric_name, threshold):
    """Return the training seconds until the metric reaches the threshold, as a TimeToTarget.

    Measured: the training clock at the first evaluation that reaches it. Extrapolated: where the
    fitted curve crosses it, at the median seconds per token; the interval holds the crossings
    that an F test does not reject.
    """
    check_target(metric_name, threshold)
    sign = 1.0 if METRICS[metric_name] == "lower" else -1.0  # sign * metric falls
    finite = [e for e in evaluations if e.metric is not None and math.isfinite(e.metric)]
    first = next((e for e in finite if reaches(metric_name, e.metric, threshold)), None)
    if first:
        crossing = first_crossing([e.step for e in finite], [sign * e.metric for e in finite],
                                  sign * threshold)
        return TimeToTarget(metric_name, threshold, first.train_time_sec, first.step, crossing)
    try:
        if not finite or finite[-1] is not evaluations[-1]:
            raise _NoFit("the last evaluation is missing or not finite")
        used = _before_decay(finite)
        scale = finite[-1].tokens
        tokens = np.array([e.tokens for e in used]) / scale
        metric = sign * np.array([e.metric for e in used])
        crossing, low, high = _fit(
            tokens, metric, sign * threshold, sign * _BEST[metric_name])
    except _NoFit as reason:
        return TimeToTarget(metric_name, threshold, reason=str(reason))

    spans = np.diff([e.tokens for e in finite])
    sec = np.diff([e.train_time_sec for e in finite])
    pace = float(np.median(sec[spans > 0] / spans[spans > 0]))  # seconds per token

    def seconds_at(tokens_ratio):
        return finite[-1].train_time_sec + (tokens_ratio - 1) * scale * pace

    return TimeToTarget(
        metric_name, threshold, extrapolated_sec=seconds_at(crossing),
        extrapolated_lo_sec=seconds_at(low),
        extrapolated_hi_sec=None if high is None else seconds_at(high))


class _NoFit(Exception):
    """The reason why there is no extrapolation."""


def _before_decay(evaluations):
    """Return the evaluations at the full learning rate, after the first share of the tokens."""
    known = [e.lr_multiplier for e in evaluations if e.lr_multiplier is not None]
    if not known:
        raise _NoFit("the record does not say when the learning-rate decay begins")
    used = [e for e in evaluations if e.lr_multiplier == max(known)
            and e.tokens > WARMUP_FRACTION * evaluations[-1].tokens]
    if len({e.tokens for e in used}) < MIN_EVALUATIONS:
        raise _NoFit(f"{len(used)} evaluations before the learning-rate decay and after the first "
                     f"{WARMUP_FRACTION:.0%} of the tokens; {MIN_EVALUATIONS} at different token "
                     "counts are needed")
    return used


def _fit(tokens, metric, threshold, floor):
    """Return (crossing, low, high) of a falling power law, in units of the tokens seen.

    high: None beyond MAX_TOKENS_RATIO. The curves that cross the threshold at c are
    threshold + slope * (tokens^-b - c^-b): for each b the best slope has a closed form.
    """
    exponent = _best_exponent(lambda b: _line(tokens ** -b[:, None], metric)[2])
    asymptote, slope, squares = (float(v) for v in _line(tokens**-exponent, metric))
    if slope == 0:
        raise _NoFit("the metric has not improved")
    if not 1.01 * _EXPONENTS[0] < exponent < 0.99 * _EXPONENTS[1]:
        raise _NoFit(f"the fitted exponent {exponent:.3g} is at a bound of the search")
    if asymptote < floor:
        raise _NoFit("the fitted curve levels off at an impossible value")
    if asymptote >= threshold:
        raise _NoFit("the fitted curve levels off before the threshold")
    crossing = max(1.0, ((threshold - asymptote) / slope) ** (-1 / exponent))
    if crossing > MAX_TOKENS_RATIO:
        raise _NoFit(f"the fitted curve needs {crossing:.1f} times the tokens seen")
    freedom = len(metric) - 3
    squares += 1e-12 * ((metric - metric.mean()) ** 2).sum()  # rounding errors
    allowed = squares * (1 + f_distribution.ppf(INTERVAL, 1, freedom) / freedom)

    def excess(at):
        def forced(b):
            x = tokens ** -b[:, None] - at ** -b[:, None]
            slope = np.maximum((x @ (metric - threshold)) / (x**2).sum(-1), 0)
            return ((metric - threshold - slope[:, None] * x) ** 2).sum(-1)
        return forced(np.array([_best_exponent(forced)]))[0] - allowed

    def end(limit):
        if excess(limit) <= 0:
            return limit
        return brentq(excess, crossing, limit, rtol=1e-6) if excess(crossing) < 0 else crossing

    low, high = end(1.0), end(MAX_TOKENS_RATIO)
    return crossing, low, high if high < MAX_TOKENS_RATIO else None


def _line(x, y):
    """Return (level, slope, sum of squares) of the best y = level + slope * x with slope >= 0."""
    x_mean = x.mean(-1, keepdims=True)
    slope = ((x - x_mean) * (y - y.mean())).sum(-1) / ((x - x_mean) ** 2).sum(-1)
    slope = np.maximum(slope, 0)[..., None]
    level = y.mean() - slope * x_mean
    return level[..., 0], slope[..., 0], ((y - level - slope * x) ** 2).sum(-1)


def _best_exponent(squares):
    """Return the exponent that minimises squares(exponents): a grid, refined six times."""
    low, high = np.log(_EXPONENTS)
    for _ in range(7):
        grid, step = np.linspace(low, high, 33, retstep=True)
        best = grid[squares(np.exp(grid)).argmin()]
        low, high = max(low, best - step), min(high, best + step)
    return float(np.exp(best))
