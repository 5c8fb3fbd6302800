"""From whole curves of calibration runs to the horizon that reaches a target first: all in optimizer steps.

The exponent of the theory (arXiv:2602.07488) enters nothing here; see ideas/lane_b_data_horizon_theory.md.
"""

import math
from dataclasses import dataclass, field

from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.crossing import (
    MAX_EXTRAPOLATION,
    Horizon,
    LackOfFit,
    Prediction,
    Quickest,
    Slopes,
    by_horizon,
    central_interval,
    end_of,
    lack_of_fit,
    slope_test,
)
from nanochat.lane_b.infer.curve_law import FIRST_STEP, FORMS, Run, fit

FORM = FORMS["relaxing"]  # dev.study.curve_laws
CONFIRMATION_FACTOR = 1.05
DEFAULT_RATIO = 12.0  # tokens per scaling parameter, scripts.base_train's default
UNREACHABLE_FACTOR = 10  # times the default horizon
SHORT_STEPS = 448  # the fixed warm-ups cost shorter runs more than 0.008 bits per byte
NEXT_HORIZON = 4 / 3  # times the longest calibration run
MAX_TIME_FACTOR = 1.25  # a 95 % interval of the time to target wider than this asks for one horizon more
MIN_FIT_P = 0.05


class TooShort(Refusal):
    """The calibration must be extended; `next_num_iterations`: by a horizon of so many steps."""

    def __init__(self, fault, longest):
        self.next_num_iterations = next_horizon(longest)
        super().__init__(f"{fault}; extend the calibration: --num-iterations {self.next_num_iterations}, or take the "
                         "default ratio with --fallback")


@dataclass(frozen=True)
class Inference:
    """The horizon chosen, how sure it is, and how it came about; horizons and times in steps.

    `predicted`: quickest (the chosen one), neighbour, shortest_whole and default, None beyond the calibration's reach.
    `horizon_left_out`: of the calibration, for lack of fit.
    """

    runs: tuple[Run, ...] = field(repr=False)
    prediction: Prediction = field(repr=False)
    misfit: LackOfFit
    horizon_left_out: int | None
    slopes: Slopes
    threshold: float
    quickest: Quickest = field(repr=False)
    predicted: dict[str, Horizon | None]

    @property
    def chosen(self):
        return self.predicted["quickest"]

    @property
    def alpha(self):
        """(value, lo, hi) of the law's exponent."""
        at = list(FORM.parameters).index("alpha")
        return (float(self.prediction.law.values[at]),
                *central_interval([law.values[at] for law, _ in self.prediction.copies]))

    @property
    def is_wide(self):
        return self.chosen.hi > MAX_TIME_FACTOR * self.chosen.lo

    @property
    def is_at_reach(self):
        """Whether the quickest of all horizons looked at is the longest: a longer one may be quicker still."""
        horizons = self.quickest.horizons
        return horizons[-1].time == min(horizon.time for horizon in horizons)

    @property
    def next_num_iterations(self):
        """The horizon that the calibration should be extended by, steps; None where it is enough."""
        longest = max(run.horizon for run in self.runs)
        return next_horizon(longest) if self.is_wide or self.is_at_reach else None

    @property
    def warnings(self):
        """What a reader of the inference must know, in words."""
        horizons, law = list(by_horizon(self.runs)), self.prediction.law
        found = [f"a calibration horizon of {horizon} steps is short, the fixed warm-ups weigh on it; use "
                 f"{SHORT_STEPS} or more" for horizon in horizons if horizon < SHORT_STEPS]
        if self.horizon_left_out:
            found.append(f"the horizon of {self.horizon_left_out} steps is left out: with it the law does not fit")
        if self.misfit.p < MIN_FIT_P:
            found.append(f"the law misses the curves by more than the scatter of seeds (p {self.misfit.p:.2g}); the "
                         f"intervals are {math.sqrt(self.misfit.ratio):.1f} times as wide for it")
        if math.isnan(self.misfit.p):
            found.append("no two seeds of a horizon that differ: neither the law's fit nor the slopes can be tested")
        found += [f"the law's {name} is at the edge of its range" for name in law.at_bound]
        if law.values[0] < 1e-3:
            found.append("L_inf is at 0: the curves do not show a floor")
        if self.quickest.whole <= (shortest := min(run.horizon for run in self.prediction.runs)):
            found.append(f"the shortest calibration runs, {shortest} steps, reach the target already; a shorter one "
                         "may be quicker")
        extend = f"; extend the calibration: --num-iterations {self.next_num_iterations}"
        if self.is_at_reach:
            found.append(f"a horizon beyond {self.quickest.horizons[-1].steps} steps, the calibration's reach, may be "
                         f"quicker still{extend}")
        if self.is_wide:
            found.append(f"the interval of the time to target is wider than a factor of {MAX_TIME_FACTOR}{extend}")
        return found


