"""Counts of a text: covariances of its tokens by lag, and bounds on its n-gram entropies.

C(n) = E[x_t x_{t+n}^T] - E[x_t] E[x_{t+n}]^T is the covariance of one-hot tokens x at lag n
(arXiv:2602.07488, section 3). The text is held in memory; everything runs in one process.
"""

import hashlib
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from nanochat.common import progress

N_FOLDS = 3  # parts of the text: two give singular directions, one measures the strength
N_DIRECTIONS = 8  # singular directions per fold
N_REPLICATES = 400  # of the bootstrap over documents
MAX_GROUPS = 512  # per fold: random groups of documents are resampled where there are more
OUTLIER_SHARE, OUTLIER_MIN_TOKENS = 0.2, 500  # of one token in a document of this length
MIN_STANDARD_ERRORS, MIN_NULLS = 5, 3  # a usable norm is above both: errors, norms of shuffled text
TOKEN_BITS = 21  # in the key of an n-gram of at most 3 tokens
MIN_NGRAM_TOKENS, HELD_OUT_TOKENS = 1 << 18, 1_000_000


# --- documents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents without BOS, laid end to end in the order of their fold and their hash.

    tokens: (n_tokens,) int32. offsets: (n_documents + 1,). hashes: (n_documents,) uint64, of the
    tokens: equal documents are in the same fold, so that they cannot correlate two folds.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    vocab_size: int

    @classmethod
    def of(cls, documents, vocab_size):
        """Return the Corpus of a list of token arrays."""
        digests = [hashlib.blake2b(np.asarray(d, "<i4").tobytes(), digest_size=8).digest()
                   for d in documents]
        hashes = np.frombuffer(b"".join(digests), "<u8")
        order = np.lexsort([hashes, hashes % N_FOLDS])
        offsets = np.cumsum([0, *(len(documents[i]) for i in order)])
        tokens = np.concatenate([documents[i] for i in order]).astype(np.int32)
        return cls(tokens, offsets, hashes[order], vocab_size)

    @property
    def lengths(self):
        return np.diff(self.offsets)

    @property
    def document(self):
        """Return the index of each token's document, (n_tokens,) int32."""
        return np.repeat(np.arange(len(self.hashes), dtype=np.int32), self.lengths)

    def select(self, mask):
        """Return the Corpus of the documents where mask (n_documents,) is true."""
        tokens = self.tokens[np.repeat(mask, self.lengths)]
        offsets = np.append(0, np.cumsum(self.lengths[mask]))
        return Corpus(tokens, offsets, self.hashes[mask], self.vocab_size)


def read_corpus(shards, vocab_size, max_tokens):
    """Return the Corpus of complete documents, in order, until max_tokens are reached.

    shards: (tokens, offsets) pairs, where each document begins with BOS. Documents of one token are
    skipped.
    """
    documents, n_tokens = [], 0
    for tokens, offsets in shards:
        for start, stop in pairwise(offsets.tolist()):
            if stop - start > 2 and n_tokens < max_tokens:
                documents.append(tokens[start + 1:stop])
                n_tokens += stop - start - 1
    return Corpus.of(documents or [np.zeros(2)], vocab_size)


def find_outliers(corpus):
    """Return the mask of long documents in which one token is far too frequent.

    Such a document (a table, padding) can carry the complete correlation at long lags. The limit
    is OUTLIER_SHARE of the document, or twice the token's share of the text if that is more.
    """
    counts = np.bincount(corpus.tokens, minlength=corpus.vocab_size)
    limits = np.maximum(OUTLIER_SHARE, 2 * counts / len(corpus.tokens))
    outliers = np.zeros(len(corpus.hashes), bool)
    for i in np.flatnonzero(corpus.lengths >= OUTLIER_MIN_TOKENS):
        document = corpus.tokens[corpus.offsets[i]:corpus.offsets[i + 1]]
        shares = np.bincount(document, minlength=corpus.vocab_size) / len(document)
        outliers[i] = (shares > limits).any()
    return outliers


# --- correlations --------------------------------------------------------------------------------


class Covariance:
    """C = J - l r^T: the joint distribution J of token pairs, from counts, and its marginals l, r.

    counts: sparse (vocab_size, vocab_size). The rank-one part stays implicit.
    """

    def __init__(self, counts):
        self.n_pairs = int(counts.sum())
        self.joint = counts / max(self.n_pairs, 1)
        self.left, self.right = self.joint.sum(axis=1), self.joint.sum(axis=0)

    def times(self, v):
        """Return C v for v (vocab_size, k)."""
        return self.joint @ v - np.outer(self.left, self.right @ v)

    def inner(self, other):
        """Return the sum of the products of the entries of two covariances."""
        joint = self.joint.multiply(other.joint).sum()
        crossed = self.left @ (other.joint @ self.right) + other.left @ (self.joint @ other.right)
        return float(joint - crossed + (self.left @ other.left) * (self.right @ other.right))

    def top_singular(self, k=N_DIRECTIONS, n_iterations=4):
        """Return (U, s, V) of the k largest singular values, by block power iteration."""
        size = len(self.left)
        v = np.random.default_rng(0).standard_normal((size, min(k + 4, size)))
        for _ in range(n_iterations):
            u = np.linalg.qr(self.times(v))[0]
            v = np.linalg.qr(self.joint.T @ u - np.outer(self.right, self.left @ u))[0]
        u, s, rotation = np.linalg.svd(self.times(v), full_matrices=False)
        return u[:, :k], s[:k], v @ rotation[:k].T


