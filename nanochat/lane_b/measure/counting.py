"""Counts of token pairs at a lag: integers that add up, so no split of the work changes a number."""

import numpy as np
from scipy import sparse

_COUNT_TOKENS = 1 << 24       # counted at once: bounds the memory
_SUM_TOKENS = 1 << 15         # gathered at once: stays in the cache


class PairCounter:
    """Counts the pairs of some documents, lag after lag. The documents are sorted by token once for all lags."""

    def __init__(self, documents):
        self.documents = documents
        self._blocks = [_Block(block) for _, block in documents.blocks(_COUNT_TOKENS)]

    def counts(self, lag):
        """(vocab_size, vocab_size) int32 CSC array: how often row's token is `lag` before column's in a document."""
        vocab_size = self.documents.vocab_size
        total = sparse.csc_array((vocab_size, vocab_size), dtype=np.int32)
        for block in self._blocks:
            total = total + block.counts(lag, vocab_size)
        return total

    def n_pairs(self, lag):
        """(n_documents,) how many pairs `lag` apart each document has."""
        return np.maximum(self.documents.lengths - lag, 0)

    def document_sums(self, lag, left, right):
        """(n_documents, k) float32: the sum over a document's pairs of left[x, k] · right[y, k].

        left, right: (vocab_size, k) float32 scores of a pair's first and second token.
        """
        sums = np.zeros((self.documents.n_documents, left.shape[1]), np.float32)
        for first, block in self.documents.blocks(_SUM_TOKENS):
            if block.n_tokens > lag:
                products = left.take(block.tokens[:-lag], axis=0)
                products *= right.take(block.tokens[lag:], axis=0)
                document = np.repeat(np.arange(block.n_documents, dtype=np.int32), block.lengths)
                products *= (document[:-lag] == document[lag:])[:, None]
                starts = block.offsets[:-1]
                n_reached = int(np.searchsorted(starts, len(products)))
                sums[first:first + n_reached] = np.add.reduceat(products, starts[:n_reached], axis=0)
        return sums


class _Block:
    """Positions of a stretch of text in the order of their tokens. Gathering what stands `lag` further on gives
    the rows of the count matrix, their entries unsorted; transposing it sorts them in linear time."""

    def __init__(self, documents):
        self.tokens = documents.tokens
        self.order = np.argsort(documents.tokens, kind="stable").astype(np.int32)
        occurrences = np.bincount(documents.tokens, minlength=documents.vocab_size)
        self.row_ends = np.concatenate([[0], np.cumsum(occurrences)]).astype(np.int32)
        ends = np.repeat(documents.offsets[1:].astype(np.int32), documents.lengths)
        self.tokens_left = ends - np.arange(len(ends), dtype=np.int32)

    def counts(self, lag, vocab_size):
        nothing = vocab_size  # an extra column takes the positions whose document ends first
        partner = np.full(len(self.tokens), nothing, np.int32)
        partner[:-lag] = self.tokens[lag:]
        partner[self.tokens_left <= lag] = nothing
        ones = np.ones(len(partner), np.int32)
        rows = sparse.csr_array((ones, partner.take(self.order), self.row_ends), shape=(vocab_size, vocab_size + 1))
        columns = rows.tocsc()
        columns.sum_duplicates()
        end = columns.indptr[vocab_size]
        return sparse.csc_array((columns.data[:end], columns.indices[:end], columns.indptr[:-1]),
                                shape=(vocab_size, vocab_size))


def count_pairs(documents, lag):
    """The counts of PairCounter for a single lag."""
    return PairCounter(documents).counts(lag)
