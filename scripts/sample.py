"""Print a model's continuations of prompts.

python -m scripts.sample --model-tag quickstart "def fib("
"""

import itertools
import sys

import numpy as np

from nanochat.checkpoint import load_trained
from nanochat.common import NEWEST_HELP, STEP_HELP, TOKENIZER_DIR_HELP, Parser, UserError, command
from nanochat.device import choose_compute_dtype, choose_device
from nanochat.engine import stream, whole_characters

# Generated text must not control a terminal: control characters except newline and tab are escaped.
ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))
           if chr(code) not in "\n\t"}


def parse_args(argv=None):
    description = __doc__.splitlines()[0]
    parser = Parser("python -m scripts.sample", description)
    add = parser.add_argument
    add("prompt", nargs="*", help="text to continue; an empty text begins a new document. Without "
        "this argument, each line of the standard input is a prompt")
    add("--model-tag", default="", help=NEWEST_HELP)
    add("--step", default="latest", help=STEP_HELP)
    add("--tokenizer-dir", default="", help=TOKENIZER_DIR_HELP)
    add("--num-samples", type=int, default=1, help="continuations per prompt (%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="generate at most this many tokens "
        "per continuation (%(default)s)")
    add("--temperature", type=float, default=0.8, help="sampling temperature; 0: always take the "
        "most likely token (%(default)s)")
    add("--top-k", type=int, default=50, help="draw from this many most likely tokens; "
        "0: from all (%(default)s)")
    add("--seed", type=int, default=42, help="seed of the first continuation of a prompt; the next "
        "ones use SEED + 1, SEED + 2, ... (%(default)s)")
    add("--device-type", default="", help="cuda, mps or cpu (default: the best available)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if args.num_samples < 1 or not 0 <= args.seed < 2**62:
        raise UserError("--num-samples must be at least 1, and --seed from 0 to 2^62 - 1")
    device = choose_device(args.device_type)
    dtype, _ = choose_compute_dtype(device)
    trained = load_trained(args.model_tag, args.step, device, dtype, args.tokenizer_dir)
    newest = "" if args.model_tag else " (the newest checkpoint)"
    print(f"{trained.name}{newest} in {dtype} on {device}", file=sys.stderr, flush=True)
    if not args.prompt:
        sys.stdin.reconfigure(errors="replace")
    for prompt in args.prompt or (line.rstrip("\r\n") for line in sys.stdin):
        for seed in range(args.seed, args.seed + args.num_samples):
            show(args, trained, prompt, seed)
    return 0


def show(args, trained, prompt, seed):
    """Print a prompt and its continuation during generation."""
    tokenizer = trained.tokenizer
    special = np.flatnonzero(tokenizer.token_bytes() == 0).tolist()  # BOS of the next document etc.
    tokens = stream(trained.model, [tokenizer.bos_id, *tokenizer.encode(prompt)],
                    args.max_new_tokens, stop_ids=special, seed=seed,
                    temperature=args.temperature, top_k=args.top_k or None)
    pieces = whole_characters(tokens, tokenizer.decode)
    first = next(pieces, "")  # raises errors before anything is printed
    for piece in itertools.chain((prompt, first), pieces):
        text = piece.translate(ESCAPES) if sys.stdout.isatty() else piece
        print(text, end="", flush=True)
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
