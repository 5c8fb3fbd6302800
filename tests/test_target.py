"""Time to target: measured, extrapolated, refused; the interval's coverage; scipy as the reference fit."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize_scalar
from scipy.stats import f as f_distribution

from nanochat.common import UserError
from nanochat.target import Evaluation, TimeToTarget, check_target, evaluations_of, time_to_target

SEC_PER_TOKEN = 1e-4
LAST_TOKENS = 15_000_000


def evaluations(tokens, metric, sec_per_token=SEC_PER_TOKEN):
    return [Evaluation(i + 1, int(t), float(m), float(t) * sec_per_token)
            for i, (t, m) in enumerate(zip(tokens, metric, strict=True))]


def power_law(tokens, b=0.5, asymptote=0.8, a=0.3):
    return asymptote + a * (np.asarray(tokens) / LAST_TOKENS) ** -b


def even_tokens(n=15):
    return np.linspace(LAST_TOKENS / n, LAST_TOKENS, n)


def test_measured_time_is_the_clock_at_the_first_evaluation_that_reaches_the_threshold():
    found = time_to_target(evaluations([1, 2, 3, 4], [2.0, 1.5, 1.6, 1.2], 10.0), "val_bpb", 1.5)
    assert (found.measured_sec, found.measured_step, found.method) == (20.0, 2, "measured")
    assert found.extrapolated_sec is None and found.reason is None


def test_core_is_reached_from_below():
    found = time_to_target(evaluations([1, 2, 3], [0.1, 0.25, 0.3], 1.0), "core", 0.25)
    assert found.measured_sec == 2.0


@pytest.mark.parametrize(("metric", "threshold", "step", "bracket"), [
    ([2.0, 1.6, 1.2], 1.5, 2.25, (2, 3)), ([2.0, None, 1.2], 1.6, 2.0, (1, 3)), ([1.4, 1.3, 1.2], 1.5, 1.0, (0, 1)),
])
def test_a_crossing_is_interpolated_between_the_evaluations_that_bracket_it(metric, threshold, step, bracket):
    points = [Evaluation(i, i, value, float(i)) for i, value in enumerate(metric, start=1)]
    mirrored = [dataclasses.replace(e, metric=None if e.metric is None else 1 - e.metric) for e in points]
    for found in (time_to_target(points, "val_bpb", threshold), time_to_target(mirrored, "core", 1 - threshold)):
        assert found.step_interpolated == pytest.approx(step) and found.bracket_steps == bracket
        assert found.measured_step == bracket[1]


def test_a_target_reached_on_untimed_steps_is_said_to_be_that():
    points = [Evaluation(10, 10, 1.4, 0.0), Evaluation(20, 20, 1.2, 9.0)]
    words = time_to_target(points, "val_bpb", 1.5).describe()
    assert "before the clock starts at step 10" in words and "0.0 s" not in words


def test_exact_power_law_is_extrapolated_exactly():
    tokens = even_tokens()
    found = time_to_target(evaluations(tokens, power_law(tokens)), "val_bpb", float(power_law(3 * LAST_TOKENS)))
    assert found.extrapolated_sec == pytest.approx(3 * LAST_TOKENS * SEC_PER_TOKEN, rel=1e-3)
    assert found.extrapolated_lo_sec <= found.extrapolated_sec <= found.extrapolated_hi_sec
    assert found.extrapolated_hi_sec / found.extrapolated_lo_sec < 1.01
    assert found.exponent == pytest.approx(0.5, abs=1e-3) and found.asymptote == pytest.approx(0.8, abs=1e-3)


def test_mirrored_metric_gives_the_same_time():
    tokens = even_tokens()
    metric = power_law(tokens) + 0.002 * np.random.default_rng(1).standard_normal(15)
    threshold = float(power_law(2 * LAST_TOKENS))
    bpb = time_to_target(evaluations(tokens, metric), "val_bpb", threshold)
    core = time_to_target(evaluations(tokens, 1 - metric), "core", 1 - threshold)
    assert core.extrapolated_sec == pytest.approx(bpb.extrapolated_sec, rel=1e-6)
    assert core.asymptote == pytest.approx(1 - bpb.asymptote, abs=1e-6)


def test_point_estimate_agrees_with_scipy_curve_fit():
    tokens = even_tokens(20)
    metric = power_law(tokens) + 0.001 * np.random.default_rng(2).standard_normal(20)
    threshold = float(power_law(2 * LAST_TOKENS))
    kept = tokens > 0.1 * LAST_TOKENS
    t = tokens[kept] / LAST_TOKENS
    (m, a, b), _ = curve_fit(lambda t, m, a, b: m + a * t**-b, t, metric[kept], p0=(0.8, 0.3, 0.5))
    want_sec = ((threshold - m) / a) ** (-1 / b) * LAST_TOKENS * SEC_PER_TOKEN
    found = time_to_target(evaluations(tokens, metric), "val_bpb", threshold)
    assert found.extrapolated_sec == pytest.approx(want_sec, rel=1e-4)


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95])  # at 0.8 alone, F(1, n) and F(2, n) are 1 % apart
def test_interval_ends_where_the_f_test_of_a_forced_crossing_refuses(confidence):
    tokens = even_tokens(20)
    metric = power_law(tokens) + 0.002 * np.random.default_rng(3).standard_normal(20)
    threshold = float(power_law(2 * LAST_TOKENS))
    found = time_to_target(evaluations(tokens, metric), "val_bpb", threshold, confidence)
    kept = tokens > 0.1 * LAST_TOKENS
    t, y = tokens[kept] / LAST_TOKENS, metric[kept]

    def residual(design, target):
        return float(((target - design @ np.linalg.lstsq(design, target, rcond=None)[0]) ** 2).sum())

    def smallest(objective):
        return minimize_scalar(objective, bounds=(0.02, 2.0), method="bounded", options={"xatol": 1e-9}).fun

    free = smallest(lambda b: residual(np.stack([np.ones_like(t), t**-b], 1), y))
    for end_sec in (found.extrapolated_lo_sec, found.extrapolated_hi_sec):
        c = end_sec / (LAST_TOKENS * SEC_PER_TOKEN)
        forced = smallest(lambda b, c=c: residual((t**-b - c**-b)[:, None], y - threshold))
        statistic = (forced - free) / (free / (len(t) - 3))
        assert statistic == pytest.approx(f_distribution.ppf(confidence, 1, len(t) - 3), rel=0.02)


@pytest.mark.parametrize("confidence", [0.8, 0.9])
@pytest.mark.parametrize(("b", "n", "noise", "far"), [(0.5, 15, 0.002, 2.0), (0.3, 20, 0.0005, 3.0)])
def test_interval_covers_the_truth_at_its_nominal_rate(b, n, noise, far, confidence):
    """Under the model's own noise (independent, normal, one size) and a crossing well beyond the data."""
    rng = np.random.default_rng(int(1000 * b) + n)
    tokens, runs = even_tokens(n), 200
    threshold = float(power_law(far * LAST_TOKENS, b))
    true_sec = far * LAST_TOKENS * SEC_PER_TOKEN
    covered = 0
    for noisy in power_law(tokens, b) + noise * rng.standard_normal((runs, n)):
        found = time_to_target(evaluations(tokens, noisy), "val_bpb", threshold, confidence)
        assert found.extrapolated_sec is not None, found.reason
        covered += found.extrapolated_lo_sec <= true_sec <= (found.extrapolated_hi_sec or math.inf)
    standard_error = math.sqrt(confidence * (1 - confidence) / runs)
    assert abs(covered / runs - confidence) < 3 * standard_error


