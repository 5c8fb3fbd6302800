"""Time to target: training seconds until a metric reaches a threshold, measured or extrapolated.

Model of the curve between the evaluations: metric = m_inf + a * tokens^-b plus independent normal
noise of one size on every evaluation. A learning-rate warmdown bends the curve away from that form;
an extrapolation over one says so only by its interval, so measured times are worth more.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from nanochat import power_law
from nanochat.common import UserError
from nanochat.runlog import numbers_of

METRICS = {"val_bpb": "lower", "core": "higher"}  # the metric's name and the direction that is better
CONFIDENCE = 0.9
MIN_EVALUATIONS = 6  # three parameters and at least three degrees of freedom for the noise
WARMUP_FRACTION = 0.1  # evaluations in the first tenth of the tokens are not on the curve
MAX_EXTRAPOLATION = 10.0  # times the tokens seen so far
BEFORE_THE_CLOCK = "before the clock starts"  # in place of 0 s: a run's first steps are not timed
_EXPONENTS = (0.02, 2.0)
_KINDS = {"val_bpb": ("val", "val_bpb"), "core": ("core", "core_metric")}


@dataclass(frozen=True)
class Evaluation:
    """Steps, tokens and training seconds so far, and the metric's value (None: not finite)."""

    step: int
    tokens: int
    metric: float | None
    train_time_sec: float


@dataclass(frozen=True)
class TimeToTarget:
    """When the target is reached. One of measured_sec, extrapolated_sec and reason is set, the others are None.

    extrapolated_hi_sec None beside a finite extrapolated_sec means that the data give no upper bound within
    MAX_EXTRAPOLATION times the tokens seen. linear_sec is the straight line of the last three evaluations.
    step_interpolated: where the straight line between the two evaluations of bracket_steps crosses the threshold.
    """

    metric_name: str
    threshold: float
    measured_sec: float | None = None
    measured_step: int | None = None
    extrapolated_sec: float | None = None
    extrapolated_lo_sec: float | None = None
    extrapolated_hi_sec: float | None = None
    extrapolated_tokens: float | None = None
    confidence: float = CONFIDENCE
    exponent: float | None = None
    asymptote: float | None = None
    linear_sec: float | None = None
    reason: str | None = None
    step_interpolated: float | None = None
    bracket_steps: tuple[int, int] | None = None  # the last evaluation above, the first at the target

    @property
    def method(self):
        """measured, power law in tokens, or none."""
        if self.measured_sec is not None:
            return "measured"
        return "power law in tokens" if self.extrapolated_sec is not None else "none"

    def summary_fields(self):
        """The fields for a run's summary.json; the first four are columns of the experiments' ledger too."""
        fields = asdict(self)
        names = {"metric_name": "target_metric_name", "threshold": "target_metric_threshold",
                 "measured_sec": "time_to_target_sec_measured", "extrapolated_sec": "time_to_target_sec_extrapolated"}
        return ({new: fields.pop(old) for old, new in names.items()}
                | {f"time_to_target_{name}": value for name, value in fields.items()}
                | {"time_to_target_method": self.method})

    def describe(self):
        """One line for the console."""
        sign = "<=" if METRICS[self.metric_name] == "lower" else ">="
        head = f"time to {self.metric_name} {sign} {self.threshold:g}"
        if self.measured_sec is not None:
            when = f"{self.measured_sec:.1f} s of training, measured" if self.measured_sec else BEFORE_THE_CLOCK
            return f"{head}: {when} at step {self.measured_step}, interpolated: step {self.step_interpolated:.1f}"
        line = "" if self.linear_sec is None else f"; straight line of the last three: {self.linear_sec:.1f} s"
        if self.extrapolated_sec is None:
            return f"{head}: {self.reason}{line}"
        high = "no upper bound" if self.extrapolated_hi_sec is None else f"{self.extrapolated_hi_sec:.1f} s"
        return (f"{head}: {self.extrapolated_sec:.1f} s extrapolated ({self.confidence:.0%} interval "
                f"{self.extrapolated_lo_sec:.1f} s to {high}){line}")


