"""The exponents of lane B's theory as estimates, and the one that follows from the others: alpha = gamma / (2 beta)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and 95 % interval; value and se None: a bracket; all None: not known."""

    value: float | None = None
    se: float | None = None
    lo: float | None = None
    hi: float | None = None


def alpha_of(gamma, beta):
    """alpha = gamma / (2 beta) with its interval [gamma_lo / 2 beta_hi, gamma_hi / 2 beta_lo].

    A point and its standard error (delta method in logarithms) only where gamma has one.
    """
    if gamma.lo is None or beta.lo is None or beta.lo <= 0:
        return Estimate()
    value = se = None
    if gamma.value is not None:
        value = gamma.value / (2 * beta.value)
        se = value * math.hypot(gamma.se / gamma.value, beta.se / beta.value)
    return Estimate(value, se, gamma.lo / (2 * beta.hi), gamma.hi / (2 * beta.lo))
