"""Token ids of shards, in files that are made once per shard and tokenizer. Does not need torch.

A file holds one line of JSON padded to HEADER_BYTES, the token ids of all documents (each begins
with BOS), zeros up to a multiple of 8 bytes, and the offsets of the documents. `sha256` in the line
is over everything else. A file is renamed into place once it is complete.
"""

import hashlib
import os
import sys
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

FORMAT = "nanochat tokens 2"
HEADER_BYTES = 4096
GROUP_DOCUMENTS = 1024  # in memory at a time


class TokenShard:
    """The documents of one shard as token ids, mapped from disk, read only.

    tokens: (n_tokens,) uint16, or uint32 if the vocabulary has more than 65,536 entries.
    offsets: (n_docs + 1,) int64; document d is tokens[offsets[d]:offsets[d + 1]].
    verify: compare the checksum, once per process. Raise UserError if the file is damaged.
    """

    def __init__(self, path, verify=True):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self.header = header = parse_json(file.read(HEADER_BYTES))
            if header["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            self.vocab_size, self.bos_id = header["vocab_size"], header["bos_id"]
            self.n_docs, self.n_tokens = header["n_docs"], header["n_tokens"]
            dtype = token_dtype(self.vocab_size)
            offsets_at = _offsets_at(self.n_tokens, dtype)
            raw = np.memmap(self.path, mode="r").view(np.ndarray)  # a memmap is slow to slice
            if len(raw) != offsets_at + 8 * (self.n_docs + 1):
                raise ValueError(f"it has {len(raw):,} bytes")
            tokens_end = HEADER_BYTES + self.n_tokens * dtype.itemsize
            self.tokens = raw[HEADER_BYTES:tokens_end].view(dtype)
            self.offsets = raw[offsets_at:].view(np.int64)
            if verify and header["sha256"] != _digest(sha256_once(path, HEADER_BYTES), header):
                raise ValueError("its SHA-256 is not that in its header")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, getattr(error, "strerror", None) or error) from None


def token_shards(dataset, tokenizer, split="train", max_shards=None, num_threads=None):
    """Return the TokenShards of a split ("train" or "val"); make those that the cache lacks.

    The name of a file has the SHA-256 of its shard. The ranks of a node share the verification of
    the files, and all ranks share the work of making them, so every rank calls this.
    """
    sources = {"train": dataset.train_shards, "val": dataset.val_shards}[split][:max_shards]
    folder = base_dir() / "tokens" / tokenizer.tokenizer_id
    paths = {source: folder / dataset.checksums[source][:16] / f"{source.stem}.bin"
             for source in sources}
    ranks = Ranks.from_environment()
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE") or ranks.world_size)
    dist = sys.modules.get("torch.distributed")
    has_group = ranks.world_size > 1 and dist and dist.is_initialized()

    with ThreadPoolExecutor(num_threads or max(1, os.cpu_count() // n_local)) as pool:
        own = sources[ranks.local_rank::n_local] if has_group else sources
        list(pool.map(lambda source: _remove_invalid(paths[source], source, dataset), own))
        if has_group:
            dist.barrier()  # files that exist now are valid

        missing = [source for source in sources if not paths[source].exists()]
        order = []  # the share of this rank, then those of the next ones, which may be late
        for rank in range(ranks.rank, ranks.rank + ranks.world_size):
            order += missing[rank % ranks.world_size::ranks.world_size]
        for source in progress(order, desc=f"tokenising {split}", unit="shard",
                               shown=bool(missing) and ranks.is_main):
            _make(paths[source], source, tokenizer, pool)
    return [TokenShard(path, verify=False) for path in paths.values()]


def _remove_invalid(path, source, dataset):
    """Remove a file that is damaged, or whose shard has been changed since."""
    if not path.exists():
        return
    problem = f"{source} has changed"
    try:
        is_same = TokenShard(path).header.get("source") == _version(source)
        if is_same or sha256_once(source) == dataset.checksums[source]:
            return
    except UserError as error:
        problem = str(error).partition(";")[0]
    print0(f"tokenising again: {problem}")
    path.unlink(missing_ok=True)


def _version(source):
    stat = os.stat(source)
    return [stat.st_size, stat.st_mtime_ns]


def _make(path, source, tokenizer, pool):
    """Tokenise a shard, unless another process does it while this one waits for the lock."""
    try:
        with locked(path):
            if path.exists():
                return
            for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a killed process
                left.unlink(missing_ok=True)
            header = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
                      "tokenizer_id": tokenizer.tokenizer_id, "source": _version(source)}
            write_token_shard(path, _encoded(source, tokenizer, pool), header)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room there, or set "
                        "NANOCHAT_BASE_DIR to another folder") from None


def _encoded(source, tokenizer, pool):
    """Yield (lengths, tokens) of groups of documents, in order. The encoder releases the GIL."""
    def encode(text):
        return np.array([tokenizer.bos_id, *tokenizer.encode(text)], dtype)

    dtype = token_dtype(tokenizer.vocab_size)
    documents = read_documents(source)
    while group := list(islice(documents, GROUP_DOCUMENTS)):
        tokens = list(pool.map(encode, group))
        yield list(map(len, tokens)), np.concatenate(tokens)


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
        header = {"format": FORMAT, **header, "n_docs": len(lengths), "n_tokens": n_tokens}
        header["sha256"] = _digest(sha256_of(temporary, HEADER_BYTES), header)
        file.seek(0)
        file.write((json_bytes(header) + b"\n").ljust(HEADER_BYTES))


def token_dtype(vocab_size):
    """Return the smaller of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def damaged(path, reason):
    """Return the UserError for a file whose content has changed since it was written."""
    return UserError(f"{path} is damaged ({reason}); delete it, and it is made again")


def _digest(content_sha256, header):
    """Return the hex SHA-256 over that of the content and the other values of the header."""
    values = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(content_sha256.encode() + json_bytes(values)).hexdigest()


def _offsets_at(n_tokens, dtype):
    return -(-(HEADER_BYTES + n_tokens * dtype.itemsize) // 8) * 8
