"""Measure the bytes per token of a tokenizer on both splits of a dataset and on short texts.

python -m scripts.tok_eval --dataset stdlib [--compare OTHER_TOKENIZER_DIR]
"""

import argparse
from pathlib import Path

from nanochat.common import CACHE_HELP, UserError, command
from nanochat.dataset import DATASET_HELP, open_dataset, sample_documents
from nanochat.tokenizer import load_tokenizer

TEXTS = {
    "prose": """The ferry left an hour late, because the captain would not sail without her dog.
We sat on the upper deck, shared somebody's oranges, and watched the lamps come on one by one.
""",
    "python": '''def moving_average(values, width):
    """Mean of the last `width` values at each position; shorter at the start."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
''',
    "numbers": "1, 12, 123, 1234, 123456; 3.14159265, 6.02214076e23, 0x7fff, 2024-02-29 23:59:60",
    "german": "Im Keller der alten Mühle stand ein Apparat, dessen Zweck niemand mehr kannte.",
    "korean": "비가 그치자 아이들은 골목으로 뛰어나왔다. 할머니는 그 모습을 오래 바라보았다.",
    "emoji": "Train at 7:05 🚆☕️ then the lake 🏞️🚣‍♀️ — bring sun cream!! 😎👍🏽\n",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_eval",
                                     description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="climbmix", help=DATASET_HELP)
    parser.add_argument("--tokenizer-dir", type=Path,
                        help=f"folder of the tokenizer (<cache>/tokenizer; {CACHE_HELP})")
    parser.add_argument("--compare", type=Path, help="folder of a second tokenizer to compare with")
    parser.add_argument("--max-chars", type=int, default=2_000_000,
                        help="read at most this many characters per split (%(default)s)")
    return parser.parse_args(argv)


def measure(tokenizer, texts):
    """Return the number of bytes and tokens of texts; assert that decoding restores them."""
    encoded = tokenizer.encode_batch(texts)
    assert all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
    return sum(len(text.encode()) for text in texts), sum(map(len, encoded))


@command
def main(argv=None):
    args = parse_args(argv)
    if args.max_chars < 1:
        raise UserError("--max-chars must be at least 1")
    dataset = open_dataset(args.dataset)
    tokenizer = load_tokenizer(args.tokenizer_dir)
    other = load_tokenizer(args.compare) if args.compare else None
    samples = {name: [text] for name, text in TEXTS.items()}
    samples["train split"] = list(sample_documents(dataset.train_shards, args.max_chars))
    samples["val split"] = list(sample_documents(dataset.val_shards, args.max_chars))

    print(f"tokenizer {tokenizer.tokenizer_id}: {tokenizer.vocab_size:,} tokens, on "
          f"{dataset.dataset_id}")
    header = f"{'text':<14}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}"
    if other:
        print(f"other: {other.tokenizer_id}, {other.vocab_size:,} tokens; gain: how many "
              "more tokens the other needs")
        header += f"{'other':>10}{'gain':>9}"
    print(header)
    for name, texts in samples.items():
        n_bytes, n_tokens = measure(tokenizer, texts)
        line = f"{name:<14}{n_bytes:>12,}{n_tokens:>12,}{n_bytes / n_tokens:>13.3f}"
        if other:
            _, other_tokens = measure(other, texts)
            line += f"{n_bytes / other_tokens:>10.3f}{other_tokens / n_tokens - 1:>+9.1%}"
        print(line)


if __name__ == "__main__":
    main()
