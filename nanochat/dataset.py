"""Datasets, named ones or folders of text, as parquet shards of documents.

python -m nanochat.dataset -n 8                 download 8 training shards of climbmix
python -m nanochat.dataset --dataset stdlib     prepare the standard library of this Python
python -m nanochat.dataset --dataset my_folder  prepare a folder of text (see text_folder)

Documents of stdlib and of folders are copied into shards in the cache, in the order of their
hashes, which is as good as random and depends on the text only. The first 5 % are the validation
split, unless the name of a file says that it is for validation. The validation split of a download
is its last shard.
"""

import argparse
import hashlib
import math
import os
import platform
import re
import shutil
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat import stdlib_corpus
from nanochat.common import (
    DIGESTS,
    NAME_LENGTH,
    QUIET_HELP,
    UserError,
    base_dir,
    command,
    locked,
    matches_checksum,
    print0,
    progress,
    read_json,
    set_quiet,
    sha256_of,
    write_checksums,
    write_json,
)
from nanochat.text_folder import SPLITS, VAL_SHARE, TextFolder, parquet_rows, unreadable

# Hugging Face repositories of shards 0 to last_shard; the last one is the validation split
Download = namedtuple("Download", "repo last_shard")
DOWNLOADS = {
    "climbmix": Download("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": Download("karpathy/fineweb-edu-100b-shuffle", 1822),
}
NAMED_DATASETS = ("stdlib", *DOWNLOADS)
DATASET_HELP = f"{', '.join(NAMED_DATASETS)}, or a folder of text (%(default)s)"
MANIFEST = "dataset.json"

_RULES = "5"  # raise it when the same files give other documents
_VAL_MAX_BYTES = 20e6
_SHARD_MIN_BYTES = 4e6  # small, so that small datasets have several shards too
_SHARD_MAX_BYTES = 100e6
_N_BUCKETS = 64  # one is sorted in memory at a time

_IN_VALIDATION = "training documents left out, because validation has them too"
_IN_TEST = "training documents left out, because test has them too"
_REPEATED = "training documents are repetitions and are kept"


@dataclass(frozen=True)
class Dataset:
    """The training and validation shards of a dataset. `checksums`: the SHA-256 per shard."""

    dataset_id: str
    train_shards: tuple[Path, ...]
    val_shards: tuple[Path, ...]
    checksums: dict[Path, str]


def open_dataset(name):
    """Return the Dataset of stdlib, of a download, or of a folder of text.

    stdlib and folders are prepared on first use. A folder with a changed file is prepared again
    and gets another dataset_id.
    """
    name = str(name)
    if name in DOWNLOADS:
        return _open_download(name)
    if name == "stdlib":
        corpus = f"stdlib-{platform.python_version()}"
        folder = base_dir() / f"base_data_{corpus}-{stdlib_corpus.RULES}"
        texts = stdlib_corpus.corpus_documents()
        documents = (("train", text.encode("utf-8", "replace")) for text in texts)
        prepare_shards(folder, corpus, documents, stdlib_corpus.CORPUS_CHARS, distinct=True)
        return _open_prepared(folder)[0]

    path = Path(name if os.path.isdir(name) else os.path.expanduser(name))
    if not os.path.isdir(path):  # Path.is_dir raises an error if the name is too long
        problem = "is a file" if os.path.exists(path) else "is not a folder"
        names = ", ".join(NAMED_DATASETS)
        raise UserError(f"--dataset {name!r} {problem}; give a folder of text or one of {names}")
    return _open_folder(path, TextFolder(path))


def _open_folder(path, text):
    """Prepare a TextFolder and print the split of each of its files."""
    if not text.split("train"):
        reasons = "; ".join(text.account()) or "no files"
        raise UserError(f"{path} has no text to train on; {reasons}")
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(sha256_of, (file.path for file in text.files)))
    key = _short_hash([_RULES, *(file.name for file in text.files), *checksums])
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", path.resolve().name).strip("-.") or "folder"
    slug = slug[:NAME_LENGTH - len("-12345678")]
    folder = base_dir() / f"base_data_{slug}-{key}"
    prepare_shards(folder, slug, text.documents(), text.expected_bytes,
                   named_validation=bool(text.split("validation")))
    dataset, manifest = _open_prepared(folder)

    size = sum(file.n_bytes for file in text.files) / 1e6
    n_documents = manifest["train_documents"] + manifest["val_documents"]
    print0(f"{path}: {len(text.files):,} files, {size:,.1f} MB, {n_documents:,} documents")
    counts = [f"{n:,} {line}" for line, n in manifest["counts"].items()]
    print0("\n".join([*text.account(), *counts]))
    return dataset


