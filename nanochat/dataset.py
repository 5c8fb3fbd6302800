"""Prepare the shards of a dataset.

python -m nanochat.dataset -n 8                 download 8 training shards of climbmix and the validation shard
python -m nanochat.dataset --dataset stdlib     prepare the embedded corpus (this Python's own library)
python -m nanochat.dataset --dataset my_folder  convert .txt, .md, .jsonl(.gz), one .parquet; several stay as they are
"""

import argparse
import filecmp
import hashlib
import os
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

from nanochat import stdlib_corpus, text_folder
from nanochat.bad_samples import SKIP_BAD, BadSamples
from nanochat.common import (
    NAME_LENGTH,
    QUIET_HELP,
    UserError,
    base_dir,
    check_name,
    command,
    read_json,
    set_quiet,
)
from nanochat.download import fetch_shards
from nanochat.shard_writer import MANIFEST, prepare_shards, shard_name
from nanochat.shards import list_shards, open_shard, shard_fingerprint

# Hugging Face dataset repositories of shards 0 .. last_shard; the last one is validation.
Download = namedtuple("Download", "repo last_shard")
DOWNLOADS = {
    "climbmix": Download("karpathy/climbmix-400b-shuffle", 6542),
    "fineweb-edu": Download("karpathy/fineweb-edu-100b-shuffle", 1822),
}
NAMED_DATASETS = ("stdlib", *DOWNLOADS)


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


def open_dataset(name, skip_bad=SKIP_BAD):
    """The Dataset `stdlib`, `climbmix`, `fineweb-edu`, or of a folder of .parquet, .txt, .md, .jsonl(.gz) files.

    stdlib, text folders and a single parquet file are split by content hash into shards on first use, in the cache
    folder; downloads are never started here. dataset_id: name and 8 hex digits, over the documents where we wrote the
    shards, else over `shard_fingerprint`s. skip_bad: the share of a text folder's samples that may be unusable.
    Errors: UserError for an unknown name, for shards that are missing, damaged or without a string column `text`.
    """
    name = str(name)
    if name == "stdlib":
        return _prepared(stdlib_corpus.corpus_name(), stdlib_corpus.corpus_key(),
                         stdlib_corpus.corpus_documents, stdlib_corpus.CORPUS_CHARS)
    if name in DOWNLOADS:
        return _downloaded(name)
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):  # unlike Path.is_dir, no error for a name that is too long
        what = "is a file, name its folder instead" if os.path.exists(folder) else "is no folder"
        raise UserError(f"--dataset {name!r} {what}; known names are stdlib, {', '.join(DOWNLOADS)}; "
                        "anything else must be a folder of .parquet, .txt, .md, .jsonl or .jsonl.gz files")
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name.removeprefix("base_data_")).strip("-.") or "folder"
    slug = slug[:NAME_LENGTH - len("-12345678")]
    if len(list_shards(folder)) > 1:
        return _open_shards(slug, folder)
    if not text_folder.list_text_files(folder):
        others = text_folder.other_suffixes(folder)
        raise UserError(f"{folder} holds no .parquet, and no .txt, .md, .jsonl or .jsonl.gz in it or below; it holds "
                        + (f"files of other kinds ({others}): rename or convert them" if others else "no files"))
    bad = BadSamples(skip_bad)
    return _prepared(slug, text_folder.folder_key(folder), lambda: text_folder.folder_documents(folder, bad),
                     text_folder.expected_bytes(folder), bad.summary)


def download_shards(name, n_train_shards, num_workers=4):
    """Fetch the first `n_train_shards` training shards (-1: all) and the validation shard of a known download."""
    source = DOWNLOADS[name]
    if n_train_shards == -1:
        n_train_shards = source.last_shard
    if not 1 <= n_train_shards <= source.last_shard:
        raise UserError(f"-n {n_train_shards}: {name} has 1 to {source.last_shard} training shards (-1: all)")
    files = [shard_name(i) for i in (*range(n_train_shards), source.last_shard)]
    fetch_shards(source.repo, files, _folder(name), num_workers)


