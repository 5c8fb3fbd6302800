"""Laws of whole curves and the crossings they predict: curves made by each law are recovered, closed forms hold."""

import math
from dataclasses import replace

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.crossing import (
    Horizon,
    Prediction,
    choose,
    end_of,
    first_crossing,
    lack_of_fit,
    landing_slope,
    shortest_whole,
    slope_test,
    time_to,
)
from nanochat.lane_b.infer.curve_law import FORMS, Progress, Run, fit
from nanochat.schedule import lr_multipliers as schedule

TRUTH = {
    "ends": (1.5, 0.4, 0.4),
    "annealing": (1.5, 0.6, 0.4, 0.1),
    "relaxing": (1.5, 0.6, 0.4, 0.12, 30.0),
    "multi_power": (1.5, 0.6, 0.4, 0.3, 20.0, 0.4, 0.6),
}


def made_run(form, values, horizon, seed=0, noise=0.0, evaluations=28):
    """A run by a law; `noise` moves the whole curve (1 sd) and bends it a little, as a seed does."""
    steps = np.unique(np.linspace(horizon / evaluations, horizon, evaluations).astype(int))
    rng = np.random.default_rng([horizon, seed])
    progress = Progress(schedule(horizon), steps)
    shift = rng.standard_normal() + 0.3 * rng.standard_normal() * steps / horizon
    loss = form.loss(progress, *values) * np.exp(noise * shift)
    return Run(progress, loss, seed).late(0.2, 1)


def made_runs(name="annealing", horizons=(448, 672, 896, 1344), seeds=(0,), noise=0.0):
    return [made_run(FORMS[name], TRUTH[name], horizon, seed, noise) for horizon in horizons for seed in seeds]


# --- progress --------------------------------------------------------------------------------------------------------

def test_progress_sums_the_multipliers_and_their_decrease():
    progress = Progress(np.array([0.5, 1.0, 1.0, 0.75, 0.25]), np.array([1, 2, 3, 4, 5]))
    assert progress.total.tolist() == [0.5, 1.5, 2.5, 3.25, 3.5]
    assert progress.drop.tolist() == [0, 0, 0, 0.25, 0.75]


def test_the_decrease_in_pieces_adds_up_to_the_drop():
    progress = Progress(schedule(900), np.array([200, 500, 900]))
    size, after, since = progress.landing
    assert (since[0] > 0) @ size == pytest.approx(progress.drop, abs=0.02)  # a piece is 1/64 of the decrease
    assert size.sum() == pytest.approx(0.95, abs=0.01) and np.all(np.diff(after) < 0)
    assert np.all(since[1] <= since[0.5]) and np.all(since[0.5] <= since[0])


def test_steps_beyond_the_horizon_are_refused():
    with pytest.raises(UserError, match="steps 10 to 101 of a horizon of 100"):
        Progress(np.ones(100), np.array([10, 101]))


def test_early_evaluations_are_cut_by_share_and_by_step():
    run = Run(Progress(np.ones(100), np.array([20, 49, 50, 100])), np.array([4.0, 3.0, 2.0, 1.0]))
    assert run.late(0.5, 1).progress.steps.tolist() == [50, 100] and run.late(0.5, 1).loss.tolist() == [2, 1]
    assert run.late(0.2, 60).progress.steps.tolist() == [100]


# --- forms -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FORMS)
def test_a_law_recovers_curves_of_its_own_form(name):
    law = fit(FORMS[name], made_runs(name))
    assert law.rms_log_loss < 1e-6
    longer = Progress(schedule(1900), np.array([800, 1200, 1900]))
    truth = FORMS[name].loss(longer, *TRUTH[name])
    assert law.at(longer) == pytest.approx(truth, abs=1e-5)
    assert law.at_bound == []


@pytest.mark.parametrize("alpha, fitted", [(0.4, (0.399, 0.401)), (0.8, (0.75, 0.8)), (0.2, (0.2, 0.25))])
def test_the_prior_of_the_exponent_gives_way_to_curves_that_know_better(alpha, fitted):
    runs = [made_run(FORMS["annealing"], (1.5, 0.6, alpha, 0.1), horizon) for horizon in (448, 672, 896, 1344)]
    assert fitted[0] < fit(FORMS["annealing"], runs).values[2] < fitted[1]