def _open_prepared(folder):
    """Return (Dataset, manifest) of a folder of shards that prepare_shards wrote."""
    remedy = f"delete {folder}; it will be prepared again"
    manifest, checksums = (read_json(folder / name, remedy) for name in (MANIFEST, DIGESTS))
    shards = sorted(folder.glob("shard_*.parquet"))
    if not [path.name for path in shards] == sorted(checksums) == manifest.get("shards"):
        raise UserError(f"{folder} is damaged: its shards are not those of {MANIFEST}; {remedy}")
    n_train = len(shards) - manifest["n_val_shards"]
    checksums = {path: checksums[path.name] for path in shards}
    splits = tuple(shards[:n_train]), tuple(shards[n_train:])
    return Dataset(manifest["dataset_id"], *splits, checksums), manifest


# --- preparing shards ----------------------------------------------------------------------------

def prepare_shards(folder, name, documents, expected_bytes, named_validation=False, distinct=False):
    """Write shards and dataset.json to `folder`, unless it exists. A failure leaves no files.

    documents: iterable of (split, UTF-8 bytes), read only if the folder does not exist.
    named_validation: whether it has a validation split. distinct: keep one copy of each document.
    """
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    with locked(folder):
        if folder.exists():
            return
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        try:
            (temporary / "spill").mkdir(parents=True)
            spilled = _spill(documents, temporary / "spill", name, expected_bytes)
            manifest = _write_shards(temporary, name, *spilled, named_validation, distinct)
            shutil.rmtree(temporary / "spill")
            n_train, n_val = manifest["train_documents"], manifest["val_documents"]
            if not n_train or not n_val:
                raise UserError(f"{name} has {n_train} training and {n_val} validation documents; "
                                "at least one of each is needed")
            write_json(temporary / MANIFEST, manifest)
            write_checksums(temporary, {n: sha256_of(temporary / n) for n in manifest["shards"]})
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _spill(documents, folder, name, expected_bytes):
    """Write documents to files by their hash, so that each file can be sorted in memory.

    Return (paths, bytes of training text).
    """
    paths = [folder / str(i) for i in range(_N_BUCKETS)]
    splits = list(SPLITS)
    train_bytes = 0
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        bar = stack.enter_context(progress(total=expected_bytes, unit="B", unit_scale=True,
                                           desc=f"preparing {name}"))
        for split, data in documents:
            head = bytes([splits.index(split)]) + len(data).to_bytes(8, "little")
            files[_digest(data)[0] * _N_BUCKETS // 256].write(head + data)
            train_bytes += len(data) if split == "train" else 0
            bar.update(len(data))
    return paths, train_bytes


def _in_hash_order(paths):
    """Yield (hash, document, its number of copies per split) of each distinct document."""
    for path in paths:
        records = []
        with open(path, "rb") as file:
            while head := file.read(9):
                data = file.read(int.from_bytes(head[1:], "little"))
                records.append((_digest(data), data, head[0]))
        records.sort()
        for (digest, data), same in groupby(records, key=lambda record: record[:2]):
            splits = [split for *_, split in same]
            yield digest, data, [splits.count(split) for split in range(len(SPLITS))]


def _digest(data):
    return hashlib.blake2b(data, digest_size=16).digest()


def _write_shards(folder, name, spilled, n_bytes, named_validation, distinct, limit=None):
    """Write the spilled documents in hash order to shards; return the manifest.

    limit: largest document of the validation split, in bytes; by default the size of the split.
    """
    val_bytes = 0 if named_validation else min(VAL_SHARE * n_bytes, _VAL_MAX_BYTES)
    train_bytes = n_bytes - val_bytes
    shard_bytes = min(max(train_bytes / 64, _SHARD_MIN_BYTES), _SHARD_MAX_BYTES)
    shard_bytes = max(1, train_bytes / max(1, math.ceil(train_bytes / shard_bytes)))
    train = _ShardWriter(folder / "train", shard_bytes)
    val = _ShardWriter(folder / "val", _SHARD_MAX_BYTES)
    counts = Counter()
    content = hashlib.sha256(bytes(named_validation))
    smallest = n_bytes
    taken = 0  # bytes of training text in the validation split, with all copies

    for digest, data, (n_train, n_val, n_test) in _in_hash_order(spilled):
        n_train = min(n_train, 1) if distinct else n_train
        weight = n_train * len(data)
        if n_val:
            val.add(data)
            counts[_IN_VALIDATION] += n_train
        elif n_test:
            counts[_IN_TEST] += n_train
            continue
        elif taken < val_bytes and weight <= (limit or val_bytes):
            val.add(data)
            counts[_IN_VALIDATION] += n_train - 1
            taken += weight
            train.n_bytes = taken - val_bytes  # this excess is missing in the first shard
        else:
            for _ in range(n_train):
                train.add(data)
            counts[_REPEATED] += n_train - 1
            smallest = min(smallest, weight)
        content.update(digest * max(1, n_train))

    if train.n_documents > 1 and not val.n_documents and not named_validation:
        return _write_shards(folder, name, spilled, n_bytes, False, distinct, smallest)
    paths = [*train.close(), *val.close()]
    shards = [shard_name(i) for i in range(len(paths))]
    for path, shard in zip(paths, shards, strict=True):
        path.rename(folder / shard)
    return {"dataset_id": f"{name}-{content.hexdigest()[:8]}", "shards": shards,
            "n_val_shards": len(val.paths), "train_documents": train.n_documents,
            "val_documents": val.n_documents, "counts": +counts}  # those above 0


class _ShardWriter:
    """Write documents to shards <prefix>0, <prefix>1, ... of about `shard_bytes` of text."""

    def __init__(self, prefix, shard_bytes):
        self.prefix = prefix
        self.shard_bytes = self.boundary = shard_bytes
        self.paths, self.documents = [], []
        self.n_documents = self.n_bytes = 0

    def add(self, data):
        if self.n_bytes >= self.boundary:
            self.close()
        self.documents.append(data)
        self.n_documents += 1
        self.n_bytes += len(data)

    def close(self):
        """Write the shard that is not complete yet; return the paths of all shards."""
        if self.documents:
            column = pa.array(self.documents, pa.binary()).cast(pa.string())
            self.paths.append(Path(f"{self.prefix}{len(self.paths)}"))
            with open(self.paths[-1], "wb") as file:
                pq.write_table(pa.table({"text": column}), file, row_group_size=1024,
                               compression="zstd", write_statistics=False)
            self.documents = []
        while self.boundary <= self.n_bytes:
            self.boundary += self.shard_bytes
        return self.paths


def shard_name(index):
    return f"shard_{index:05d}.parquet"


def _short_hash(lines):
    data = "\n".join(lines).encode(errors="surrogateescape")
    return hashlib.sha256(data).hexdigest()[:8]


# --- reading shards ------------------------------------------------------------------------------

def read_documents(path):
    """Yield the documents of a shard in order, without null and blank ones. Raise UserError."""
    is_valid = matches_checksum(path)
    n_documents = 0
    try:
        if not is_valid:
            raise ValueError(f"its SHA-256 is not that in {DIGESTS}")
        for data in parquet_rows(path):
            text = data.decode() if data else ""
            if text and not text.isspace():
                n_documents += 1
                yield text
        if not n_documents:
            raise ValueError("it has no document with text in it")
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(path, error) from None


def sample_documents(shards, max_chars, doc_cap=None):
    """Yield documents, each cut at `doc_cap` characters, until `max_chars` have been yielded."""
    for shard in shards:
        for document in read_documents(shard):
            yield document[:doc_cap]
            max_chars -= len(document[:doc_cap])
            if max_chars <= 0:
                return


# --- downloads -----------------------------------------------------------------------------------

def _open_download(name):
    folder = base_dir() / f"base_data_{name}"
    shards = sorted(folder.glob("shard_*.parquet"))
    last = shard_name(DOWNLOADS[name].last_shard)
    if len(shards) < 2 or shards[-1].name != last:
        raise UserError(f"{folder} needs {last}, the validation shard of {name}, and at least one "
                        f"more; run: python -m nanochat.dataset --dataset {name} -n 8")
    path = folder / DIGESTS
    known = read_json(path, "delete it") if path.exists() else {}
    new = [shard for shard in shards if shard.name not in known]  # from another program
    if new:
        with ThreadPoolExecutor() as pool:
            known |= zip((shard.name for shard in new), pool.map(sha256_of, new), strict=True)
        with suppress(OSError):  # a read-only cache
            write_checksums(folder, known)
    checksums = {shard: known[shard.name] for shard in shards}
    dataset_id = f"{name}-{_short_hash(f'{s.name} {c}' for s, c in checksums.items())}"
    return Dataset(dataset_id, tuple(shards[:-1]), tuple(shards[-1:]), checksums)


def download_shards(name, n_train_shards, num_workers=4):
    """Download training shards (-1: all) and the validation shard, unless they exist.

    The environment variable HF_ENDPOINT names another host. If a shard fails, raise UserError and
    keep the complete ones.
    """
    repo, last_shard = DOWNLOADS[name]
    n_train_shards = last_shard if n_train_shards == -1 else n_train_shards
    if not 1 <= n_train_shards <= last_shard:
        raise UserError(f"-n {n_train_shards}: {name} has 1 to {last_shard} training shards "
                        "(-1: all)")
    folder = base_dir() / f"base_data_{name}"
    staging = folder / ".download"
    names = [shard_name(i) for i in (*range(n_train_shards), last_shard)]
    with locked(folder), ThreadPoolExecutor(num_workers) as pool:
        missing = [shard for shard in names if not (folder / shard).exists()]
        fetched = pool.map(lambda shard: _fetch(repo, shard, staging), missing)
        for path, checksum in progress(fetched, desc=name, total=len(missing), unit="shard"):
            write_checksums(folder, {path.name: checksum})
            path.rename(folder / path.name)
        shutil.rmtree(staging, ignore_errors=True)


def _fetch(repo, name, folder):
    """Download a shard, check it and return (path, SHA-256). The hub resumes and retries."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = {"repo_type": "dataset", "endpoint": os.environ.get("HF_ENDPOINT")}
    path = folder / name
    try:
        hf_hub_download(repo, name, local_dir=folder, **where)
        checksum = sha256_of(path)
        etag = get_hf_file_metadata(hf_hub_url(repo, name, **where)).etag  # of a large file
        if re.fullmatch("[0-9a-f]{64}", etag or "") and checksum != etag:
            raise ValueError("its SHA-256 is not that of the host")
        next(parquet_rows(path))
    except Exception as error:  # of the hub's library, its HTTP client, pyarrow or the disk
        path.unlink(missing_ok=True)
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise UserError(f"could not download {name} of {repo} ({reason}); run the same command "
                        "again: complete shards are kept") from None
    return path, checksum


# --- command -------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanochat.dataset",
                                     description="Download a named dataset, or prepare a folder of "
                                     "text or Python's standard library (stdlib).")
    parser.add_argument("--dataset", default="climbmix", help=DATASET_HELP)
    parser.add_argument("-n", "--num-files", type=int,
                        help="training shards to download, about 100 MB each (-1: all); required "
                             f"for {' and '.join(DOWNLOADS)}")
    parser.add_argument("-w", "--num-workers", type=int, default=4,
                        help="parallel downloads (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.num_workers < 1:
        raise UserError("-w must be at least 1")
    if (args.dataset in DOWNLOADS) != (args.num_files is not None):
        raise UserError(f"-n, the number of training shards to download, belongs to --dataset "
                        f"{' and '.join(DOWNLOADS)}, for example -n 8; it is needed there only")
    if args.dataset in DOWNLOADS:
        download_shards(args.dataset, args.num_files, args.num_workers)

    dataset = open_dataset(args.dataset)
    shards = (*dataset.train_shards, *dataset.val_shards)
    size = sum(shard.stat().st_size for shard in shards) / 1e6
    print0(f"{dataset.dataset_id}: {len(dataset.train_shards):,} training and "
           f"{len(dataset.val_shards):,} validation shards, {size:,.1f} MB, in {shards[0].parent}")


if __name__ == "__main__":
    main()
