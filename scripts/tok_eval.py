"""How many bytes of text a token stands for: on both splits of a dataset and on short texts of different kinds.

python -m scripts.tok_eval --dataset stdlib [--compare OTHER_TOKENIZER_DIR]
"""

import argparse
from pathlib import Path

from nanochat.common import UserError, command
from nanochat.dataset import open_dataset
from nanochat.shards import sample_documents
from nanochat.tokenizer import load_tokenizer

TEXTS = {
    "prose": """The ferry left an hour late, because the captain would not sail without her dog. Nobody complained.
We sat on the upper deck, shared somebody's oranges, and watched the lamps of the harbour come on one by one. "You get
used to it," said the woman beside me; "after thirty years I set my watch by the dog." It barked, and we were off.
""",
    "science": """A falling drop of rain reaches its terminal velocity when drag balances weight. For small drops the
flow is laminar and Stokes' law holds: the speed grows with the square of the radius. Drops above five millimetres are
unstable; the pressure at their base exceeds what surface tension can hold, so that they flatten, swell and burst.
""",
    "python": '''def moving_average(values, width):
    """Mean of the last `width` values at each position; shorter at the start."""
    total, means = 0.0, []
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        means.append(total / min(i + 1, width))
    return means
''',
    "c": """static int count_bits(uint64_t word) {
    int n = 0;
    while (word != 0) {      /* clears the lowest set bit */
        word &= word - 1;
        n++;
    }
    return n;
}
""",
    "numbers": """1, 12, 123, 1234, 12345, 123456; 3.14159265, 2.71828183, 6.02214076e23, 0x7fff, 1/3
2024-02-29 23:59:60  +41 44 555 01 99   1,048,576 bytes   98.6 %   -273.15   192.168.0.17   17:45
""",
    "german": """Im Keller der alten Mühle stand ein Apparat, dessen Zweck niemand mehr kannte. Großvater ölte ihn
trotzdem jeden Sonntag. „Wer weiß“, sagte er, „eines Tages läuft er wieder, und dann wären wir schön blamiert.“
""",
    "korean": """비가 그치자 아이들은 골목으로 뛰어나왔다. 할머니는 창가에 앉아 식은 차를 마시며
그 모습을 오래 바라보았다.
""",
    "html": """<table class="prices">
  <tr><th scope="row">Tea</th><td data-unit="eur">2.40</td></tr>
  <tr><th scope="row">Coffee &amp; cake</th><td data-unit="eur">6.10</td></tr>
</table>
""",
    "latex": r"""\begin{equation}
  \int_{0}^{\infty} x^{n} e^{-\lambda x} \, dx = \frac{n!}{\lambda^{n+1}}, \qquad \lambda > 0,\ n \in \mathbb{N}
\end{equation}
""",
    "emoji": "Train at 7:05 🚆☕️ then the lake 🏞️🚣‍♀️ — bring sun cream!! 😎👍🏽 (Ana says hi 👋)\n",
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.tok_eval", description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="climbmix",
                        help="stdlib, climbmix, fineweb-edu, or a folder of text (climbmix)")
    parser.add_argument("--tokenizer-dir", type=Path, help="default: <cache folder>/tokenizer")
    parser.add_argument("--compare", type=Path, help="folder of a second tokenizer")
    parser.add_argument("--max-chars", type=int, default=2_000_000, help="characters read of each split (%(default)s)")
    return parser.parse_args(argv)


def measure(tokenizer, texts):
    """(bytes, tokens) of a list of texts; every text must come back from its tokens unchanged."""
    encoded = tokenizer.encode_batch(texts)
    assert all(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts, strict=True))
    return sum(len(text.encode()) for text in texts), sum(map(len, encoded))


def table(samples, tokenizer, other=None):
    """Lines of the table: a row for each sample {name: texts}; with `other`, its figures and ours relative to them."""
    header = f"{'text':<14}{'bytes':>12}{'tokens':>12}{'bytes/token':>13}"
    yield header + (f"{'other':>10}{'gain':>9}" if other else "")
    for name, texts in samples.items():
        n_bytes, n_tokens = measure(tokenizer, texts)
        line = f"{name:<14}{n_bytes:>12,}{n_tokens:>12,}{n_bytes / n_tokens:>13.3f}"
        if other:
            _, other_tokens = measure(other, texts)
            line += f"{n_bytes / other_tokens:>10.3f}{other_tokens / n_tokens - 1:>+9.1%}"
        yield line


@command
def main(argv=None):
    args = parse_args(argv)
    if args.max_chars < 1:
        raise UserError("--max-chars must be at least 1")
    tokenizer = load_tokenizer(args.tokenizer_dir)
    other = load_tokenizer(args.compare) if args.compare else None
    dataset = open_dataset(args.dataset)
    samples = {name: [text] for name, text in TEXTS.items()}
    samples["train split"] = list(sample_documents(dataset.train_shards, args.max_chars))
    samples["val split"] = list(sample_documents(dataset.val_shards, args.max_chars))
    print(f"tokenizer {tokenizer.tokenizer_id}, {tokenizer.vocab_size:,} tokens, on {dataset.dataset_id}")
    if other:
        print(f"other: {other.tokenizer_id}, {other.vocab_size:,} tokens; gain: our bytes per token relative to its")
    print("\n".join(table(samples, tokenizer, other)))


if __name__ == "__main__":
    main()
