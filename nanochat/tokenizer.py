"""Byte-level BPE: trained with rustbpe, run with tiktoken, saved as plain text that upstream's programs need not read
(for them a tokenizer.pkl and token_bytes.pt are written beside it)."""

import base64
import binascii
import functools
import hashlib
import json
import operator
import os
from pathlib import Path

import numpy as np
import rustbpe
import tiktoken

from nanochat.errors import UserError
from nanochat.files import write_text

# GPT-4's split pattern with number groups of one or two digits instead of up to three.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = tuple(f"<|{name}|>" for name in (
    "bos", "user_start", "user_end", "assistant_start", "assistant_end",
    "python_start", "python_end", "output_start", "output_end",
))
BOS = SPECIAL_TOKENS[0]
TEXT_FILE = "tokenizer.txt"
_HEADER = "nanochat tokenizer, version 1"


class Tokenizer:
    """A vocabulary: ids 0..n-1 are byte strings by merge rank, the special tokens follow."""

    def __init__(self, ranks, special_tokens, pattern=SPLIT_PATTERN):
        """ranks: {bytes: id}; special_tokens: {str: id}. Errors: UserError when they do not make a vocabulary."""
        _check_vocabulary(ranks, special_tokens)
        try:
            self._encoding = tiktoken.Encoding(
                "nanochat", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
        except ValueError as error:
            raise UserError(f"the tokenizer's split pattern is not a regular expression ({error})") from None
        self.ranks, self.special_tokens, self.pattern = ranks, special_tokens, pattern
        self.vocab_size = len(ranks) + len(special_tokens)
        self.bos_id = special_tokens[BOS]

    def encode(self, text):
        """Token ids of a text, without BOS; text that spells a special token is ordinary text."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts, num_threads=None):
        """Token ids of each text, encoded in threads (default: one a core)."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads or os.cpu_count())

    def decode(self, ids):
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        return self._encoding.decode(ids)

    def token_bytes(self):
        """int32 (vocab_size): how many bytes of text each token stands for; 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths

    @functools.cached_property
    def tokenizer_id(self):
        """12 hex digits of a SHA-256 over pattern, special tokens and ranks."""
        return hashlib.sha256(_to_text(self).encode()).hexdigest()[:12]

    def save(self, folder):
        """Write tokenizer.txt, atomically."""
        write_text(Path(folder) / TEXT_FILE, _to_text(self))


def train_tokenizer(texts, vocab_size):
    """Tokenizer with `vocab_size` tokens, the special ones among them, trained on an iterable of texts."""
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def load_tokenizer(folder):
    """The Tokenizer saved in a folder. Errors: UserError naming the file, and the line, of what is wrong."""
    path = Path(folder) / TEXT_FILE
    if not path.exists():
        raise UserError(f"no tokenizer in {folder}; train one with: python -m scripts.tok_train")
    return _from_text(path)


def _to_text(tokenizer):
    """Header, pattern, special tokens, then tiktoken's own notation: base64 of the token's bytes and its rank."""
    lines = [_HEADER, f"pattern {json.dumps(tokenizer.pattern)}"]
    by_id = operator.itemgetter(1)
    lines += [f"special {json.dumps(name)} {i}" for name, i in sorted(tokenizer.special_tokens.items(), key=by_id)]
    lines += [f"{base64.b64encode(token).decode()} {i}" for token, i in sorted(tokenizer.ranks.items(), key=by_id)]
    return "\n".join(lines) + "\n"


def _from_text(path):
    pattern, special_tokens, ranks, number = None, {}, {}, 1
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if lines[:1] != [_HEADER]:
            raise ValueError(f"does not begin with {_HEADER!r}")
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007 (named in the error)
            key, value = line.split(" ", 1)
            if key == "pattern":
                pattern = json.loads(value)
            elif key == "special":
                name, token_id = value.rsplit(" ", 1)
                special_tokens[json.loads(name)] = int(token_id)
            else:
                ranks[base64.b64decode(key, validate=True)] = int(value)
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path}, line {number}: damaged ({error}); train or copy the tokenizer again") from None
    try:
        return Tokenizer(ranks, special_tokens, pattern)
    except UserError as error:
        raise UserError(f"{path}: {error}; train or copy the tokenizer again") from None


def _check_vocabulary(ranks, special_tokens):
    ids = sorted([*ranks.values(), *special_tokens.values()])
    if ids != list(range(len(ids))):
        raise UserError("the token ids are not 0, 1, 2, ... without a gap")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{len(missing)} of the 256 single bytes have no token")
    if BOS not in special_tokens:
        raise UserError(f"there is no special token {BOS}")
