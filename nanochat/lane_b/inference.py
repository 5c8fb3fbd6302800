"""From runs of small models to the depth and the ratio that reach a target first.

The runs share text and recipe and have several depths and ratios. The law of their curves
(nanochat.lane_b.curves) forecasts every candidate: depths within the law's reach, ratios 4 to 12.
Cost is the forecast number of steps to the target times the seconds per step of that depth.
"""

import math
from dataclasses import dataclass

import numpy as np

from nanochat.lane_b import Refusal
from nanochat.lane_b.calibration import Setup
from nanochat.lane_b.curves import Forecast, Time, collapse_gap, holdout_error

RATIOS = np.geomspace(4, 12, 23)  # tokens per scaling parameter; others were not tested
REACH_SMALLEST, REACH_LARGEST = 8.2, 3.6  # 8 and 3.5 times in parameters, and their rounding
MARGIN = 1.06  # factor on the horizon of the cheapest candidate: forecasts were a little short
NEIGHBOUR = 1.05  # times the named horizon
SIMILAR_COST = 1.05  # a smaller depth within this factor is preferred
DEFAULT_RATIO = 12.0
MAX_FACTOR = 1.35  # hi / lo of the interval of the time to target
MAX_HOLDOUT = 0.01  # relative error
COLLAPSE_GAPS = 0.01, 0.03  # above: warning, uncertain
SAME_RATIO = 0.02  # difference of logarithms


@dataclass(frozen=True)
class Option:
    """A candidate: depth, ratio and horizon with the Time to the target in reference steps."""

    depth: int
    ratio: float
    horizon: int
    time: Time
    step_sec: float

    @property
    def sec(self):
        return self.time.steps * self.step_sec

    @property
    def sec_p90(self):
        return self.time.p90 * self.step_sec

    def to_dict(self, setup):
        """Return plain values. steps, lo, hi: steps of its batch to the target, None: infinity."""
        batch = setup.batch(self.depth)
        scale = setup.step_tokens / batch
        values = {"steps": scale * self.time.steps, "lo": scale * self.time.lo,
                  "hi": scale * self.time.hi, "sec": self.sec}
        return {"depth": self.depth, "ratio": self.ratio, "batch": batch,
                "horizon": setup.own_steps(self.depth, self.ratio),
                **{name: v if math.isfinite(v) else None for name, v in values.items()}}


@dataclass(frozen=True)
class Inference:
    """The answer with its grounds. reasons: {state: sentence} of failed checks."""

    setup: Setup
    curves: list
    threshold: float
    forecast: Forecast
    options: list
    named: Option
    neighbour: Option
    default: Option | None
    reasons: dict
    warnings: list

    def exponent(self):
        """Return -d ln(L_end - floor) / d ln tokens of the named size at the named horizon."""
        setup, law, n = self.setup, self.forecast.law, self.setup.n_params(self.named.depth)
        floor = law.floor(n, 1 - setup.config.final_lr_frac)
        above = [law.final_loss(n, setup.multipliers(option.horizon)) - floor
                 for option in (self.named, self.neighbour)]
        return math.log(above[0] / above[1]) / math.log(self.neighbour.horizon / self.named.horizon)

    def cost(self, extra=()):
        """Return the calibration's cost as shares of the complete named run: FLOPs, seconds.

        extra: further runs (depth, ratio) to count.
        """
        setup, named = self.setup, self.named
        depths = {setup.n_params(depth): depth for depth in setup.step_sec}
        runs = [(depths[curve.n_params], curve.horizon) for curve in self.curves]
        runs += [(depth, setup.steps(depth, ratio)) for depth, ratio in extra]
        return tuple(sum(steps * per_step(depth) for depth, steps in runs)
                     / (named.horizon * per_step(named.depth))
                     for per_step in (setup.step_flops, setup.seconds))


