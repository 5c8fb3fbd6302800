"""What digests, locks and checkpoints cost: opening token files, reading shards, saving beside training and at once.

    python -m dev.bench.trust --million-tokens 64

Every round measures each part once; medians, 20th and 80th percentiles are over rounds. All files are in the page
cache: from a slower disk the reading hides the hashing. A step waits for nothing but a save's copy.
"""

import argparse
import functools
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dev.bench.loader import made_shard
from dev.bench.measure import append_rows, cpu_ms, percentiles, time_interleaved
from nanochat import files
from nanochat.common import command, device_name, git_commit
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.runlog import RunLog
from nanochat.saving import Saver
from nanochat.shard_writer import prepare_shards
from nanochat.shards import list_shards, read_documents
from nanochat.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from nanochat.tokens import HEADER_BYTES, TokenShard


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million-tokens", type=float, default=64, help="in the token file, 2 bytes each")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="append the figures to this CSV file")
    return parser.parse_args(argv)


def without_digest(path):
    """A copy as earlier versions wrote it."""
    old = path.with_name(f"old_{path.name}")
    data = bytearray(path.read_bytes())
    line = files.parse_json(bytes(data[:HEADER_BYTES]))
    del line["sha256"]
    data[:HEADER_BYTES] = files.json_bytes(line).ljust(HEADER_BYTES)
    old.write_bytes(data)
    return old


def parts_of(folder, n_tokens):
    """{part: function} to be timed, the digests' memory of this process emptied before each."""
    [shard] = made_shard(folder, 1000, int(n_tokens))
    old, paths = without_digest(shard.path), [shard.path.with_name(f"{i}.bin") for i in range(os.cpu_count())]
    for path in paths:
        os.link(shard.path, path)
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, rng.integers(2, 9)))) for _ in range(3000)]
    texts = [" ".join(rng.choice(words, 300)) for _ in range(1500)]
    prepare_shards(folder / "d", "d", lambda: texts, sum(map(len, texts)))
    shards = list_shards(folder / "d")
    tokenizer = train_tokenizer(texts[:50], MIN_VOCAB_SIZE + 300)
    log = RunLog.create(folder, "r", {}, owned=[files.RunLock(folder, folder / "lock", "bench", "")])

    def fresh(function):
        def timed():
            files._sha256_of_version.cache_clear()
            return function()
        return timed

    def opened_in_threads():
        with ThreadPoolExecutor(len(paths)) as pool:
            list(pool.map(TokenShard, paths))

    def read():
        return [text for path in shards for text in read_documents(path)]

    def read_unnoted():
        notes = folder / "d" / files.DIGESTS
        notes.rename(folder / "aside")
        try:
            read()
        finally:
            (folder / "aside").rename(notes)

    def checkpoint():
        log.event("train", step=1, loss=1.0)
        log.before_checkpoint()

    return {"open a token file": fresh(lambda: TokenShard(shard.path)),
            "the same without digest": lambda: TokenShard(old),
            f"open {len(paths)} of them in threads": fresh(opened_in_threads),
            "read prepared shards": fresh(read), "the same without digests": read_unnoted,
            "encode them on one core": lambda: [tokenizer.encode(text) for text in texts],
            "owner check and fsync of the record before a checkpoint": checkpoint}


def saving_times(folder, rounds):
    """{part: milliseconds}: a d4 of width 256 that trains on 2,048 tokens a step, uncompiled, and saves both ways."""
    model = GPT(GPTConfig(256, 8192, n_layer=4, n_head=4, n_kv_head=4, n_embd=256))
    model.init_weights(0)
    optimizer = MuonAdamW(parameter_groups(model))
    tokens = torch.randint(8192, (8, 257), generator=torch.Generator().manual_seed(0))
    saver = Saver(folder / "checkpoints", {"model_config": model.config.to_dict()}, model, optimizer, Ranks(), keep=1)

    def step():
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(number, wait):
        saver.save({"step": number}, lambda: None)
        if wait:
            saver.collect(wait=True)

    cpu_ms(step)
    save(1, wait=True)
    alone, beside, at_once, pauses, costs = [], [], [], [], []
    for number in range(2, 2 * rounds + 2, 2):
        usual = [cpu_ms(step) for _ in range(3)]
        at_once.append(cpu_ms(functools.partial(save, number, wait=True)))
        pauses.append(cpu_ms(functools.partial(save, number + 1, wait=False)))
        slowed = [cpu_ms(step)]
        while saver.collect(wait=saver.has_failed) is None:
            slowed.append(cpu_ms(step))
        alone, beside = alone + usual, beside + slowed
        costs.append(pauses[-1] + sum(slowed) - len(slowed) * percentiles(usual)[0])
    saver.close()
    return {"a training step": alone, "a training step while a checkpoint is written": beside,
            "pause of a checkpoint written at once": at_once, "pause of one written in the background": pauses,
            "the same and what it slows the steps by": costs}


@command
def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        times = time_interleaved(parts_of(Path(folder), 1e6 * args.million_tokens), args.rounds, torch.device("cpu"))
        times |= saving_times(Path(folder), args.rounds)
    rows = []
    for part, milliseconds in times.items():
        median, low, high = percentiles(milliseconds)
        print(f"{part:<56} {median:8.1f} ms ({low:.1f} to {high:.1f})")
        rows.append({"part": part, "ms_median": median, "ms_p20": low, "ms_p80": high,
                     "mtokens": args.million_tokens, "device": device_name(torch.device("cpu")),
                     "commit": git_commit()[0]})
    if args.out:
        append_rows(args.out, rows)


if __name__ == "__main__":
    main()
