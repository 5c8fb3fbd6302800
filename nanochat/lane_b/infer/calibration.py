"""The metric at the end of complete schedules of D tokens: L(D) = L_inf + A D^-alpha, in bits per byte.

At a fixed model L_inf holds the entropy of the text and the model's own limit together, so it is
always fitted (L_inf >= 0, A > 0). alpha is given by the theory, or fitted too. Errors: copies of
the points with new normal noise are fitted again; the noise of each copy is drawn with the
uncertainty that its size has at so few degrees of freedom (Student's t by resampling).
"""

from dataclasses import dataclass

import numpy as np

from nanochat import power_law
from nanochat.errors import UserError
from nanochat.lane_b import Refusal

CONFIDENCE = 0.95
MIN_HORIZONS = 3  # with alpha given: L_inf, A and something left to see the fit by
MIN_HORIZONS_FREE = 4  # with alpha fitted too
MIN_HORIZON_STEP = 1.5  # horizons closer than this factor count as one
_ALPHA_RANGE = (0.01, 3.0)  # 0.05 to 0.5 have been measured


@dataclass(frozen=True, order=True)
class BitsPerByte:
    """A loss per byte of text. Mixing it with a bare number, or one per token, is a TypeError."""

    value: float

    def __post_init__(self):
        if not (np.isfinite(self.value) and self.value > 0):
            raise Refusal(f"a metric of {self.value} bits per byte cannot be: it must be finite and above 0; "
                          "leave that run out or repeat it")


def bits_per_byte(metric):
    """The number in a BitsPerByte. Errors: TypeError for anything else."""
    if not isinstance(metric, BitsPerByte):
        raise TypeError(f"{metric!r} is not in bits per byte")
    return metric.value


@dataclass(frozen=True)
class CalibrationPoint:
    """The metric at the end of one complete schedule of `tokens` tokens; `source` names the run."""

    tokens: int
    metric: BitsPerByte
    source: str

    def __post_init__(self):
        bits_per_byte(self.metric)
        if self.tokens < 1:
            raise UserError(f"calibration point {self.source}: {self.tokens} tokens cannot be a horizon")


@dataclass(frozen=True)
class Curves:
    """L(D) = asymptote + amplitude (D / reference_tokens)^-alpha: one curve (floats) or many (1-D arrays).

    The amplitude is taken at the middle of the data, in bits per byte, where it is a number of ordinary
    size; `scale` is the same thing at one token, the A of the formula (bits per byte x tokens^alpha).
    """

    alpha: float | np.ndarray
    asymptote: float | np.ndarray
    amplitude: float | np.ndarray
    reference_tokens: float

    @property
    def scale(self):
        return self.amplitude * self.reference_tokens**self.alpha

    def metric_at(self, tokens):
        """Bits per byte at the end of a schedule of `tokens`; (curves, tokens) for many curves."""
        alpha, asymptote, amplitude = (part[:, None] if np.ndim(part) else part
                                       for part in (self.alpha, self.asymptote, self.amplitude))
        return asymptote + amplitude * (np.asarray(tokens) / self.reference_tokens) ** -alpha

    def tokens_at(self, metric):
        """The horizon whose end reaches `metric` (BitsPerByte); infinity for a curve that never does."""
        gap, amplitude = bits_per_byte(metric) - np.asarray(self.asymptote), np.asarray(self.amplitude)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            tokens = self.reference_tokens * (amplitude / gap) ** (1 / np.asarray(self.alpha))
        return np.where((gap > 0) & (amplitude > 0), tokens, np.inf)


@dataclass(frozen=True)
class Calibration:
    """A fitted curve, its residual, and the resampled curves that carry its uncertainty (None: nothing to spare).

    alpha_lo, alpha_hi: 95 % by resampling; for a given alpha, of what was given.
    """

    curve: Curves
    alpha_lo: float | None
    alpha_hi: float | None
    rms_residual_bits_per_byte: float
    degrees_of_freedom: int
    resampled: Curves | None