def infer(curves, setup, threshold, depth=None, seed=0, half_rates=()):
    """Return the Inference for a target in bits per byte. depth: answer with its ratio only.

    half_rates: curves of runs at half the learning rates, to test the rates. Raise Refusal with a
    state if the runs do not give an answer.
    """
    sizes = sorted({curve.n_params for curve in curves})
    if len(sizes) < 2:
        raise Refusal("all calibration runs have one size, which says nothing of other sizes; add "
                      "a depth with 2 to 3 times the parameters", "one_size")
    log_ratios = [math.log(curve.horizon / curve.n_params) for curve in curves]
    if max(log_ratios) - min(log_ratios) < SAME_RATIO:
        raise Refusal("all calibration runs have one ratio of tokens to parameters; add a run of "
                      "twice the ratio at the smallest depth", "one_ratio")
    depths = depths_in_reach(setup, sizes)
    if depth is not None and depth not in depths:
        raise Refusal(f"depth {depth} is outside of the law's reach, depths {depths[0]} to "
                      f"{depths[-1]}; calibrate with other depths", "beyond_reach")
    forecast = Forecast(curves, seed)

    def option(depth, ratio):
        steps = setup.steps(depth, ratio)
        time = forecast.time(setup.n_params(depth), setup.multipliers(steps), threshold)
        too_early = steps_above(curves, threshold, setup.n_params(depth), steps)
        time = Time(*(max(too_early, value) for value in time))
        return Option(depth, float(ratio), steps, time, setup.seconds(depth))

    asked = [depth] if depth else depths
    options = [option(d, ratio) for d in asked for ratio in RATIOS]
    best = _cheapest(options)
    if best is None:
        law, n = forecast.law, setup.n_params(asked[-1])
        floor = law.floor(n, 1 - setup.config.final_lr_frac)
        end = law.final_loss(n, setup.multipliers(setup.steps(asked[-1], RATIOS[-1])))
        raise Refusal(
            f"no depth up to {asked[-1]} is sure to reach {threshold:g} at ratio 12 (forecast "
            f"{end:.4f}, floor {floor:.4f}); raise the target or calibrate with larger depths",
            "below_floor" if threshold <= floor else "beyond_reach")
    named = option(best.depth, min(best.ratio * MARGIN, DEFAULT_RATIO))
    defaults = [option(d, DEFAULT_RATIO) for d in asked]
    default = next((one for one in defaults if math.isfinite(one.time.steps)), None)
    if default and default.sec <= named.sec:
        named = default
    found = Inference(setup, list(curves), threshold, forecast, options, named,
                      option(named.depth, named.ratio * NEIGHBOUR), default, {}, [])
    _check(found, best, half_rates)
    return found


def depths_in_reach(setup, sizes):
    """Return the depths that the law of calibrated sizes (scaling parameters) may forecast."""
    limit = min(REACH_SMALLEST * sizes[0], REACH_LARGEST * sizes[-1])
    depths = range(min(setup.step_sec), 16 * max(setup.step_sec))
    return [depth for depth in depths if sizes[0] <= setup.n_params(depth) <= limit]


def steps_above(curves, threshold, n_params, horizon):
    """Return the last step at which a calibration run shows that the target is not yet reached.

    Only runs of at least this size and at most this horizon show it: they are ahead at every step.
    """
    ahead = [curve for curve in curves if curve.n_params >= n_params and curve.horizon <= horizon]
    return max((int(curve.steps[np.minimum.accumulate(curve.loss) > threshold].max(initial=0))
                for curve in ahead), default=0)


def _cheapest(options):
    """Return the option with the lowest 90th percentile of its cost; a smaller depth if similar.

    In simulations the 97.5th percentile gave horizons that were much longer than necessary.
    """
    sure = [option for option in options if math.isfinite(option.time.p90)]
    if not sure:
        return None
    limit = SIMILAR_COST * min(option.sec_p90 for option in sure)
    smallest = min(option.depth for option in sure if option.sec_p90 <= limit)
    return min((o for o in sure if o.depth == smallest), key=lambda option: option.sec_p90)


