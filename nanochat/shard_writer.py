"""Documents -> a folder of parquet shards: shuffled, without duplicates, whole or not there at all.

The order is that of the documents' content hashes: it looks random, depends on nothing but the set of
documents, and puts equal documents side by side, so that none is in both the training and the validation split.
"""

import contextlib
import hashlib
import math
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, locked, progress, sha256_of, write_checksums, write_json

MANIFEST = "dataset.json"
_VAL_SHARE, _VAL_MAX_BYTES = 0.05, 20e6  # validation: a twentieth of the text, but never more than 20 MB
_SHARD_MIN_BYTES, _SHARD_MAX_BYTES = 4e6, 100e6  # text in a shard; small ones so that even small datasets have several
_BUCKET_BYTES, _MAX_BUCKETS = 64e6, 256  # what is sorted in memory at a time


def prepare_shards(folder, name, documents, expected_bytes, notes=dict):
    """Make `folder` (shard_00000.parquet ..., the last for validation, and dataset.json) unless it is there.

    documents: function returning an iterable of str; expected_bytes: about how much text that is; notes: function
    returning what else dataset.json shall say, called once all documents are read.
    One process writes while others wait. Errors: UserError for fewer than 2 distinct documents or a full disk;
    whatever goes wrong, no half-written folder is left.
    """
    with locked(folder):
        if folder.exists():
            return
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)  # left behind by a killed process
        temporary.mkdir(parents=True)
        try:
            _write(documents(), temporary, name, expected_bytes, notes)
            os.rename(temporary, folder)
        except OSError as error:
            raise UserError(f"cannot prepare {folder} ({error.strerror or error}); make room there, or move the cache "
                            "with NANOCHAT_BASE_DIR") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write(documents, folder, name, expected_bytes, notes):
    spill = folder / "spill"
    spill.mkdir()
    buckets, total_bytes = _spill(documents, spill, name, expected_bytes)
    content, n_train = hashlib.sha256(), 0
    for group in _groups(_in_digest_order(buckets, content), total_bytes):
        if not (folder / "validation").exists():
            _write_shard(folder / "validation", group)
        else:
            _write_shard(folder / shard_name(n_train), group)
            n_train += 1
    shutil.rmtree(spill)
    if n_train == 0:
        raise UserError(f"{name} holds fewer than 2 distinct documents with text in them; at least 2 are needed, "
                        "one to train on and one to validate on")
    (folder / "validation").rename(folder / shard_name(n_train))  # the last in name order
    shards = [shard_name(i) for i in range(n_train + 1)]
    write_json(folder / MANIFEST, {"dataset_id": f"{name}-{content.hexdigest()[:8]}",
                                   "shards": shards, **notes()})
    write_checksums(folder, {name: sha256_of(folder / name) for name in shards})


def shard_name(index):
    return f"shard_{index:05d}.parquet"


def _groups(documents, total_bytes):
    """Cut a stream of documents into lists, one a shard: first the validation shard's, then the training shards'."""
    val_bytes = min(_VAL_SHARE * total_bytes, _VAL_MAX_BYTES)
    train_bytes = total_bytes - val_bytes
    n_train = math.ceil(train_bytes / min(max(train_bytes / 64, _SHARD_MIN_BYTES), _SHARD_MAX_BYTES))
    group, size, boundary = [], 0, val_bytes
    for data in documents:
        if group and size >= boundary:
            yield group
            group = []
            while boundary <= size:
                boundary += train_bytes / n_train
        group.append(data)
        size += len(data)
    if boundary == val_bytes and len(group) > 1:  # nearly all were duplicates, and no training shard came about
        yield group[:1]
        group = group[1:]
    if group:
        yield group


def _spill(documents, folder, name, expected_bytes):
    """Sort documents roughly by digest into files small enough to be sorted in memory: (their paths, total bytes)."""
    n_buckets = min(max(math.ceil(expected_bytes / _BUCKET_BYTES), 1), _MAX_BUCKETS)
    paths = [folder / str(i) for i in range(n_buckets)]
    total_bytes = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        bar = stack.enter_context(progress(total=expected_bytes, unit="B", unit_scale=True, desc=name))
        for text in documents:
            if not text or text.isspace():
                continue
            data = text.encode("utf-8", "replace")  # a lone surrogate, possible in JSON, becomes a question mark
            bucket = int.from_bytes(_digest(data)[:4], "big") * n_buckets >> 32
            files[bucket].write(len(data).to_bytes(8, "little") + data)
            total_bytes += len(data)
            bar.update(len(data))
        bar.total = bar.n
    return paths, total_bytes


def _in_digest_order(paths, content):
    """Yield the distinct documents (UTF-8) by content hash, and feed the hashes to `content`."""
    last = None
    for path in paths:
        with open(path, "rb") as file:
            documents = [file.read(int.from_bytes(prefix, "little")) for prefix in iter(lambda f=file: f.read(8), b"")]
        for digest, data in sorted((_digest(data), data) for data in documents):
            if digest != last:
                content.update(digest)
                yield data
            last = digest


def _digest(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def _write_shard(path, documents):
    column = pa.array(documents, pa.binary()).cast(pa.string())
    pq.write_table(pa.table({"text": column}), path, row_group_size=1024, compression="zstd", write_statistics=False)