def horizons(points):
    """The distinct horizons in tokens, shortest first; those within a factor MIN_HORIZON_STEP count as one."""
    distinct = []
    for tokens in sorted(point.tokens for point in points):
        if not distinct or tokens >= MIN_HORIZON_STEP * distinct[-1]:
            distinct.append(tokens)
    return distinct


def check_points(points):
    """(tokens, bits per byte) of points that a falling curve can be fitted to. Errors: Refusal for the others."""
    found = horizons(points)
    if len(found) < MIN_HORIZONS:
        raise Refusal(f"calibration has {len(found)} distinct horizons (need {MIN_HORIZONS}, a factor of 2 apart; "
                      f"closer than {MIN_HORIZON_STEP} they count as one); add runs with complete schedules between or "
                      "beyond them")
    tokens = np.array([point.tokens for point in points], dtype=np.float64)
    metrics = np.array([bits_per_byte(point.metric) for point in points])
    first = metrics[tokens < MIN_HORIZON_STEP * found[0]].mean()
    last = metrics[tokens >= found[-1]].mean()
    if last >= first:
        raise Refusal(f"calibration points do not fall: {first:.4f} bits per byte at {found[0]} tokens, {last:.4f} at "
                      f"{found[-1]}; use longer horizons or more seeds, and check that each run ended its own schedule")
    return tokens, metrics


def fit_calibration(points, alpha=None, alpha_log_se=0.0, resamples=2000, seed=0):
    """Fit L(D) to the points with `alpha` given (its standard error in log alpha beside it), or fitted too.

    Errors: Refusal for fewer than three distinct horizons, points that do not fall from the shortest to the
    longest or fit no falling curve, and a free alpha that they do not determine.
    """
    tokens, metrics = check_points(points)
    free = alpha is None
    reference = float(np.exp(np.log(tokens).mean()))
    scaled = tokens / reference
    best = float(power_law.fit(scaled, metrics, _ALPHA_RANGE, nonnegative=True)[2]) if free else alpha
    if not 1.001 * _ALPHA_RANGE[0] < best < 0.999 * _ALPHA_RANGE[1]:
        fault = ("alpha not fitted: the calibration points fit best at its limit" if free else
                 f"alpha is not between {_ALPHA_RANGE[0]} and {_ALPHA_RANGE[1]}:")
        raise Refusal(f"{fault} {best:g}; add horizons further apart, or seeds")
    asymptote, amplitude, _ = power_law.solve(scaled**-best, metrics, nonnegative=True)
    if amplitude <= 0:
        raise Refusal("no falling curve fits the calibration points; check that each run ended its own schedule, "
                      "or add seeds")
    curve = Curves(best, float(asymptote), float(amplitude), reference)
    residual = metrics - curve.metric_at(tokens)
    freedom = len(tokens) - (3 if free else 2)
    resampled = lo = hi = None
    if freedom > 0:
        rng = np.random.default_rng(seed)
        noise = np.sqrt((residual**2).sum() / rng.chisquare(freedom, resamples))
        copies = curve.metric_at(tokens) + noise[:, None] * rng.standard_normal((resamples, len(tokens)))
        if free:
            asymptotes, amplitudes, alphas = power_law.fit(scaled, copies, _ALPHA_RANGE, nonnegative=True)
        else:
            log_alphas = np.log(best) + alpha_log_se * rng.standard_normal(resamples)
            alphas = np.exp(np.clip(log_alphas, *np.log(_ALPHA_RANGE)))
            asymptotes, amplitudes, _ = power_law.solve(scaled ** -alphas[:, None], copies, nonnegative=True)
        resampled = Curves(alphas, asymptotes, amplitudes, reference)
        lo, hi = central_interval(alphas)
    return Calibration(curve, lo, hi, float(np.sqrt((residual**2).mean())), freedom, resampled)


def central_interval(values):
    """(lo, hi) holding the middle CONFIDENCE of the values; infinite ones keep their place in the order."""
    tail = (1 - CONFIDENCE) / 2
    lo, hi = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(lo), float(hi)
