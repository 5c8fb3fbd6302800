"""Processor time and memory of lane B's statistics against the size of the text, each part of the work by itself.

    OMP_NUM_THREADS=1 python -m dev.bench.lane_b_scale --million-tokens 32 128 512 --out FILE.csv

The text is made up (Zipf tokens, most of them copied from nearby, documents of 1,000) and lies in token shards on disk.
Seconds are the processor's, so that other work on the machine counts little. Memory is the anonymous part of the
resident set, sampled every 20 ms: pages of the mapped shards are the system's.
"""

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dev.bench.lane_b import made_tokens
from dev.bench.measure import append_rows, status_bytes
from nanochat.common import command, device_name, git_commit
from nanochat.lane_b.measure import entropy
from nanochat.lane_b.measure.corpus import from_shards, outliers
from nanochat.lane_b.measure.correlation import counters_of, estimate_lags, null_coefficient
from nanochat.tokens import TokenShard, write_token_shard

_SHARD_TOKENS, _DOCUMENT_TOKENS = 1 << 25, 1000


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million-tokens", type=int, nargs="+", default=[8, 32, 128], help="sizes of text, ascending")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of the text; one more is BOS")
    parser.add_argument("--lags", type=int, nargs="+", default=[1, 8], help="how many decide the time, not which")
    parser.add_argument("--ngrams", action="store_true", help="measure the n-gram models too")
    parser.add_argument("--folder", help="where the shards go, 2 bytes a token (default: the system's for such files)")
    parser.add_argument("--out", help="append the figures to this CSV file")
    return parser.parse_args(argv)


def write_shard(folder, seed, vocab_size):
    """(tokens, offsets) of a token shard of made text, mapped from disk."""
    n_documents = _SHARD_TOKENS // _DOCUMENT_TOKENS
    text = made_tokens(n_documents * _DOCUMENT_TOKENS, vocab_size, seed).reshape(n_documents, _DOCUMENT_TOKENS)
    path = Path(folder) / f"{seed}.bin"
    write_token_shard(path, [([1 + _DOCUMENT_TOKENS] * n_documents, np.insert(text, 0, vocab_size, axis=1).ravel())],
                      {"vocab_size": vocab_size + 1, "bos_id": vocab_size})
    shard = TokenShard(path)
    return shard.tokens, shard.offsets


def measured(function):
    """(its value, processor seconds, peak of anonymous memory in MiB)."""
    peak, ended = [0], threading.Event()

    def sample():
        while not ended.wait(0.02):
            peak[0] = max(peak[0], status_bytes("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.process_time()
    value = function()
    seconds = time.process_time() - start
    ended.set()
    sampler.join()
    return value, seconds, peak[0] / 2 ** 20


def measure_parts(shards, n_tokens, args):
    """Rows of figures, one a part of the statistics of the first n_tokens."""
    rows = []

    def part(name, function, per=1):
        value, seconds, mib = measured(function)
        print(f"{n_tokens // 10 ** 6:5d}M tokens  {name:<14} {seconds / per:8.1f} s  {mib:8.0f} MiB", flush=True)
        rows.append({"part": name, "cpu_sec": round(seconds / per, 2), "peak_mib": round(mib)})
        return value

    corpus = part("index", lambda: from_shards(shards, args.vocab_size, args.vocab_size + 1, n_tokens))
    part("outliers", lambda: outliers(corpus))
    part("null", lambda: null_coefficient(corpus))
    if args.ngrams:
        samples = [(n, size) for size in entropy.ngram_sizes(corpus) for n in entropy.CONTEXTS]
        part("n-gram models", lambda: [entropy.score_ngrams(corpus, sample) for sample in samples])
    counters = counters_of(corpus)
    part("a lag", lambda: estimate_lags(counters, args.lags), per=len(args.lags))
    n_pairs = counters[0].counts(args.lags[0]).nnz
    return [{**row, "tokens": corpus.n_tokens, "documents": corpus.n_documents, "vocab_size": args.vocab_size,
             "different_pairs_of_a_fold": n_pairs, "lags": len(args.lags), "device": device_name(torch.device("cpu")),
             "threads": os.environ.get("OMP_NUM_THREADS", ""), "commit": git_commit()[0]} for row in rows]


@command
def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        shards = []
        for n_million in args.million_tokens:
            while sum(len(tokens) - len(offsets) + 1 for tokens, offsets in shards) < n_million * 10 ** 6:
                shards.append(write_shard(folder, len(shards), args.vocab_size))
            rows = measure_parts(shards, n_million * 10 ** 6, args)
            if args.out:
                append_rows(args.out, rows)


if __name__ == "__main__":
    main()
