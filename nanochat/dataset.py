"""Datasets, named ones or folders of text, as parquet shards of documents.

python -m nanochat.dataset -n 8                 download 8 training shards of climbmix
python -m nanochat.dataset --dataset stdlib     prepare the standard library of this Python
python -m nanochat.dataset --dataset my_folder  prepare a folder of text (see text_folder)

Documents of stdlib and of folders are sorted in memory and copied into shards in the cache, in the
order of their hashes, which is as good as random and depends on the text only. The first 5 % are
the validation split, unless the name of a file says that it is for validation. The validation split
of a download is its last shard.
"""

import hashlib
import math
import os
import platform
import re
import shutil
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
    Parser,
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
from nanochat.text_folder import VAL_SHARE, TextFolder, parquet_rows, unreadable

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

    stdlib and folders are prepared on first use, a folder with a changed file again.
    """
    name = str(name)
    if name in DOWNLOADS:
        return _open_download(name)
    if name == "stdlib":
        corpus = f"stdlib-{platform.python_version()}"
        folder = base_dir() / f"base_data_{corpus}-{stdlib_corpus.RULES}"
        texts = stdlib_corpus.corpus_documents()
        documents = (("train", text.encode("utf-8", "replace")) for text in texts)
        prepare_shards(folder, corpus, documents, distinct=True)
        return _open_prepared(folder)[0]

    path = Path(name if os.path.isdir(name) else os.path.expanduser(name))
    if not os.path.isdir(path):  # Path.is_dir raises an error if the name is too long
        raise UserError(f"--dataset {name!r} is not a folder; give a folder of text or one of "
                        f"{', '.join(NAMED_DATASETS)}")
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
    prepare_shards(folder, slug, text.documents(), bool(text.split("validation")))
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
    return _dataset(manifest["dataset_id"], shards, manifest["n_val_shards"], checksums), manifest


def _dataset(dataset_id, shards, n_val_shards, checksums):
    return Dataset(dataset_id, tuple(shards[:-n_val_shards]), tuple(shards[-n_val_shards:]),
                   {path: checksums[path.name] for path in shards})


# --- preparing shards ----------------------------------------------------------------------------

def prepare_shards(folder, name, documents, named_validation=False, distinct=False):
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
            temporary.mkdir()
            manifest = _write_shards(temporary, name, documents, named_validation, distinct)
            n_train, n_val = manifest["train_documents"], manifest["val_documents"]
            if not n_train or not n_val:
                raise UserError(f"{name} has {n_train} training and {n_val} validation documents; "
                                "at least one of each is needed")
            write_json(temporary / MANIFEST, manifest)
            write_checksums(temporary, {n: sha256_of(temporary / n) for n in manifest["shards"]})
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(folder, name, documents, named_validation, distinct):
    """Write documents in the order of their hashes to shards; return the manifest."""
    documents = progress(documents, desc=f"preparing {name}", unit="doc")
    records = sorted((hashlib.blake2b(data, digest_size=16).digest(), data, split)
                     for split, data in documents)
    n_bytes = sum(len(data) for _, data, split in records if split == "train")
    if distinct:
        records = sorted(set(records))
    copies = [(digest, data, [split for *_, split in same])
              for (digest, data), same in groupby(records, key=lambda record: record[:2])]

    # A document larger than the validation split is for training, unless all are.
    val_bytes = 0 if named_validation else min(VAL_SHARE * n_bytes, _VAL_MAX_BYTES)
    sizes = [len(data) * len(splits) for _, data, splits in copies if {*splits} == {"train"}]
    limit = max(val_bytes, min(sizes, default=0))
    taken = 0  # bytes of training text in the validation split, with all copies
    train, val = [], []
    counts = Counter()
    content = hashlib.sha256(bytes(named_validation))
    for digest, data, splits in copies:
        n_train = splits.count("train")
        if "validation" in splits:
            val.append(data)
            counts[_IN_VALIDATION] += n_train
        elif "test" in splits:
            counts[_IN_TEST] += n_train
            continue
        elif taken < val_bytes and n_train * len(data) <= limit:
            val.append(data)
            counts[_IN_VALIDATION] += n_train - 1
            taken += n_train * len(data)
        else:
            train += [data] * n_train
            counts[_REPEATED] += n_train - 1
        content.update(digest * max(1, n_train))

    train_bytes = n_bytes - val_bytes
    shard_bytes = min(max(train_bytes / 64, _SHARD_MIN_BYTES), _SHARD_MAX_BYTES)
    shard_bytes = max(1, train_bytes / max(1, math.ceil(train_bytes / shard_bytes)))
    val_shards = _cut(val, _SHARD_MAX_BYTES)
    shards = [*_cut(train, shard_bytes, taken - val_bytes), *val_shards]
    for i, shard in enumerate(shards):
        column = pa.array(shard, pa.binary()).cast(pa.string())
        with open(folder / shard_name(i), "wb") as file:
            pq.write_table(pa.table({"text": column}), file, row_group_size=1024,
                           compression="zstd", write_statistics=False)
    return {"dataset_id": f"{name}-{content.hexdigest()[:8]}",
            "shards": [shard_name(i) for i in range(len(shards))],
            "n_val_shards": len(val_shards), "train_documents": len(train),
            "val_documents": len(val), "counts": +counts}  # those above 0


def _cut(documents, shard_bytes, n_bytes=0):
    """Return lists of documents of about `shard_bytes`; the first has `n_bytes` less."""
    shards, boundary = [], shard_bytes
    for data in documents:
        if not shards or n_bytes >= boundary:
            shards.append([])
        while boundary <= n_bytes:
            boundary += shard_bytes
        shards[-1].append(data)
        n_bytes += len(data)
    return shards


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
    key = _short_hash(f"{shard.name} {known[shard.name]}" for shard in shards)
    return _dataset(f"{name}-{key}", shards, 1, known)


def download_shards(name, n_train_shards, num_workers=4):
    """Download training shards (-1: all) and the validation shard, unless they exist.

    The environment variable HF_ENDPOINT names another host. Raise UserError if a shard fails.
    """
    from huggingface_hub import hf_hub_download

    if name not in DOWNLOADS:
        raise UserError(f"-n is only for the downloads {' and '.join(DOWNLOADS)}; leave it out")
    repo, last_shard = DOWNLOADS[name]
    n_train_shards = last_shard if n_train_shards == -1 else n_train_shards
    if not 1 <= n_train_shards <= last_shard:
        raise UserError(f"-n {n_train_shards}: {name} has 1 to {last_shard} training shards "
                        "(-1: all)")
    folder = base_dir() / f"base_data_{name}"

    def fetch(shard):
        try:  # the hub resumes, retries, checks the size, and renames the complete file
            hf_hub_download(repo, shard, repo_type="dataset", local_dir=folder,
                            endpoint=os.environ.get("HF_ENDPOINT"))
        except Exception as error:  # of the hub's library, its HTTP client or the disk
            reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
            raise UserError(f"could not download {shard} of {repo} ({reason}); run the same "
                            "command again: complete shards are kept") from None

    names = [shard_name(i) for i in (*range(n_train_shards), last_shard)]
    with locked(folder), ThreadPoolExecutor(num_workers) as pool:
        missing = [shard for shard in names if not (folder / shard).exists()]
        for shard in missing[:1]:  # alone: threads would hide the error of a host without answer
            fetch(shard)
        fetched = pool.map(fetch, missing[1:])
        list(progress(fetched, desc=name, total=len(missing[1:]), unit="shard"))


# --- command -------------------------------------------------------------------------------------

def parse_args(argv=None):
    parser = Parser("python -m nanochat.dataset", "Download a named dataset, or prepare a folder "
                    "of text or Python's standard library (stdlib).")
    parser.add_argument("--dataset", default="climbmix", help=DATASET_HELP)
    parser.add_argument("-n", "--num-files", type=int,
                        help="training shards to download, about 100 MB each (-1: all)")
    parser.add_argument("-w", "--num-workers", type=int, default=4, choices=range(1, 129),
                        metavar="N", help="parallel downloads (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.num_files is not None:
        download_shards(args.dataset, args.num_files, args.num_workers)
    dataset = open_dataset(args.dataset)
    print0(f"{dataset.dataset_id}: {len(dataset.train_shards):,} training and "
           f"{len(dataset.val_shards):,} validation shards in {dataset.val_shards[0].parent}")


if __name__ == "__main__":
    main()
