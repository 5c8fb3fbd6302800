"""Documents in memory, without their BOS, and what their hashes decide: order, folds, what is held out."""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

N_FOLDS = 3


class Hashed:
    """What depends on the documents' content alone. hashes: (n_documents,) uint64, of the tokens."""

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


@dataclass(frozen=True, eq=False)
class Documents(Hashed):
    """Documents laid end to end. tokens: (n_tokens,) uint16; offsets: (n_documents + 1,) int64; hashes as Hashed."""

    tokens: np.ndarray
    offsets: np.ndarray
    hashes: np.ndarray
    vocab_size: int

    @property
    def n_tokens(self):
        return int(self.offsets[-1])

    @cached_property
    def lengths(self):
        return np.diff(self.offsets)

    def select(self, mask):
        """The documents where mask (n_documents,) bool holds."""
        lengths = self.lengths
        return replace(self, tokens=self.tokens[np.repeat(mask, lengths)], hashes=self.hashes[mask],
                       offsets=offsets_of(lengths[mask]))

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
        for first, last in runs(self.offsets, max_tokens):
            start, stop = self.offsets[first], self.offsets[last]
            yield first, replace(self, tokens=self.tokens[start:stop], offsets=self.offsets[first:last + 1] - start,
                                 hashes=self.hashes[first:last])


def offsets_of(lengths):
    """(n + 1,) int64: where documents of these lengths begin when laid end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def runs(offsets, max_tokens):
    """(first, last) of runs of whole documents of at most max_tokens each; a longer document is a run of its own."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + max_tokens, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


def from_arrays(arrays, vocab_size):
    """Documents of a list of token arrays (without BOS), ordered by their hash."""
    hashes = np.array([hash_of(array) for array in arrays], np.uint64)
    order = np.argsort(hashes, kind="stable")
    tokens = np.concatenate([arrays[i] for i in order]) if arrays else np.empty(0, np.uint16)
    lengths = np.array([len(array) for array in arrays], np.int64)[order]
    return Documents(np.asarray(tokens, np.uint16), offsets_of(lengths), hashes[order], vocab_size)


def hash_of(tokens):
    """64 bits that depend on a document's tokens alone."""
    digest = hashlib.blake2b(np.ascontiguousarray(tokens, "<u2").data, digest_size=8).digest()
    return int.from_bytes(digest, "little")
