"""Token ids of shards, in files that are made once per shard and tokenizer. Does not need torch.

A file holds one line of JSON padded to HEADER_BYTES, the token ids of all documents (each begins
with BOS), zeros up to a multiple of 8 bytes, and the offsets of the documents. `sha256` in the line
is over everything else. A file is renamed into place once it is complete.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from nanochat.common import (
    UserError,
    atomic_path,
    base_dir,
    json_bytes,
    locked,
    parse_json,
    print0,
    progress,
    sha256_of,
    sha256_once,
)
from nanochat.dataset import read_documents
from nanochat.distributed import Ranks

HEADER_BYTES = 4096
GROUP_DOCUMENTS = 1024  # in memory at a time


class TokenShard:
    """The documents of one shard as token ids, mapped from disk, read only.

    tokens: (n_tokens,) uint16, or uint32 if the vocabulary has more than 65,536 entries.
    offsets: (n_docs + 1,) int64; document d is tokens[offsets[d]:offsets[d + 1]].
    Raise UserError if the checksum, computed once per process, is not that of the file.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with open(path, "rb") as file:
                self.header = header = parse_json(file.read(HEADER_BYTES))
            if header["sha256"] != _digest(sha256_once(path, HEADER_BYTES), header):
                raise ValueError("its SHA-256 is not that in its header")
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot read {path} ({reason}); delete it: it is made again") from None
        self.vocab_size, self.bos_id = header["vocab_size"], header["bos_id"]
        self.n_docs, self.n_tokens = header["n_docs"], header["n_tokens"]
        dtype = token_dtype(self.vocab_size)
        raw = np.memmap(path, mode="r").view(np.ndarray)  # a memmap is slow to slice
        self.tokens = raw[HEADER_BYTES : HEADER_BYTES + self.n_tokens * dtype.itemsize].view(dtype)
        self.offsets = raw[_offsets_at(self.n_tokens, dtype) :].view(np.int64)


def token_shards(dataset, tokenizer, split="train", max_shards=None):
    """Return the TokenShards of a split ("train" or "val"); make those that the cache lacks.

    The name of a file has the SHA-256 of its shard. Ranks that call this at the same time share
    the work.
    """
    def path_of(source):
        return folder / dataset.checksums[source][:16] / f"{source.stem}.bin"

    sources = {"train": dataset.train_shards, "val": dataset.val_shards}[split][:max_shards]
    folder = base_dir() / "tokens" / tokenizer.tokenizer_id
    ranks = Ranks.from_environment()
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size)
    with ThreadPoolExecutor(max(1, os.cpu_count() // n_local)) as pool:
        found = pool.map(lambda source: _valid_shard(path_of(source), source, dataset), sources)
        shards = dict(zip(sources, found, strict=True))
        missing = [source for source in sources if shards[source] is None]
        first = len(missing) * ranks.rank // ranks.world_size  # each rank begins at another one
        for source in progress(missing[first:] + missing[:first], desc=f"tokenising {split}",
                               unit="shard", shown=bool(missing) and ranks.is_main):
            with locked(path_of(source)):
                shards[source] = (_valid_shard(path_of(source), source, dataset)
                                  or _make(path_of(source), source, tokenizer, pool))
    return list(shards.values())


def _valid_shard(path, source, dataset):
    """Return a TokenShard, or None if it is missing, damaged, or its text has changed since."""
    try:
        shard = TokenShard(path)
    except UserError:
        return None
    is_current = shard.header.get("source") == _version(source)
    return shard if is_current or sha256_once(source) == dataset.checksums[source] else None


def _version(source):
    stat = os.stat(source)
    return [stat.st_size, stat.st_mtime_ns]


def _make(path, source, tokenizer, pool):
    """Tokenise a shard and return its TokenShard. The encoder releases the GIL."""
    def encode(text):
        return np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype)

    def groups():
        documents = read_documents(source)
        while group := list(islice(documents, GROUP_DOCUMENTS)):
            tokens = list(pool.map(encode, group))
            yield list(map(len, tokens)), np.concatenate(tokens)

    if path.exists():
        print0(f"tokenising again: {path} is damaged, or its text has changed")
    dtype = token_dtype(tokenizer.vocab_size)
    header = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
              "source": _version(source)}
    try:
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a killed process
            left.unlink(missing_ok=True)
        write_token_shard(path, groups(), header)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room there, or set "
                        "NANOCHAT_BASE_DIR to another folder") from None
    return TokenShard(path)


def write_token_shard(path, groups, header):
    """Write a file atomically from groups of documents: pairs (lengths, their tokens in a row).

    header: vocab_size, bos_id and whatever else identifies the tokens.
    """
    dtype = token_dtype(header["vocab_size"])
    lengths = []
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for group_lengths, tokens in groups:
            lengths.extend(group_lengths)
            file.write(np.ascontiguousarray(tokens, dtype))
        n_tokens = sum(lengths)
        file.write(bytes(_offsets_at(n_tokens, dtype) - file.tell()))
        file.write(np.cumsum([0, *lengths], dtype=np.int64))
        file.flush()
        header = {**header, "n_docs": len(lengths), "n_tokens": n_tokens}
        header["sha256"] = _digest(sha256_of(temporary, HEADER_BYTES), header)
        file.seek(0)
        file.write((json_bytes(header) + b"\n").ljust(HEADER_BYTES))


def token_dtype(vocab_size):
    """Return the smaller of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _digest(content_sha256, header):
    """Return the hex SHA-256 over that of the content and the other values of the header."""
    values = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(content_sha256.encode() + json_bytes(values)).hexdigest()


def _offsets_at(n_tokens, dtype):
    return -(-(HEADER_BYTES + n_tokens * dtype.itemsize) // 8) * 8
