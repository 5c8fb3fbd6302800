"""From made curves of calibration runs to H*: known answers, warnings in words, refusals that say what to do."""

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.crossing import Horizon, Prediction, end_of, time_to
from nanochat.lane_b.infer.curve_law import FORMS, Law, Progress, Run
from nanochat.lane_b.infer.horizon import TooShort, infer_horizon
from nanochat.lane_b.infer.horizon_figure import draw_inference
from nanochat.lane_b.infer.inputs import Setting
from nanochat.lane_b.statistics import Estimate, alpha_of
from nanochat.schedule import lr_multipliers

LOW_RATES, NEAR_BEST = (1.5, 0.6, 0.4, 0.05, 30.0), (1.5, 0.6, 0.4, 0.3, 300.0)  # the gain of the landing: small, large
DEFAULT_STEPS = 1200
SETTING = Setting("books", "bpe", 1_000_000, 2048, 0.05, {})
schedule = cache(lr_multipliers)


def truth(values=LOW_RATES):
    return Law(FORMS["relaxing"], np.array(values), 0.0)


def made_runs(values=LOW_RATES, horizons=(480, 640, 853), seeds=(0, 1), noise=0.0005, every=20):
    """Runs by a law; a seed moves its whole curve (1 sd = `noise`) and bends it a little."""
    runs = []
    for horizon in horizons:
        steps = np.unique([*range(every, horizon + 1, every), horizon])
        for seed in seeds:
            rng = np.random.default_rng([horizon, seed])
            shift = rng.standard_normal() + 0.3 * rng.standard_normal() * steps / horizon
            progress = Progress(schedule(horizon), steps)
            runs.append(Run(progress, truth(values).at(progress) * np.exp(noise * shift), seed))
    return runs


def threshold_at(steps, values=LOW_RATES):
    return end_of(truth(values), schedule, steps)


@cache
def infer(values=LOW_RATES, whole=900, copies=40, **options):
    return infer_horizon(made_runs(values, **options), threshold_at(whole, values), schedule, DEFAULT_STEPS, copies)


# --- known answers ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("values", [LOW_RATES, NEAR_BEST])
def test_the_horizon_that_crosses_first_is_found_on_either_side(values):
    found, law, threshold = infer(values), truth(values), threshold_at(900, values)
    times = {steps: time_to(law, schedule, steps, threshold) for steps in range(900, 1280, 10)}
    assert found.quickest.whole_lo <= 900 <= found.quickest.whole_hi
    assert time_to(law, schedule, found.chosen.steps, threshold) <= 1.03 * min(times.values())
    for horizon in filter(None, found.predicted.values()):
        assert horizon.lo <= time_to(law, schedule, horizon.steps, threshold) <= horizon.hi
    longer_is_quicker = min(times.values()) < 0.98 * 900
    assert (found.slopes.says, found.chosen.steps > 1.1 * 900) == (
        ("longer", True) if longer_is_quicker else ("shorter", False))
    assert longer_is_quicker == (values == LOW_RATES)


def test_the_neighbour_the_shortest_whole_and_the_default_are_predicted_beside_it():
    found = infer(NEAR_BEST)
    steps = {name: horizon.steps for name, horizon in found.predicted.items()}
    assert steps == {"quickest": found.chosen.steps, "neighbour": round(1.05 * found.chosen.steps),
                     "shortest_whole": math.ceil(found.quickest.whole), "default": DEFAULT_STEPS}
    alpha, lo, hi = found.alpha
    assert lo < 0.4 < hi and alpha == pytest.approx(0.4, abs=0.1)


def test_a_chosen_horizon_always_has_a_bound_of_its_time():
    for found in (infer(), infer(NEAR_BEST), infer(NEAR_BEST, noise=0.003, copies=80)):
        assert found.chosen.hi < math.inf
    assert found.quickest.chosen.hi == math.inf and found.chosen.steps > found.quickest.chosen.steps  # it was needed


def test_the_default_beyond_the_reach_of_the_calibration_is_not_predicted():
    found = infer_horizon(made_runs(), threshold_at(900), schedule, 1281, copies=40)
    assert found.predicted["default"] is None  # 1.5 times 853 is 1279


def test_the_same_seed_gives_the_same_inference():
    again = [infer_horizon(made_runs(), threshold_at(900), schedule, DEFAULT_STEPS, 40, seed) for seed in (0, 1)]
    assert again[0].quickest == infer().quickest != again[1].quickest


# --- what a reader must know -----------------------------------------------------------------------------------------

def test_a_horizon_that_the_law_does_not_fit_is_left_out_once_and_said_to_be():
    runs = made_runs()
    runs[:2] = [replace(run, loss=run.loss * 1.02) for run in runs[:2]]
    found = infer_horizon(runs, threshold_at(900), schedule, DEFAULT_STEPS, copies=40)
    assert found.horizon_left_out == 480 and found.misfit.p > 0.05
    assert "the horizon of 480 steps is left out: with it the law does not fit" in found.warnings
    assert found.chosen.steps == pytest.approx(infer().chosen.steps, rel=0.1)


