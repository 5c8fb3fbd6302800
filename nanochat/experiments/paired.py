"""Paired differences over seeds: size, spread, interval and p of a gain."""

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Paired:
    """n differences: their mean, standard deviation (ddof 1), t interval, and one-sided p of a mean above zero.

    With one difference sd, lo, hi and p are None: one pair says nothing of the noise. Differences that are all
    alike leave lo, hi and p None: their noise is below what was recorded, not zero.
    """

    n: int
    mean: float
    sd: float | None = None
    lo: float | None = None
    hi: float | None = None
    p: float | None = None

    def describe(self, unit, digits=2):
        """The figures in words, with as much as there is of interval and p."""
        if self.n < 2:
            return f"n=1, {self.mean:+.{digits}f} {unit}"
        if self.lo is None:
            return f"n={self.n}, mean {self.mean:+.{digits}f} {unit}, all alike: no interval"
        return (f"n={self.n}, mean {self.mean:+.{digits}f} {unit} (interval {self.lo:+.{digits}f} to "
                f"{self.hi:+.{digits}f}), sd {self.sd:.{digits}f}, p={self.p:.2g}")


def paired(differences, confidence):
    """Student's t for the mean of the differences, at least one of them (Student 1908)."""
    d = np.asarray(differences, dtype=np.float64)
    n, mean = len(d), float(d.mean())
    if n == 1:
        return Paired(1, mean)
    sd = float(d.std(ddof=1))
    if sd <= 1e-12 * float(np.abs(d).max()):  # every pair alike but for rounding: t is infinite, or 0/0
        return Paired(n, mean, 0.0)
    lo, hi = map(float, stats.ttest_1samp(d, 0).confidence_interval(confidence))
    return Paired(n, mean, sd, lo, hi, float(stats.ttest_1samp(d, 0, alternative="greater").pvalue))
