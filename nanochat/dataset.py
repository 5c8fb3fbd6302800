"""Prepare the shards of a dataset.

python -m nanochat.dataset -n 8                 download 8 training shards of climbmix and the validation shard
python -m nanochat.dataset --dataset stdlib     prepare the embedded corpus (this Python's own library)
python -m nanochat.dataset --dataset my_folder  convert .txt, .md, .jsonl(.gz), one .parquet; several stay as they are
"""

import argparse

from nanochat.data.bad_samples import SKIP_BAD
from nanochat.data.sources import DOWNLOADS, download_shards, open_dataset
from nanochat.errors import UserError, command
from nanochat.progress import QUIET_HELP, be_quiet, say_next


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
    be_quiet(args.quiet)
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
    say_next("scripts.tok_train", "--dataset", args.dataset)


if __name__ == "__main__":
    main()
