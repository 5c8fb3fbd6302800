"""A corpus of any size: an index of its documents in memory, their tokens read from the shards a block at a time.

Every rank has the whole index and reads a contiguous part of the documents, about as many tokens as the others.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from nanochat.distributed import Ranks, all_reduce_sum, on_main
from nanochat.lane_b import Refusal
from nanochat.lane_b.measure.documents import Documents, Hashed, hash_of, offsets_of, runs

MAX_VOCAB_SIZE = 1 << 16      # two tokens fit a 32-bit key
MIN_DOCUMENTS = 30            # standard errors come from resampling documents
OUTLIER_SHARE = 0.2           # one token above this share of a long document, and above twice its share of the corpus
OUTLIER_MIN_TOKENS = 500
_BLOCK_TOKENS = 1 << 22       # read at once


@dataclass(frozen=True, eq=False)
class Corpus(Hashed):
    """Where documents are. pieces: token arrays, maybe mapped from disk; for every document, in the order in which they
    are stored: piece (int32), start (int64, after its BOS), lengths (int64, in tokens), hashes (uint64).

    token_counts: (vocab_size,) int64 over all documents. 28 bytes a document: the only part that grows with the text.
    """

    pieces: tuple
    piece: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    hashes: np.ndarray
    token_counts: np.ndarray
    vocab_size: int
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def n_tokens(self):
        return int(self.lengths.sum())

    def own_blocks(self, chosen, max_tokens):
        """(indices, Documents) pairs of about max_tokens each: this rank's part of the indices `chosen`, ascending."""
        starts = offsets_of(self.lengths[chosen])
        shares = [starts[-1] * rank // self.ranks.world_size for rank in (self.ranks.rank, self.ranks.rank + 1)]
        first, last = np.searchsorted(starts[:-1], shares)  # those that begin in this rank's share of the tokens
        own = chosen[first:last]
        for begin, end in runs(starts[first:last + 1], max_tokens):
            yield own[begin:end], self.read(own[begin:end])

    def read(self, chosen):
        """Documents of the indices `chosen`, in that order."""
        offsets = offsets_of(self.lengths[chosen])
        tokens = np.empty(offsets[-1], np.uint16)
        places = (array[chosen].tolist() for array in (self.piece, self.start, self.lengths))
        at = 0
        for piece, start, length in zip(*places, strict=True):
            tokens[at:at + length] = self.pieces[piece][start:start + length]
            at += length
        return Documents(tokens, offsets, self.hashes[chosen], self.vocab_size)

    def sample(self, mask, n_tokens):
        """Documents: a random sample of those where mask (n_documents,) bool holds, the last one cut at n_tokens.

        They come in the order of their hashes: smaller samples are the beginnings of larger ones.
        """
        chosen = np.flatnonzero(mask)
        chosen = chosen[np.argsort(self.hashes[chosen], kind="stable")]
        n_needed = int(np.searchsorted(np.cumsum(self.lengths[chosen]), n_tokens)) + 1
        return self.read(chosen[:n_needed]).first(n_tokens)

    def without(self, mask):
        """The corpus less the documents where mask (n_documents,) bool holds."""
        left_out = np.bincount(self.read(np.flatnonzero(mask)).tokens, minlength=self.vocab_size)
        index = {name: getattr(self, name)[~mask] for name in ("piece", "start", "lengths", "hashes")}
        return replace(self, **index, token_counts=self.token_counts - left_out)


def from_shards(shards, bos_id, vocab_size, max_tokens, ranks=None):
    """Corpus of token shards: whole documents, in the shards' order, until max_tokens (BOS left out) are reached.

    shards: (tokens, offsets) pairs, every document beginning with bos_id. Documents below 2 tokens are left out. Every
    rank calls it. Errors: Refusal for a vocabulary above 65,536 and for fewer than 30 different documents.
    """
    check_vocabulary(vocab_size)
    ranks = ranks or Ranks()
    lengths = np.concatenate([np.diff(offsets) - 1 for _, offsets in shards])
    piece = np.repeat(np.arange(len(shards), dtype=np.int32), [len(offsets) - 1 for _, offsets in shards])
    start = np.concatenate([offsets[:-1] + 1 for _, offsets in shards])
    long_enough = np.flatnonzero(lengths > 1)
    before = offsets_of(lengths[long_enough])[:-1]
    kept = long_enough[before < max_tokens]
    pieces = tuple(tokens for tokens, _ in shards)
    hashes, counts = np.zeros(len(kept), np.uint64), np.zeros(vocab_size, np.int64)
    corpus = Corpus(pieces, piece[kept], start[kept], lengths[kept], hashes, counts, vocab_size, ranks)
    for chosen, documents in corpus.own_blocks(np.arange(len(kept)), _BLOCK_TOKENS):
        counts += np.bincount(documents.tokens, minlength=vocab_size)
        for i, begin, end in zip(chosen, documents.offsets, documents.offsets[1:], strict=False):
            assert pieces[corpus.piece[i]][corpus.start[i] - 1] == bos_id, "every document begins with BOS"
            hashes[i] = hash_of(documents.tokens[begin:end])
    corpus = replace(corpus, hashes=all_reduce_sum(ranks, hashes.view(np.int64)).view(np.uint64),
                     token_counts=all_reduce_sum(ranks, counts))
    on_main(ranks, lambda: check_variety(corpus))
    return corpus


def from_documents(documents):
    """Corpus of Documents in memory, as one rank reads them."""
    return Corpus((documents.tokens,), np.zeros(documents.n_documents, np.int32), documents.offsets[:-1],
                  documents.lengths, documents.hashes, np.bincount(documents.tokens, minlength=documents.vocab_size),
                  documents.vocab_size)


def check_vocabulary(vocab_size):
    """Errors: Refusal above 65,536 tokens."""
    if vocab_size > MAX_VOCAB_SIZE:
        raise Refusal(f"a vocabulary of {vocab_size:,} tokens is above {MAX_VOCAB_SIZE:,}; train a smaller one: "
                      "python -m scripts.tok_train --vocab-size 8192")


def check_variety(corpus):
    """Errors: Refusal where there are too few different documents, or one token makes up nearly everything."""
    n_different = len(np.unique(corpus.hashes))
    if n_different < MIN_DOCUMENTS:
        raise Refusal(f"only {n_different} different document{'s' * (n_different != 1)} (need {MIN_DOCUMENTS}: errors "
                      "come from resampling documents); give more text, or cut it into documents at its chapters")
    share = corpus.token_counts.max() / corpus.n_tokens
    if share > 0.5:
        raise Refusal(f"one token makes up {share:.0%} of the text: there is nothing to correlate; "
                      "clean the text, or check that the tokenizer is the one meant for it")


def outliers(corpus):
    """(n_documents,) bool: long documents one token of which is above 20 %, and above twice its share of the corpus.

    A single such document (a table, a run of padding) can carry the whole correlation at long lags. Every rank calls
    it.
    """
    limits = np.maximum(OUTLIER_SHARE, 2 * corpus.token_counts / corpus.n_tokens)
    flagged = np.zeros(corpus.n_documents, np.int8)
    for chosen, documents in corpus.own_blocks(np.flatnonzero(corpus.lengths >= OUTLIER_MIN_TOKENS), _BLOCK_TOKENS):
        for i, start, stop in zip(chosen, documents.offsets, documents.offsets[1:], strict=False):
            tokens, most = np.sort(documents.tokens[start:stop]), int(OUTLIER_SHARE * (stop - start))
            if (tokens[most:] == tokens[:-most]).any():  # some token is there more often; to count them all is slower
                flagged[i] = (np.bincount(tokens, minlength=corpus.vocab_size) > limits * (stop - start)).any()
    return all_reduce_sum(corpus.ranks, flagged).astype(bool)

