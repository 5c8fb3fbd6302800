"""Token ids of shards, in files that are made once per shard and tokenizer. Does not need torch.

A file is an Arrow file with one column of lists, the token ids of the documents; each document
begins with BOS. The metadata of the column hold a JSON header with a SHA-256 over everything else.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

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
)
from nanochat.dataset import read_documents, unreadable
from nanochat.distributed import Ranks

GROUP_DOCUMENTS = 1024  # tokenised at a time


class TokenShard:
    """The documents of one shard as token ids, mapped from disk, read only.

    tokens: (n_tokens,) uint16, or uint32 if the vocabulary has more than 65,536 entries.
    offsets: (n_docs + 1,) int64; document d is tokens[offsets[d]:offsets[d + 1]].
    Raise UserError if the checksum is not that of the file.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            file = pa.ipc.open_file(pa.py_buffer(np.memmap(path, mode="r")))
            column = file.get_batch(0).column(0)
            column.validate()
            self.tokens, self.offsets = column.values.to_numpy(), column.offsets.to_numpy()
            self.header = parse_json(file.schema.metadata[b"header"])
            if self.header.pop("sha256") != _sha256(self.header, self.tokens, self.offsets):
                raise ValueError("its SHA-256 is not that in its header")
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(path, error) from None
        self.bos_id = self.header["bos_id"]
        self.n_docs, self.n_tokens = len(self.offsets) - 1, len(self.tokens)


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
    is_current = shard.header.get("modified") == os.stat(source).st_mtime_ns
    return shard if is_current or sha256_of(source) == dataset.checksums[source] else None


def _make(path, source, tokenizer, pool):
    """Tokenise a shard and return its TokenShard. The encoder releases the GIL."""
    def encode(text):
        return np.array([tokenizer.bos_id, *tokenizer.encode(text)], np.uint32)

    def groups():
        documents = read_documents(source)
        while group := list(islice(documents, GROUP_DOCUMENTS)):
            tokens = list(pool.map(encode, group))
            yield list(map(len, tokens)), np.concatenate(tokens)

    if path.exists():
        print0(f"tokenising again: {path} is damaged, or its text has changed")
    header = {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
              "modified": os.stat(source).st_mtime_ns}
    for left in path.parent.glob(f".{path.name}.*.tmp"):  # by a killed process
        left.unlink(missing_ok=True)
    write_token_shard(path, groups(), header)
    return TokenShard(path)


def write_token_shard(path, groups, header):
    """Write a file atomically from groups of documents: pairs (lengths, their tokens in a row).

    header: vocab_size, bos_id and other values that identify the tokens.
    """
    dtype = np.uint16 if header["vocab_size"] <= 1 << 16 else np.uint32
    lengths, tokens = [], []
    for group_lengths, group_tokens in groups:
        lengths.extend(group_lengths)
        tokens.append(np.asarray(group_tokens, dtype))
    offsets, tokens = np.cumsum([0, *lengths], dtype=np.int64), np.concatenate(tokens)
    header = {**header, "sha256": _sha256(header, tokens, offsets)}
    column = pa.LargeListArray.from_arrays(offsets, tokens)
    batch = pa.record_batch([column], ["tokens"], metadata={"header": json_bytes(header)})
    with (atomic_path(path) as temporary, open(temporary, "wb") as file,
          pa.ipc.new_file(file, batch.schema) as writer):
        writer.write_batch(batch)


def _sha256(header, tokens, offsets):
    digest = hashlib.sha256(json_bytes(header))
    digest.update(tokens)
    digest.update(offsets)
    return digest.hexdigest()
