"""How fast correlations between tokens decay with their distance: ‖C(n)‖ with errors (arXiv:2602.07488, section 3).

C(n) = E[x_t x_{t+n}ᵀ] − E[x_t] E[x_{t+n}]ᵀ over one-hot tokens x. The largest singular value of an estimated C is
biased upwards by noise, so directions and strength come from different thirds of the documents.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from nanochat.distributed import all_reduce_sum, gather, reduce_sum_to
from nanochat.lane_b.measure.counting import PairCounter, count_pairs
from nanochat.lane_b.measure.documents import N_FOLDS

SUBSPACE = 8              # singular directions kept from the first fold
INFLUENCE_RANK = 3        # of them, those that enter the Frobenius norm's error
_STEPS = 16               # of the bidiagonalisation
_NULL_TOKENS, _NULL_PERMUTATIONS = 1 << 20, 16
MIN_STANDARD_ERRORS, MIN_NULLS = 5, 3


@dataclass(frozen=True)
class LagEstimate:
    """What the text says about one lag. Strengths are norms of C(lag); influences are one number a document.

    A document's influence is the change of the estimate per unit of weight on it: the standard error is their
    root sum of squares, and a bootstrap over documents weighs them (Efron 1982, the infinitesimal jackknife). Of very
    many documents, random groups stand for one each.
    """

    lag: int
    n_pairs: int
    op: float
    frobenius_squared: float
    plug_in: float
    op_influence: np.ndarray
    frobenius_squared_influence: np.ndarray
    frobenius_squared_noise: float    # standard error that remains without signal

    @property
    def op_se(self):
        return float(np.linalg.norm(self.op_influence))

    @property
    def frobenius(self):
        """√⟨C_A, C_B⟩, or None where noise made the product of two folds negative."""
        return float(np.sqrt(self.frobenius_squared)) if self.frobenius_squared > 0 else None

    @property
    def frobenius_se(self):
        error = np.hypot(np.linalg.norm(self.frobenius_squared_influence), self.frobenius_squared_noise)
        return self.frobenius and float(error / (2 * self.frobenius))

    def is_usable(self, null):
        """Whether the strength stands clear of its error and of `null`, the plug-in's value on shuffled text."""
        return bool(self.op > MIN_STANDARD_ERRORS * self.op_se and self.op > MIN_NULLS * null)


class Covariance:
    """C = J/N − l rᵀ for pair counts J (sparse), N pairs and the marginals l, r; the rank-1 part stays implicit."""

    def __init__(self, counts):
        data = counts.data.astype(np.float64)
        self.counts = sparse.csc_array((data, counts.indices, counts.indptr), shape=counts.shape)
        self.n_pairs = float(counts.sum(dtype=np.int64))
        self.left, self.right = self.counts.sum(axis=1) / self.n_pairs, self.counts.sum(axis=0) / self.n_pairs

    @cached_property
    def _transposed(self):
        return self.counts.T

    def times(self, v):
        """C v, for v (vocab_size,) or (vocab_size, k)."""
        return self.counts @ v / self.n_pairs - np.multiply.outer(self.left, self.right @ v)

    def transposed_times(self, u):
        """Cᵀ u."""
        return self._transposed @ u / self.n_pairs - np.multiply.outer(self.right, self.left @ u)

    def inner(self, other):
        """⟨C, other⟩, the sum of products of the entries."""
        joint = self.counts.multiply(other.counts).sum() / (self.n_pairs * other.n_pairs)
        return float(joint - self.left @ (other.counts @ self.right) / other.n_pairs
                     - other.left @ (self.counts @ other.right) / self.n_pairs
                     + (self.left @ other.left) * (self.right @ other.right))


def top_singular(covariance, k, steps=_STEPS):
    """(U (vocab, k), s (k,), V (vocab, k)): the largest singular triplets, by Golub-Kahan bidiagonalisation with
    full reorthogonalisation (Golub & Van Loan, 10.4). Small ones are approximate."""
    size = len(covariance.left)
    steps = min(steps, size)
    left, right = np.zeros((size, steps)), np.zeros((size, steps))
    bidiagonal = np.zeros((steps, steps))
    direction = np.random.default_rng(0).standard_normal(size)
    for i in range(steps):
        direction -= right[:, :i] @ (right[:, :i].T @ direction)
        norm = np.linalg.norm(direction)
        if i:
            bidiagonal[i - 1, i] = norm
        if norm == 0:
            break
        right[:, i] = direction / norm
        image = covariance.times(right[:, i])
        image -= left[:, :i] @ (left[:, :i].T @ image)
        bidiagonal[i, i] = np.linalg.norm(image)
        if bidiagonal[i, i] == 0:
            break
        left[:, i] = image / bidiagonal[i, i]
        direction = covariance.transposed_times(left[:, i])
    u, s, vt = np.linalg.svd(bidiagonal)
    return left @ u[:, :k], s[:k], right @ vt[:k].T


