"""How many tokens a second the data loader serves from cached tokens, and where its time goes.

    python -m dev.bench.loader                                          # made documents of about 200 and 1000 tokens
    python -m dev.bench.loader --dataset climbmix --tokenizer-dir DIR   # a real dataset

Every round measures each shape once; medians and 10th to 90th percentiles are over rounds.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from dev.bench.measure import append_rows
from nanochat.common import choose_device, command, device_name, git_commit, progress
from nanochat.dataloader import RowPlanner, TokenLoader, fill_rows
from nanochat.dataset import open_dataset
from nanochat.tokenizer import load_tokenizer
from nanochat.tokens import TokenShard, token_shards, write_token_shard

PARTS = ("loader", "planner", "filler")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a dataset's name or folder (default: documents made up here)")
    parser.add_argument("--tokenizer-dir", help="folder of the tokenizer for --dataset")
    parser.add_argument("--max-shards", type=int, help="of --dataset")
    parser.add_argument("--sequence-lens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--batch-rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--world-size", type=int, default=1, help="plan for this many ranks, fill for one")
    parser.add_argument("--device-type", default="cpu", help="where batches are delivered: cpu (default) or cuda")
    parser.add_argument("--million-tokens", type=float, default=4, help="served by each measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="append the figures to this CSV file")
    args = parser.parse_args(argv)
    if args.dataset and not args.tokenizer_dir:
        parser.error("--dataset needs --tokenizer-dir")
    return args


def made_shard(folder, mean_tokens, n_tokens=20_000_000, vocab_size=32_768, bos_id=32_759):
    """Random tokens in documents of log-normal length (sigma 0.5)."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(2, rng.lognormal(np.log(mean_tokens) - 0.125, 0.5, n_tokens // mean_tokens)).astype(np.int64)
    tokens = rng.integers(0, bos_id, lengths.sum(), dtype=np.uint16)
    tokens[np.cumsum(lengths) - lengths] = bos_id
    path = Path(folder) / f"made_{mean_tokens}.bin"
    write_token_shard(path, [(lengths.tolist(), tokens)], {"vocab_size": vocab_size, "bos_id": bos_id})
    return [TokenShard(path)]


def measure(shards, batch_rows, sequence_len, world_size, device, n_tokens):
    """{part: tokens a second delivered to this rank} of the loader as a whole and of its two parts alone."""
    n_batches = max(1, round(n_tokens / (batch_rows * sequence_len)))
    with TokenLoader(shards, batch_rows, sequence_len, world_size=world_size, device=device) as loader:
        for _ in range(4 * 32):  # what was prepared before the clock starts is not counted
            next(loader)
        loader_sec = timed(lambda: [next(loader) for _ in range(n_batches)], device)
    planner = RowPlanner(shards, sequence_len + 1, seed=0, shuffle=True)
    plans = []
    planner_sec = timed(lambda: plans.extend(
        [planner.next_row() for _ in range(world_size * batch_rows)][:batch_rows] for _ in range(n_batches)))
    filler_sec = timed(lambda: [fill_rows(shards, plan, sequence_len + 1) for plan in plans])
    served = n_batches * batch_rows * sequence_len
    return dict(zip(PARTS, (served / seconds for seconds in (loader_sec, planner_sec, filler_sec)), strict=True))


def timed(work, device=None):
    start = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summarised(figures):
    """The 10th, 50th and 90th percentile of each part, in million tokens a second."""
    line = {}
    for part in PARTS:
        percentiles = np.percentile([figure[part] for figure in figures], [10, 50, 90]) / 1e6
        line |= {f"{part}_mtok_per_sec_{name}": value
                 for name, value in zip(("p10", "median", "p90"), percentiles, strict=True)}
    return line


def printed(line):
    parts = (f"{part} {{{part}_mtok_per_sec_median:.1f}} ({{{part}_mtok_per_sec_p10:.1f}} to "
             f"{{{part}_mtok_per_sec_p90:.1f}})" for part in PARTS)
    return ("{documents}, {batch_rows} rows of {sequence_len}, million tokens/s: " + ", ".join(parts)).format(**line)


@command
def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device_type)
    facts = {"device": device_name(device), "cores": os.cpu_count(), "commit": git_commit()[0],
             "python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        if args.dataset:
            tokenizer = load_tokenizer(args.tokenizer_dir)
            sources = {args.dataset: token_shards(open_dataset(args.dataset), tokenizer, max_shards=args.max_shards)}
        else:
            sources = {f"made, mean {mean} tokens": made_shard(folder, mean) for mean in (200, 1000)}
        shapes = [(name, rows, length) for name in sources for length in args.sequence_lens for rows in args.batch_rows]
        found = {shape: [] for shape in shapes}
        for name, rows, length in progress(shapes * args.rounds, desc="measuring"):
            found[name, rows, length].append(measure(
                sources[name], rows, length, args.world_size, device, args.million_tokens * 1e6))
    lines = [{"documents": name, "batch_rows": rows, "sequence_len": length, "world_size": args.world_size,
              **summarised(figures), **facts} for (name, rows, length), figures in found.items()]
    for line in lines:
        print(printed(line))
    if args.out:
        append_rows(args.out, lines)


if __name__ == "__main__":
    main()
