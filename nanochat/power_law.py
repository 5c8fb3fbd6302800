"""Least squares of y = m + a x^-b, a > 0: closed form in m and a for each b, a search in one dimension for b."""

import numpy as np

_GRID, _ZOOM = 64, 9  # exponents tried at once: in the whole range, then between the neighbours of the best
_ZOOMS = 7  # the last grid's steps are 1e-5 of a step of the first


def solve(x, y, nonnegative=False):
    """(m, a, sum of squares left) of y = m + a x along the last axis; nonnegative: with m >= 0."""
    x, y = np.broadcast_arrays(x, y)
    x_mean, y_mean = x.mean(-1, keepdims=True), y.mean(-1, keepdims=True)
    a = ((x - x_mean) * (y - y_mean)).sum(-1) / ((x - x_mean) ** 2).sum(-1)
    m = y_mean[..., 0] - a * x_mean[..., 0]
    if nonnegative:  # where it is violated, the best fit allowed goes through 0
        a = np.where(m < 0, (x * y).sum(-1) / (x * x).sum(-1), a)
        m = np.where(m < 0, 0.0, m)
    return m, a, ((y - m[..., None] - a[..., None] * x) ** 2).sum(-1)


def best_exponent(squares, exponents, shape=()):
    """The exponent of the smallest squares(b), for each place of `shape`: a grid even in log b, zoomed in on.

    squares: from (*shape, n) exponents to as many sums, infinite where no curve is allowed. exponents: (least, most).
    """
    log_b = np.broadcast_to(np.linspace(*np.log(exponents), _GRID), (*shape, _GRID))
    for zoom in range(_ZOOMS + 1):
        best = squares(np.exp(log_b)).argmin(-1)[..., None]
        lo, middle, hi = (np.take_along_axis(log_b, np.clip(best + step, 0, log_b.shape[-1] - 1), -1)
                          for step in (-1, 0, 1))
        if zoom < _ZOOMS:
            log_b = lo + (hi - lo) * np.linspace(0, 1, _ZOOM)
    return np.exp(middle[..., 0])


def fit(x, y, exponents, nonnegative=False):
    """(m, a, b) of the curve through points x (n,), near 1 in size, and y (..., n); a is 0 where no falling one fits.

    exponents: (least, most) b; nonnegative: m >= 0.
    """
    def squares(b):
        _, a, left = solve(x ** -b[..., None], y[..., None, :], nonnegative)
        return np.where(a > 0, left, np.inf)

    b = best_exponent(squares, exponents, y.shape[:-1])
    m, a, _ = solve(x ** -b[..., None], y, nonnegative)
    return np.where(a > 0, m, y.mean(-1)), np.maximum(a, 0.0), b