def _downloaded(name):
    folder, prepare = _folder(name), f"python -m nanochat.dataset --dataset {name} -n 8"
    shards, last = list_shards(folder), shard_name(DOWNLOADS[name].last_shard)
    if not shards:
        raise UserError(f"{name} is not downloaded yet ({folder} holds no shard); run: {prepare}")
    if last not in (path.name for path in shards) or len(shards) == 1:
        raise UserError(f"{folder} lacks {last}, the validation shard of {name}, or any other; run: {prepare}")
    return _open_shards(name, folder)


def _prepared(name, key, documents, expected_bytes, notes=dict):
    folder = base_dir() / f"base_data_{name}-{key}"
    prepare_shards(folder, name, documents, expected_bytes, notes)
    return _open_shards(name, folder)


def _open_shards(name, folder):
    shards = tuple(list_shards(folder))
    dataset_id = _manifest_id(folder, shards)
    if dataset_id is None:
        digest = hashlib.sha256("\n".join(shard_fingerprint(shard) for shard in shards).encode())
        dataset_id = f"{name}-{digest.hexdigest()[:8]}"
    *train, val = shards
    for shard in train:
        if filecmp.cmp(shard, val, shallow=False):
            raise UserError(f"{shard} and {val.name} are the same, and the last shard in name order is the validation "
                            "split: it must hold other text than the training shards; remove one of the two")
    return Dataset(name, dataset_id, shards)


def _manifest_id(folder, shards):
    """The dataset_id that the manifest of shards we wrote gives them; None without a manifest."""
    path, remedy = folder / MANIFEST, "delete the folder if it is a prepared one, and it is made again, or that file"
    if not path.exists():
        return None
    manifest = read_json(path, remedy)
    if manifest.get("shards") != [shard.name for shard in shards]:
        raise UserError(f"{path} names other shards than there are; {remedy}")
    try:
        dataset_id = check_name("dataset_id", manifest.get("dataset_id"))
    except UserError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    for shard in shards:
        open_shard(shard).close()
    return dataset_id


def _folder(name):
    return base_dir() / f"base_data_{name}"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m nanochat.dataset", description="Prepare the shards of a dataset.")
    parser.add_argument("--dataset", default="climbmix", help=f"stdlib, {', '.join(DOWNLOADS)}, or a folder (climbmix)")
    parser.add_argument("-n", "--num-files", type=int, help="training shards to download, about 100 MB each; -1: all")
    parser.add_argument("-w", "--num-workers", type=int, default=4, help="parallel downloads (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--skip-bad", type=float, default=SKIP_BAD, metavar="SHARE",
                        help="of a text folder's samples (lines, rows, files), as many that cannot be used may be left "
                             f"out; they are counted, the first named ({SKIP_BAD})")
    args = parser.parse_args(argv)
    if not 0 <= args.skip_bad < 1:
        parser.error("--skip-bad is a share: at least 0 and below 1")
    return args


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.dataset in DOWNLOADS:
        if args.num_files is None:
            raise UserError(f"say how many training shards of {args.dataset} to download, for example -n 8 "
                            "(about 100 MB each; -1 for all)")
        if args.num_workers < 1:
            raise UserError(f"-w {args.num_workers}: at least one worker is needed")
        download_shards(args.dataset, args.num_files, args.num_workers)
    elif args.num_files is not None:
        raise UserError(f"-n is for downloads ({', '.join(DOWNLOADS)}); leave it out for --dataset {args.dataset}")
    dataset = open_dataset(args.dataset, args.skip_bad)
    n_bytes = sum(shard.stat().st_size for shard in dataset.shards)
    print(f"{dataset.dataset_id}: {len(dataset.train_shards)} training shards and 1 validation shard, "
          f"{n_bytes / 1e6:,.1f} MB on disk, in {dataset.shards[0].parent}")


if __name__ == "__main__":
    main()
