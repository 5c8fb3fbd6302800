"""Measure the bytes per token of a tokenizer on both splits of a dataset.

python -m scripts.tok_eval --dataset stdlib
"""

from pathlib import Path

from nanochat.common import CACHE_HELP, Parser, command
from nanochat.dataset import DATASET_HELP, open_dataset, sample_documents
from nanochat.tokenizer import load_tokenizer

MAX_CHARS = 2_000_000  # per split


def parse_args(argv=None):
    parser = Parser("python -m scripts.tok_eval", __doc__.splitlines()[0])
    parser.add_argument("--dataset", default="climbmix", help=DATASET_HELP)
    parser.add_argument("--tokenizer-dir", type=Path,
                        help=f"folder of the tokenizer (<cache>/tokenizer; {CACHE_HELP})")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    dataset = open_dataset(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer_dir)
    print(f"tokenizer {tokenizer.tokenizer_id}: {tokenizer.vocab_size:,} tokens, on "
          f"{dataset.dataset_id}")
    for split, shards in (("train", dataset.train_shards), ("val", dataset.val_shards)):
        n_bytes = n_tokens = 0
        for text in sample_documents(shards, MAX_CHARS):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            n_bytes += len(text.encode())
            n_tokens += len(ids)
        print(f"{split}: {n_bytes:,} bytes, {n_tokens:,} tokens, {n_bytes / n_tokens:.3f} bytes "
              "per token")


if __name__ == "__main__":
    main()
