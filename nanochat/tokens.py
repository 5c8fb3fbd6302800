"""Shards of text -> arrays of token ids on disk, made once for each shard and tokenizer. No torch.

A shard's file holds, in this order: one line of JSON padded to HEADER_BYTES, the token ids of all documents
(each begins with BOS), zeros up to a multiple of 8 bytes, the documents' offsets. It is renamed into place
when whole, so a file that is there is complete. `sha256` in the line is over all that follows it and the line's other
values; files of earlier versions have none.
"""

import contextlib
import hashlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import cpu_count
from pathlib import Path

import numpy as np

from nanochat.common import (
    UserError,
    atomic_path,
    base_dir,
    json_bytes,
    locked,
    open_binary,
    parse_json,
    print0,
    progress,
    sha256_of,
    sha256_once,
)
from nanochat.distributed import Ranks
from nanochat.shards import read_documents, row_count, shard_key

FORMAT = "nanochat tokens 1"
HEADER_BYTES = 4096
GROUP_CHARACTERS = 1 << 18  # text that one thread encodes in one go


class TokenShard:
    """One shard's documents as token ids, mapped from disk, read only.

    tokens: (n_tokens,) uint16, or uint32 when the vocabulary has more than 65,536 entries.
    offsets: (n_docs + 1,) int64; document d is tokens[offsets[d]:offsets[d + 1]] and begins with BOS.
    Errors: UserError when the file is missing or damaged: a process reads all of it once, for its digest.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.header = header = _read_header(self.path)
        self.vocab_size, self.bos_id = header["vocab_size"], header["bos_id"]
        self.n_docs, self.n_tokens = header["n_docs"], header["n_tokens"]
        dtype = token_dtype(self.vocab_size)
        offsets_at = _offsets_at(self.n_tokens, dtype)
        expected_bytes = offsets_at + 8 * (self.n_docs + 1)
        if (found_bytes := self.path.stat().st_size) != expected_bytes:
            raise damaged(self.path, f"{found_bytes} bytes long instead of {expected_bytes}")
        raw = np.memmap(self.path, mode="r").view(np.ndarray)  # slices of a memmap object are slow to make
        self.tokens = raw[HEADER_BYTES:HEADER_BYTES + self.n_tokens * dtype.itemsize].view(dtype)
        self.offsets = raw[offsets_at:].view(np.int64)
        if self.offsets[0] != 0 or self.offsets[-1] != self.n_tokens or (np.diff(self.offsets) < 1).any():
            raise damaged(self.path, "its offsets do not fit its tokens")
        if "sha256" in header and header["sha256"] != _digest(sha256_once(self.path, HEADER_BYTES), header):
            raise damaged(self.path, "its bytes differ from those written")


def token_shards(dataset, tokenizer, split="train", max_shards=None, num_threads=None):
    """The TokenShards of a split ("train" or "val"), in the dataset's order; made now where the cache lacks them.

    A file is kept by the tokenizer and its shard's key; a damaged one is made again, with a line that says why.
    Processes share the work through locks on the files; each returns when all shards are there.
    Errors: UserError from reading the sources, and when the cache cannot be written.
    """
    sources = {"train": dataset.train_shards, "val": dataset.val_shards}[split][:max_shards]
    folder, tokenizer_id = base_dir() / "tokens", tokenizer.tokenizer_id
    paths = {source: folder / tokenizer_id / shard_key(source) / f"{source.stem}.bin" for source in sources}
    ranks = Ranks.from_environment()
    num_threads = num_threads or max(1, cpu_count() // ranks.world_size)

    def kept(source):
        path, by_dataset = paths[source], folder / dataset.dataset_id / tokenizer_id / paths[source].name
        try:
            return TokenShard(path)
        except UserError as error:
            if path.exists():
                print0(f"tokenising again: {str(error).partition(';')[0]}")
        with contextlib.suppress(UserError):
            return _kept_by_dataset(by_dataset, source, tokenizer)

    with ThreadPoolExecutor(num_threads) as pool:
        shards = dict(zip(sources, pool.map(kept, sources), strict=True))
        missing = [source for source in sources if shards[source] is None]
        n_rows = {source: row_count(source) for source in missing}
        with progress(total=sum(n_rows.values()), unit="doc", unit_scale=True, desc=f"tokenising {split}",
                      shown=bool(missing) and ranks.is_main) as bar:
            encode_all = partial(_map_ahead, pool, partial(_encode, tokenizer), ahead=2 * num_threads)
            for source in _own_share_first(missing, ranks):
                end = bar.n + n_rows[source]
                groups = _counted(encode_all(_grouped(read_documents(source))), bar)
                shards[source] = _make(paths[source], source, tokenizer, groups)
                bar.update(end - bar.n)  # blank documents, and shards that another process made
    return list(shards.values())


def token_dtype(vocab_size):
    """The smaller of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_token_shard(path, groups, header):
    """Write a shard's file atomically from groups of documents: pairs (lengths, their tokens end to end).

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


def damaged(path, reason):
    """The UserError for a file of tokens that cannot be what was written."""
    return UserError(f"{path} is damaged ({reason}); delete it, and it is made again")


def _kept_by_dataset(path, source, tokenizer):
    """The TokenShard where earlier versions kept it; None when it does not fit. Errors: as TokenShard."""
    shard = TokenShard(path)
    return shard if shard.header == {**shard.header, **_header(source, tokenizer)} else None


def _make(path, source, tokenizer, groups):
    """Tokenise one shard, unless another process does it while we wait for the lock."""
    try:
        with locked(path):
            with contextlib.suppress(UserError):
                return TokenShard(path)
            for torn in path.parent.glob(f".{path.name}.*.tmp"):  # left by a process that was killed
                torn.unlink(missing_ok=True)
            write_token_shard(path, groups, _header(source, tokenizer))
            return TokenShard(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); make room there, or move the cache with "
                        "NANOCHAT_BASE_DIR") from None


def _header(source, tokenizer):
    return {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id,
            "tokenizer_id": tokenizer.tokenizer_id, "source_bytes": source.stat().st_size}


def _read_header(path):
    try:
        with open_binary(path) as file:
            header = parse_json(file.read(HEADER_BYTES))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; token_shards makes it") from None
    except OSError as error:
        raise damaged(path, error.strerror) from None
    except ValueError:
        raise damaged(path, "its header is not JSON") from None
    numbers = ("vocab_size", "bos_id", "n_docs", "n_tokens")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise damaged(path, f"its format is not {FORMAT!r}")
    if any(type(header.get(name)) is not int or header[name] < 0 for name in numbers):
        raise damaged(path, f"its header lacks one of {', '.join(numbers)}")
    return header


def _digest(content_sha256, header):
    """Hex SHA-256 over the digest of the tokens and offsets and the header's other values."""
    values = {name: value for name, value in header.items() if name != "sha256"}
    return hashlib.sha256(content_sha256.encode() + json_bytes(values)).hexdigest()


def _offsets_at(n_tokens, dtype):
    return -(-(HEADER_BYTES + n_tokens * dtype.itemsize) // 8) * 8


def _encode(tokenizer, texts):
    """(lengths, tokens end to end) of a group of documents. The encoder works outside Python's lock."""
    documents = [np.array([tokenizer.bos_id, *tokenizer.encode(text)], token_dtype(tokenizer.vocab_size))
                 for text in texts]
    return [len(tokens) for tokens in documents], np.concatenate(documents)


def _map_ahead(pool, function, items, ahead):
    """`pool.map` that takes its items as it goes, so that a shard's text is never in memory as a whole."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _grouped(texts):
    group, n_characters = [], 0
    for text in texts:
        group.append(text)
        n_characters += len(text)
        if n_characters >= GROUP_CHARACTERS:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def _counted(groups, bar):
    for lengths, tokens in groups:
        yield lengths, tokens
        bar.update(len(lengths))


def _own_share_first(sources, ranks):
    """This rank's share, then the others' in turn: most are made by then, a slow rank's are taken over."""
    shares = [sources[rank::ranks.world_size] for rank in range(ranks.world_size)]
    return [source for share in shares[ranks.rank:] + shares[:ranks.rank] for source in share]