def _check(found, best, half_rates):
    """Fill in the failed checks, which make the answer uncertain, and the warnings."""
    reasons, warnings, setup, named = found.reasons, found.warnings, found.setup, found.named
    longest = named.time.hi if math.isfinite(named.time.hi) else named.time.p90
    if math.isinf(named.time.p90):
        reasons["may_miss"] = ("more than 10 % of the replicates miss the target; depth "
                               f"{best.depth} at ratio {best.ratio * MARGIN:.3g} is surer and "
                               "forecast to be slower")
    elif longest > MAX_FACTOR * named.time.lo:
        reasons["wide_interval"] = (f"the interval of the time to target is wider than a factor of "
                                    f"{MAX_FACTOR}; add a second seed of the largest size")
    elif math.isinf(named.time.hi):
        warnings.append("the named run may miss the target: up to 10 % of the replicates do")
    error = holdout_error(found.curves)
    if error is None:
        warnings.append("two sizes: no size could be left out to test the law")
    elif error > MAX_HOLDOUT:
        reasons["holdout"] = (f"fitted without the largest size, the law misses its final loss by "
                              f"{error:.1%} (limit {MAX_HOLDOUT:.0%})")
    tokens, available = named.horizon * setup.step_tokens, setup.train_tokens
    if available and tokens > available:
        reasons["repeated_text"] = (f"the named run reads {tokens:.3g} tokens, the text has "
                                    f"{available:.3g}; no calibration run shows repetition")
    if half_rates and (sentence := _rates_fault(half_rates, found)):
        reasons["rates"] = sentence
    gap, (doubtful, excessive) = collapse_gap(found.curves), COLLAPSE_GAPS
    sentence = (f"normalised curves of different sizes differ by {gap:.1%} (limits {doubtful:.0%} "
                f"and {excessive:.0%}): warm-ups or learning rates act differently")
    if gap > excessive:
        reasons["collapse_gap"] = f"{sentence}; calibrate with larger depths or more text"
    elif gap > doubtful:
        warnings.append(sentence)
    if named is found.default:
        warnings.append(f"the default ratio {DEFAULT_RATIO:g} is the answer: no other is forecast "
                        "to be faster")
    if best.ratio == RATIOS[0]:
        warnings.append(f"the cheapest ratio is {best.ratio:g}, the lowest that is tested")
    if named.depth not in setup.step_sec:
        warnings.append(f"the seconds per step of depth {named.depth} are estimated from its "
                        "FLOPs; measure them with --timing-run")


def _rates_fault(half_rates, found):
    """Compare runs at half the learning rates with full ones at two sizes, extrapolated in ln N.

    Return None if the effect has one sign at both sizes and at the named one.
    """
    effects = {}
    for half in half_rates:
        full = [curve.loss[-1] for curve in found.curves
                if (curve.n_params, curve.horizon) == (half.n_params, half.horizon)]
        if full:
            effects[half.n_params] = half.loss[-1] - np.mean(full)
    if len(effects) < 2:
        raise Refusal("the test of the learning rates needs runs at half the rates of the smallest "
                      "and the largest depth, with the horizons of calibration runs", "mixed_setup")
    small, large = min(effects), max(effects)
    slope = (effects[large] - effects[small]) / math.log(large / small)
    n = found.setup.n_params(found.named.depth)
    effect = effects[large] + slope * math.log(n / large)
    if effects[small] * effects[large] > 0 and effects[large] * effect > 0:
        return None
    advice = "halve them there" if effect < 0 else "keep or raise them there"
    return (f"half the learning rates change the final loss by {effects[small]:+.4f} at the "
            f"smallest depth, {effects[large]:+.4f} at the largest and, extrapolated, by "
            f"{effect:+.4f} at depth {found.named.depth}: the rates are not right for it; {advice}")