def next_horizon(longest):
    return round(NEXT_HORIZON * longest)


def infer_horizon(runs, threshold, schedule, default_steps, copies=200, seed=0):
    """The horizon whose run first crosses `threshold` (bits per byte), from all evaluations of whole `runs`.

    schedule: from a horizon to its learning-rate multipliers. Errors: Refusal for runs that carry no answer, TooShort
    for a target beyond their reach.
    """
    shortest, longest = (pick(run.horizon for run in runs) for pick in (min, max))
    if shortest < FIRST_STEP:
        raise Refusal(f"a calibration horizon of {shortest} steps: the law reads curves from step {FIRST_STEP} "
                      f"on, after the warm-ups; leave it out, and use horizons of {SHORT_STEPS} steps or more")
    slopes = slope_test(runs)
    fitted, misfit, left_out = _runs_that_fit([run.late() for run in runs])
    noise_factor = math.sqrt(misfit.ratio) if misfit.p < MIN_FIT_P else 1.0  # Birge's ratio
    prediction = Prediction(FORM, fitted, schedule, copies, seed, noise_factor)
    quickest = prediction.quickest(threshold)
    chosen = quickest.chosen and next((horizon for horizon in quickest.horizons
                                       if horizon.steps >= quickest.chosen.steps and math.isfinite(horizon.hi)), None)
    reach = int(MAX_EXTRAPOLATION * longest)
    if chosen is None:
        far = max(round(UNREACHABLE_FACTOR * default_steps), reach)
        if end_of(prediction.law, schedule, far) > threshold:
            floor = prediction.law.values[0]
            raise Refusal(f"likely_unreachable: by the law no schedule up to {far} steps ends at {threshold:.4f} bits "
                          f"per byte (L_inf {floor:.4f}); raise the threshold, train a larger model, or take "
                          "the default ratio with --fallback")
        raise TooShort(f"no horizon up to {reach} steps, {MAX_EXTRAPOLATION} times the longest calibration run, is "
                       f"sure to reach {threshold:.4f} bits per byte", longest)
    steps = {"neighbour": round(CONFIRMATION_FACTOR * chosen.steps), "default": round(default_steps),
             "shortest_whole": math.ceil(quickest.whole)}
    predicted = {name: prediction.horizon(at, threshold)[0] if at <= reach else None for name, at in steps.items()}
    return Inference(tuple(runs), prediction, misfit, left_out, slopes, threshold, quickest,
                     {"quickest": chosen, **predicted})


def _runs_that_fit(runs):
    """(the runs for the law, its lack of fit, the shortest horizon where the law fits without that alone)."""
    misfit, horizons = lack_of_fit(fit(FORM, runs), runs), list(by_horizon(runs))
    if misfit.p < MIN_FIT_P and len(horizons) > 2:
        longer = [run for run in runs if run.horizon > horizons[0]]
        if (without := lack_of_fit(fit(FORM, longer), longer)).p >= MIN_FIT_P:
            return longer, without, horizons[0]
    return runs, misfit, None