class Fold:
    """The token pairs of a part of the text, and its groups of documents for the bootstrap."""

    def __init__(self, corpus, rng):
        self.tokens, self.document = corpus.tokens, corpus.document
        self.vocab_size, n_documents = corpus.vocab_size, len(corpus.hashes)
        n_groups = min(n_documents, MAX_GROUPS)
        edges = corpus.offsets[np.arange(n_groups + 1) * n_documents // n_groups]
        self.groups = list(pairwise(edges.tolist()))
        self.draws = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), N_REPLICATES)

    def pairs(self, lag, start, stop):
        """Return the token ids (left, right) of the pairs at this lag within one document."""
        left = self.document[start:max(stop - lag, start)]
        at = start + np.flatnonzero(left == self.document[start + lag:stop])
        return self.tokens.take(at), self.tokens.take(at + lag)

    def count(self, lag):
        """Return how often each token precedes another by `lag`, (vocab_size, vocab_size)."""
        return _count(*self.pairs(lag, 0, len(self.tokens)), self.vocab_size)

    def resample(self, lag, left_scores, right_scores):
        """Return the mean over pairs of products of scores, (k,), and its replicates, (R, k).

        left_scores, right_scores: (vocab_size, k). Replicates draw groups of documents with
        replacement, the same ones at every lag.
        """
        left_scores, right_scores = left_scores.astype(np.float32), right_scores.astype(np.float32)
        sums = np.zeros((len(self.groups), left_scores.shape[1] + 1))
        for i, group in enumerate(self.groups):
            left, right = self.pairs(lag, *group)
            products = np.einsum("ij,ij->j", left_scores.take(left, 0), right_scores.take(right, 0))
            sums[i] = [*products, len(left)]
        total, drawn = sums.sum(axis=0), self.draws @ sums
        return total[:-1] / max(total[-1], 1), drawn[:, :-1] / np.maximum(drawn[:, -1:], 1)


def _count(left, right, vocab_size):
    pairs = sparse.coo_array((np.ones(len(left)), (left, right)), (vocab_size, vocab_size))
    pairs.has_canonical_format = True  # adds duplicates later: after two transpositions they are
    counts = pairs.tocsr().tocsc()  # sorted, which takes half the time of sorting them
    counts.sum_duplicates()
    return counts


def null_coefficient(corpus, n_tokens=1 << 20, n_permutations=8):
    """Return the operator norm of C of shuffled text, times the root of its number of pairs."""
    norms = []
    for seed in range(n_permutations):
        tokens = np.random.default_rng(seed).permutation(corpus.tokens[:n_tokens])
        covariance = Covariance(_count(tokens[:-1], tokens[1:], corpus.vocab_size))
        norms.append(covariance.top_singular()[1][0] * math.sqrt(covariance.n_pairs))
    return float(np.mean(norms))


def estimate_lags(corpus, lags, null):
    """Return (a dict per lag, bootstrap replicates of the operator norms, (R, n_lags)).

    A dict has the operator norm `op` and the Frobenius norm of C(lag) with standard errors;
    `frobenius` is None where noise makes the product of two folds negative. `usable`: op is above
    `noise`. `data_tokens`: training tokens that are needed before the correlation exceeds their
    noise, P(n) in the theory. null: see null_coefficient.
    """
    rng = np.random.default_rng(0)
    folds = [Fold(corpus.select(corpus.hashes % N_FOLDS == i), rng) for i in range(N_FOLDS)]
    results = [_estimate_lag(folds, lag, null)
               for lag in progress(lags, desc="correlations", unit="lag")]
    estimates, replicates = zip(*results, strict=True)
    return list(estimates), np.transpose(replicates)