def test_the_fit_is_the_same_twice():
    runs = made_runs(seeds=(0, 1), noise=0.001)
    assert np.array_equal(fit(FORMS["multi_power"], runs).values, fit(FORMS["multi_power"], runs).values)


def test_one_spoilt_evaluation_counts_little():
    runs = made_runs()
    runs[1].loss[5] *= 1.3
    end = Progress(schedule(1900), np.array([1900]))
    truth = FORMS["annealing"].loss(end, *TRUTH["annealing"])
    assert fit(FORMS["annealing"], runs).at(end) == pytest.approx(truth, abs=1e-3)


def test_a_fast_landing_is_the_annealing_law():
    progress, floor_to_gain = Progress(schedule(900), np.array([400, 600, 900])), TRUTH["annealing"]
    annealing = FORMS["annealing"].loss(progress, *floor_to_gain)
    assert FORMS["relaxing"].loss(progress, *floor_to_gain, 1e9) == pytest.approx(annealing, abs=0.002)
    assert FORMS["multi_power"].loss(progress, *floor_to_gain, 1e9, 1.5, 0.0) == pytest.approx(annealing, abs=0.002)


def test_parameters_at_their_bounds_are_named():
    runs = [made_run(FORMS["annealing"], (1.5, 0.6, 0.4, 0.0), horizon) for horizon in (448, 896)]
    assert fit(FORMS["annealing"], runs).at_bound == ["gain"]


def test_one_horizon_or_too_few_evaluations_fit_no_law():
    with pytest.raises(Refusal, match="23 evaluations of 1 horizons do not determine the 4 parameters of annealing"):
        fit(FORMS["annealing"], made_runs(horizons=(896,)))
    with pytest.raises(Refusal, match="2 evaluations of 2 horizons"):
        fit(FORMS["ends"], made_runs(horizons=(448, 896)))


# --- crossings -------------------------------------------------------------------------------------------------------

def test_first_crossing_is_linear_between_evaluations():
    assert first_crossing([10, 20, 30], [3.0, 2.0, 1.0], 1.75) == 22.5
    assert first_crossing([10, 20, 30], [3.0, 2.0, 2.5], 2.0) == 20
    assert first_crossing([10, 20], [1.0, 0.5], 1.5) == 10
    assert first_crossing([10, 20], [3.0, 2.0], 1.9) == math.inf


def test_shortest_whole_schedule_of_a_power_law_is_its_closed_form():
    law = fit(FORMS["ends"], made_runs("ends"))
    exact = 1000 * (0.4 / 0.42) ** (1 / 0.4)  # floor 1.5, amplitude 0.4, alpha 0.4, threshold 1.92
    assert shortest_whole(law, schedule, 1.92, 300, 3000) == math.ceil(exact)
    assert shortest_whole(law, schedule, 1.6, 300, 3000) == math.inf


def test_a_run_crosses_where_its_law_says():
    law = fit(FORMS["annealing"], made_runs())
    fine = np.arange(1, 1001)
    exact = first_crossing(fine, law.at(Progress(schedule(1000), fine)), 2.1)
    assert time_to(law, schedule, 1000, 2.1) == pytest.approx(exact, abs=1)


# --- slopes, fit -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("gain, says", [(0.02, "longer"), (0.3, "shorter")])
def test_the_slopes_say_on_which_side_the_quickest_horizon_lies(gain, says):
    values = (1.5, 0.6, 0.4, gain)
    runs = [made_run(FORMS["annealing"], values, horizon, seed, 0.001) for horizon in (672, 896) for seed in (0, 1)]
    slopes, law = slope_test(runs), fit(FORMS["annealing"], runs)
    assert slopes.says == says
    d_star = shortest_whole(law, schedule, end_of(law, schedule, 775), 600, 900)
    threshold = end_of(law, schedule, d_star)
    quicker = time_to(law, schedule, round(1.1 * d_star), threshold) < d_star
    assert quicker == (says == "longer")


