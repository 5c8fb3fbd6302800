"""β: how fast correlations decay at the short lags, its regime, and its refusal (arXiv:2602.07488, section 3)."""

from dataclasses import dataclass
from math import inf

import numpy as np

from nanochat.lane_b import Refusal
from nanochat.lane_b.measure import fit
from nanochat.lane_b.measure.correlation import MIN_NULLS, MIN_STANDARD_ERRORS

MIN_LAGS = 5
_REPLICATES = 400


@dataclass(frozen=True)
class Decay:
    """Both laws through one curve of norms; delta_bic: BIC of the single law above the broken one's, None without."""

    single: fit.PowerLaw
    broken: fit.BrokenPowerLaw | None

    @property
    def delta_bic(self):
        return None if self.broken is None else self.single.bic - self.broken.bic

    @property
    def n_break(self):
        """Where the slope changes, or None where one law is enough."""
        two_regimes = self.broken is not None and self.delta_bic > fit.TWO_REGIMES_DELTA_BIC
        return self.broken.n_break if two_regimes else None


@dataclass(frozen=True)
class Beta:
    """β of the lags of `window`, from the operator norms; data sizes in tokens that those lags speak of.

    frobenius_slope: None where noise hides the Frobenius norm at one of those lags.
    """

    slope: fit.Slope
    law: fit.PowerLaw
    window: tuple[int, int]
    n_lags: int
    frobenius_slope: float | None
    op: Decay
    frobenius: Decay | None
    min_data_tokens: float
    max_data_tokens: float

    @property
    def regime(self):
        """One line on what β describes."""
        if self.op.n_break is not None:
            before, after = self.op.broken.slope_before, self.op.broken.slope_after
            return (f"correlations follow two regimes (break at n={self.op.n_break:.1f}: {before:.2f} -> {after:.2f}); "
                    f"beta={self.slope.value:.2f} describes data sizes up to about {self.max_data_tokens:.1e} tokens")
        return (f"one power law over lags {self.window[0]} to {self.window[1]}; beta={self.slope.value:.2f} describes "
                f"data sizes of about {self.min_data_tokens:.1e} to {self.max_data_tokens:.1e} tokens")


def measure_beta(estimates, null_coefficient):
    """Beta from LagEstimates. Errors: Refusal with fewer than 5 lags above noise, or without decay."""
    usable = [e for e in estimates if e.is_usable(null_coefficient / np.sqrt(e.n_pairs))]
    if len(usable) < MIN_LAGS:
        raise Refusal(f"beta not reported: only {len(usable)} lags above noise (need {MIN_LAGS}); "
                      f"{_tokens_needed(estimates, null_coefficient)}")
    op_decay = _decay(usable, "op", "op_se")
    frobenius_decay = _decay(usable, "frobenius", "frobenius_se")
    inside = [e for e in usable if op_decay.n_break is None or e.lag <= op_decay.n_break]
    if len(inside) < MIN_LAGS:
        way_out = ("give more --lags within it, or more text" if op_decay.n_break >= MIN_LAGS else
                   f"no {MIN_LAGS} lags fit there, give --lags beyond it")
        raise Refusal(f"beta not reported: only {len(inside)} lags before the break at n={op_decay.n_break:.1f} "
                      f"(need {MIN_LAGS}); {way_out}")
    lags, op, op_se = (np.array([getattr(e, name) for e in inside], float) for name in ("lag", "op", "op_se"))
    known = all(e.frobenius is not None for e in inside)
    frobenius = np.array([e.frobenius for e in inside], float) if known else None
    slope, law = fit.measure_slope(lags, op, op_se, _replicates(inside), frobenius)
    if slope.interval[0] <= 0:
        raise Refusal(f"beta not reported: {slope.value:.2f} ± {slope.se:.2f} over lags {inside[0].lag} to "
                      f"{inside[-1].lag} is not clear of 0, correlations do not decay; give more text or other --lags")
    return Beta(
        slope=slope, law=law, window=(inside[0].lag, inside[-1].lag), n_lags=len(inside),
        frobenius_slope=fit.fit_power_law(lags, frobenius, fit.weights_of(op, op_se)).slope if known else None,
        op=op_decay, frobenius=frobenius_decay,
        min_data_tokens=data_tokens(inside[0].op, null_coefficient),
        max_data_tokens=data_tokens(inside[-1].op, null_coefficient))


def data_tokens(op, null_coefficient):
    """P(n): how many tokens it takes for a correlation of this strength to stand out of noise; None where it is 0."""
    return float((null_coefficient / op) ** 2) if op > 0 else None


def _decay(estimates, value, error):
    """Decay of one norm over the lags, None where noise hides it at one of them."""
    y, y_se = ([getattr(e, name) for e in estimates] for name in (value, error))
    if None in y:
        return None
    lags, weights = [e.lag for e in estimates], fit.weights_of(y, y_se)
    return Decay(fit.fit_power_law(lags, y, weights), fit.fit_broken_power_law(lags, y, weights))


def _replicates(estimates):
    """(R, n_lags) operator norms under Poisson weights of the documents, the same weights at every lag."""
    rng = np.random.default_rng(0)
    influences = np.column_stack([e.op_influence for e in estimates])
    total = np.zeros((_REPLICATES, len(estimates)))
    for start in range(0, len(influences), 4096):
        block = influences[start:start + 4096]
        total += (rng.poisson(1.0, (_REPLICATES, len(block))) - 1.0) @ block
    return np.array([e.op for e in estimates]) + total


def _tokens_needed(estimates, null_coefficient):
    """What to do about too few usable lags: errors and null both fall with the root of the text's size."""
    factors = sorted(
        max(MIN_STANDARD_ERRORS * e.op_se, MIN_NULLS * null_coefficient / np.sqrt(e.n_pairs)) ** 2 / e.op ** 2
        if e.op > e.op_se else inf for e in estimates)
    if factors[MIN_LAGS - 1] == inf:
        return "far more text is needed, or this text has no correlations at these lags"
    return f"about {1.2 * factors[MIN_LAGS - 1] * estimates[0].n_pairs:.1e} tokens needed"
