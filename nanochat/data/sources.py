"""Text sources by name: each becomes a folder of parquet shards, the last of which is validation."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from nanochat.data import stdlib_corpus, text_folder
from nanochat.data.download import fetch_shards, hub_url
from nanochat.data.shard_writer import MANIFEST, prepare_shards, shard_name
from nanochat.data.shards import list_shards, open_shard, read_documents, shard_fingerprint
from nanochat.errors import UserError
from nanochat.paths import base_dir

__all__ = ["DOWNLOADS", "Dataset", "Download", "download_shards", "open_dataset", "read_documents", "shard_fingerprint"]


@dataclass(frozen=True)
class Download:
    """A Hugging Face dataset repository of shards 0 .. last_shard; the last one is validation."""

    repo: str
    last_shard: int


DOWNLOADS = {
    "climbmix": Download("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": Download("karpathy/fineweb-edu-100b-shuffle", 1822),
}


@dataclass(frozen=True)
class Dataset:
    """Shards in name order under a stable id: what a run trains and validates on."""

    name: str
    dataset_id: str
    shards: tuple[Path, ...]

    @property
    def train_shards(self):
        return self.shards[:-1]

    @property
    def val_shards(self):
        return self.shards[-1:]


def open_dataset(name):
    """The Dataset `stdlib`, `climbmix`, `fineweb-edu`, or of a folder of .parquet, .txt, .md, .jsonl(.gz) files.

    stdlib and text folders are converted on first use, into the cache folder; downloads are never started here.
    dataset_id: name and 8 hex digits, over the documents where we wrote the shards, else over `shard_fingerprint`s.
    Errors: UserError for an unknown name, for shards that are missing, damaged or without a string column `text`.
    """
    name = str(name)
    if name == "stdlib":
        return _prepared(stdlib_corpus.corpus_name(), stdlib_corpus.corpus_key(),
                         stdlib_corpus.corpus_documents, stdlib_corpus.CORPUS_CHARS)
    if name in DOWNLOADS:
        return _downloaded(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        what = "is a file, name its folder instead" if folder.exists() else "is no folder"
        raise UserError(f"--dataset {name!r} {what}; known names are stdlib, {', '.join(DOWNLOADS)}; "
                        "anything else must be a folder of .parquet, .txt, .md, .jsonl or .jsonl.gz files")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name.removeprefix("base_data_")).strip("-.") or "folder"
    if list_shards(folder):
        return _open_shards(slug, folder)
    if not text_folder.list_text_files(folder):
        raise UserError(f"{folder} holds no .parquet, .txt, .md, .jsonl or .jsonl.gz files")
    return _prepared(slug, text_folder.folder_key(folder), lambda: text_folder.folder_documents(folder),
                     text_folder.expected_bytes(folder))


def download_shards(name, n_train_shards, num_workers=4):
    """Fetch the first `n_train_shards` training shards (-1: all) and the validation shard of a known download."""
    source = DOWNLOADS[name]
    if n_train_shards == -1:
        n_train_shards = source.last_shard
    if not 1 <= n_train_shards <= source.last_shard:
        raise UserError(f"-n {n_train_shards}: {name} has 1 to {source.last_shard} training shards (-1: all)")
    files = [shard_name(i) for i in (*range(n_train_shards), source.last_shard)]
    fetch_shards({_folder(name) / file: hub_url(source.repo, file) for file in files}, num_workers)


def _downloaded(name):
    folder, prepare = _folder(name), f"python -m nanochat.dataset --dataset {name} -n 8"
    shards, last = list_shards(folder), shard_name(DOWNLOADS[name].last_shard)
    if not shards:
        raise UserError(f"{name} is not downloaded yet ({folder} holds no shard); run: {prepare}")
    if last not in (path.name for path in shards):
        raise UserError(f"{folder} lacks {last}, the validation shard of {name}; run: {prepare}")
    return _open_shards(name, folder)


def _prepared(name, key, documents, expected_bytes):
    folder = base_dir() / f"base_data_{name}-{key}"
    prepare_shards(folder, name, documents, expected_bytes)
    return _open_shards(name, folder)


def _open_shards(name, folder):
    shards = tuple(list_shards(folder))
    if len(shards) < 2:
        raise UserError(f"{folder} holds {len(shards)} parquet shard; at least 2 are needed, as the last in name "
                        "order is the validation split")
    if (folder / MANIFEST).exists():
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["shards"] != [path.name for path in shards]:
            raise UserError(f"{folder} was prepared with other shards than it holds now; delete it and run again")
        for shard in shards:
            open_shard(shard).close()
        return Dataset(name, manifest["dataset_id"], shards)
    digest = hashlib.sha256("\n".join(shard_fingerprint(shard) for shard in shards).encode())
    return Dataset(name, f"{name}-{digest.hexdigest()[:8]}", shards)


def _folder(name):
    return base_dir() / f"base_data_{name}"
