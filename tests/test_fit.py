import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from nanochat.lane_b.measure.fit import (
    BrokenPowerLaw,
    Slope,
    fit_broken_power_law,
    fit_power_law,
    measure_slope,
    slopes,
    weights_of,
)

LAGS = np.array([1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64])
# ‖C(n)‖_op of a corpus of books, 34 million tokens
BOOKS = np.array([9.51e-3, 5.20e-3, 2.35e-3, 1.246e-3, 8.5e-4, 6.21e-4, 5.88e-4, 5.92e-4, 5.49e-4, 5.02e-4, 4.80e-4,
                  4.48e-4, 4.12e-4])


def delta_bic(y, y_se=None):
    weights = weights_of(y, y_se)
    return fit_power_law(LAGS, y, weights).bic - fit_broken_power_law(LAGS, y, weights).bic


@given(st.floats(-2, 3), st.floats(-5, 5))
def test_an_exact_power_law_is_recovered(slope, intercept):
    law = fit_power_law(LAGS, np.exp(intercept) * LAGS ** -slope)
    assert law.slope == pytest.approx(slope, abs=1e-9) and law.log_intercept == pytest.approx(intercept, abs=1e-9)
    assert law.rms_log_residual < 1e-9
    np.testing.assert_allclose(law(LAGS), np.exp(intercept) * LAGS ** -slope, rtol=1e-9)


def test_slope_and_error_equal_linear_regression():
    y = BOOKS[:6]
    law, peer = fit_power_law(LAGS[:6], y), stats.linregress(np.log(LAGS[:6]), np.log(y))
    assert law.slope == pytest.approx(-peer.slope) and law.slope_se == pytest.approx(peer.stderr)
    assert law.r_squared == pytest.approx(peer.rvalue ** 2)


def test_weighted_slopes_equal_polyfit():
    weights = np.linspace(0.2, 3, len(LAGS))
    expected = -np.polyfit(np.log(LAGS), np.log(BOOKS), 1, w=np.sqrt(weights))[0]
    assert fit_power_law(LAGS, BOOKS, weights).slope == pytest.approx(expected)
    assert slopes(LAGS, [BOOKS, 2 * BOOKS], weights) == pytest.approx([expected, expected])


def test_an_exact_break_is_recovered():
    exact = BrokenPowerLaw(1.5, 0.2, 7.0, -4.0, 0, 1, 0)
    law = fit_broken_power_law(LAGS, exact(LAGS))
    assert law.n_break == pytest.approx(7, rel=0.02)
    assert (law.slope_before, law.slope_after) == pytest.approx((1.5, 0.2), abs=0.02)
    np.testing.assert_allclose(law(LAGS), exact(LAGS), rtol=0.02)
    assert delta_bic(exact(LAGS)) > 20


def test_books_have_two_regimes_with_a_break_near_six():
    law = fit_broken_power_law(LAGS, BOOKS)
    assert law.n_break == pytest.approx(6.4, abs=1) and 20 < delta_bic(BOOKS) < 40
    assert law.slope_before == pytest.approx(1.58, abs=0.05) and law.slope_after == pytest.approx(0.17, abs=0.05)


def test_a_single_law_is_seldom_taken_for_two():
    rng = np.random.default_rng(0)
    noise = 0.08 * rng.standard_normal((100, len(LAGS)))
    deltas = [delta_bic(LAGS ** -0.8 * np.exp(n), 0.08 * LAGS ** -0.8) for n in noise]
    assert (np.array(deltas) > 10).sum() <= 1


def test_deviations_below_the_accuracy_of_any_law_are_no_break():
    bent = LAGS ** -0.6 * np.exp(0.01 * np.log(LAGS) ** 2 / 4)
    assert delta_bic(bent, 1e-6 * bent) < 0


def test_too_few_points_beyond_the_break_give_no_broken_law():
    assert fit_broken_power_law(LAGS[:4], BOOKS[:4]) is None


def test_errors_of_a_slope_add_in_quadrature_and_cover_it():
    rng = np.random.default_rng(1)
    x, y_se, covered = LAGS[:8], 0.1, 0
    for _ in range(200):
        y = x ** -1.2 * np.exp(y_se * rng.standard_normal(8))
        slope, law = measure_slope(x, y, y_se * y, y * np.exp(y_se * rng.standard_normal((200, 8))))
        assert slope.se == pytest.approx(np.hypot(slope.se_jackknife, slope.se_bootstrap))
        assert law.slope == slope.value
        covered += slope.interval[0] < 1.2 < slope.interval[1]
    assert covered >= 0.93 * 200


def test_the_scatter_of_six_points_alone_covers_the_slope():
    """87 % or more; with the normal quantile it is 79 %, for four degrees of freedom are few."""
    rng = np.random.default_rng(1)
    covered = 0
    for noise in 0.1 * rng.standard_normal((200, 6)):
        slope, _ = measure_slope(LAGS[:6], LAGS[:6] ** -1.2 * np.exp(noise))
        covered += slope.interval[0] < 1.2 < slope.interval[1]
    assert covered >= 0.87 * 200


def test_the_interval_takes_student_s_t_for_the_lags_alone():
    slope = Slope(1.588, 0.151, 0.003, 0.113, n_points=6)
    assert slope.se == pytest.approx(0.1886, abs=1e-4)
    assert slope.interval == pytest.approx((1.114, 2.062), abs=1e-3)
    two_points, _ = measure_slope([1, 2], [1.0, 0.5], other=[1.0, 0.6])
    assert np.isfinite(two_points.interval).all()


def test_jackknife_of_books_is_close_to_the_regression_error():
    slope, law = measure_slope(LAGS[:6], BOOKS[:6])
    assert slope.value == pytest.approx(1.59, abs=0.02)
    assert slope.se_jackknife == pytest.approx(law.slope_se, rel=0.2) and slope.se_bootstrap == slope.gap == 0


def test_a_second_curve_adds_the_distance_of_its_slope():
    slope, _ = measure_slope(LAGS, LAGS ** -1.0, other=LAGS ** -1.3)
    assert slope.gap == pytest.approx(0.3) and slope.se == pytest.approx(0.3, abs=1e-6)


def test_r_squared_of_perfect_useless_and_constant():
    assert fit_power_law([1, 2, 4], [4.0, 2.0, 1.0]).r_squared == pytest.approx(1)
    assert fit_power_law([1, 2, 4], [1.0, 2.0, 1.0]).r_squared == pytest.approx(0)
    assert fit_power_law([1, 2, 4], [1.0, 1.0, 1.0]).r_squared == 0
    assert fit_power_law([1, 2, 4], [4.0, 9.0, 1.0], np.array([1, 0, 1])).r_squared == pytest.approx(1)
