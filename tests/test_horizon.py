import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import curve_fit, nnls

from nanochat.errors import UserError
from nanochat.lane_b import Refusal
from nanochat.lane_b.exponents import Estimate, alpha_of
from nanochat.lane_b.infer.calibration import (
    BitsPerByte,
    CalibrationPoint,
    Curves,
    central_interval,
    fit_calibration,
)
from nanochat.lane_b.infer.horizon import (
    STATES,
    CorpusStatistics,
    CorrelationLaw,
    infer_horizon,
    regime_at,
)
from nanochat.lane_b.infer.horizon_figure import draw_inference

HORIZONS = np.array([1e6, 2e6, 4e6, 8e6])
TRUE = Curves(alpha=0.3, asymptote=0.8, amplitude=0.3, reference_tokens=3e6)
NOISE = 0.003  # bits per byte between seeds
LAW = CorrelationLaw(log_intercept=math.log(4e-3), slope=0.9, n_break=None, slope_after=None, null_coefficient=0.26,
                     longest_lag=64)
# gamma / (2 beta) = 0.3, and data sizes far beyond the calibration's
STATISTICS = CorpusStatistics(
    dataset_id="d", tokenizer_id="t", vocab_size=8192, beta=Estimate(0.5, 0.02, 0.46, 0.54), beta_max_data_tokens=1e9,
    gamma=Estimate(0.3, 0.01, 0.28, 0.32), gamma_refusal=None, law=LAW, context_tokens=100_000, warnings=())
BRACKET = replace(STATISTICS, gamma=Estimate(None, None, 0.2, 0.5), gamma_refusal="H_2 still falls")


def points(curve=TRUE, horizons=HORIZONS, seeds=2, noise=0.0, rng=None):
    tokens = np.repeat(horizons, seeds)
    metrics = curve.metric_at(tokens) + (noise * rng.standard_normal(len(tokens)) if noise else 0)
    return [CalibrationPoint(int(t), BitsPerByte(float(m)), f"run-{i}")
            for i, (t, m) in enumerate(zip(tokens, metrics, strict=True))]


def made(*pairs):
    return [CalibrationPoint(tokens, BitsPerByte(metric), "given") for tokens, metric in pairs]


def threshold_at(tokens, curve=TRUE):
    return BitsPerByte(float(curve.metric_at(tokens)))


# The calibration fit

