"""The one fitter of m + a x^-b, against scipy: nnls for the closed form, curve_fit for all three."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, nnls

from nanochat import power_law

RANGE = (0.02, 2.0)
SIZES = 2.0 ** np.arange(-6, 1)


@settings(deadline=None)
@given(st.floats(0, 6), st.floats(0.05, 2), st.floats(0.1, 1))
def test_an_exact_curve_is_recovered(m, a, b):
    exact = m + a * SIZES**-b
    found_m, found_a, found_b = power_law.fit(SIZES, exact, RANGE, nonnegative=True)
    assert found_b == pytest.approx(b, rel=1e-3)
    np.testing.assert_allclose(found_m + found_a * SIZES**-found_b, exact, atol=1e-5 * exact.max())


def test_many_curves_are_fitted_as_each_alone_and_as_by_scipy():
    rows = 0.8 + 0.3 * SIZES**-0.4 + 0.002 * np.random.default_rng(0).standard_normal((20, 7))
    together = np.array(power_law.fit(SIZES, rows, RANGE))
    for row, found in zip(rows, together.T, strict=True):
        assert (found == power_law.fit(SIZES, row, RANGE)).all()
        wanted, _ = curve_fit(lambda x, m, a, b: m + a * x**-b, SIZES, row, p0=(0.8, 0.3, 0.4))
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("y", [8.0 - np.arange(7), 1 + SIZES**-0.5, SIZES**-1.5 - 0.5])
def test_an_offset_that_may_not_be_negative_is_that_of_nnls(y):
    x = SIZES**-0.5
    m, a, squares = power_law.solve(x, y, nonnegative=True)
    wanted, norm = nnls(np.column_stack([np.ones(7), x]), y)
    np.testing.assert_allclose([m, a, squares], [*wanted, norm**2], atol=1e-12)


def test_an_offset_is_never_negative():
    m, a, _ = power_law.fit(SIZES, 8.0 - np.arange(7), RANGE, nonnegative=True)
    assert m == 0 and a > 0


@pytest.mark.parametrize("y", [np.arange(7.0), np.ones(7)])
def test_what_does_not_fall_has_no_amplitude(y):
    m, a, _ = power_law.fit(SIZES, y, RANGE)
    assert (m, a) == (y.mean(), 0)