def test_the_landing_slope_is_that_of_the_curve():
    """L = 2 - 0.3 ln(t/H) + 0.1 ln(t/H)^2."""
    steps = np.arange(50, 1001, 25)
    log_share = np.log(steps / 1000)
    run = Run(Progress(np.ones(1000), steps), 2 - 0.3 * log_share + 0.1 * log_share**2)
    assert landing_slope(run) == pytest.approx(0.3)
    with pytest.raises(Refusal, match="4 evaluations in the last quarter of a run of 1000 steps"):
        landing_slope(Run(Progress(np.ones(1000), steps[-4:]), np.ones(4)))


def test_one_seed_leaves_the_slopes_undecided():
    assert slope_test(made_runs()).says == "undecided"


def test_lack_of_fit_tells_a_wrong_form_from_the_scatter_of_seeds():
    runs = made_runs("multi_power", seeds=(0, 1), noise=0.0005)
    assert lack_of_fit(fit(FORMS["multi_power"], runs), runs).p > 0.05
    flat = fit(FORMS["annealing"], runs)
    wrong = lack_of_fit(replace(flat, values=flat.values * [1, 1, 1, 0]), runs)  # no gain from the landing
    assert wrong.p < 0.001 and wrong.ratio > 10
    assert math.isnan(lack_of_fit(flat, made_runs()).p)  # one seed: nothing to compare with


# --- predictions with intervals --------------------------------------------------------------------------------------

def test_intervals_cover_the_crossings_of_runs_to_come():
    """By simulation: calibrations of 3 horizons x 2 seeds, one run at 1.4 times the longest; nominal 95 %."""
    threshold, covered = end_of(fit(FORMS["annealing"], made_runs()), schedule, 1100), []
    for seed in range(20):
        runs = made_runs(horizons=(448, 672, 896), seeds=(10 * seed, 10 * seed + 1), noise=0.001)
        predicted, _ = Prediction(FORMS["annealing"], runs, schedule, copies=60).horizon(1250, threshold)
        coming = made_run(FORMS["annealing"], TRUTH["annealing"], 1250, seed + 1000, 0.001)
        assert predicted.hi < 1.2 * predicted.lo
        covered.append(predicted.lo <= first_crossing(coming.progress.steps, coming.loss, threshold) <= predicted.hi)
    assert np.mean(covered) >= 0.85


def test_the_quickest_horizon_is_that_of_the_true_law():
    law = fit(FORMS["annealing"], made_runs())
    threshold = end_of(law, schedule, 1100)
    times = [time_to(law, schedule, horizon, threshold) for horizon in range(1100, 1345, 10)]
    runs = made_runs(horizons=(448, 672, 896), seeds=(0, 1), noise=0.0005)
    quickest = Prediction(FORMS["annealing"], runs, schedule, copies=40).quickest(threshold)
    assert quickest.whole_lo <= 1100 <= quickest.whole_hi
    assert quickest.chosen.time == pytest.approx(min(times), rel=0.02)
    assert quickest.chosen.lo < quickest.chosen.time < quickest.chosen.hi


def test_no_horizon_is_chosen_beyond_the_reach_of_the_runs():
    quickest = Prediction(FORMS["annealing"], made_runs(seeds=(0, 1), noise=0.001), schedule, copies=20).quickest(1.7)
    assert quickest.chosen is None and quickest.whole == math.inf


def test_the_shortest_of_equally_quick_horizons_that_nearly_always_get_there_is_chosen():
    def horizon(steps, time, reaches):
        return Horizon(steps, time, 0.9 * time, 1.1 * time, reaches)

    sure = [horizon(1000, 995, 0.5), horizon(1100, 950, 0.97), horizon(1200, 905, 1), horizon(1300, 900, 1),
            horizon(2100, 700, 1)]
    assert choose(sure, 1000).steps == 1200  # 905 is within 1 % of 900; 2100 is beyond 2 D*
    assert choose([horizon(1000, 800, 0.5), horizon(1100, 850, 0.95)], 1000).steps == 1100  # D* often just misses
    assert choose([horizon(1000, 800, 0.5)], 1000) is None
