"""From corpus statistics and calibration runs to a training horizon: the exponent, the policy, the states.

Theory: arXiv:2602.07488. ‖C(n)‖ falls as n^-beta, the conditional entropy as n^-gamma; P tokens resolve
lags up to n*(P) ~ P^(1/2beta), so the loss falls as P^-alpha with alpha = gamma / (2 beta), as long
as the context is longer than n*(P). See ideas/lane_b_data_horizon_theory.md.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from nanochat.errors import UserError
from nanochat.lane_b import Refusal
from nanochat.lane_b.exponents import Estimate, alpha_of
from nanochat.lane_b.infer import calibration as fits

ALPHA_SOURCES = ("auto", "theory", "calibration")
CONFIRMATION_FACTOR = 1.05
DEFAULT_RATIO = 12.0  # tokens per scaling parameter, scripts.base_train's default
UNREACHABLE_FACTOR = 10  # times the default horizon
MAX_INTERVAL_FACTOR = 4  # a 95 % interval wider than this says too little
MAX_EXTRAPOLATION = 4  # times the longest calibration horizon (and half the shortest)
STATES = ("ok", "threshold_not_above_asymptote", "likely_unreachable", "low_quality")


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval (None: not known; infinite: no bound)."""

    value: float
    lo: float | None
    hi: float | None

    def times(self, factor):
        return Interval(*(None if number is None else number * factor for number in (self.value, self.lo, self.hi)))


@dataclass(frozen=True)
class CorrelationLaw:
    """‖C(n)‖ = exp(log_intercept) n^-slope, from n_break on with slope_after; P(n) = (null_coefficient/‖C(n)‖)^2."""

    log_intercept: float
    slope: float
    n_break: float | None
    slope_after: float | None
    null_coefficient: float
    longest_lag: int

    def usable_context_tokens(self, data_tokens):
        """n*(P): the longest lag that P = `data_tokens` tokens resolve; infinity when all of them are."""
        log_norm = math.log(self.null_coefficient) - math.log(data_tokens) / 2  # the weakest norm that is resolved
        log_lag = _over(self.log_intercept - log_norm, self.slope)
        if self.n_break is not None and log_lag > math.log(self.n_break):
            above = self.log_intercept - self.slope * math.log(self.n_break) - log_norm
            log_lag = math.log(self.n_break) + _over(above, self.slope_after)
        return math.exp(log_lag) if log_lag < 700 else math.inf


def _over(log_fall, slope):
    return log_fall / slope if slope > 0 else math.inf


@dataclass(frozen=True)
class CorpusStatistics:
    """What lane B's inference takes from stats.json (see inputs.read_statistics)."""

    dataset_id: str
    tokenizer_id: str
    vocab_size: int
    beta: Estimate
    beta_max_data_tokens: float
    gamma: Estimate
    gamma_refusal: str | None
    law: CorrelationLaw
    context_tokens: int | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Regime:
    """Whether `data_tokens` tokens resolve lags up to less than the context (horizon-limited) or beyond it."""

    name: str
    data_tokens: float
    usable_context_tokens: float
    beyond_measured_lags: bool
    context_tokens: int | None


