"""How fast lane B's statistics are on one core: counting a lag, all of a lag's estimate, an n-gram model.

    OMP_NUM_THREADS=1 python -m dev.bench.lane_b                                        # made text
    OMP_NUM_THREADS=1 python -m dev.bench.lane_b --dataset books --tokenizer-dir DIR    # a real dataset

Every round measures each part once; medians, 20th and 80th percentiles are over rounds. Reading the documents and
sorting them by token comes once for all lags up to 16M tokens a fold, with each lag beyond: the rows "sorted" leave it
out. dev.bench.lane_b_scale measures larger texts.
"""

import argparse
import os
import platform
from pathlib import Path

import numpy as np
import scipy
import torch

from dev.bench.measure import append_rows, percentiles, time_interleaved
from nanochat.common import command, device_name, git_commit
from nanochat.dataset import open_dataset
from nanochat.lane_b.measure.corpus import from_documents, from_shards
from nanochat.lane_b.measure.correlation import counters_of, estimate_lags
from nanochat.lane_b.measure.documents import from_arrays
from nanochat.lane_b.measure.kneser_ney import KneserNey
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import token_shards


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a dataset's name or folder (default: text made up here)")
    parser.add_argument("--tokenizer-dir", help="default: the one in the cache folder")
    parser.add_argument("--million-tokens", type=float, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192, help="of made text")
    parser.add_argument("--lag", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="append the figures to this CSV file")
    return parser.parse_args(argv)


def made_documents(n_tokens, vocab_size, document_tokens=1000):
    tokens = made_tokens(n_tokens // document_tokens * document_tokens, vocab_size)
    return from_arrays(list(tokens.reshape(-1, document_tokens)), vocab_size)


def made_tokens(n_tokens, vocab_size, seed=0):
    """Zipf tokens, six in ten of them copied from up to 512 tokens back: pairs repeat about as they do in text."""
    rng = np.random.default_rng(seed)
    frequencies = 1 / np.arange(1, vocab_size + 1)
    steps = np.cumsum(frequencies / frequencies.sum()) * (1 << 22)
    drawn = np.repeat(np.arange(vocab_size, dtype=np.uint16), np.diff(steps.round().astype(int), prepend=0))
    tokens = drawn.take(rng.integers(0, len(drawn), n_tokens, dtype=np.int32))
    source = np.arange(n_tokens) - np.where(rng.random(n_tokens, np.float32) < 0.6, rng.integers(1, 513, n_tokens), 0)
    return tokens[np.maximum(source, 0)]


def read_corpus(args, n_tokens):
    tokenizer = load_tokenizer(args.tokenizer_dir)
    shards = [(shard.tokens, shard.offsets) for shard in token_shards(open_dataset(args.dataset), tokenizer)]
    return from_shards(shards, tokenizer.bos_id, tokenizer.vocab_size, n_tokens)


@command
def main(argv=None):
    args = parse_args(argv)
    n_tokens = int(1e6 * args.million_tokens)
    corpus = (read_corpus(args, n_tokens) if args.dataset else
              from_documents(made_documents(n_tokens, args.vocab_size)))
    documents, counters = corpus.sample(np.ones(corpus.n_documents, bool), corpus.n_tokens), counters_of(corpus)
    device = torch.device("cpu")
    times = time_interleaved({
        "counting a lag": lambda: [counter.counts(args.lag) for counter in counters_of(corpus)],
        "counting a lag, sorted": lambda: [counter.counts(args.lag) for counter in counters],
        "estimate of a lag, sorted": lambda: estimate_lags(counters, [args.lag]),
        "n-gram model, context 1": lambda: KneserNey(documents, 1),
        "n-gram model, context 2": lambda: KneserNey(documents, 2),
    }, args.rounds, device, warmup=1)
    rows = []
    for part, milliseconds in times.items():
        median, fast, slow = (documents.n_tokens / ms / 1e3 for ms in percentiles(milliseconds))
        print(f"{part:<24} {median:6.1f} million tokens/s ({slow:.1f} to {fast:.1f})")
        rows.append({"part": part, "mtok_per_sec_median": median, "mtok_per_sec_p20": slow, "mtok_per_sec_p80": fast,
                     "tokens": documents.n_tokens, "vocab_size": documents.vocab_size, "lag": args.lag,
                     "dataset": Path(args.dataset).name if args.dataset else "made", "device": device_name(device),
                     "threads": os.environ.get("OMP_NUM_THREADS", ""), "commit": git_commit()[0],
                     "python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__})
    if args.out:
        append_rows(args.out, rows)


if __name__ == "__main__":
    main()
