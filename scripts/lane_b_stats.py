"""Measure how token correlations and next-token entropies of a text decay; write stats.json.

python -m scripts.lane_b_stats --dataset stdlib --out stats.json

The text is held in memory: the default --max-tokens takes about 2 GB.
"""

from types import SimpleNamespace

from nanochat import common
from nanochat.common import Parser, print0
from nanochat.dataset import open_dataset
from nanochat.device import keep_freed_memory
from nanochat.lane_b import statistics
from nanochat.lane_b.corpus import read_corpus
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import token_shards


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b_stats", __doc__)
    add = parser.add_argument
    add("--dataset", required=True, help="a name of nanochat.dataset, or a folder of text")
    add("--tokenizer-dir", metavar="DIR",
        help="folder of the tokenizer (default: that of scripts.tok_train)")
    add("--max-tokens", type=int, default=32_000_000,
        help="stop reading training documents after this many tokens (%(default)s)")
    add("--out", required=True, metavar="FILE.json",
        help="output file, read by scripts.lane_b_infer_ratio --stats-json")
    add("--quiet", action="store_true", help=common.QUIET_HELP)
    args = parser.parse_args(argv)
    if args.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    return args


def read_shards(dataset, tokenizer, max_tokens):
    """Return (tokens, offsets) of the training shards that max_tokens need; encode no others."""
    n_shards = 1
    while True:
        shards = token_shards(dataset, tokenizer, "train", max_shards=n_shards)
        n_tokens = sum(shard.n_tokens - shard.n_docs for shard in shards)
        if len(shards) < n_shards or n_tokens >= max_tokens:
            return [(shard.tokens, shard.offsets) for shard in shards]
        n_shards *= 2


@common.command
def main(argv=None):
    args = parse_args(argv)
    common.set_quiet(args.quiet)
    keep_freed_memory(SimpleNamespace(type="cpu"))  # page faults would take a third of the time
    common.check_output("--out", args.out)
    dataset = open_dataset(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer_dir)
    shards = read_shards(dataset, tokenizer, args.max_tokens)
    document = {
        "dataset_id": dataset.dataset_id,
        "tokenizer_id": tokenizer.tokenizer_id,
        **statistics.measure(read_corpus(shards, tokenizer.vocab_size, args.max_tokens)),
        "created_utc": common.utc_now(),
    }
    common.write_json(args.out, document)
    print0(statistics.describe(document))
    print0(f"written: {args.out}")


if __name__ == "__main__":
    main()