def estimate_lags(counters, lags, done=lambda: None):
    """[LagEstimate] of the lags from the PairCounters of the three folds; on ranks but 0: None.

    Operator norm: the 8 leading singular directions from fold A, the pair among them with the largest covariance in
    fold B, its strength in fold C, averaged over the three rotations. Frobenius norm: √ of the mean ⟨C_A, C_B⟩.
    Every rank counts its documents for each lag and owns one lag at a time, whose counts it adds up. done: called after
    each lag.
    """
    corpus, estimates = counters[0].corpus, []
    ranks, vocab_size = corpus.ranks, corpus.vocab_size
    nothing = np.zeros((N_FOLDS, 2, vocab_size, 1 + min(INFLUENCE_RANK, vocab_size)), np.float32)
    for first in range(0, len(lags), ranks.world_size):
        wave, counts, own, estimate = lags[first:first + ranks.world_size], None, None, None
        for owner, lag in enumerate(wave):
            added_up = [reduce_sum_to(ranks, owner, counter.counts(lag)) for counter in counters]
            counts = added_up if owner == ranks.rank else counts
        if counts:
            own = _Norms([Covariance(fold) for fold in counts])  # the ranks side by side, each its own lag
        for owner, lag in enumerate(wave):
            scores = all_reduce_sum(ranks, own.scores if owner == ranks.rank else nothing)
            sums = [all_reduce_sum(ranks, counter.group_sums(lag, *of_fold))
                    for counter, of_fold in zip(counters, scores, strict=True)]
            if owner == ranks.rank:
                estimate = own.estimate(lag, sums)
            done()
        estimates += [found for found in gather(ranks, estimate) or () if found]
    return estimates if ranks.is_main else None


class _Norms:
    """The norms of C at one lag from the Covariances of the three folds, and what their errors take.

    scores: (fold, 2, vocab_size, 1 + rank) float32, of a pair's first and second token, centred on the fold's
    marginals: both norms are means over pairs of products of scores. Those of the Frobenius norm are the other fold's
    leading singular triplets, which carry nearly all of the product's variance.
    """

    def __init__(self, covariances):
        subspaces = [top_singular(c, SUBSPACE) for c in covariances]
        self.op, scores, self.strengths = 0.0, [None] * N_FOLDS, [None] * N_FOLDS
        for a in range(N_FOLDS):
            b, c = (a + 1) % N_FOLDS, (a + 2) % N_FOLDS
            left, strengths, right = subspaces[a]
            u, _, vt = np.linalg.svd(left.T @ covariances[b].times(right))
            pair = left @ u[:, 0], right @ vt[0]
            self.op += float(pair[0] @ covariances[c].times(pair[1])) / N_FOLDS
            left, right = (np.column_stack([one, vectors[:, :INFLUENCE_RANK]])
                           for one, vectors in zip(pair, (left, right), strict=True))
            scores[c] = left - covariances[c].left @ left, right - covariances[c].right @ right
            self.strengths[c] = strengths[:INFLUENCE_RANK]
        self.scores = np.array(scores, np.float32)
        products = [covariances[i].inner(covariances[j]) for i, j in ((0, 1), (1, 2), (2, 0))]
        self.frobenius_squared, self.noise = float(np.mean(products)), _product_noise(covariances)
        whole = Covariance(sum(c.counts for c in covariances))
        self.n_pairs, self.plug_in = int(whole.n_pairs), float(top_singular(whole, 1)[1][0])

    def estimate(self, lag, sums):
        """LagEstimate from the group_sums of the three folds under `scores`."""
        influences = []
        for of_fold, strengths in zip(sums, self.strengths, strict=True):
            products, pairs = of_fold[:, :-1], of_fold[:, -1]
            n_pairs = pairs.sum()
            deviations = (products - np.outer(pairs, products.sum(axis=0) / n_pairs)) / n_pairs
            # Every fold weighs a third in the operator norm; in the mean of three products it enters two of them.
            influences.append([deviations[:, 0] / N_FOLDS, deviations[:, 1:] @ strengths * 2 / N_FOLDS])
        return LagEstimate(lag, self.n_pairs, self.op, self.frobenius_squared, self.plug_in,
                           *np.concatenate(influences, axis=1), self.noise)


def _product_noise(covariances):
    """Standard error of the mean ⟨C_A, C_B⟩ of independent tokens: entries have variance l_x r_y / N in each fold."""
    variance = sum((a.left @ b.left) * (a.right @ b.right) / (a.n_pairs * b.n_pairs)
                   for a, b in zip(covariances, covariances[1:] + covariances[:1], strict=True))
    return float(np.sqrt(variance)) / N_FOLDS


def counters_of(corpus):
    """The PairCounters of a Corpus's three folds. Influences follow this order: fold, then hash."""
    folds = corpus.folds
    return [PairCounter(corpus, np.flatnonzero(folds == fold)) for fold in range(N_FOLDS)]


def null_coefficient(corpus):
    """The plug-in ‖C‖_op of shuffled text times √pairs: what noise alone gives at any lag and size of text.

    Mean over permutations of a part of the text, since one alone scatters by 6 %.
    """
    part, norms = corpus.sample(np.ones(corpus.n_documents, bool), _NULL_TOKENS), []
    for seed in range(_NULL_PERMUTATIONS):
        covariance = Covariance(count_pairs(part.shuffled(np.random.default_rng(seed)), 1))
        norms.append(top_singular(covariance, 1)[1][0] * np.sqrt(covariance.n_pairs))
    return float(np.mean(norms))
