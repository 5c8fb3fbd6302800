"""All of a corpus's statistics, measured in one go.

Without β the inference has no use for them, so whatever leaves no β is refused as a whole. γ may be missing: that
refusal is recorded, the bracket from n-grams stands in, and α is an interval without a point.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nanochat.lane_b import Refusal
from nanochat.lane_b.exponents import Estimate, alpha_of
from nanochat.lane_b.measure import entropy
from nanochat.lane_b.measure.beta import MIN_LAGS, Beta, measure_beta
from nanochat.lane_b.measure.correlation import LagEstimate, counters_of, estimate_lag, null_coefficient
from nanochat.lane_b.measure.documents import N_FOLDS, Documents, check_variety, outliers
from nanochat.lane_b.measure.pool import run_tasks

DEFAULT_LAGS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64)


@dataclass(frozen=True)
class Gamma(Estimate):
    """γ where the losses by position converged; a bracket without a value from n-grams."""

    source: str | None = None
    window: tuple[float, float] | None = None
    data_tokens: int | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class Statistics:
    """Everything measured on one corpus."""

    documents: Documents
    n_outlier_documents: int
    null_coefficient: float
    estimates: tuple[LagEstimate, ...]
    beta: Beta
    positions: entropy.PositionEntropies | None
    ngrams: entropy.NgramBracket | None
    gamma: Gamma
    warnings: tuple[str, ...]

    @property
    def alpha(self):
        """Estimate of γ / 2β."""
        slope = self.beta.slope
        return alpha_of(self.gamma, Estimate(slope.value, slope.se, *slope.interval))


def measure(documents, lags, position_losses, processes, ranks, shared_path):
    """Statistics of Documents, or None on ranks but 0. lags: None for the default ones the documents can hold.

    position_losses: a list of PositionLosses, maybe empty. Errors: Refusal where no β can be had.
    """
    documents, n_outliers, lags, warnings = _prepare(documents, lags)
    sizes = entropy.ngram_sizes(documents)
    samples = [(context, size) for size in reversed(sizes) for context in reversed(entropy.CONTEXTS)]
    tasks = [(_null_task, None), *((entropy.score_ngrams, sample) for sample in samples),
             *((_lag_task, lag) for lag in lags)]
    results = run_tasks(documents, tasks, processes, ranks, shared_path)
    if results is None:
        return None
    (null,), scores = results[0], results[1:1 + len(samples)]
    estimates = tuple(LagEstimate(*result) for result in results[1 + len(samples):])
    beta = measure_beta(estimates, null)
    if beta.op.n_break is not None:
        warnings.append(beta.regime)
    if beta.frobenius_slope is None:
        warnings.append("noise hides the Frobenius norm at lags that give beta: its interval lacks the distance "
                        "between the two norms' slopes")
    ngrams = None
    if sizes:
        nats = dict(zip(samples, scores, strict=True))
        ngrams = entropy.bracket_of(sizes, {n: [nats[n, size] for size in sizes] for n in entropy.CONTEXTS})
    positions = entropy.entropies_by_position(position_losses) if position_losses else None
    if positions and positions.offset_note:
        warnings.append(positions.offset_note)
    return Statistics(documents, n_outliers, null, estimates, beta, positions, ngrams,
                      _gamma(positions, ngrams), tuple(warnings))


def _prepare(documents, lags):
    """(documents without outliers, how many those were, lags, warnings)."""
    warnings = []
    flagged = outliers(documents)
    n_outliers = int(flagged.sum())
    if n_outliers:
        documents = documents.select(~flagged)
        check_variety(documents)
        warnings.append(f"{n_outliers} outlier document{'s' * (n_outliers > 1)} left out: "
                        "one token makes up over 20 % of a long document")
    median = int(np.median(documents.lengths))
    if lags is None:
        lags = [lag for lag in DEFAULT_LAGS if lag <= median // 10]
        if 0 < len(lags) < len(DEFAULT_LAGS):
            warnings.append(f"lags end at {lags[-1]}, a tenth of the median document's length")
    elif max(lags) > median // 10:
        raise Refusal(f"lag {max(lags)} is above a tenth of the median document's length ({median // 10}); "
                      "leave out the longer --lags or give longer documents")
    if len(lags) < MIN_LAGS:
        raise Refusal(f"only {len(lags)} lags (need {MIN_LAGS}), and they end at a tenth of the median document's "
                      f"{median} tokens; give more --lags or longer documents")
    if any(documents.lengths[documents.folds == fold].max(initial=0) <= lags[-1] for fold in range(N_FOLDS)):
        raise Refusal(f"a third of the documents has none longer than lag {lags[-1]}; give more documents")
    return documents, n_outliers, lags, warnings


def _gamma(positions, ngrams):
    if positions and positions.slope:
        slope, window = positions.slope, (positions.window[0].n, positions.window[-1].n)
        return Gamma(slope.value, slope.se, *slope.interval, "position_losses", window, positions.tokens)
    reason = positions.refusal if positions else ngrams.reason if ngrams else "no losses by position"
    way_out = "train longer or give more runs to --position-losses" if positions else "give --position-losses"
    if ngrams is None or not ngrams.is_bounded:
        return Gamma(refusal=f"gamma not reported: {reason}; too little text for a bracket from n-grams; {way_out}")
    refusal = f"gamma not reported: {reason}; bracket from n=1,2: {ngrams.lo:.3f}-{ngrams.hi:.3f}; {way_out}"
    return Gamma(lo=ngrams.lo, hi=ngrams.hi, source="ngram_bracket", window=(1, 2),
                 data_tokens=ngrams.data_tokens[-1], refusal=refusal)


_counters = lru_cache(maxsize=1)(counters_of)


def _lag_task(documents, lag):
    return tuple(vars(estimate_lag(_counters(documents), lag)).values())


def _null_task(documents, _):
    return (null_coefficient(documents),)
