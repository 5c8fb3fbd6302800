"""Laws of whole loss curves: val_bpb at every step of a run, whatever its horizon, from its learning-rate multipliers.

S(t) is the sum of the multipliers so far (so warm-ups count as the progress they make), d(t) the sum of their decrease,
the drop. Every law is a formula with bounded parameters, fitted to all evaluations of all calibration runs at once:
Huber loss on log L, several fixed starts, nothing random. Which law is used is decided by errors on runs left out
(dev/study/curve_laws.py), not by fit: that is `relaxing`, with a prior of the exponent and without the first 300 steps;
these two matter more than the form. `ends` is the lane's older law of schedule ends alone, to be compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import least_squares

from nanochat.common import UserError
from nanochat.lane_b import Refusal

FIRST_SHARE, FIRST_STEP = 0.2, 300  # earlier evaluations are another regime (Muon's momentum warms up for 400 steps)
ALPHA, ALPHA_LOG_SD = 0.4, 0.25  # prior of every law's exponent: 0.25 to 0.61 in all experiments with several horizons
_RUN_LOG_SD = 0.001  # a seed moves a whole curve by so much of L; what the prior is weighed with
_PIECES = 64  # the decrease of a schedule in so many pieces
_HUBER_LOG_LOSS = 0.002  # about the scatter of seeds: what lies further out counts linearly
REFERENCE_STEPS = 1000.0  # S at which amplitudes are taken, steps: parameters of ordinary size
_SMALL = 1e-9


@dataclass(frozen=True)
class Progress:
    """What the laws read of a schedule: `multipliers` of all its steps (H,), seen after `steps` of them (n,)."""

    multipliers: np.ndarray
    steps: np.ndarray

    def __post_init__(self):
        if len(self.steps) and not 1 <= min(self.steps) <= max(self.steps) <= len(self.multipliers):
            raise UserError(f"evaluations at steps {min(self.steps)} to {max(self.steps)} of a horizon of "
                            f"{len(self.multipliers)}; a law knows steps 1 to the horizon")

    @property
    def horizon(self):
        return len(self.multipliers)

    @cached_property
    def total(self):
        """S: the sum of the multipliers so far (n,), in steps at the peak."""
        return np.cumsum(self.multipliers)[self.steps - 1]

    @cached_property
    def drop(self):
        """d: the sum of their decrease so far (n,)."""
        return np.concatenate([[0.0], np.cumsum(np.maximum(-np.diff(self.multipliers), 0))])[self.steps - 1]

    @cached_property
    def landing(self):
        """The decrease in pieces: (size, multiplier after it, both (K,); {q: sum since it of multipliers^q (n, K)})."""
        falls = np.maximum(-np.diff(self.multipliers), 0)
        falling = np.flatnonzero(falls)
        pieces = [piece for piece in np.array_split(falling, _PIECES) if len(piece)]
        size = np.array([falls[piece].sum() for piece in pieces])
        after = np.array([self.multipliers[piece + 1].mean() for piece in pieces])
        at_step = np.array([piece.mean() + 1 for piece in pieces])
        since = {}
        for power in (0, 0.5, 1):
            total = np.cumsum(self.multipliers**power)
            at_piece = np.interp(at_step, np.arange(1, len(total) + 1), total)
            since[power] = np.maximum(total[self.steps - 1, None] - at_piece, 0)
        return size, after, since


@dataclass(frozen=True)
class Run:
    """One run's evaluations: bits per byte `loss` (n,) at the n steps of its progress."""

    progress: Progress
    loss: np.ndarray
    seed: int = 0

    @property
    def horizon(self):
        return self.progress.horizon

    @property
    def shares(self):
        """Where in the horizon the evaluations are (n,), 1 at its end."""
        return self.progress.steps / self.horizon

    def late(self, first_share=FIRST_SHARE, first_step=FIRST_STEP):
        """The run without its evaluations before `first_share` of the horizon and `first_step`: another regime."""
        kept = (self.shares >= first_share) & (self.progress.steps >= first_step)
        return Run(Progress(self.progress.multipliers, self.progress.steps[kept]), self.loss[kept], self.seed)


@dataclass(frozen=True)
class Form:
    """A formula L(parameters, progress) with the range of each parameter and the starts of the search."""

    name: str
    parameters: dict[str, tuple[float, float]]
    starts: tuple[tuple[float, ...], ...]
    loss: Callable = None
    ends_only: bool = False


def power(progress, amplitude, alpha):
    """The progress made, whatever the landing: amplitude (S / 1000 steps)^-alpha."""
    return amplitude * (progress.total / REFERENCE_STEPS) ** -alpha


