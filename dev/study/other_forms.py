"""Laws of whole curves that lost in dev.study.curve_laws: what was tried beside the library's four, for its table."""

import numpy as np

from nanochat.lane_b.infer.curve_law import REFERENCE_STEPS, curve_form, power


def _lagged(progress, floor, amplitude, alpha, gain, lag_steps):
    """Annealing whose gain lags in steps: the momentum of arXiv:2408.11029."""
    size, _, since = progress.landing
    return floor + power(progress, amplitude, alpha) - gain * ((1 - np.exp(-since[0] / lag_steps)) @ size)


def _fading_gain(progress, floor, amplitude, alpha, gain, delta, shape):
    """The gain of the landing changes with the progress made, and is a power of the drop."""
    return (floor + power(progress, amplitude, alpha)
            - power(progress, gain, delta) * progress.drop**shape)


def _landing_shape(progress, floor, amplitude, alpha, steeper, curved, growth):
    """The landing multiplies the excess over the floor, more so for longer horizons."""
    drop, log_horizon = progress.drop, np.log(progress.horizon / REFERENCE_STEPS)
    log_landed = -drop * (steeper + growth * log_horizon) - curved * drop**2
    return floor + power(progress, amplitude, alpha) * np.exp(log_landed)


def _self_similar(progress, floor, amplitude, alpha, slope, curve, bend, growth):
    """A shape over the share of the horizon, cubic in logs, times a power of S that changes with the share."""
    late = progress.steps / progress.horizon - 0.7
    log_excess = late * (slope + late * (curve + late * bend))
    exponent = alpha + growth * late
    return floor + amplitude * np.exp(log_excess) * (progress.total / REFERENCE_STEPS) ** -exponent


OTHER_FORMS = {form.name: form for form in (
    curve_form("lagged", _lagged, {"gain": (0.0, 2.0), "lag_steps": (1.0, 500.0)}, (0.1, 20.0), (0.1, 150.0)),
    curve_form("fading_gain", _fading_gain, {"gain": (0.0, 2.0), "delta": (-0.5, 1.5), "shape": (0.5, 3.0)},
               (0.1, 0.0, 1.0), (0.1, 0.4, 1.0)),
    curve_form("landing_shape", _landing_shape,
               {"steeper": (-1.0, 3.0), "curved": (-1.5, 1.5), "growth": (-0.5, 0.5)}, (0.2, 0.0, 0.0)),
    curve_form("self_similar", _self_similar,
               {"slope": (-3.0, 3.0), "curve": (-5.0, 5.0), "bend": (-10.0, 10.0), "growth": (-0.5, 0.5)},
               (0.0, 0.0, 0.0, 0.0)),
)}