@dataclass(frozen=True)
class Inference:
    """A horizon, how sure it is, and how it came about.

    `alpha` is the exponent used, of `alpha_source` (theory or calibration); `own` is the fit with alpha free,
    None where the points leave nothing to fit it with. Target and ratios are None where the curve never
    reaches the threshold. `faults` are the reasons for the state low_quality.
    """

    state: str
    alpha_source: str
    policy: str
    alpha: Estimate
    alpha_theory: Estimate
    calibration: fits.Calibration
    own: fits.Calibration | None
    threshold: fits.BitsPerByte
    n_scaling_params: int
    target_tokens: Interval | None
    regime: Regime | None
    faults: tuple[str, ...]
    warnings: tuple[str, ...]
    points: tuple[fits.CalibrationPoint, ...] = field(repr=False)

    @property
    def ratio(self):
        """Target tokens per scaling parameter."""
        return None if self.target_tokens is None else self.target_tokens.times(1 / self.n_scaling_params)

    @property
    def confirmation_ratio(self):
        """The one neighbour that is run as well."""
        return None if self.ratio is None else CONFIRMATION_FACTOR * self.ratio.value

    @property
    def refusal(self):
        """Why there is no horizon to train for, with the way out; None in the states that give one."""
        if self.state == "threshold_not_above_asymptote":
            fault = (f"the threshold of {self.threshold.value:.4f} bits per byte is not above "
                     f"L_inf = {self.calibration.curve.asymptote:.4f}, which this model never passes")
        elif self.state == "likely_unreachable":
            fault = (f"the target of {self.target_tokens.value:.2e} tokens is a ratio of {self.ratio.value:.0f}, "
                     f"more than {UNREACHABLE_FACTOR} times the default")
        else:
            return None
        return (f"{self.state}: {fault}; raise the threshold, train a larger model, or take the default ratio "
                "with --fallback")


def regime_at(law, data_tokens, context_tokens):
    """The regime of a model with `context_tokens` (None: not known) trained on `data_tokens`."""
    usable = law.usable_context_tokens(data_tokens)
    name = ("unknown context" if context_tokens is None
            else "horizon-limited" if usable < context_tokens else "context-limited")
    return Regime(name, data_tokens, usable, usable > law.longest_lag, context_tokens)


def infer_horizon(points, threshold, n_scaling_params, statistics, *, alpha_source="auto",
                  default_ratio=DEFAULT_RATIO, context_tokens=None, resamples=2000, seed=0):
    """The shortest complete schedule whose end reaches `threshold` (BitsPerByte), as an Inference.

    `points` are CalibrationPoints of one model with `n_scaling_params`. Errors: Refusal where the policy
    `alpha_source` (of ALPHA_SOURCES) finds no exponent to use, and for points that no falling curve fits.
    """
    assert alpha_source in ALPHA_SOURCES
    fits.bits_per_byte(threshold)
    if n_scaling_params < 1 or not 0 < default_ratio < math.inf:
        raise UserError(f"{n_scaling_params} scaling parameters and a default ratio of {default_ratio:g}: they must be "
                        "positive and finite")
    context_tokens = context_tokens or statistics.context_tokens
    options = {"resamples": resamples, "seed": seed}
    fits.check_points(points)
    own, own_refusal = _fit(points, options)
    theory = alpha_of(statistics.gamma, statistics.beta)
    by_theory, no_theory = None, f"the statistics give no alpha ({statistics.gamma_refusal or 'gamma is a bracket'})"
    if theory.value is not None:
        by_theory, no_theory = _fit(points, options, theory.value, theory.se / theory.value)
    doubts = _theory_doubts(theory, by_theory, own, points, threshold, statistics, context_tokens)
    source, policy = _choose_source(alpha_source, no_theory, doubts, own_refusal, points)
    calibration, alpha = by_theory, theory
    if source == "calibration":
        se = own.resampled and float(np.std(own.resampled.alpha))
        calibration, alpha = own, Estimate(own.curve.alpha, se, own.alpha_lo, own.alpha_hi)

    target = _target(calibration, threshold)
    faults = (*_faults(target, points), *(doubts if source == "theory" else ()))
    if not math.isfinite(target.value):
        state, target, regime, faults = "threshold_not_above_asymptote", None, None, ()
    else:
        unreachable = target.value > UNREACHABLE_FACTOR * default_ratio * n_scaling_params
        state = "likely_unreachable" if unreachable else "low_quality" if faults else "ok"
        regime = regime_at(statistics.law, target.value, context_tokens)
    warnings = (*statistics.warnings, *_disagreement(theory, own))
    return Inference(state, source, policy, alpha, theory, calibration, own, threshold, n_scaling_params,
                     target, regime, faults, warnings, tuple(points))


