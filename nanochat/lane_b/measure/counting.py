"""Counts of token pairs at a lag: integers that add up, so no split of the work changes a number."""

import numpy as np
from scipy import sparse

_COUNT_TOKENS = 1 << 24       # counted at once: bounds the memory
_SUM_TOKENS = 1 << 15         # gathered at once: stays in the cache
MAX_GROUPS = 1 << 15          # of documents, in a fold: bounds the influences


class PairCounter:
    """Counts the pairs of a part of a Corpus, lag after lag. Each rank counts its own: what it returns are summands."""

    def __init__(self, corpus, members):
        """members: indices of documents, ascending. Where they are many their influences are summed over groups:
        neighbours in the order of their hashes, so a group is a random one."""
        self.corpus, self.members = corpus, members
        self.n_groups = min(len(members), MAX_GROUPS)
        self._groups = np.zeros(corpus.n_documents, np.int32)
        by_hash = members[np.argsort(corpus.hashes[members], kind="stable")]
        self._groups[by_hash] = np.arange(len(members)) * self.n_groups // max(len(members), 1)
        self._kept = None  # a small part's block is sorted once for all lags, a large one's anew for each

    def counts(self, lag):
        """(vocab_size, vocab_size) int64 CSC array: how often row's token is `lag` before column's in a document."""
        vocab_size = self.corpus.vocab_size
        total = sparse.csc_array((vocab_size, vocab_size), dtype=np.int64)
        for _, block in self._blocks():
            total = total + block.counts(lag, vocab_size)
        return total

    def group_sums(self, lag, left, right):
        """(n_groups, k + 1) float64: over a group's documents, the sums of document_sums, then how many pairs."""
        sums = np.zeros((self.n_groups, left.shape[1] + 1))
        for chosen, block in self._blocks():
            groups, documents = self._groups[chosen], block.documents
            np.add.at(sums[:, :-1], groups, document_sums(documents, lag, left, right))
            np.add.at(sums[:, -1], groups, np.maximum(documents.lengths - lag, 0))
        return sums

    def _blocks(self):
        if self._kept is None:
            blocks = ((chosen, _Block(documents))
                      for chosen, documents in self.corpus.own_blocks(self.members, _COUNT_TOKENS))
            if self.corpus.lengths[self.members].sum() > _COUNT_TOKENS * self.corpus.ranks.world_size:
                yield from blocks
                return
            self._kept = list(blocks)
        yield from self._kept


def document_sums(documents, lag, left, right):
    """(n_documents, k) float64: the sum over a document's pairs of left[x, k] · right[y, k].

    left, right: (vocab_size, k) float32 scores of a pair's first and second token.
    """
    sums = np.zeros((documents.n_documents, left.shape[1]))
    for first, block in documents.blocks(_SUM_TOKENS):
        if block.n_tokens > lag:
            products = left.take(block.tokens[:-lag], axis=0)
            products *= right.take(block.tokens[lag:], axis=0)
            document = np.repeat(np.arange(block.n_documents, dtype=np.int32), block.lengths)
            products *= (document[:-lag] == document[lag:])[:, None]
            products = products.astype(np.float64)  # summed as float32, the cut into blocks would show
            starts = block.offsets[:-1]
            n_reached = int(np.searchsorted(starts, len(products)))
            sums[first:first + n_reached] = np.add.reduceat(products, starts[:n_reached], axis=0)
    return sums


class _Block:
    """Positions of a stretch of text in the order of their tokens. Gathering what stands `lag` further on gives
    the rows of the count matrix, their entries unsorted; transposing it sorts them in linear time."""

    def __init__(self, documents):
        self.documents = documents
        self.order = np.argsort(documents.tokens, kind="stable").astype(np.int32)
        occurrences = np.bincount(documents.tokens, minlength=documents.vocab_size)
        self.row_ends = np.concatenate([[0], np.cumsum(occurrences)]).astype(np.int32)
        ends = np.repeat(documents.offsets[1:].astype(np.int32), documents.lengths)
        self.tokens_left = ends - np.arange(len(ends), dtype=np.int32)

    def counts(self, lag, vocab_size):
        nothing = vocab_size  # an extra column takes the positions whose document ends first
        partner = np.full(len(self.order), nothing, np.int32)
        partner[:-lag] = self.documents.tokens[lag:]
        partner[self.tokens_left <= lag] = nothing
        ones = np.ones(len(partner), np.int32)
        rows = sparse.csr_array((ones, partner.take(self.order), self.row_ends), shape=(vocab_size, vocab_size + 1))
        columns = rows.tocsc()
        columns.sum_duplicates()
        end = columns.indptr[vocab_size]
        return sparse.csc_array((columns.data[:end], columns.indices[:end], columns.indptr[:-1]),
                                shape=(vocab_size, vocab_size))


def count_pairs(documents, lag):
    """The counts of PairCounter over Documents in memory."""
    return _Block(documents).counts(lag, documents.vocab_size)