def _annealing(progress, floor, amplitude, alpha, gain):
    """arXiv:2408.11029, without momentum: the gain of the landing is in proportion to the drop."""
    return floor + power(progress, amplitude, alpha) - gain * progress.drop


def _relaxing(progress, floor, amplitude, alpha, gain, rate):
    """The noise of the steps follows the multiplier with a lag: at a rate in proportion to its root."""
    size, _, since = progress.landing
    landed = 1 - np.exp(-rate / REFERENCE_STEPS * since[0.5])
    return floor + power(progress, amplitude, alpha) - gain * (landed @ size)


def _multi_power(progress, floor, amplitude, alpha, gain, rate, beta, gamma):
    """arXiv:2503.12811, its exponents bounded."""
    size, after, since = progress.landing
    landed = 1 - (1 + rate / REFERENCE_STEPS * after**-gamma * since[1]) ** -beta
    return floor + power(progress, amplitude, alpha) - gain * (landed @ size)


def _ends(progress, floor, amplitude, alpha):
    return floor + amplitude * (progress.horizon / REFERENCE_STEPS) ** -alpha + 0 * progress.steps


_CURVE = {"floor": (0.0, 5.0), "amplitude": (1e-4, 20.0), "alpha": (0.05, 1.5)}
_STARTS = ((1.0, 1.0, 0.25), (1.5, 0.5, 0.5), (1.7, 0.3, 1.0))


def curve_form(name, loss, rest, *starts):
    """A Form whose first parameters are floor, amplitude and alpha; `rest` and `starts` are of those after them."""
    return Form(name, _CURVE | rest, tuple((*start, *more) for start in _STARTS for more in starts or ((),)), loss)


FORMS = {form.name: form for form in (
    replace(curve_form("ends", _ends, {}), ends_only=True),
    curve_form("annealing", _annealing, {"gain": (0.0, 2.0)}, (0.1,)),
    curve_form("multi_power", _multi_power,
               {"gain": (0.0, 2.0), "rate": (0.01, 1e3), "beta": (0.1, 1.5), "gamma": (0.0, 1.5)},
               (0.2, 5.0, 0.5, 0.5), (0.2, 50.0, 0.5, 0.5)),
    curve_form("relaxing", _relaxing, {"gain": (0.0, 2.0), "rate": (0.5, 1e3)}, (0.1, 5.0), (0.1, 50.0)),
)}


@dataclass(frozen=True)
class Law:
    """A fitted form. `rms_log_loss`: of the residuals it was fitted to."""

    form: Form
    values: np.ndarray
    rms_log_loss: float

    def at(self, progress):
        """Bits per byte (n,) at the n steps of a Progress, of any horizon."""
        return self.form.loss(progress, *self.values)

    @property
    def at_bound(self):
        """Names of the parameters that the fit left at the edge of their range."""
        return [name for (name, (lo, hi)), value in zip(self.form.parameters.items(), self.values, strict=True)
                if min(value - lo, hi - value) < 1e-3 * (hi - lo)]


def fit(form, runs, start=None, alpha=ALPHA, alpha_log_sd=ALPHA_LOG_SD):
    """Fit a Form to all evaluations of `runs`; from `start` alone where it is given (values of an earlier fit).

    The exponent has a log-normal prior around `alpha`: within a run the curve bends less than the ends of several
    horizons do, so that curves alone give 0.06 to 0.1 and a floor of 0. A run weighs as one number against it.
    """
    if form.ends_only:
        runs = [run.late(1.0, 1) for run in runs]
    n = sum(len(run.loss) for run in runs)
    if n <= len(form.parameters) or len({run.horizon for run in runs}) < 2:
        raise Refusal(f"{n} evaluations of {len({run.horizon for run in runs})} horizons do not determine the "
                      f"{len(form.parameters)} parameters of {form.name}; add calibration runs")
    observed = np.log(np.concatenate([run.loss for run in runs]))
    prior_weight = _RUN_LOG_SD * np.sqrt(n / len(runs)) / alpha_log_sd
    alpha_at = list(form.parameters).index("alpha")

    def residual(values):
        predicted = np.concatenate([form.loss(run.progress, *values) for run in runs])
        return np.append(np.log(np.maximum(predicted, _SMALL)) - observed,
                         prior_weight * np.log(values[alpha_at] / alpha))

    lo, hi = np.array(list(form.parameters.values())).T
    found = [least_squares(residual, np.clip(first, lo + 1e-6, hi - 1e-6), bounds=(lo, hi), loss="huber",
                           f_scale=_HUBER_LOG_LOSS, x_scale="jac", max_nfev=200)
             for first in ([start] if start is not None else form.starts)]
    best = min(found, key=lambda result: result.cost)
    return Law(form, best.x, float(np.sqrt(np.mean(best.fun[:-1]**2))))