def check_metric_name(metric_name):
    """Raise UserError when no target can be in this metric."""
    if metric_name not in METRICS:
        raise UserError(f"--target-metric-name {metric_name!r} is unknown; use one of {', '.join(METRICS)}")


def check_target(metric_name, threshold):
    """Raise UserError when no training run can be asked for this target."""
    check_metric_name(metric_name)
    if threshold is None or not math.isfinite(threshold):
        raise UserError(f"--target-metric-threshold {threshold} is not a number")
    if metric_name == "val_bpb" and threshold <= 0:
        raise UserError(f"--target-metric-threshold {threshold:g}: bits per byte are above 0")
    if metric_name == "core" and threshold >= 1:
        raise UserError(f"--target-metric-threshold {threshold:g}: CORE is below 1")


def reaches(metric_name, value, threshold):
    """Whether an evaluation's value (None: not finite) is at the target or beyond it."""
    if value is None or not math.isfinite(value):
        return False
    return value <= threshold if METRICS[metric_name] == "lower" else value >= threshold


def evaluations_of(events: Iterable[dict], metric_name: str) -> list[Evaluation]:
    """The evaluations of one metric among a run's events, in their order. A metric of None was not finite.

    Errors: UserError naming the step of an event that lacks a number.
    """
    kind, field = _KINDS[metric_name]
    return [Evaluation(*numbers) for numbers in numbers_of(events, kind, "step", "tokens", field, "train_time_sec")]


def first_crossing(steps, metric, threshold):
    """The step at which a falling metric first is at most `threshold`, linear between evaluations; infinity: never."""
    below = np.flatnonzero(np.asarray(metric) <= threshold)
    if not len(below):
        return math.inf
    at = below[0]
    if at == 0:
        return float(steps[0])
    share = (metric[at - 1] - threshold) / (metric[at - 1] - metric[at])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def time_to_target(evaluations: Sequence[Evaluation], metric_name: str, threshold: float,
                   confidence: float = CONFIDENCE) -> TimeToTarget:
    """Training seconds until `metric_name` (val_bpb: at most, core: at least) reaches `threshold`.

    Measured: the clock at the first evaluation that reaches it, and the crossing's step, interpolated. Otherwise the
    power law in tokens, fitted by least squares, times the median seconds per token; the interval holds every crossing
    point that an F test of the curve forced through it does not refuse.
    """
    check_target(metric_name, threshold)
    finite = [e for e in evaluations if e.metric is not None and math.isfinite(e.metric)]
    sign = 1.0 if METRICS[metric_name] == "lower" else -1.0  # times it: the metric falls towards the threshold
    crossing = first_crossing([e.step for e in finite], [sign * e.metric for e in finite], sign * threshold)
    if math.isfinite(crossing):
        at = next(i for i, e in enumerate(finite) if reaches(metric_name, e.metric, threshold))
        bracket = (finite[at - 1].step if at else 0, finite[at].step)
        return TimeToTarget(metric_name, threshold, finite[at].train_time_sec, finite[at].step, confidence=confidence,
                            step_interpolated=crossing, bracket_steps=bracket)

    if finite and finite[-1] is not evaluations[-1]:
        return _refused(metric_name, threshold, "the last evaluation is not finite")
    tokens = np.array([e.tokens for e in finite], dtype=np.float64)
    metric = sign * np.array([e.metric for e in finite], dtype=np.float64)
    clock_sec = np.array([e.train_time_sec for e in finite], dtype=np.float64)
    linear_tokens = _line_crossing(tokens[-3:], metric[-3:], sign * threshold)
    to_sec = _clock(tokens, clock_sec)
    linear_sec = None if linear_tokens is None else to_sec(linear_tokens)

    kept = tokens > WARMUP_FRACTION * (tokens[-1] if len(tokens) else 0)
    if kept.sum() < MIN_EVALUATIONS or len(set(tokens[kept])) < kept.sum():
        return _refused(metric_name, threshold, f"{kept.sum()} evaluations past the first {WARMUP_FRACTION:.0%} "
                        f"of the tokens, at least {MIN_EVALUATIONS} at growing token counts are needed", linear_sec)
    fit = _fit(tokens[kept], metric[kept], sign * threshold, confidence)
    if isinstance(fit, str):
        return _refused(metric_name, threshold, fit, linear_sec)
    crossing, lo, hi, exponent, asymptote = fit
    return TimeToTarget(metric_name, threshold, extrapolated_sec=to_sec(crossing), extrapolated_lo_sec=to_sec(lo),
                        extrapolated_hi_sec=None if math.isinf(hi) else to_sec(hi), extrapolated_tokens=crossing,
                        confidence=confidence, exponent=exponent, asymptote=sign * asymptote, linear_sec=linear_sec)


