"""A corpus -> stats.json: how fast its correlations and its entropy decay, with intervals, or a refusal.

python -m scripts.lane_b_stats --dataset stdlib --out stats.json --plot stats.png
python -m scripts.lane_b_stats --dataset climbmix --max-tokens 64000000 --position-losses cal-4-s0 cal-3-s0 \\
    --out stats.json
torchrun --nproc-per-node 4 -m scripts.lane_b_stats ... shares the documents out over the ranks, of several nodes too.

Memory does not grow with the text, but for 40 bytes a document and the different pairs of tokens that it holds.
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import time

import scipy

from nanochat.common import (
    QUIET_HELP,
    check_output,
    command,
    print0,
    runs_dir,
    set_quiet,
    utc_now,
    versions,
    write_json,
)
from nanochat.dataset import open_dataset
from nanochat.distributed import spawn_workers, start_ranks, stop_ranks
from nanochat.lane_b.figure import check_plot
from nanochat.lane_b.measure.corpus import check_vocabulary, from_shards
from nanochat.lane_b.measure.position_losses import check_same_model, check_same_text, read_position_losses
from nanochat.lane_b.measure.statistics import DEFAULT_LAGS, measure
from nanochat.lane_b.measure.statistics_figure import draw_statistics
from nanochat.lane_b.measure.statistics_file import VERSION, describe, statistics_document
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import token_shards

_TOKENS_A_PROCESS = 1 << 23


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b_stats", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a name of nanochat.dataset, or a folder")
    parser.add_argument("--tokenizer-dir", "--tokenizer", metavar="DIR",
                        help="default: the one of scripts.tok_train in the cache folder")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="which text (default: train)")
    parser.add_argument("--max-tokens", type=int, default=32_000_000,
                        help="whole documents up to about this many (%(default)s)")
    parser.add_argument("--lags", type=parse_lags, metavar="N,N,...",
                        help=f"default: {','.join(map(str, DEFAULT_LAGS))}, up to a tenth of the median document")
    parser.add_argument("--position-losses", nargs="+", default=[], metavar="RUN_OR_FILE",
                        help="runs of scripts.base_train --position-losses on P and P/2 tokens: they give gamma")
    parser.add_argument("--context-tokens", type=int, help="context length of the model it is for; recorded")
    parser.add_argument("--processes", type=int, help="that share the documents out on this machine; default: one a "
                        f"core, each for {_TOKENS_A_PROCESS >> 20}M tokens or more")
    parser.add_argument("--out", "--output-json", required=True, metavar="FILE.json",
                        help="where the statistics go: scripts.lane_b_infer_ratio --stats-json reads them")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--plot", metavar="FILE.png", help="draw them: correlations by lag, entropies by context")
    args = parser.parse_args(argv)
    for name in ("max_tokens", "context_tokens", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.processes and args.processes > (most := 4 * os.cpu_count()):
        parser.error(f"--processes {args.processes} must be at most {most}, four a core: more gain nothing")
    if args.processes and "RANK" in os.environ and not multiprocessing.parent_process():
        parser.error("--processes is for a start without torchrun, which has --nproc-per-node")
    return args


def parse_lags(text):
    """Sorted different lags of a list "1,2,4"."""
    try:
        lags = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,4,8") from None
    if lags[0] < 1:
        raise argparse.ArgumentTypeError(f"lag {lags[0]} is below 1")
    return lags


def read_shards(dataset, tokenizer, split, max_tokens):
    """Token shards, encoded only as far as max_tokens needs them."""
    n_shards = 1
    while True:
        shards = token_shards(dataset, tokenizer, split, max_shards=n_shards)
        if len(shards) < n_shards or sum(shard.n_tokens - shard.n_docs for shard in shards) >= max_tokens:
            return [(shard.tokens, shard.offsets) for shard in shards]
        n_shards *= 2


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    check_output("--out", args.out)
    check_plot(args.plot)
    dataset = open_dataset(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer_dir)
    losses = [read_position_losses(name, runs_dir()) for name in args.position_losses]
    check_same_text(losses, dataset.dataset_id, tokenizer.tokenizer_id)
    check_same_model(losses)
    check_vocabulary(tokenizer.vocab_size)
    shards = read_shards(dataset, tokenizer, args.split, args.max_tokens)
    n_helpers = 0
    if "RANK" not in os.environ:
        n_tokens = min(args.max_tokens, sum(len(tokens) for tokens, _ in shards))
        n_helpers = (args.processes or min(os.cpu_count(), 1 + n_tokens // _TOKENS_A_PROCESS)) - 1
    with spawn_workers(n_helpers, main, argv) if n_helpers else contextlib.nullcontext():
        measure_and_write(args, argv, dataset, tokenizer, losses, shards)


def measure_and_write(args, argv, dataset, tokenizer, losses, shards):
    """stats.json and the summary, on rank 0; the others measure their part."""
    start = time.time()
    corpus = from_shards(shards, tokenizer.bos_id, tokenizer.vocab_size, args.max_tokens, start_ranks())
    statistics = measure(corpus, args.lags, losses)
    stop_ranks()
    if statistics is None:
        return
    n_bytes = int(tokenizer.token_bytes() @ statistics.corpus.token_counts)
    document = {
        "schema_version": VERSION, "dataset_id": dataset.dataset_id, "tokenizer_id": tokenizer.tokenizer_id,
        "split": args.split, "vocab_size": tokenizer.vocab_size, "context_tokens": args.context_tokens,
        "bytes_per_token": float(n_bytes / statistics.corpus.n_tokens), **statistics_document(statistics),
        "settings": vars(args),
        "versions": {**versions(), "scipy": scipy.__version__},
        "command": " ".join(["python", "-m", "scripts.lane_b_stats", *(sys.argv[1:] if argv is None else argv)]),
        "created_utc": utc_now(), "wall_time_sec": time.time() - start}
    write_json(args.out, document)
    print0(describe(document))
    print0(f"written: {args.out}")
    if args.plot:
        draw_statistics(statistics, args.plot)


if __name__ == "__main__":
    main()
