"""Time to target: measured, extrapolated or refused; scipy is the reference for the fit."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize_scalar
from scipy.stats import f as f_distribution

from nanochat.common import UserError
from nanochat.target import (
    INTERVAL,
    Evaluation,
    check_target,
    evaluations_of,
    time_to_target,
)

SEC_PER_TOKEN = 1e-4
LAST_TOKENS = 15_000_000


def evaluations(tokens, metric, sec_per_token=SEC_PER_TOKEN, lr_multiplier=1.0):
    return [Evaluation(i, int(t), float(m), float(t) * sec_per_token, lr_multiplier)
            for i, (t, m) in enumerate(zip(tokens, metric, strict=True), start=1)]


def power_law(tokens, b=0.5, asymptote=0.8, a=0.3):
    return asymptote + a * (np.asarray(tokens) / LAST_TOKENS) ** -b


def even_tokens(n=15):
    return np.linspace(LAST_TOKENS / n, LAST_TOKENS, n)


def noisy(n, noise, seed):
    return power_law(even_tokens(n)) + noise * np.random.default_rng(seed).standard_normal(n)


@pytest.mark.parametrize(("metric", "threshold", "step", "measured_step"), [
    ([2.0, 1.6, 1.2], 1.5, 2.25, 3), ([2.0, None, 1.2], 1.6, 2.0, 3), ([1.4, 1.3], 1.5, 1.0, 1),
    ([2.0, 1.5, 1.6, 1.2], 1.5, 2.0, 2)])
def test_measured_time_is_the_clock_at_the_first_evaluation_at_the_threshold(
        metric, threshold, step, measured_step):
    points = [Evaluation(i, i, value, 10.0 * i) for i, value in enumerate(metric, start=1)]
    mirrored = [dataclasses.replace(e, metric=None if e.metric is None else 1 - e.metric)
                for e in points]
    for found in (time_to_target(points, "val_bpb", threshold),
                  time_to_target(mirrored, "core", 1 - threshold)):
        assert (found.measured_sec, found.measured_step) == (10.0 * measured_step, measured_step)
        assert found.step_interpolated == pytest.approx(step)
        assert found.extrapolated_sec is None and found.reason is None
    points[measured_step - 1] = dataclasses.replace(points[measured_step - 1], train_time_sec=0.0)
    text = time_to_target(points, "val_bpb", threshold).describe()
    assert f"reached by val_bpb before the clock starts, at step {measured_step}" in text


def test_only_evaluations_before_the_learning_rate_decay_are_extrapolated():
    """The decay lowers the metric: a fit through it would reach the threshold too early."""
    tokens = even_tokens(20)
    points = evaluations(tokens, power_law(tokens))
    decayed = [dataclasses.replace(e, metric=e.metric - 0.02 * i, lr_multiplier=1 - 0.1 * i)
               for i, e in enumerate(points[13:])]
    threshold = float(power_law(4 * LAST_TOKENS))
    for curve in (points, [*points[:13], *decayed]):
        mirrored = [dataclasses.replace(e, metric=1 - e.metric) for e in curve]
        for found in (time_to_target(curve, "val_bpb", threshold),
                      time_to_target(mirrored, "core", 1 - threshold)):
            expected_sec = pytest.approx(4 * LAST_TOKENS * SEC_PER_TOKEN, rel=1e-3)
            assert found.extrapolated_sec == expected_sec
            assert found.extrapolated_hi_sec / found.extrapolated_lo_sec < 1.01
            assert "; extrapolated" in found.describe()


def test_estimate_and_interval_agree_with_scipy():
    """The interval ends where the F test rejects a curve that is forced through the crossing."""
    tokens = even_tokens(20)
    metric = noisy(20, 0.002, 3)
    threshold = float(power_law(2 * LAST_TOKENS))
    found = time_to_target(evaluations(tokens, metric), "val_bpb", threshold)
    kept = tokens > 0.1 * LAST_TOKENS
    t, y = tokens[kept] / LAST_TOKENS, metric[kept]

    (m, a, b), _ = curve_fit(lambda t, m, a, b: m + a * t**-b, t, y, p0=(0.8, 0.3, 0.5))
    crossing = ((threshold - m) / a) ** (-1 / b)
    seconds = LAST_TOKENS * SEC_PER_TOKEN
    assert found.extrapolated_sec == pytest.approx(crossing * seconds, rel=1e-4)

    def residual(design, target):
        return float(((target - design @ np.linalg.lstsq(design, target)[0]) ** 2).sum())

    def smallest(objective):
        return minimize_scalar(objective, bounds=(0.02, 2.0), method="bounded",
                               options={"xatol": 1e-9}).fun

    free = smallest(lambda b: residual(np.stack([np.ones_like(t), t**-b], 1), y))
    limit = f_distribution.ppf(INTERVAL, 1, len(t) - 3)
    for end_sec in (found.extrapolated_lo_sec, found.extrapolated_hi_sec):
        c = end_sec / seconds
        forced = smallest(lambda b, c=c: residual((t**-b - c**-b)[:, None], y - threshold))
        assert (forced - free) / (free / (len(t) - 3)) == pytest.approx(limit, rel=0.02)


def test_interval_covers_the_truth_at_its_confidence_level():
    n_runs = 200
    threshold = float(power_law(2 * LAST_TOKENS))
    true_sec = 2 * LAST_TOKENS * SEC_PER_TOKEN
    covered = 0
    for seed in range(n_runs):
        points = evaluations(even_tokens(), noisy(15, 0.002, seed))
        found = time_to_target(points, "val_bpb", threshold)
        high_sec = found.extrapolated_hi_sec or math.inf
        covered += found.extrapolated_lo_sec <= true_sec <= high_sec
    standard_error = math.sqrt(INTERVAL * (1 - INTERVAL) / n_runs)
    assert abs(covered / n_runs - INTERVAL) < 3 * standard_error


TEN = np.arange(1.0, 11.0)


@pytest.mark.parametrize(("metric", "threshold", "lr_multiplier", "reason"), [
    ([], 1.0, 1.0, "missing"),
    ([3.0, 2.0, 1.5], 1.0, 1.0, "3 evaluations before the learning-rate decay"),
    ([1.0] * 10, 0.5, 1.0, "has not improved"),
    (np.linspace(1.0, 1.4, 10), 0.5, 1.0, "has not improved"),
    (0.8 + 0.3 * TEN**-0.5, 0.7, 1.0, "levels off before the threshold"),
    (0.8 + 0.3 * TEN**-0.5, 0.805, 1.0, "times the tokens"),
    ([2 - 0.05 * i for i in range(9)] + [math.nan], 1.0, 1.0, "not finite"),
    (2.0 - 0.2 * np.log(TEN), 1.5, 1.0, "exponent 0.02 is at a bound"),
    (1.2 * TEN**-0.05 - 0.1, 0.9, 1.0, "impossible value"),
    (0.8 + 0.3 * TEN**-0.5, 0.85, None, "does not say when the learning-rate decay begins"),
])
def test_no_time_is_invented(metric, threshold, lr_multiplier, reason):
    points = evaluations(range(1, len(metric) + 1), metric, 1.0, lr_multiplier)
    found = time_to_target(points, "val_bpb", threshold)
    assert found.extrapolated_sec is None and found.measured_sec is None
    assert reason in found.reason and found.describe() == (
        f"target {threshold:g} not reached by val_bpb, not extrapolated: {found.reason}")


@pytest.mark.parametrize(("name", "threshold", "message"), [
    ("loss", 1.0, "unknown"), ("val_bpb", None, "not a number"), ("val_bpb", 0.0, "above 0"),
    ("core", 1.0, "below 1")])
def test_impossible_targets_are_refused(name, threshold, message):
    with pytest.raises(UserError, match=message):
        check_target(name, threshold)


def test_evaluations_are_read_from_a_runs_events():
    events = [{"kind": "train", "step": 2, "tokens": 16, "loss": 3.0, "lr_multiplier": 0.5},
              {"kind": "core", "step": 2, "tokens": 16, "core_metric": 0.1, "train_time_sec": 2.0}]
    assert evaluations_of(events, "core") == [Evaluation(2, 16, 0.1, 2.0, 0.5)]
    with pytest.raises(UserError, match=r"the val event of step None has no number"):
        evaluations_of([{"kind": "val"}], "val_bpb")
