"""Train a tokenizer on the training shards of a dataset.

python -m scripts.tok_train --dataset stdlib --vocab-size 8192
"""

import argparse
import os
import time
from collections import Counter
from pathlib import Path

from nanochat.common import (
    QUIET_HELP,
    UserError,
    base_dir,
    check_output,
    command,
    progress,
    set_quiet,
)
from nanochat.dataset import open_dataset
from nanochat.shards import row_count, sample_documents
from nanochat.tokenizer import TEXT_FILE, load_tokenizer, train_tokenizer

_REPORT_CHARS = 1_000_000  # validation text for the compression figure


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_train", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="climbmix",
                        help="stdlib, climbmix, fineweb-edu, or a folder of text (climbmix)")
    parser.add_argument("--vocab-size", type=int, default=32768,
                        help="tokens, the nine special ones among them (%(default)s)")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000,
                        help="stop reading after this many characters (%(default)s)")
    parser.add_argument("--doc-cap", type=int, default=10_000,
                        help="characters taken of each document at most (%(default)s)")
    parser.add_argument("--tokenizer-dir", type=Path, help="where to save it (default: <cache folder>/tokenizer)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    return parser.parse_args(argv)


def with_progress(documents, n_rows):
    yield from progress(documents, total=n_rows, unit="doc", unit_scale=True, desc="reading")
    print("merging pairs ...", flush=True)


def share_read(tally, n_rows, max_chars, doc_cap):
    """Which share of the training text was read, and what left out the rest; `tally` as sample_documents fills it."""
    unread = n_rows - tally["documents"] if tally["yielded"] >= max_chars else 0  # their length is not known
    total = tally["whole"] * (1 + unread / tally["documents"])
    shares = {f"--doc-cap {doc_cap:,}": (tally["whole"] - tally["yielded"]) / total,
              f"--max-chars {max_chars:,}": 1 - tally["whole"] / total}
    reasons = [f"{flag} left out {share:.1%}" for flag, share in shares.items() if share > 0]
    return (f"read {tally['yielded']:,} characters, {tally['yielded'] / total:.1%} of the "
            f"{'about ' if unread else ''}{total:,.0f} to train on" + "".join(f"; {reason}" for reason in reasons))


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.max_chars < 1 or args.doc_cap < 1:
        raise UserError("--max-chars and --doc-cap must be at least 1")
    folder = args.tokenizer_dir or base_dir() / "tokenizer"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    check_output("--tokenizer-dir", there / TEXT_FILE)  # before the work: the rest of its folders can be made
    dataset = open_dataset(args.dataset)
    start = time.perf_counter()
    n_rows, tally = sum(map(row_count, dataset.train_shards)), Counter()
    documents = sample_documents(dataset.train_shards, args.max_chars, args.doc_cap, tally)
    tokenizer = train_tokenizer(with_progress(documents, n_rows), args.vocab_size)
    train_sec = time.perf_counter() - start
    print(share_read(tally, n_rows, args.max_chars, args.doc_cap))
    tokenizer.save(folder)
    assert load_tokenizer(folder).tokenizer_id == tokenizer.tokenizer_id
    texts = list(sample_documents(dataset.val_shards, _REPORT_CHARS))
    n_bytes = sum(len(text.encode()) for text in texts)
    n_tokens = sum(map(len, tokenizer.encode_batch(texts)))
    print(f"tokenizer {tokenizer.tokenizer_id}: {tokenizer.vocab_size:,} tokens, trained in {train_sec:.1f} s on "
          f"{dataset.dataset_id}, {n_bytes / n_tokens:.3f} bytes per token on validation text, saved in {folder}")


if __name__ == "__main__":
    main()