def test_curves_that_no_law_fits_are_all_kept_said_to_be_missed_and_widen_the_interval():
    runs = [replace(run, loss=run.loss * (1 + 0.003 * (index // 2 % 2))) for index, run in enumerate(
        made_runs(horizons=(480, 560, 640, 853)))]
    found = infer_horizon(runs, threshold_at(800), schedule, DEFAULT_STEPS, copies=40)
    assert found.horizon_left_out is None and found.misfit.p < 0.05 and len(found.prediction.runs) == 8
    assert any("misses the curves by more than the scatter of seeds" in warning for warning in found.warnings)
    assert f"the intervals are {math.sqrt(found.misfit.ratio):.1f} times as wide for it" in " ".join(found.warnings)
    assert found.is_wide and not infer(whole=800).is_wide
    far = [replace(run, loss=run.loss * (1 + 0.02 * (index // 2 % 2))) for index, run in enumerate(runs)]
    with pytest.raises(TooShort, match="is sure to reach"):
        infer_horizon(far, threshold_at(800), schedule, DEFAULT_STEPS, copies=40)


def test_a_misfit_widens_the_interval_by_the_root_of_its_ratio():
    runs = [run.late() for run in made_runs(horizons=(480, 853))]
    plain, wide = (Prediction(FORMS["relaxing"], runs, schedule, copies=200, noise_factor=factor).horizon(
        1000, threshold_at(800))[0] for factor in (1.0, 2.0))
    assert (wide.hi - wide.lo) / (plain.hi - plain.lo) == pytest.approx(2, rel=0.35) and wide.time == plain.time


@pytest.mark.parametrize("change, warning", [
    ({"horizons": (400, 640)}, "a calibration horizon of 400 steps is short"),
    ({"seeds": (0,)}, "no two seeds of a horizon"),
    ({"values": (1.5, 0.6, 0.4, 0.0, 30.0), "noise": 0, "seeds": (0,)}, "the law's gain is at the edge of its range"),
    ({"values": (-1.0, 3.0, 0.4, 0.05, 30.0), "noise": 0, "seeds": (0,)}, "L_inf is at 0"),
    ({"whole": 480}, "640 steps, reach the target already"),
    ({"horizons": (480, 640)}, "a horizon beyond 960 steps, the calibration's reach, may be quicker still"),
])
def test_what_limits_an_inference_is_said_in_words(change, warning):
    options = {"whole": 800, **change}
    if options["whole"] == 480:
        options["horizons"] = (640, 853)
    assert any(warning in found for found in infer(**options).warnings)


def test_a_wide_interval_asks_for_one_horizon_more():
    wide = replace(infer(), predicted={"quickest": Horizon(900, 800.0, 700.0, 900.0, 1.0)})
    assert wide.is_wide and "wider than a factor of 1.25; extend the calibration: --num-iterations 1137" in str(
        wide.warnings)
    assert not infer().is_wide and infer(NEAR_BEST).next_num_iterations is None
    at_reach = infer(horizons=(480, 640), whole=800)
    assert at_reach.is_at_reach and at_reach.next_num_iterations == 853


# --- refusals --------------------------------------------------------------------------------------------------------

def test_a_target_beyond_the_calibration_names_the_next_horizon_to_train():
    with pytest.raises(TooShort, match=r"no horizon up to 960 steps, .* extend the calibration: --num-iterations 853"):
        infer(horizons=(480, 640), whole=1100)
    with pytest.raises(Refusal, match=r"likely_unreachable: by the law no schedule up to 12000 steps ends at 1\.4000"):
        infer_horizon(made_runs(), 1.4, schedule, DEFAULT_STEPS, copies=40)


@pytest.mark.parametrize("options, fault", [
    ({"horizons": (299, 640)}, "a calibration horizon of 299 steps: the law reads curves from step 300 on"),
    ({"horizons": (640,)}, "one horizon gives no slope"),
    ({"every": 80}, "lower --eval-every"),
])
def test_runs_that_carry_no_answer_are_refused(options, fault):
    with pytest.raises(Refusal, match=fault) as refused:
        infer(**options)
    assert refused.value.exit_code == 3


# --- figure ----------------------------------------------------------------------------------------------------------

def test_an_inference_has_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    draw_inference(infer(), SETTING, tmp_path / "infer.png")
    assert (tmp_path / "infer.png").stat().st_size > 20_000
    with pytest.raises(UserError, match=r"--plot .*figure\.odd"):
        draw_inference(infer(), SETTING, tmp_path / "figure.odd")


# --- the theory's exponent -------------------------------------------------------------------------------------------

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
    assert alpha_of(Estimate(), Estimate(0.5, 0.02, 0.46, 0.54)) == Estimate()
    assert alpha_of(Estimate(0.3, 0.01, 0.28, 0.32), Estimate(0.1, 0.1, -0.1, 0.3)).lo is None