def _fit(tokens, metric, threshold, confidence):
    """(tokens where the fitted falling power law crosses the threshold, lo, hi, exponent, asymptote), or why not.

    The curves that cross at `c` are metric - threshold = a * (tokens^-b - c^-b): again a closed form for a and a
    search for b give the smallest residual. Tokens are in units of those seen so far; hi is infinite where it would be
    above MAX_EXTRAPOLATION of them.
    """
    scale = tokens[-1]
    t = tokens / scale
    asymptote, slope, exponent = map(float, power_law.fit(t, metric, _EXPONENTS))
    if slope == 0:
        return "the metric has not improved over the evaluations so far"
    if asymptote >= threshold:
        return f"the fitted curve levels off {asymptote - threshold:.4g} short of the threshold"
    crossing = ((threshold - asymptote) / slope) ** (-1 / exponent)
    if crossing > MAX_EXTRAPOLATION:
        return f"the fitted curve needs {crossing:.1f} times the tokens seen so far, more than {MAX_EXTRAPOLATION:g}"

    freedom, distance = len(metric) - 3, metric - threshold
    residual = ((metric - asymptote - slope * t**-exponent) ** 2).sum()
    floor = residual + 1e-12 * ((metric - metric.mean()) ** 2).sum()  # rounding is not evidence
    allowed = floor * (1 + f_distribution.ppf(confidence, 1, freedom) / freedom)
    crossing = max(crossing, 1.0)  # the target was not reached so far

    def excess(at):
        """By how much the squares that the best falling curve through the threshold at `at` leaves are above those
        allowed."""
        def squares(exponents):
            forced = t ** -exponents[:, None] - at ** -exponents[:, None]
            product, square = forced @ distance, (forced**2).sum(-1)
            return np.where(product > 0, (distance**2).sum() - product**2 / square, np.inf)
        return squares(power_law.best_exponent(squares, _EXPONENTS)[None])[0] - allowed

    def end(limit):
        """The accepted crossing that is furthest from the estimate towards `limit`."""
        if excess(limit) <= 0:
            return limit
        return brentq(excess, crossing, limit, rtol=1e-6) if excess(crossing) < 0 else crossing

    lo, hi = end(1.0), end(MAX_EXTRAPOLATION)
    return crossing * scale, lo * scale, math.inf if hi == MAX_EXTRAPOLATION else hi * scale, exponent, asymptote


def _line_crossing(tokens, metric, threshold):
    """Tokens at which the least-squares line reaches the threshold, or None when it does not fall."""
    if len(tokens) < 3 or len(set(tokens)) < 3:
        return None
    slope, level = np.polyfit(tokens / tokens[-1] - 1, metric, 1)  # level: the line's value at the last evaluation
    crossing = 1 + (threshold - level) / slope if slope < 0 else math.inf
    return crossing * tokens[-1] if 1 <= crossing <= MAX_EXTRAPOLATION else None


def _clock(tokens, clock_sec):
    """A function from tokens still to come to the training clock, at the median seconds per token so far."""
    spans = np.diff(tokens)
    pace = float(np.median(np.diff(clock_sec)[spans > 0] / spans[spans > 0])) if (spans > 0).any() else 0.0
    return lambda target: float(clock_sec[-1] + (target - tokens[-1]) * pace)


def _refused(metric_name, threshold, reason, linear_sec=None):
    return TimeToTarget(metric_name, threshold, linear_sec=linear_sec, reason=f"not extrapolated: {reason}")