def _estimate_lag(folds, lag, null):
    """Return (dict of the lag, replicates of its operator norm).

    The noise of different folds is independent, so that it cancels in their products. Operator
    norm: singular directions from all folds but one, covariance of that pair in the one left out.
    Frobenius norm: root of the inner product of the same two covariances. Both are averaged over
    the fold left out. The error of the Frobenius norm comes from the leading directions, which
    carry nearly all of its variance, and from the noise that independent tokens would leave.
    """
    counts = [fold.count(lag) for fold in folds]
    op, squared, noise_variance, replicates = 0.0, 0.0, 0.0, np.zeros((2, N_REPLICATES))
    for i, fold in enumerate(folds):
        measured, others = Covariance(counts[i]), Covariance(counts[i - 1] + counts[i - 2])
        left, strengths, right = others.top_singular()
        means, resampled = fold.resample(lag, left - measured.left @ left,
                                         right - measured.right @ right)
        op += means[0] / N_FOLDS
        replicates[0] += resampled[:, 0] / N_FOLDS
        # A fold is also one of the others in two of the three products; each noise enters twice.
        replicates[1] += (resampled - means) @ strengths * 2 / N_FOLDS
        squared += others.inner(measured) / N_FOLDS
        independent = (others.left @ measured.left) * (others.right @ measured.right)
        noise_variance += 2 * independent / (others.n_pairs * measured.n_pairs) / N_FOLDS**2
    op_se, squared_se = np.std(replicates, axis=1, ddof=1).tolist()
    frobenius = math.sqrt(squared) if squared > 0 else None
    frobenius_se = frobenius and math.hypot(squared_se, noise_variance**0.5) / (2 * frobenius)
    n_pairs = sum(int(matrix.sum()) for matrix in counts)
    noise = max(MIN_STANDARD_ERRORS * op_se, MIN_NULLS * null / math.sqrt(n_pairs))
    estimate = {"lag": lag, "n_pairs": n_pairs, "op": float(op), "op_se": op_se,
                "frobenius": frobenius, "frobenius_se": frobenius_se, "noise": noise,
                "data_tokens": float((null / op) ** 2) if op > 0 else None,
                "usable": bool(op > noise)}
    return estimate, replicates[0]


# --- n-grams -------------------------------------------------------------------------------------


def bound_entropies(corpus):
    """Return [{n, lo, hi}] for contexts of n = 1, 2 tokens in nats; [] for too little text.

    lo is the conditional entropy of the counts, which is below H_n on average because entropy is
    concave. hi is the cross-entropy of an interpolated model on documents held out. Both allow for
    1.96 standard errors of the latter.
    """
    held_out = corpus.hashes // 3 % 16 == 0
    training, test = corpus.select(~held_out), corpus.select(held_out)
    test = test.select(test.offsets[1:] <= HELD_OUT_TOKENS)
    if len(training.tokens) < MIN_NGRAM_TOKENS or not len(test.tokens):
        return []
    ngrams, document = ngram_keys(test, 3)
    probability, bounds, hi = np.full(len(ngrams), 1 / corpus.vocab_size), [], math.inf
    for length in (1, 2, 3):
        probability, entropy = witten_bell(ngram_keys(training, length)[0],
                                           ngrams & _mask(length), probability)
        nats = -np.log(probability)
        sums, sizes = np.bincount(document, nats), np.bincount(document)
        mean = sums.sum() / sizes.sum()
        allowance = 1.96 * float(np.linalg.norm(sums - sizes * mean) / sizes.sum())
        hi = min(hi, float(mean) + allowance)  # more context never raises the entropy
        bounds.append({"n": length - 1, "lo": entropy - allowance, "hi": hi})
    return bounds[1:] if bounds[-1]["lo"] > 0 else []


def witten_bell(training, ngrams, shorter):
    """Return (probability of the last token of each n-gram, conditional entropy of the counts).

    training, ngrams: keys of equal length. shorter: the probabilities without the first token,
    which an n-gram's context gets in proportion to its number of different followers (Witten and
    Bell 1991; Chen and Goodman 1999, section 2.4).
    """
    keys, counts = np.unique(training, return_counts=True)
    contexts, starts, types = np.unique(keys >> TOKEN_BITS, return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, starts)
    entropy = (totals @ np.log(totals) - counts @ np.log(counts)) / len(training)
    count = _look_up(ngrams, keys, counts)
    total, n_types = (_look_up(ngrams >> TOKEN_BITS, contexts, each) for each in (totals, types))
    probability = (count + n_types * shorter) / np.maximum(total + n_types, 1)
    return np.where(total, probability, shorter), float(entropy)


def ngram_keys(corpus, length):
    """Return (keys, document index) of all runs of `length` tokens within a document.

    A key is an int64 with TOKEN_BITS bits per token, the last token in the lowest ones.
    """
    document = corpus.document
    first = np.flatnonzero(document[:1 - length or None] == document[length - 1:])
    keys = np.zeros(len(first), np.int64)
    for i in range(length):
        keys = keys << TOKEN_BITS | corpus.tokens.take(first + i)
    return keys, document.take(first)


def _look_up(queries, keys, values):
    at = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0)


def _mask(length):
    return (1 << TOKEN_BITS * length) - 1
