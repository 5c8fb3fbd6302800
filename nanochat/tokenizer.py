"""Byte-level BPE: trained with rustbpe, run with tiktoken, saved in upstream's files.

A vocabulary is three things: ranks {token bytes: id}, special tokens {name: id}, split pattern.
"""

import base64
import hashlib
import io
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.common import UserError, atomic_path, base_dir

# GPT-4's split pattern, but digits form groups of one or two instead of up to three
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (
    "bos", "user_start", "user_end", "assistant_start", "assistant_end",
    "python_start", "python_end", "output_start", "output_end",
))
BOS = SPECIAL_TOKENS[0]
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 24
PICKLE_FILE, TOKEN_BYTES_FILE = "tokenizer.pkl", "token_bytes.pt"

_ID_PREFIX = "nanochat-"  # the tokenizer_id, in the name of a saved encoding, detects damage
_PART_CHARS = 100_000  # rustbpe and tiktoken panic on a million blanks in a row
_PROBE = "".join(map(chr, range(1, 256))) + " Straße, 漢字; x² = 12345 \t\n\r\n  🚆 "
_WORD_END = re.compile(r"\S(?= )")


class Tokenizer:
    """A vocabulary with ids 0 to vocab_size - 1: byte strings by merge rank, special tokens."""

    def __init__(self, ranks, special_tokens, pattern=SPLIT_PATTERN):
        _check_vocabulary(ranks, special_tokens, pattern)
        self.vocabulary = (ranks, special_tokens, pattern)
        self.tokenizer_id = vocabulary_id(*self.vocabulary)
        self._encoding = tiktoken.Encoding(
            _ID_PREFIX + self.tokenizer_id, pat_str=pattern, mergeable_ranks=ranks,
            special_tokens=special_tokens)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(f"the split pattern {pattern[:80]!r} leaves out text")
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos_id = special_tokens[BOS]

    def encode(self, text):
        """Return the token ids of a text, without BOS. Special tokens in it are ordinary text."""
        if len(text) <= _PART_CHARS:
            return self._encoding.encode_ordinary(text)
        return [token for part in _parts(text) for token in self._encoding.encode_ordinary(part)]

    def decode(self, ids):
        """Return the text of token ids. U+FFFD stands for bytes that are not UTF-8."""
        return self._encoding.decode(ids)

    def token_bytes(self):
        """Return int32 (vocab_size,): bytes of text per token, 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self.vocabulary[0].items():
            lengths[token_id] = len(token)
        return lengths

    def save(self, folder):
        """Write a pickled tiktoken.Encoding and, for upstream's programs, token_bytes.pt."""
        import torch

        token_bytes = io.BytesIO()  # to a full disk, torch.save raises a RuntimeError
        torch.save(torch.from_numpy(self.token_bytes()), token_bytes)
        with atomic_path(Path(folder) / TOKEN_BYTES_FILE) as temporary:
            temporary.write_bytes(token_bytes.getvalue())
        with atomic_path(Path(folder) / PICKLE_FILE) as temporary:
            temporary.write_bytes(pickle.dumps(self._encoding))


def train_tokenizer(texts, vocab_size):
    """Return a Tokenizer of `vocab_size` tokens, nine of them special, trained on texts."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"a vocabulary of {vocab_size} is not possible: choose {MIN_VOCAB_SIZE} "
                        f"(256 bytes and special tokens) to {MAX_VOCAB_SIZE}")
    import rustbpe  # only here, so that a machine without it can train a model

    trainer = rustbpe.Tokenizer()
    parts = (part for text in texts for part in _parts(text))
    trainer.train_from_iterator(parts, vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    largest = len(ranks) + len(SPECIAL_TOKENS)
    if largest < vocab_size:
        raise UserError(f"a vocabulary of {vocab_size} is too large for this text, whose pairs "
                        f"make {largest} tokens at most; choose fewer or train on more text")
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def load_tokenizer(folder=None):
    """Return the Tokenizer in a folder, ours or upstream's; by default that of the cache.

    Raise UserError if the pickle needs anything but tiktoken.Encoding, or is damaged.
    """
    path = Path(folder or base_dir() / "tokenizer") / PICKLE_FILE
    if not os.path.exists(path):
        raise UserError(f"there is no {path}; give another --tokenizer-dir, or train a tokenizer "
                        "with python -m scripts.tok_train and the same --dataset and "
                        "--tokenizer-dir")
    try:
        state = _EncodingUnpickler(io.BytesIO(path.read_bytes())).load().state
        tokenizer = Tokenizer(state["mergeable_ranks"], state["special_tokens"], state["pat_str"])
        name = str(state["name"])
        if name.startswith(_ID_PREFIX) and name != _ID_PREFIX + tokenizer.tokenizer_id:
            raise ValueError(f"its content is not that of {name}")
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"cannot read {path} ({type(error).__name__}: {error}); train the "
                        "tokenizer again, or copy it from a source that you trust") from None
    return tokenizer


def vocabulary_id(ranks, special_tokens, pattern):
    """Return 12 hex digits of a SHA-256 over everything that decides how a text is encoded."""
    lines = [f"pattern {json.dumps(pattern)}"]
    lines += [f"special {json.dumps(name)} {i}" for name, i in _by_id(special_tokens)]
    lines += [f"{base64.b64encode(token).decode()} {i}" for token, i in _by_id(ranks)]
    return hashlib.sha256(("\n".join(lines) + "\n").encode()).hexdigest()[:12]


def _by_id(tokens):
    return sorted(tokens.items(), key=lambda item: item[1])


class _Encoding:
    """The stand-in for tiktoken.core.Encoding while a pickle is read."""

    def __setstate__(self, state):
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Refuse every name but tiktoken.core.Encoding."""

    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"refused: it asks for {module}.{name}"[:200])
        return _Encoding


def _parts(text):
    """Cut a long text before blanks that follow a word, where the split pattern cuts it, too."""
    start = 0
    while len(text) - start > _PART_CHARS:
        word_end = _WORD_END.search(text, start + _PART_CHARS // 2, start + _PART_CHARS)
        end = word_end.end() if word_end else start + _PART_CHARS
        yield text[start:end]
        start = end
    yield text[start:]


def _check_vocabulary(ranks, special_tokens, pattern):
    """Raise UserError unless every text can be encoded and decoded. Files can hold anything."""
    types = [{(type(key), type(i)) for key, i in tokens.items()}
             for tokens in (ranks, special_tokens) if type(tokens) is dict]
    if types != [{(bytes, int)}, {(str, int)}] or type(pattern) is not str:
        raise UserError("it is not a vocabulary of tokens and their ids")
    ids = sorted([*ranks.values(), *special_tokens.values()])
    if ids != list(range(len(ids))):
        raise UserError("the token ids are not 0, 1, 2, ... without a gap")
    if BOS not in special_tokens or not ranks.keys() >= {bytes([i]) for i in range(256)}:
        raise UserError(f"there is no token {BOS}, or none for one of the 256 single bytes")
