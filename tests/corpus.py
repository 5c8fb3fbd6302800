"""A tiny corpus, tokenizer and model size for tests of the programs; real enough to learn from."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.tokenizer import load_tokenizer

GOLDEN_TOKENIZER = str(Path(__file__).parent / "golden" / "tokenizer_1024")
WORDS = ("the", "a", "red", "green", "old", "small", "dog", "cat", "sees", "finds", "near", "under",
         "and", "then")

# A model that trains in seconds, uncompiled: the base_train flags that every such test shares.
TINY_FLAGS = [
    "--depth", "2", "--aspect-ratio", "16", "--head-dim", "16", "--max-seq-len", "64",
    "--device-batch-size", "2", "--total-batch-size", "256", "--eval-every", "5",
    "--eval-tokens", "512", "--core-metric-every", "-1", "--sample-every", "-1", "--no-compile",
    "--tokenizer-dir", GOLDEN_TOKENIZER]


def write_corpus(folder, n_shards=3, documents_per_shard=60):
    """A folder of parquet shards of made sentences, the same every time."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(0)
    for shard in range(n_shards):
        texts = [" ".join(source.choices(WORDS, k=source.randint(5, 120)))
                 for _ in range(documents_per_shard)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{shard:05d}.parquet")
    return folder


def golden_tokenizer():
    return load_tokenizer(GOLDEN_TOKENIZER)