def test_noisier_evaluations_give_a_wider_interval():
    tokens, noise = even_tokens(), np.random.default_rng(4).standard_normal(15)
    threshold = float(power_law(1.5 * LAST_TOKENS))
    narrow, wide = (time_to_target(evaluations(tokens, power_law(tokens) + size * noise), "val_bpb", threshold)
                    for size in (0.0005, 0.003))
    assert (wide.extrapolated_hi_sec - wide.extrapolated_lo_sec
            > 2 * (narrow.extrapolated_hi_sec - narrow.extrapolated_lo_sec))


def test_slow_evaluation_interval_does_not_change_the_pace():
    tokens = even_tokens()
    slow = [dataclasses.replace(e, train_time_sec=e.train_time_sec + 500.0 * (i > 3))
            for i, e in enumerate(evaluations(tokens, power_law(tokens)))]
    found = time_to_target(slow, "val_bpb", float(power_law(2 * LAST_TOKENS)))
    assert found.extrapolated_sec == pytest.approx(2 * LAST_TOKENS * SEC_PER_TOKEN + 500.0, rel=1e-3)


def test_straight_line_of_the_last_three_is_given_for_comparison():
    metric = [3.0, 2.0, 1.6, 1.5, 1.4, 1.3]
    found = time_to_target(evaluations(range(1, 7), metric, 1.0), "val_bpb", 1.1)
    assert found.linear_sec == pytest.approx(8.0)


