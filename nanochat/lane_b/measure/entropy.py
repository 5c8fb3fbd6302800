"""γ: how fast the entropy of the next token falls with the context, from a trained model's losses by position or,
as a bracket alone, from n-gram models of the text (arXiv:2602.07488, section 4)."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np

from nanochat import power_law
from nanochat.lane_b.measure.fit import NORMAL_95, PowerLaw, Slope, fit_power_law, measure_slope
from nanochat.lane_b.measure.kneser_ney import KneserNey

CONVERGED_NATS = 0.02       # the most a converged loss may fall when the data double
MIN_POINTS = 3
CONTEXTS = (1, 2)
DOUBLINGS = 6
_MIN_SIZES = 4
_EXPONENTS = (0.02, 2.0)
MIN_NGRAM_TOKENS = 1 << 18  # so that the smallest sample has 4,096
MAX_NGRAM_TOKENS = 1 << 25
_HELD_OUT_TOKENS = 1_000_000
_HALF = (0.45, 0.55)        # which sizes count as half the data
_REPLICATES = 400


@dataclass(frozen=True)
class PositionLosses:
    """Mean nats a token by the number of tokens since BOS, of a model trained on `tokens` tokens.

    nats, counts: (positions,); index n is the loss with n tokens of context.
    """

    name: str
    tokens: int
    nats: np.ndarray
    counts: np.ndarray
    dataset_id: str | None = None
    tokenizer_id: str | None = None
    model_config: dict | None = None


@dataclass(frozen=True)
class EntropyPoint:
    """H_n of models trained on P tokens (nats) and on P/2 (nats_half)."""

    n: float
    nats: float
    nats_half: float
    count: int

    @property
    def is_converged(self):
        return abs(self.nats_half - self.nats) < CONVERGED_NATS


@dataclass(frozen=True)
class PositionEntropies:
    """H_n at a grid of context lengths, and γ where at least 3 of them have converged, else why not."""

    tokens: int
    tokens_half: int
    n_runs: int
    n_runs_half: int
    points: tuple[EntropyPoint, ...] = ()
    window: tuple[EntropyPoint, ...] = ()
    slope: Slope | None = None
    law: PowerLaw | None = None
    refusal: str | None = None
    offset_note: str | None = None


@dataclass(frozen=True)
class NgramCurve:
    """Held-out cross-entropies (nats a token) with n tokens of context as the data double, and their extrapolation
    CE = H + A · (P / largest P)^-exponent. se: of the last one, from the choice of the held-out documents."""

    n: int
    cross_entropies: tuple[float, ...]
    se: float
    extrapolated: float
    amplitude: float
    exponent: float

    @property
    def lo(self):
        """The least H_n can be."""
        return self.extrapolated - NORMAL_95 * self.se

    @property
    def hi(self):
        """The most H_n can be."""
        return self.cross_entropies[-1] + NORMAL_95 * self.se

    @property
    def last_fall(self):
        return self.cross_entropies[-2] - self.cross_entropies[-1]


@dataclass(frozen=True)
class NgramBracket:
    """γ from contexts of 1 and 2 tokens: each H_n lies between its extrapolation and its last cross-entropy."""

    data_tokens: tuple[int, ...]
    curves: tuple[NgramCurve, ...]

    @property
    def is_bounded(self):
        """False where an extrapolation takes away over half of a cross-entropy: that limits nothing."""
        return all(curve.extrapolated > curve.cross_entropies[-1] / 2 for curve in self.curves)

    @property
    def lo(self):
        """From the lowest H_1 and the highest H_2; None where not bounded."""
        return float(max(0.0, np.log2(self.curves[0].lo / self.curves[1].hi))) if self.is_bounded else None

    @property
    def hi(self):
        """From the highest H_1 and the lowest H_2; None where not bounded."""
        return float(np.log2(self.curves[0].hi / self.curves[1].lo)) if self.is_bounded else None

    @property
    def reason(self):
        """Why this is a bracket, in words."""
        for curve in self.curves:
            if curve.last_fall >= CONVERGED_NATS:
                return (f"H_n at n={curve.n} still falls {curve.last_fall:.3f} nats per data doubling "
                        f"(limit {CONVERGED_NATS})")
        return f"n-grams give {len(self.curves)} points of H_n (need {MIN_POINTS})"


def entropies_by_position(losses):
    """PositionEntropies of a list of PositionLosses: the largest P among them, and those trained on half of it.

    γ is a pure power law through the contexts from 1 up to where doubling the data still changes the loss.
    """
    largest = max(loss.tokens for loss in losses)
    whole = [loss for loss in losses if loss.tokens > 0.95 * largest]
    half = [loss for loss in losses if _HALF[0] * largest <= loss.tokens <= _HALF[1] * largest]
    found = partial(PositionEntropies, largest, half[0].tokens if half else largest // 2, len(whole), len(half))
    if not half:
        sizes = ", ".join(f"{tokens:,}" for tokens in sorted({loss.tokens for loss in losses}))
        return found(refusal="position losses of models trained on P and P/2 tokens are needed, these saw "
                             f"{sizes}; add a run on about {largest // 2:,} tokens")
    points = _points(whole, half)
    unconverged = [point for point in points if not point.is_converged]
    window = points[:points.index(unconverged[0])] if unconverged else points
    if len(window) < MIN_POINTS:
        return found(points, refusal=_unconverged(unconverged[0]) if unconverged else
                     f"only {len(points)} context lengths (need {MIN_POINTS})")
    slope, law = _gamma(window)
    if slope.interval[0] <= 0:
        return found(points, refusal="the losses do not clearly fall with the context "
                                     f"({slope.value:.3f} ± {slope.se:.3f})")
    return found(points, window, slope, law, offset_note=_offset_note(window))


def context_grid(longest):
    """Context lengths 1 to 6, then half an octave apart: [8, 11, 16, 23, ...], up to `longest`."""
    grid = [1, 2, 3, 4, 5, 6] + [round(2 ** (k / 2)) for k in range(6, 60)]
    return [n for n in grid if n <= longest]


def score_ngrams(corpus, sample):
    """Held-out (cross-entropy, standard error) in nats of Kneser-Ney for sample = (context, n).

    It learns from n tokens of the documents that are not held out; samples are random and nested.
    """
    context, n_tokens = sample
    held_out = corpus.held_out
    model = KneserNey(corpus.sample(~held_out, n_tokens), context)
    return model.cross_entropy(corpus.sample(held_out, _HELD_OUT_TOKENS))


def ngram_sizes(corpus):
    """The sample sizes of the bracket in tokens, each twice the one before; empty where the text is too small.

    The largest is 2^25 tokens: a model's memory grows with its sample, and this one takes 2 GB.
    """
    held_out = corpus.held_out
    n_tokens = min(int(corpus.lengths[~held_out].sum()), MAX_NGRAM_TOKENS)
    enough = n_tokens >= MIN_NGRAM_TOKENS and held_out.any()
    return [n_tokens >> k for k in range(DOUBLINGS, -1, -1)] if enough else []


def bracket_of(data_tokens, cross_entropies):
    """NgramBracket of {context: [(nats, error) of each size]}. A longer context never has the higher entropy.

    The extrapolation is the lowest of those from the last 4, 5, ... sizes: the fall flattens as the data grow, and
    one power law through all of it stops too early.
    """
    curves, shorter, sizes = [], np.inf, np.array(data_tokens) / data_tokens[-1]
    for context in CONTEXTS:
        values, errors = np.transpose(cross_entropies[context])
        values = np.minimum(shorter, values)
        fits = (power_law.fit(sizes[start:], values[start:], _EXPONENTS, nonnegative=True)
                for start in range(len(values) - _MIN_SIZES + 1))
        extrapolation = min(tuple(map(float, found)) for found in fits)
        curves.append(NgramCurve(context, tuple(map(float, values)), float(errors[-1]), *extrapolation))
        shorter = values
    return NgramBracket(tuple(data_tokens), tuple(curves))


def _points(whole, half):
    """EntropyPoints: means over runs and over positions between neighbours of the grid, weighed by their counts."""
    longest = min(len(loss.nats) for loss in whole + half) - 1
    grid = context_grid(longest)
    edges = [np.sqrt(a * b) for a, b in pairwise(grid)]
    points = []
    for n, low, high in zip(grid, [0.5, *edges], [*edges, longest + 1], strict=True):
        inside = np.arange(int(np.ceil(low)), min(int(np.ceil(high)), longest + 1)) if n > 6 else np.array([n])
        counts = sum(loss.counts[inside] for loss in whole)
        if counts.sum() == 0:
            break
        nats, nats_half = (np.average(np.concatenate([loss.nats[inside] for loss in losses]),
                                      weights=np.concatenate([loss.counts[inside] for loss in losses]) + 1e-9)
                           for losses in (whole, half))
        points.append(EntropyPoint(float(np.average(inside, weights=counts)), float(nats), float(nats_half),
                                   int(counts.sum() / len(whole))))
    return tuple(points)


def _unconverged(point):
    fall = point.nats_half - point.nats
    if fall > 0:
        return f"H_n at n={point.n:.0f} still falls {fall:.3f} nats per data doubling (limit {CONVERGED_NATS})"
    return (f"H_n at n={point.n:.0f} is {-fall:.3f} nats higher from twice the data (limit {CONVERGED_NATS}): "
            "those runs have not learned the text")


def _gamma(points):
    n, nats, nats_half, counts = (np.array([getattr(p, name) for p in points], float)
                                  for name in ("n", "nats", "nats_half", "count"))
    nats_se = nats / np.sqrt(np.maximum(counts, 1))  # the loss of a token scatters by about its mean
    replicates = nats + np.random.default_rng(0).standard_normal((_REPLICATES, len(n))) * nats_se
    return measure_slope(n, nats, nats_se, replicates, other=nats_half)


def _offset_note(points):
    """What γ would be with an offset H_n = H_inf + A n^-γ: any offset that fits as well as none."""
    n, nats = (np.array([getattr(p, name) for p in points], float) for name in ("n", "nats"))
    pure = fit_power_law(n, nats)
    as_good = [pure.slope]
    for offset in np.linspace(0, 0.98, 50)[1:] * nats.min():
        law = fit_power_law(n, nats - offset)
        residual = law(n) + offset - nats
        if np.linalg.norm(residual) <= np.linalg.norm(pure(n) - nats):
            as_good.append(law.slope)
    if max(as_good) - min(as_good) < 0.01:
        return None
    return f"offset H_inf not fitted: gamma would range {min(as_good):.2f}-{max(as_good):.2f}"
