"""Power laws in log-log: a single one, one with a break, and how sure their slopes are. Weighted least squares."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as t_distribution

BREAK_RANGE = (2.5, 40.0)
TWO_REGIMES_DELTA_BIC = 10.0
LAW_ACCURACY = 0.05     # no power law of real text is better than this; smaller deviations are no evidence of a break
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class PowerLaw:
    """y = exp(log_intercept) · x^-slope; slope_se from the scatter about it, which is never taken below the errors."""

    slope: float
    slope_se: float
    log_intercept: float
    rms_log_residual: float
    r_squared: float
    bic: float

    def __call__(self, x):
        return np.exp(self.log_intercept) * np.asarray(x, float) ** -self.slope


@dataclass(frozen=True)
class BrokenPowerLaw:
    """Continuous: slope_before up to n_break, slope_after beyond; exp(log_intercept) is the value at x = 1."""

    slope_before: float
    slope_after: float
    n_break: float
    log_intercept: float
    rms_log_residual: float
    r_squared: float
    bic: float

    def __call__(self, x):
        x = np.asarray(x, float)
        before, after = np.minimum(x, self.n_break), np.maximum(x / self.n_break, 1)
        return np.exp(self.log_intercept) * before ** -self.slope_before * after ** -self.slope_after


@dataclass(frozen=True)
class Slope:
    """A slope with an error that adds in quadrature what leaving out points, resampling and a second curve say."""

    value: float
    se_jackknife: float
    se_bootstrap: float
    gap: float
    n_points: int

    @property
    def se(self):
        return float(np.sqrt(self.se_jackknife ** 2 + self.se_bootstrap ** 2 + self.gap ** 2))

    @property
    def interval(self):
        """95 %; a jackknife of few points knows its own size badly, which Student's t with n - 2 makes up for."""
        student = t_distribution.ppf(0.975, self.n_points - 2) if self.n_points > 2 else NORMAL_95
        half = float(np.hypot(student * self.se_jackknife, NORMAL_95 * np.hypot(self.se_bootstrap, self.gap)))
        return self.value - half, self.value + half


def weights_of(y, y_se=None):
    """Weights of log y: 1 / (relative error² + 5 %²); the law's own inaccuracy bounds what any point can pull."""
    relative = 0.0 if y_se is None else np.asarray(y_se, float) / np.asarray(y, float)
    return 1 / (relative ** 2 + LAW_ACCURACY ** 2) * np.ones(len(y))


def fit_power_law(x, y, weights=None):
    """PowerLaw through points (x > 0, y > 0, at least 2), weights of log y as in weights_of."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = weights_of(y) if weights is None else weights
    design = np.column_stack([-np.log(x), np.ones_like(x)])
    (slope, intercept), chi_squared, summary = _least_squares(design, np.log(y), weights, n_parameters=3)
    scatter = max(1.0, chi_squared / max(len(x) - 2, 1))
    covariance = scatter * np.linalg.inv(design.T @ (design * weights[:, None]))
    return PowerLaw(float(slope), float(np.sqrt(covariance[0, 0])), float(intercept), **summary)


def fit_broken_power_law(x, y, weights=None):
    """The best BrokenPowerLaw over breaks in 2.5..40, or None where none leaves 3 points before it and 2 after."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = weights_of(y) if weights is None else weights
    fits = []
    for n_break in np.geomspace(*BREAK_RANGE, 241):
        if (x <= n_break).sum() >= 3 and (x > n_break).sum() >= 2:
            after = np.log(np.maximum(x / n_break, 1))
            design = np.column_stack([after - np.log(x), -after, np.ones_like(x)])
            fits.append((n_break, *_least_squares(design, np.log(y), weights, n_parameters=5)))
    if not fits:
        return None
    n_break, (before, after, intercept), _, summary = min(fits, key=lambda fit: fit[2])
    return BrokenPowerLaw(float(before), float(after), float(n_break), float(intercept), **summary)


def measure_slope(x, y, y_se=None, replicates=None, other=None):
    """(Slope of a pure power law through (x, y), its PowerLaw).

    Standard errors: points left out one at a time; replicates (R, len(x)), resampled values of y; the distance to
    the slope of `other` (len(x)), the same decay measured differently.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    weights = weights_of(y, y_se)
    law = fit_power_law(x, y, weights)
    bootstrap = 0.0 if replicates is None else float(np.std(slopes(x, replicates, weights), ddof=1))
    gap = 0.0 if other is None else abs(fit_power_law(x, other, weights).slope - law.slope)
    return Slope(law.slope, _jackknife(x, y, weights), bootstrap, float(gap), len(x)), law


def slopes(x, ys, weights):
    """(R,) slopes of pure power laws through each row of ys (R, len(x)); rows with values ≤ 0 are left out."""
    ys = np.asarray(ys, float)
    log_x, log_y = np.log(np.asarray(x, float)), np.log(ys[(ys > 0).all(axis=1)])
    centred = log_x - np.average(log_x, weights=weights)
    return -(log_y @ (weights * centred)) / (weights @ centred ** 2)


def _jackknife(x, y, weights):
    """Standard error of the slope from leaving out one point at a time, each weighed by 1 − its leverage: points at
    the end of a short window pull hard and would be counted several times over (Hinkley 1977, eq. 2.5)."""
    n = len(x)
    if n < 3:
        return 0.0
    log_x = np.log(x)
    centred = log_x - np.average(log_x, weights=weights)
    leverages = weights / weights.sum() + weights * centred ** 2 / (weights @ centred ** 2)
    without = [slopes(x[kept], y[None, kept], weights[kept])[0] for kept in ~np.eye(n, dtype=bool)]
    deviations = (1 - leverages) * (np.array(without) - slopes(x, y[None], weights)[0])
    return float(np.linalg.norm(deviations) * np.sqrt(n / (n - 2)))


def _least_squares(design, target, weights, n_parameters):
    """(coefficients, χ², the fields every law reports). BIC is −2 ln L + n_parameters ln n with a free scale of the
    errors that is never below the given ones, so deviations smaller than those are no evidence for anything."""
    root = np.sqrt(weights)
    coefficients = np.linalg.lstsq(design * root[:, None], target * root, rcond=None)[0]
    fitted = design @ coefficients
    chi_squared = float(weights @ (target - fitted) ** 2)
    total = weights @ (target - np.average(target, weights=weights)) ** 2
    n = len(target)
    scale = max(1.0, chi_squared / n)
    return coefficients, chi_squared, {
        "rms_log_residual": float(np.sqrt(np.mean((target - fitted) ** 2))),
        "r_squared": float(1 - chi_squared / total) if total > 0 else 0.0,
        "bic": float(n * np.log(scale) + chi_squared / scale + n_parameters * np.log(n))}