@pytest.mark.parametrize(("tokens", "metric", "threshold", "reason"), [
    ([], [], 1.0, "0 evaluations"),
    ([1, 2, 3], [3.0, 2.0, 1.5], 1.0, "at least 6"),
    (range(1, 11), [1.0] * 10, 0.5, "has not improved"),
    (range(1, 11), np.linspace(1.0, 1.4, 10), 0.5, "has not improved"),
    (range(1, 11), 0.8 + 0.3 * np.arange(1.0, 11.0) ** -0.5, 0.7, "levels off"),
    (range(1, 11), 0.8 + 0.3 * np.arange(1.0, 11.0) ** -0.5, 0.805, "times the tokens"),
    (range(1, 11), [2 - 0.05 * i for i in range(9)] + [math.nan], 1.0, "last evaluation is not finite"),
])
def test_no_time_is_invented(tokens, metric, threshold, reason):
    found = time_to_target(evaluations(tokens, metric, 1.0), "val_bpb", threshold)
    assert found.extrapolated_sec is None and found.measured_sec is None
    assert found.reason.startswith("not extrapolated: ") and reason in found.reason
    assert reason in found.describe()


def test_repeated_token_counts_are_refused():
    found = time_to_target(evaluations([5] * 8, np.linspace(2, 1.5, 8)), "val_bpb", 1.0)
    assert "growing token counts" in found.reason


def test_missing_values_between_good_ones_are_passed_over():
    tokens = even_tokens()
    points = evaluations(tokens, power_law(tokens))
    points[5] = dataclasses.replace(points[5], metric=None)
    found = time_to_target(points, "val_bpb", float(power_law(2 * LAST_TOKENS)))
    assert found.extrapolated_sec == pytest.approx(2 * LAST_TOKENS * SEC_PER_TOKEN, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 5.0), st.integers(1, 10**6)), max_size=15), st.floats(0.1, 5.0))
def test_any_curve_gives_exactly_one_kind_of_answer(points, threshold):
    tokens = np.cumsum([step for _, step in points])
    found = time_to_target(evaluations(tokens, [metric for metric, _ in points]), "val_bpb", threshold)
    answers = [found.measured_sec, found.extrapolated_sec, found.reason]
    assert sum(answer is not None for answer in answers) == 1
    if found.extrapolated_sec is not None:
        now_sec = float(tokens[-1]) * SEC_PER_TOKEN
        assert now_sec * (1 - 1e-9) <= found.extrapolated_lo_sec <= found.extrapolated_sec
        assert found.extrapolated_hi_sec is None or found.extrapolated_hi_sec >= found.extrapolated_sec
    assert found.describe()


@pytest.mark.parametrize(("name", "threshold", "message"), [
    ("loss", 1.0, "unknown"), ("val_bpb", None, "not a number"), ("val_bpb", math.nan, "not a number"),
    ("val_bpb", 0.0, "above 0"), ("core", 1.0, "below 1"),
])
def test_impossible_targets_are_refused(name, threshold, message):
    with pytest.raises(UserError, match=message):
        check_target(name, threshold)


def test_evaluations_are_read_from_a_runs_events():
    events = [{"kind": "train", "step": 1, "tokens": 8, "loss": 3.0, "train_time_sec": 1.0},
              {"kind": "val", "step": 2, "tokens": 16, "val_bpb": 1.2, "train_time_sec": 2.0},
              {"kind": "core", "step": 2, "tokens": 16, "core_metric": 0.1, "train_time_sec": 2.0}]
    assert evaluations_of(events, "val_bpb") == [Evaluation(2, 16, 1.2, 2.0)]
    assert evaluations_of(events, "core") == [Evaluation(2, 16, 0.1, 2.0)]


@pytest.mark.parametrize("damage", [{"tokens": None}, {"train_time_sec": "2"}, {"val_bpb": "low"}])
def test_an_evaluation_without_its_numbers_is_named(damage):
    event = {"kind": "val", "step": 2, "tokens": 16, "val_bpb": 1.2, "train_time_sec": 2.0}
    with pytest.raises(UserError, match=f"val event of step 2: {next(iter(damage))} is"):
        evaluations_of([event | damage], "val_bpb")
    with pytest.raises(UserError, match="val event of step missing"):
        evaluations_of([{"kind": "val"}], "val_bpb")


def test_summary_fields_carry_the_ledgers_names():
    fields = TimeToTarget("val_bpb", 0.9, measured_sec=12.5, measured_step=100).summary_fields()
    assert fields["target_metric_name"] == "val_bpb" and fields["target_metric_threshold"] == 0.9
    assert fields["time_to_target_sec_measured"] == 12.5 and fields["time_to_target_sec_extrapolated"] is None
    assert fields["time_to_target_step_interpolated"] is None and fields["time_to_target_bracket_steps"] is None
    assert fields["time_to_target_measured_step"] == 100 and fields["time_to_target_method"] == "measured"
