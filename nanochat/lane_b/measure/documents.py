"""A corpus as lane B sees it: documents without their BOS, in an order that depends on their content alone."""

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from nanochat.lane_b import Refusal

MAX_VOCAB_SIZE = 1 << 16      # two tokens fit a 32-bit key
MIN_DOCUMENTS = 30            # standard errors come from resampling documents
OUTLIER_SHARE = 0.2           # one token above this share of a long document, and above twice its share of the corpus
OUTLIER_MIN_TOKENS = 500
N_FOLDS = 3


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents laid end to end in the order of their hashes, so that any prefix is a random sample.

    tokens: (n_tokens,) uint16; offsets: (n_documents + 1,) int64; hashes: (n_documents,) uint64, of the tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    vocab_size: int

    @property
    def n_tokens(self):
        return int(self.offsets[-1])

    @property
    def lengths(self):
        return np.diff(self.offsets)

    @property
    def n_documents(self):
        return len(self.hashes)

    @property
    def folds(self):
        """(n_documents,) which of the 3 folds each document is in."""
        return (self.hashes % np.uint64(N_FOLDS)).astype(np.int8)

    @property
    def held_out(self):
        """(n_documents,) bool: the sixteenth of the documents on which n-gram models are scored; no matter the fold."""
        return (self.hashes // np.uint64(N_FOLDS)) % np.uint64(16) == 0

    def select(self, mask):
        """The documents where mask (n_documents,) bool holds."""
        lengths = self.lengths
        return replace(self, tokens=self.tokens[np.repeat(mask, lengths)], hashes=self.hashes[mask],
                       offsets=np.concatenate([[0], np.cumsum(lengths[mask])]))

    def first(self, n_tokens):
        """The documents that begin within the first n_tokens, the last one cut there."""
        if n_tokens >= self.n_tokens:
            return self
        n_documents = int(np.searchsorted(self.offsets, n_tokens))
        offsets = np.append(self.offsets[:n_documents], n_tokens)
        return replace(self, tokens=self.tokens[:n_tokens], offsets=offsets, hashes=self.hashes[:n_documents])

    def shuffled(self, rng):
        """The same tokens in random order, cut into documents of the same lengths: no correlation is left."""
        return replace(self, tokens=rng.permutation(self.tokens))

    def blocks(self, max_tokens):
        """Cut into runs of whole documents of about max_tokens each: (first document, Documents) pairs."""
        first = 0
        while first < self.n_documents:
            last = int(np.searchsorted(self.offsets, self.offsets[first] + max_tokens, side="right")) - 1
            last = min(max(last, first + 1), self.n_documents)
            start, stop = self.offsets[first], self.offsets[last]
            yield first, replace(self, tokens=self.tokens[start:stop], offsets=self.offsets[first:last + 1] - start,
                                 hashes=self.hashes[first:last])
            first = last


def from_shards(shards, bos_id, vocab_size, max_tokens):
    """Documents of token shards: whole documents, in the shards' order, until max_tokens (BOS left out) are reached.

    shards: (tokens, offsets) pairs, every document beginning with bos_id. Documents below 2 tokens are left out.
    Errors: Refusal for a vocabulary above 65,536 and for fewer than 30 different documents.
    """
    check_vocabulary(vocab_size)
    pieces, n_tokens = [], 0
    for tokens, offsets in shards:
        assert (tokens[offsets[:-1]] == bos_id).all(), "every document begins with BOS"
        for start, stop in pairwise(offsets.tolist()):
            if stop - start > 2 and n_tokens < max_tokens:
                pieces.append(np.asarray(tokens[start + 1:stop], np.uint16))
                n_tokens += len(pieces[-1])
    documents = from_arrays(pieces, vocab_size)
    check_variety(documents)
    return documents


def from_arrays(arrays, vocab_size):
    """Documents of a list of token arrays (without BOS), ordered by their hash."""
    digests = (hashlib.blake2b(np.ascontiguousarray(array, "<u2").tobytes(), digest_size=8) for array in arrays)
    hashes = np.array([int.from_bytes(digest.digest(), "little") for digest in digests], np.uint64)
    order = np.argsort(hashes, kind="stable")
    lengths = np.array([len(array) for array in arrays], np.int64)[order]
    tokens = np.concatenate([arrays[i] for i in order]) if arrays else np.empty(0, np.uint16)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Documents(np.asarray(tokens, np.uint16), offsets, hashes[order], vocab_size)


def check_vocabulary(vocab_size):
    """Errors: Refusal above 65,536 tokens."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise Refusal(f"a vocabulary of {vocab_size:,} tokens is above {MAX_VOCAB_SIZE:,}; train a smaller one: "
                      "python -m scripts.tok_train --vocab-size 8192")


def check_variety(documents):
    """Errors: Refusal where there are too few different documents, or one token makes up nearly everything."""
    n_different = len(np.unique(documents.hashes))
    if n_different < MIN_DOCUMENTS:
        raise Refusal(f"only {n_different} different document{'s' * (n_different != 1)} (need {MIN_DOCUMENTS}: errors "
                      "come from resampling documents); give more text, or cut it into documents at its chapters")
    share = np.bincount(documents.tokens).max() / documents.n_tokens
    if share > 0.5:
        raise Refusal(f"one token makes up {share:.0%} of the text: there is nothing to correlate; "
                      "clean the text, or check that the tokenizer is the one meant for it")


def outliers(documents):
    """(n_documents,) bool: long documents one token of which is above 20 %, and above twice its share of the corpus.

    A single such document (a table, a run of padding) can carry the whole correlation at long lags.
    """
    corpus_share = np.bincount(documents.tokens, minlength=documents.vocab_size) / documents.n_tokens
    flagged = np.zeros(documents.n_documents, bool)
    for i in np.flatnonzero(documents.lengths >= OUTLIER_MIN_TOKENS):
        counts = np.bincount(documents.tokens[documents.offsets[i]:documents.offsets[i + 1]])
        limit = np.maximum(OUTLIER_SHARE, 2 * corpus_share[:len(counts)])
        flagged[i] = (counts > limit * counts.sum()).any()
    return flagged
