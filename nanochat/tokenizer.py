"""Byte-level BPE: trained with rustbpe, run with tiktoken, saved as plain text and in upstream's format."""

import concurrent.futures
import os
import pickle
import re
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanochat.common import UserError, atomic_path, base_dir, write_text
from nanochat.tokenizer_files import read_pickle_file, read_text_file, to_text, vocabulary_id

# GPT-4's split pattern, except that digits go in groups of one or two instead of up to three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (
    "bos", "user_start", "user_end", "assistant_start", "assistant_end",
    "python_start", "python_end", "output_start", "output_end",
))
BOS = SPECIAL_TOKENS[0]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 24
TEXT_FILE, PICKLE_FILE, TOKEN_BYTES_FILE = "tokenizer.txt", "tokenizer.pkl", "token_bytes.pt"

# Both rustbpe and tiktoken panic on a million blanks in a row, so that longer texts go to them in parts.
_PART_CHARS = 100_000
_PROBE = "".join(map(chr, range(1, 256))) + " Straße, 漢字; x² = 12345 \t\n\r\n  🚆 "  # no text may be lost
_WORD_END = re.compile(r"\S(?= )")


class Tokenizer:
    """A vocabulary: byte strings by merge rank, then special tokens; ids 0 .. vocab_size - 1 without a gap."""

    def __init__(self, ranks, special_tokens, pattern=SPLIT_PATTERN):
        """ranks: {bytes: id}; special_tokens: {str: id}. Errors: UserError when they do not make a vocabulary."""
        _check_vocabulary(ranks, special_tokens)
        try:
            self._encoding = tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        except ValueError as error:
            raise UserError(f"the split pattern is not a regular expression ({error})") from None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(f"the split pattern {pattern[:80]!r} leaves out text")
        self._ranks = ranks
        self.vocabulary = (ranks, special_tokens, pattern)
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos_id = special_tokens[BOS]
        self.tokenizer_id = vocabulary_id(*self.vocabulary)

    def encode(self, text):
        """Token ids of a text, without BOS; text that spells a special token is ordinary text."""
        if len(text) <= _PART_CHARS:
            return self._encoding.encode_ordinary(text)
        return [token_id for part in _parts(text) for token_id in self._encoding.encode_ordinary(part)]

    def encode_batch(self, texts, num_threads=None):
        """Token ids of each text, encoded in threads (default: one a core)."""
        with concurrent.futures.ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. Errors: KeyError for an id that is none."""
        return self._encoding.decode(ids)

    def token_bytes(self):
        """int32 (vocab_size): how many bytes of text each token stands for; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._ranks.items():
            lengths[token_id] = len(token)
        return lengths

    def save(self, folder):
        """Write tokenizer.txt, and for upstream's programs tokenizer.pkl and token_bytes.pt, each atomically."""
        import torch

        folder = Path(folder)
        try:
            with atomic_path(folder / PICKLE_FILE) as temporary:
                temporary.write_bytes(pickle.dumps(self._encoding))
            with atomic_path(folder / TOKEN_BYTES_FILE) as temporary:
                torch.save(torch.from_numpy(self.token_bytes()), temporary)
            write_text(folder / TEXT_FILE, to_text(*self.vocabulary))
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            reason = str(error).splitlines()[0]
            raise UserError(f"the tokenizer cannot be saved in {folder} ({reason}); make room there, or give another "
                            "--tokenizer-dir") from None


def train_tokenizer(texts, vocab_size):
    """Tokenizer of `vocab_size` tokens, the nine special ones among them, trained on an iterable of texts.

    Errors: UserError when the vocabulary is smaller than the bytes and special tokens, or larger than the text allows.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} is too small: the 256 bytes and {len(SPECIAL_TOKENS)} "
                        f"special tokens take {MIN_VOCAB_SIZE}; choose a larger one")
    if vocab_size > MAX_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} is too large: at most {MAX_VOCAB_SIZE} tokens")
    trainer = rustbpe.Tokenizer()
    parts = (part for text in texts for part in _parts(text))
    trainer.train_from_iterator(parts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    largest = len(ranks) + len(SPECIAL_TOKENS)
    if largest < vocab_size:
        raise UserError(f"a vocabulary of {vocab_size} is too large for this text, which has pairs to merge "
                        f"for {largest} tokens at most; choose a smaller one or train on more text")
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def load_tokenizer(folder=None):
    """The Tokenizer saved in a folder, ours or upstream's; empty or None: the cache's own.

    Errors: UserError naming the file of what is wrong.
    """
    folder = Path(folder or base_dir() / "tokenizer")
    readers = {TEXT_FILE: read_text_file, PICKLE_FILE: read_pickle_file}
    there = [folder / name for name in readers if os.path.exists(folder / name)]  # no error for too long a name
    if not there:
        raise UserError(f"no tokenizer in {folder} (neither {TEXT_FILE} nor {PICKLE_FILE}); "
                        "train one with: python -m scripts.tok_train")
    vocabularies = [readers[path.name](path) for path in there]
    if vocabularies[0] != vocabularies[-1]:
        raise UserError(f"{there[0]} and {there[-1].name} beside it are different tokenizers, "
                        "as another program wrote one of them; delete the one you do not want")
    try:
        return Tokenizer(*vocabularies[0])
    except UserError as error:
        raise UserError(f"{there[0]}: {error}; train the tokenizer again or copy the file again") from None


def _parts(text):
    """Cut a long text where the split pattern cuts it anyway: before a blank that follows a word.

    A stretch of `_PART_CHARS` without such a place is cut all the same: it still decodes to itself.
    """
    start = 0
    while len(text) - start > _PART_CHARS:
        word_end = _WORD_END.search(text, start + _PART_CHARS // 2, start + _PART_CHARS)
        end = word_end.end() if word_end else start + _PART_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _check_vocabulary(ranks, special_tokens):
    ids = sorted([*ranks.values(), *special_tokens.values()])
    if ids != list(range(len(ids))):
        raise UserError("the token ids are not 0, 1, 2, ... without a gap")
    if missing := sum(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(f"{missing} of the 256 single bytes have no token")
    if b"" in ranks:
        raise UserError("one token stands for no byte at all")
    if BOS not in special_tokens:
        raise UserError(f"there is no special token {BOS}")