def test_a_known_curve_is_recovered():
    given, free = fit_calibration(points(), alpha=0.3), fit_calibration(points())
    for fit in (given, free):
        assert fit.curve.alpha == pytest.approx(0.3, rel=1e-4)
        assert fit.curve.asymptote == pytest.approx(0.8, abs=1e-4)
        assert fit.curve.scale == pytest.approx(0.3 * 3e6**0.3, rel=1e-3)
        assert float(fit.curve.tokens_at(threshold_at(1.6e7))) == pytest.approx(1.6e7, rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_fits_agree_with_nnls_and_with_curve_fit(seed):
    cloud = points(noise=NOISE, rng=np.random.default_rng(seed))
    tokens = np.array([point.tokens for point in cloud])
    metrics = np.array([point.metric.value for point in cloud])
    given = fit_calibration(cloud, alpha=0.25).curve
    (asymptote, scale), _ = nnls(np.column_stack([np.ones(8), (tokens / 1e6) ** -0.25]), metrics)
    assert given.asymptote == pytest.approx(asymptote, abs=1e-9)
    assert given.metric_at(1e6) - given.asymptote == pytest.approx(scale, rel=1e-9)
    free = fit_calibration(cloud).curve
    (best, _, _), _ = curve_fit(lambda t, a, l, s: l + s * (t / 3e6) ** -a, tokens, metrics, p0=(0.3, 0.8, 0.3))
    assert free.alpha == pytest.approx(best, rel=1e-4)


def test_a_negative_asymptote_is_clamped_to_a_pure_power_law():
    straight = Curves(alpha=0.1, asymptote=0.0, amplitude=1.0, reference_tokens=3e6)
    fit = fit_calibration(points(straight), alpha=0.05)  # free, L_inf would be below 0
    tokens, metrics = np.repeat(HORIZONS, 2), straight.metric_at(np.repeat(HORIZONS, 2))
    (asymptote, scale), _ = nnls(np.column_stack([np.ones(8), tokens**-0.05]), metrics)
    assert fit.curve.asymptote == asymptote == 0
    assert fit.curve.scale == pytest.approx(scale)


def test_residual_is_what_the_curve_leaves():
    cloud = made((1_000_000, 1.02), (1_000_000, 1.00), (2_000_000, 0.92), (2_000_000, 0.90), (4_000_000, 0.87),
                 (4_000_000, 0.85))
    fit = fit_calibration(cloud)  # three horizons, three parameters: the seeds' means are hit
    assert fit.rms_residual_bits_per_byte == pytest.approx(0.01, rel=1e-3)
    assert fit.degrees_of_freedom == 3


def coverage(simulate, count=200):
    """Share of simulated calibrations whose 95 % interval of the target holds the true one, and of alpha."""
    truth, held = 1.6e7, []
    for seed in range(count):
        fit, alpha = simulate(np.random.default_rng(seed))
        lo, hi = central_interval(fit.resampled.tokens_at(threshold_at(truth)))
        held.append((lo <= truth <= hi, fit.alpha_lo <= alpha <= fit.alpha_hi))
    return np.mean(held, axis=0)


def test_intervals_cover_at_their_nominal_rate_with_alpha_fitted():
    target, alpha = coverage(lambda rng: (fit_calibration(points(noise=NOISE, rng=rng), resamples=400), 0.3))
    assert 0.90 <= target <= 0.99  # 95 % of 200: 3 standard deviations are 0.046
    assert 0.90 <= alpha <= 0.99


@pytest.mark.parametrize("horizons", [HORIZONS[:3], HORIZONS])
def test_intervals_cover_at_their_nominal_rate_with_alpha_from_the_theory(horizons):
    def simulate(rng):
        cloud = points(horizons=horizons, noise=NOISE, rng=rng)
        return fit_calibration(cloud, 0.3 * math.exp(0.08 * rng.standard_normal()), 0.08, resamples=400), 0.3

    target, alpha = coverage(simulate)
    assert 0.90 <= target <= 0.995
    assert 0.90 <= alpha <= 0.99


@pytest.mark.parametrize("pairs, fault", [
    ([(1_000_000, 1.0), (2_000_000, 0.9)], "2 distinct horizons"),
    ([(1_000_000, 1.0)] * 4, "1 distinct horizons"),
    ([(1_000_000, 1.0), (1_000_100, 0.98), (2_000_000, 0.9)], "2 distinct horizons"),
    ([(1_000_000, 1.0), (2_000_000, 1.1), (4_000_000, 1.2)], "do not fall: 1.0000 .* 1.2000"),
    ([(1_000_000, 1.0), (2_000_000, 1.0), (4_000_000, 1.0)], "do not fall"),
    # all of the fall at once: no alpha, however large, is large enough
    ([(1_000_000, 1.5), (2_000_000, 1.0), (4_000_000, 1.0), (8_000_000, 1.0)], "alpha not fitted"),
])
def test_points_that_carry_no_curve_are_refused(pairs, fault):
    with pytest.raises(Refusal, match=fault) as refused:
        fit_calibration(made(*pairs))
    assert refused.value.exit_code == 3


def test_a_given_alpha_that_cannot_be_is_refused():
    with pytest.raises(Refusal, match=r"alpha is not between 0\.01 and 3\.0: 40"):
        fit_calibration(points(), alpha=40.0)


def test_points_whose_best_curve_rises_are_refused():
    with pytest.raises(Refusal, match="no falling curve fits"):
        fit_calibration(made((1_000_000, 0.9), (2_000_000, 0.5), (4_000_000, 1.5), (8_000_000, 0.89)), alpha=0.3)


@pytest.mark.parametrize("metric", [math.nan, math.inf, 0.0, -1.0])
def test_a_metric_that_cannot_be_is_refused(metric):
    with pytest.raises(Refusal, match="bits per byte cannot be"):
        BitsPerByte(metric)


@pytest.mark.parametrize("bare", [4.2, "4.2", None])
def test_what_is_not_in_bits_per_byte_is_never_taken_for_it(bare):
    for use in (lambda: CalibrationPoint(1_000_000, bare, "run"), lambda: TRUE.tokens_at(bare),
                lambda: infer_horizon(points(), bare, 1_000_000, STATISTICS), lambda: BitsPerByte(1.0) < bare):
        with pytest.raises(TypeError):
            use()


# The theory's side

@pytest.mark.parametrize("gamma, gamma_se, beta, beta_se, alpha, alpha_se", [
    (0.325, 0.003, 0.88, 0.06, 0.185, 0.013),  # arXiv:2602.07488, TinyStories
    (0.265, 0.016, 0.94, 0.16, 0.141, 0.025),  # and WikiText-103
])
def test_alpha_matches_the_paper(gamma, gamma_se, beta, beta_se, alpha, alpha_se):
    def wide(value, se):
        return Estimate(value, se, value - 1.96 * se, value + 1.96 * se)

    found = alpha_of(wide(gamma, gamma_se), wide(beta, beta_se))
    assert found.value == pytest.approx(alpha, abs=5e-4)
    assert found.se == pytest.approx(alpha_se, abs=6e-4)
    assert found.lo == (gamma - 1.96 * gamma_se) / (2 * (beta + 1.96 * beta_se))
    assert found.hi == (gamma + 1.96 * gamma_se) / (2 * (beta - 1.96 * beta_se))


def test_a_bracket_of_gamma_gives_an_interval_without_a_point():
    found = alpha_of(Estimate(None, None, 0.124, 0.339), Estimate(1.59, 0.07, 1.45, 1.73))
    assert (found.value, found.se) == (None, None)
    assert (found.lo, found.hi) == pytest.approx((0.0358, 0.1169), abs=1e-4)
    assert alpha_of(Estimate(None, None, None, None), STATISTICS.beta) == Estimate(None, None, None, None)
    assert alpha_of(STATISTICS.gamma, Estimate(0.1, 0.1, -0.1, 0.3)).lo is None


@pytest.mark.parametrize("law", [LAW, replace(LAW, slope=1.58, n_break=6.4, slope_after=0.17)])
def test_usable_context_is_where_the_correlation_meets_the_noise(law):
    def norm(n):
        slope_2 = law.slope if law.n_break is None else law.slope_after
        bent = (min(n, law.n_break or n)) ** -law.slope * max(1.0, n / (law.n_break or n)) ** -slope_2
        return math.exp(law.log_intercept) * bent

    for lag in (1.5, 6.0, 7.0, 40.0):
        resolved_by = (law.null_coefficient / norm(lag)) ** 2
        assert law.usable_context_tokens(resolved_by) == pytest.approx(lag, rel=1e-9)


def test_a_correlation_that_never_meets_the_noise_has_no_end():
    law = replace(LAW, slope=1.58, n_break=6.4, slope_after=-0.02)
    assert law.usable_context_tokens(1e7) == math.inf
    assert regime_at(law, 1e7, 2048).name == "context-limited"
    assert regime_at(LAW, 1e5, 2048).name == "horizon-limited"
    assert regime_at(LAW, 1e5, None).name == "unknown context"
    assert regime_at(LAW, 1e9, None).beyond_measured_lags


# Policy and states

def infer(cloud=None, statistics=STATISTICS, threshold=None, params=1_500_000, **options):
    cloud = cloud or points(noise=NOISE, rng=np.random.default_rng(0))
    return infer_horizon(cloud, threshold or threshold_at(1.6e7), params, statistics, **{"resamples": 400, **options})


def test_auto_takes_the_theory_where_its_premises_hold():
    found = infer()
    assert (found.state, found.alpha_source, found.faults) == ("ok", "theory", ())
    assert found.alpha.value == found.calibration.curve.alpha == pytest.approx(0.3)
    assert found.target_tokens.lo < 1.6e7 < found.target_tokens.hi
    assert found.ratio.value == pytest.approx(found.target_tokens.value / 1_500_000)
    assert found.confirmation_ratio == 1.05 * found.ratio.value
    assert found.regime.name == "horizon-limited"


@pytest.mark.parametrize("change, reason", [
    ({"gamma": BRACKET.gamma, "gamma_refusal": "H_2 still falls"}, "no alpha (H_2 still falls"),
    ({"beta_max_data_tokens": 2e5}, "beta describes data sizes up to about 2.0e+05 tokens"),
    ({"beta_max_data_tokens": 1e7}, "beta describes data sizes up to about 1.0e+07 tokens, its target is 1."),
    ({"context_tokens": 16}, "context-limited"),
    ({"context_tokens": 75}, "context-limited: 1."),  # holds at the 8M tokens of the longest calibration
    ({"gamma": Estimate(0.05, 0.001, 0.048, 0.052)}, "the calibration prefers alpha 0.3"),
])
def test_auto_takes_the_calibration_where_the_theory_does_not_hold(change, reason):
    found = infer(statistics=replace(STATISTICS, **change))
    assert found.alpha_source == "calibration"
    assert found.calibration is found.own
    assert reason in found.policy


def test_disagreement_is_reported_whatever_the_source():
    off = replace(STATISTICS, gamma=Estimate(0.05, 0.001, 0.048, 0.052))
    for source in ("theory", "calibration"):
        found = infer(statistics=off, alpha_source=source)
        assert "the calibration prefers alpha" in found.warnings[-1]
    assert infer(statistics=off, alpha_source="theory").state == "low_quality"


@pytest.mark.parametrize("change", [{"beta_max_data_tokens": 1e7}, {"context_tokens": 75}])
def test_a_theory_asked_for_beyond_its_premises_at_the_target_is_of_low_quality(change):
    found = infer(statistics=replace(STATISTICS, **change), alpha_source="theory")
    assert (found.state, found.alpha_source, len(found.faults)) == ("low_quality", "theory", 1)


@pytest.mark.parametrize("ratio", [math.nan, math.inf, 0.0])
def test_a_default_ratio_that_cannot_be_is_an_error(ratio):
    with pytest.raises(UserError, match="positive and finite"):
        infer(default_ratio=ratio)


@pytest.mark.parametrize("source, cloud, statistics, fault", [
    ("theory", None, BRACKET, "give no alpha .H_2 still falls.; use --alpha-source calibration"),
    ("calibration", points(horizons=HORIZONS[:3]), STATISTICS, "3 distinct horizons .need 4"),
    ("auto", points(horizons=HORIZONS[:3]), BRACKET, "no alpha to use: .*H_2 still falls.*; and .*need 4.*--fallback"),
    ("auto", points(horizons=HORIZONS[:2]), STATISTICS, "2 distinct horizons"),
])
def test_without_an_exponent_there_is_a_refusal_and_no_silent_default(source, cloud, statistics, fault):
    with pytest.raises(Refusal, match=fault):
        infer(cloud, statistics, alpha_source=source)


def test_three_horizons_without_a_point_to_spare_are_not_compared_with_the_theory():
    with pytest.raises(Refusal, match="too few points to check the theory's alpha"):
        infer(points(horizons=HORIZONS[:3], seeds=1))
    assert infer(points(horizons=HORIZONS[:3], seeds=1), alpha_source="theory").state == "low_quality"


def states():
    noisy = points(noise=0.012, rng=np.random.default_rng(1))
    return {
        "ok": infer(),
        "threshold_not_above_asymptote": infer(threshold=BitsPerByte(0.7)),
        "likely_unreachable": infer(params=100_000),
        "low_quality": infer(noisy, alpha_source="calibration"),
    }


def test_every_state_is_reached_and_refuses_where_it_must():
    found = states()
    assert tuple(found) == STATES
    for state, inference in found.items():
        assert inference.state == state
    assert found["ok"].refusal is None and found["low_quality"].refusal is None
    assert found["low_quality"].faults
    hopeless = found["threshold_not_above_asymptote"]
    assert (hopeless.target_tokens, hopeless.ratio, hopeless.confirmation_ratio, hopeless.regime) == (None,) * 4
    assert "not above L_inf = 0.80" in hopeless.refusal
    assert "a ratio of 1" in found["likely_unreachable"].refusal


def test_every_state_has_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for state, inference in states().items():
        draw_inference(inference, tmp_path / f"{state}.png")
        assert (tmp_path / f"{state}.png").stat().st_size > 20_000
    with pytest.raises(UserError, match=r"--plot .*figure\.odd"):
        draw_inference(inference, tmp_path / "figure.odd")


def test_a_target_far_from_the_calibration_is_of_low_quality():
    far = infer(threshold=threshold_at(1e8), params=10_000_000)
    assert far.state == "low_quality"
    assert any("far from the calibration" in fault for fault in far.faults)


def test_the_same_seed_gives_the_same_inference():
    assert infer(seed=3).target_tokens == infer(seed=3).target_tokens != infer(seed=4).target_tokens
