"""Train a tokenizer on the training text of a dataset.

python -m scripts.tok_train --dataset stdlib --vocab-size 8192
"""

import os
import shlex
from pathlib import Path

from nanochat.common import (
    CACHE_HELP,
    QUIET_HELP,
    Parser,
    UserError,
    base_dir,
    check_output,
    command,
    progress,
    set_quiet,
)
from nanochat.dataset import DATASET_HELP, DOWNLOADS, open_dataset, sample_documents
from nanochat.tokenizer import PICKLE_FILE, train_tokenizer


def parse_args(argv=None):
    parser = Parser("python -m scripts.tok_train", __doc__.splitlines()[0])
    parser.add_argument("--dataset", default="climbmix", help=DATASET_HELP)
    parser.add_argument("--vocab-size", type=int, default=32768,
                        help="number of tokens in the vocabulary, including nine special ones "
                             "(%(default)s)")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000,
                        help="read at most this many characters in total (%(default)s)")
    parser.add_argument("--doc-cap", type=int, default=10_000,
                        help="read at most this many characters per document (%(default)s)")
    parser.add_argument("--tokenizer-dir", type=Path,
                        help="folder to save the tokenizer in (<cache>/tokenizer; "
                             f"{CACHE_HELP})")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.max_chars < 1 or args.doc_cap < 1:
        raise UserError("--max-chars and --doc-cap must be at least 1")
    folder = args.tokenizer_dir or base_dir() / "tokenizer"
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    check_output("--tokenizer-dir", parent / PICKLE_FILE)  # before the work

    dataset = open_dataset(args.dataset)
    texts = sample_documents(dataset.train_shards, args.max_chars, args.doc_cap)
    tokenizer = train_tokenizer(progress(texts, desc="reading", unit="doc"), args.vocab_size)
    tokenizer.save(folder)
    print(f"tokenizer {tokenizer.tokenizer_id}: {tokenizer.vocab_size:,} tokens, trained on "
          f"{dataset.dataset_id}, saved in {folder}")
    flags = ["--dataset", args.dataset]
    flags += ["--tokenizer-dir", str(folder)] if args.tokenizer_dir else []
    flags += [] if args.dataset in DOWNLOADS else ["--preset", "laptop"]
    print(f"next: {shlex.join(['python', '-m', 'scripts.base_train', *flags])}")


if __name__ == "__main__":
    main()
