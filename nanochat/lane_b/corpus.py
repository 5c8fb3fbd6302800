"""Counts of a text: covariances of its tokens by lag, and bounds on its n-gram entropies.

C(n) = E[x_t x_{t+n}^T] - E[x_t] E[x_{t+n}]^T is the covariance of one-hot tokens x at lag n
(arXiv:2602.07488, section 3). The text is held in memory; everything runs in one process.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse

from nanochat.common import progress

N_FOLDS = 3  # parts of the text: two give singular directions, one measures the strength
N_REPLICATES = 400  # of the bootstrap over documents
MAX_GROUPS = 512  # per fold: random groups of documents are resampled where there are more
MIN_STANDARD_ERRORS = 5  # of a usable norm
TOKEN_BITS = 21  # in the key of an n-gram
MIN_NGRAM_TOKENS = 1 << 18


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

    def folds(self):
        """Return the Fold of each part of the text."""
        rng = np.random.default_rng(0)
        masks = [self.hashes % N_FOLDS == i for i in range(N_FOLDS)]
        return [Fold(Corpus(self.tokens[np.repeat(mask, self.lengths)],
                            np.append(0, np.cumsum(self.lengths[mask])), self.hashes[mask],
                            self.vocab_size), rng) for mask in masks]


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
        left, right = self.pairs(lag, 0, len(self.tokens))
        shape = self.vocab_size, self.vocab_size
        pairs = sparse.coo_array((np.ones(len(left)), (left, right)), shape)
        pairs.has_canonical_format = True  # adds duplicates later: after two transpositions they
        counts = pairs.tocsr().tocsc()  # are sorted, which takes half the time of sorting them
        counts.sum_duplicates()
        return counts

    def resample(self, lag, left_scores, right_scores):
        """Return the mean over pairs of left_scores * right_scores, and its replicates, (R,).

        scores: (vocab_size,). Replicates draw groups of documents with replacement, the same ones
        at every lag.
        """
        sums = np.zeros((len(self.groups), 2))
        for i, group in enumerate(self.groups):
            left, right = self.pairs(lag, *group)
            sums[i] = left_scores.take(left) @ right_scores.take(right), len(left)
        total, drawn = sums.sum(axis=0), self.draws @ sums
        return total[0] / max(total[1], 1), drawn[:, 0] / np.maximum(drawn[:, 1], 1)


class Covariance:
    """C = J - l r^T: the joint distribution J of token pairs, from counts, and its marginals l, r.

    counts: sparse (vocab_size, vocab_size). The rank-one part stays implicit.
    """

    def __init__(self, counts):
        self.joint = counts / max(int(counts.sum()), 1)
        self.left, self.right = self.joint.sum(axis=1), self.joint.sum(axis=0)

    def times(self, v):
        """Return C v for v (vocab_size, k)."""
        return self.joint @ v - np.outer(self.left, self.right @ v)

    def inner(self, other):
        """Return the sum of the products of the entries of two covariances."""
        joint = self.joint.multiply(other.joint).sum()
        crossed = self.left @ (other.joint @ self.right) + other.left @ (self.joint @ other.right)
        return float(joint - crossed + (self.left @ other.left) * (self.right @ other.right))

    def top_singular(self, width=12, n_iterations=4):
        """Return the largest singular value and its vectors (u, s, v), by block power iteration."""
        size = len(self.left)
        v = np.random.default_rng(0).standard_normal((size, min(width, size)))
        for _ in range(n_iterations):
            u = np.linalg.qr(self.times(v))[0]
            v = np.linalg.qr(self.joint.T @ u - np.outer(self.right, self.left @ u))[0]
        u, s, rotation = np.linalg.svd(self.times(v), full_matrices=False)
        return u[:, 0], s[0], v @ rotation[0]


def estimate_lags(corpus, lags):
    """Return (a dict per lag, bootstrap replicates of the operator norms, (R, n_lags)).

    A dict has the operator norm `op` of C(lag) with its standard error, and the Frobenius norm
    (None where noise makes its square negative). `usable`: op is above `noise`.
    """
    folds = corpus.folds()
    results = [_estimate_lag(folds, lag)
               for lag in progress(lags, desc="correlations", unit="lag")]
    estimates, replicates = zip(*results, strict=True)
    return list(estimates), np.transpose(replicates)


def _estimate_lag(folds, lag):
    """Return (dict of the lag, replicates of its operator norm).

    The noise of different folds is independent, so that it cancels in products of one fold and the
    others. Operator norm: the singular directions come from the others, the covariance of that pair
    from the one fold. Frobenius norm: root of the inner product. Both are means over the folds.
    """
    counts, replicates = [fold.count(lag) for fold in folds], np.zeros(N_REPLICATES)
    op = squared = 0.0
    for i, fold in enumerate(folds):
        measured, others = Covariance(counts[i]), Covariance(counts[i - 1] + counts[i - 2])
        u, _, v = others.top_singular()
        mean, resampled = fold.resample(lag, u - measured.left @ u, v - measured.right @ v)
        op += mean / N_FOLDS
        squared += others.inner(measured) / N_FOLDS
        replicates += resampled / N_FOLDS
    op_se = float(np.std(replicates, ddof=1))
    noise = MIN_STANDARD_ERRORS * op_se
    return {"lag": lag, "n_pairs": sum(int(matrix.sum()) for matrix in counts), "op": float(op),
            "op_se": op_se, "frobenius": squared**0.5 if squared > 0 else None, "noise": noise,
            "usable": bool(op > noise)}, replicates


def bound_entropies(corpus):
    """Return (upper bound of H_1, lower bound of H_2) in nats; None for too little text.

    H_1: cross-entropy of the held-out third of the text given one token, by counts interpolated
    with those of single tokens (Witten and Bell 1991). H_2: conditional entropy of the counts,
    which is below the truth on average because entropy is concave.
    """
    tokens, document = corpus.tokens.astype(np.int64), corpus.document
    if len(tokens) < MIN_NGRAM_TOKENS:
        return None
    *training, test = (fold.count(1) for fold in corpus.folds())
    counts = training[0] + training[1]
    total, types = counts.sum(axis=1), np.diff(counts.tocsr().indptr)
    single = (counts.sum(axis=0) + 1) / (counts.sum() + corpus.vocab_size)
    left, right = test.nonzero()
    seen = np.maximum(total + types, 1)
    probability = (counts.tocsr()[left, right] + types[left] * single[right]) / seen[left]
    probability = np.where(total[left], probability, single[right])
    upper = -(test.tocsr()[left, right] @ np.log(probability)) / test.sum()

    whole = document[:-2] == document[2:]
    pairs = (tokens[:-2] << TOKEN_BITS | tokens[1:-1])[whole]
    lower = _entropy(pairs << TOKEN_BITS | tokens[2:][whole]) - _entropy(pairs)
    return (float(upper), lower) if lower > 0 else None


def _entropy(keys):
    shares = np.unique(keys, return_counts=True)[1] / len(keys)
    return float(-shares @ np.log(shares))
