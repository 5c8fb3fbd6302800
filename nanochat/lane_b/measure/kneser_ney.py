"""Interpolated modified Kneser-Ney n-gram models (Chen & Goodman 1999, section 3), for cross-entropies alone."""

from dataclasses import dataclass

import numpy as np

MAX_CONTEXT = 3           # an n-gram of 16-bit tokens is one 64-bit key
_MIN_DISCOUNT = 0.05      # keeps a probability for what was never seen
_UNKNOWN_DISCOUNT = 0.5   # where no n-gram has the counts that would tell


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length. keys: sorted uint64, the first token in the highest bits; contexts: keys >> 16."""

    keys: np.ndarray
    discounted: np.ndarray    # count minus its discount, over the context's total
    contexts: np.ndarray
    backoff: np.ndarray       # probability a context leaves to the shorter one

    def probability(self, ngrams, shorter):
        """Interpolate with the probabilities `shorter` of the same n-grams without their first token."""
        if len(self.keys) == 0:
            return shorter
        where, seen = _find(self.contexts, ngrams >> np.uint64(16))
        result = np.where(seen, self.backoff[where], 1.0) * shorter
        where, seen = _find(self.keys, ngrams)
        return result + np.where(seen, self.discounted[where], 0.0)


class KneserNey:
    """p(token | the `context` tokens before it). Every length but the longest counts in how many different ways an
    n-gram is continued to the left; each length has three discounts; the shortest falls back on 1 / vocab_size."""

    def __init__(self, documents, context):
        assert 1 <= context <= MAX_CONTEXT
        self.context, self.vocab_size = context, documents.vocab_size
        keys, _ = ngram_keys(documents, context + 1)
        self.orders = []  # from the longest n-grams to single tokens
        for length in range(context + 1, 0, -1):
            keys, counts = np.unique(keys, return_counts=True)
            self.orders.append(_order(keys, counts))
            keys = keys & np.uint64((1 << 16 * (length - 1)) - 1)

    def probability(self, ngrams):
        """(n,) float64: the probability of each n-gram's last token after the others. ngrams: uint64 keys."""
        result = np.full(len(ngrams), 1 / self.vocab_size)
        for length, order in enumerate(reversed(self.orders), start=1):
            result = order.probability(ngrams & np.uint64((1 << 16 * length) - 1), result)
        return result

    def cross_entropy(self, documents):
        """(mean nats a token over the tokens that have a whole context before them, its standard error over
        documents)."""
        keys, document = ngram_keys(documents, self.context + 1)
        different, which = np.unique(keys, return_inverse=True)
        nats = -np.log(self.probability(different))[which]
        sums, sizes = (np.bincount(document, weights) for weights in (nats, None))
        mean = sums.sum() / sizes.sum()
        return float(mean), float(np.linalg.norm(sums - sizes * mean) / sizes.sum())


def ngram_keys(documents, length):
    """(keys (n,) uint64, document (n,) int32) of every run of `length` tokens within a document.

    A key has 16 bits a token, the last one lowest; document is the index of the one it is in.
    """
    n_keys = max(documents.n_tokens - length + 1, 0)
    keys = np.zeros(n_keys, np.uint64)
    for i in range(length if n_keys else 0):
        keys <<= np.uint64(16)
        keys |= documents.tokens[i:i + n_keys]
    document = np.repeat(np.arange(documents.n_documents, dtype=np.int32), documents.lengths)
    inside = document[:n_keys] == document[length - 1:]
    return keys[inside], document[:n_keys][inside]


def _order(keys, counts):
    if len(keys) == 0:
        return _Order(keys, np.empty(0), keys, np.empty(0))
    discounts = _discounts(counts)
    contexts, sizes = np.unique(keys >> np.uint64(16), return_counts=True)
    starts = np.cumsum(sizes) - sizes
    totals = np.add.reduceat(counts, starts)
    discount = discounts.take(np.minimum(counts, 3))
    backoff = np.add.reduceat(discount, starts) / totals
    discounted = counts - discount
    discounted /= np.repeat(totals, sizes)
    return _Order(keys, discounted, contexts, backoff)


def _discounts(counts):
    """(4,) what to take off a count of 0, 1, 2, and 3 or more: Chen & Goodman's eq. 26, clamped to [0.05, count]."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    return np.array([0.0, *(
        np.clip(i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i], _MIN_DISCOUNT, i)
        if n[i] > 0 and n[1] > 0 else _UNKNOWN_DISCOUNT for i in (1, 2, 3))])


def _find(keys, queries):
    """(an index for each query, whether the key there is the query)."""
    where = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return where, keys[where] == queries