def _fit(points, options, *alpha):
    """(the calibration with `alpha` and its log error given, or free; None), or (None, why there is none)."""
    try:
        return fits.fit_calibration(points, *alpha, **options), None
    except Refusal as refusal:
        return None, str(refusal)


def _target(calibration, threshold):
    lo = hi = None
    if calibration.resampled is not None:
        lo, hi = fits.central_interval(calibration.resampled.tokens_at(threshold))
    return Interval(float(calibration.curve.tokens_at(threshold)), lo, hi)


def _choose_source(asked, no_theory, doubts, own_refusal, points):
    """(theory or calibration, why) by the stated policy. Errors: Refusal with the ways out."""
    found = len(fits.horizons(points))
    no_calibration = own_refusal
    if found < fits.MIN_HORIZONS_FREE:
        no_calibration = (f"alpha not fitted: {found} distinct horizons (need {fits.MIN_HORIZONS_FREE}, "
                          "for L_inf and A too)")
    if asked == "theory" and no_theory:
        raise Refusal(f"{no_theory}; use --alpha-source calibration with {fits.MIN_HORIZONS_FREE} horizons")
    if asked == "calibration" and no_calibration:
        raise Refusal(f"{no_calibration}; add calibration runs with complete schedules")
    if asked != "auto":
        return asked, "asked for"
    if not no_theory and not doubts:
        return "theory", "gamma converged, the data sizes lie where beta holds, the calibration agrees"
    reasons = no_theory or "; ".join(doubts)
    if no_calibration:
        raise Refusal(f"no alpha to use: {reasons}; and {no_calibration}; add calibration runs, or take the default "
                      "ratio with --fallback")
    return "calibration", reasons


def _theory_doubts(theory, by_theory, own, points, threshold, statistics, context_tokens):
    """Why alpha = gamma / (2 beta) does not describe these runs, nor the one that its own target asks for.

    A tuple of sentences, empty where it may.
    """
    if by_theory is None:
        return ()
    doubts = []
    largest, reach = max(point.tokens for point in points), "the calibration reaches"
    target = float(by_theory.curve.tokens_at(threshold))
    if largest < target < math.inf:  # where the curve never gets there, that state says so
        largest, reach = target, "its target is"
    if largest > statistics.beta_max_data_tokens:
        doubts.append(f"beta describes data sizes up to about {statistics.beta_max_data_tokens:.1e} tokens, "
                      f"{reach} {largest:.1e}")
    if regime_at(statistics.law, largest, context_tokens).name == "context-limited":
        doubts.append(f"context-limited: {largest:.1e} tokens resolve lags beyond the {context_tokens} of the context")
    if own is None or own.alpha_lo is None:
        doubts.append("the calibration has too few points to check the theory's alpha against its own")
    return (*doubts, *_disagreement(theory, own))


def _disagreement(theory, own):
    """What there is to say where the theory's interval of alpha and the calibration's own do not meet."""
    if theory.lo is None or own is None or own.alpha_lo is None:
        return ()
    if own.alpha_lo <= theory.hi and theory.lo <= own.alpha_hi:
        return ()
    return (f"the calibration prefers alpha {own.curve.alpha:.3f} ({own.alpha_lo:.3f} to {own.alpha_hi:.3f}), "
            f"the statistics give {theory.lo:.3f} to {theory.hi:.3f}",)


def _faults(target, points):
    """Why a target, though there is one, is of low quality."""
    if target.lo is None:
        return ("no interval: the calibration has no point to spare",)
    faults = []
    if not target.hi <= MAX_INTERVAL_FACTOR * target.lo:
        faults.append(f"the target's 95 % interval is wider than a factor of {MAX_INTERVAL_FACTOR}")
    shortest, longest = (pick(point.tokens for point in points) for pick in (min, max))
    if not shortest / 2 <= target.value <= MAX_EXTRAPOLATION * longest:
        faults.append(f"the target, {target.value:.2e} tokens, is far from the calibration's "
                      f"{shortest:.2e} to {longest:.2e}")
    return tuple(faults)
