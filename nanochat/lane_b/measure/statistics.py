"""All of a corpus's statistics, measured in one go.

α = γ / 2β needs β, so whatever leaves no β is refused as a whole. γ may be missing: that refusal is recorded, the
bracket from n-grams stands in, and α is an interval without a point.
"""

from dataclasses import dataclass

import numpy as np

from nanochat.common import progress
from nanochat.distributed import gather, on_main
from nanochat.lane_b import Refusal
from nanochat.lane_b.exponents import Estimate, alpha_of
from nanochat.lane_b.measure import entropy
from nanochat.lane_b.measure.beta import MIN_LAGS, Beta, measure_beta
from nanochat.lane_b.measure.corpus import Corpus, check_variety, outliers
from nanochat.lane_b.measure.correlation import LagEstimate, counters_of, estimate_lags, null_coefficient
from nanochat.lane_b.measure.documents import N_FOLDS

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

    corpus: Corpus
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


def measure(corpus, lags, position_losses):
    """Statistics of a Corpus, or None on ranks but 0. Every rank calls it. lags: None for the default ones the
    documents can hold.

    position_losses: a list of PositionLosses, maybe empty. Errors: Refusal where no β can be had.
    """
    ranks = corpus.ranks
    flagged = outliers(corpus)
    if flagged.any():
        corpus = corpus.without(flagged)
        on_main(ranks, lambda: check_variety(corpus))
    on_main(ranks, lambda: _choose_lags(corpus, lags))
    lags, warnings = _choose_lags(corpus, lags)
    sizes = entropy.ngram_sizes(corpus)
    samples = [(context, size) for size in reversed(sizes) for context in reversed(entropy.CONTEXTS)]
    with progress(total=len(samples) + 1 + len(lags), desc="statistics", unit="part", shown=ranks.is_main) as bar:
        own = {}
        for sample in (*samples, None)[ranks.rank::ranks.world_size]:
            own[sample] = entropy.score_ngrams(corpus, sample) if sample else null_coefficient(corpus)
            bar.update(ranks.world_size)
        measured = gather(ranks, own)
        bar.update(len(samples) + 1 - bar.n)
        estimates = estimate_lags(counters_of(corpus), lags, bar.update)
    if not ranks.is_main:
        return None
    scores = {sample: score for of_rank in measured for sample, score in of_rank.items()}
    null = scores[None]
    beta = measure_beta(estimates, null)
    if beta.op.n_break is not None:
        warnings.append(beta.regime)
    if beta.frobenius_slope is None:
        warnings.append("noise hides the Frobenius norm at lags that give beta: its interval lacks the distance "
                        "between the two norms' slopes")
    ngrams = None
    if sizes:
        ngrams = entropy.bracket_of(sizes, {n: [scores[n, size] for size in sizes] for n in entropy.CONTEXTS})
    positions = entropy.entropies_by_position(position_losses) if position_losses else None
    if positions and positions.offset_note:
        warnings.append(positions.offset_note)
    if n_outliers := int(flagged.sum()):
        warnings.insert(0, f"{n_outliers} outlier document{'s' * (n_outliers > 1)} left out: "
                           "one token makes up over 20 % of a long document")
    return Statistics(corpus, n_outliers, null, tuple(estimates), beta, positions, ngrams,
                      _gamma(positions, ngrams), tuple(warnings))


def _choose_lags(corpus, lags):
    """(lags, warnings). Errors: Refusal where the documents cannot hold the lags."""
    warnings = []
    median = int(np.median(corpus.lengths))
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
    if any(corpus.lengths[corpus.folds == fold].max(initial=0) <= lags[-1] for fold in range(N_FOLDS)):
        raise Refusal(f"a third of the documents has none longer than lag {lags[-1]}; give more documents")
    return lags, warnings


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
