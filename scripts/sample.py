"""Try a model: continuations of prompts, written as they are made.

python -m scripts.sample --model-tag quickstart "def fib("
"""

import argparse
import contextlib
import itertools
import shlex
import sys
import time

import numpy as np

from nanochat.checkpoint import load_trained
from nanochat.common import UserError, choose_compute_dtype, choose_device, command, device_name, warn
from nanochat.engine import stream, whole_characters

# What a model writes must not steer a terminal: control characters but newline and tab are shown as their codes.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.sample", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("prompt", nargs="*", help="a text to continue, or empty for a document from its beginning; without any they "
                                  "are asked for in a terminal, or are the lines of the standard input")
    add("--model-tag", required=True, help="checkpoints, ours or upstream's: a name under <cache>, or an absolute path")
    add("--step", default="latest", help="the checkpoint's step, or latest (%(default)s)")
    add("--tokenizer-dir", default="", help="folder of the tokenizer; empty: what the checkpoint says, else "
                                            "<cache>/tokenizer")
    add("--num-samples", type=int, default=1, help="continuations of each prompt, by the seeds SEED, SEED + 1, ... "
                                                    "(%(default)s)")
    add("--max-new-tokens", type=int, default=128, help="tokens of each continuation at most (%(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    add("--top-k", type=int, default=50, help="among so many likeliest tokens; 0: all (%(default)s)")
    add("--seed", type=int, default=42, help="the same seed, the same text (%(default)s)")
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if args.num_samples < 1 or not 0 <= args.seed < 2**62:
        raise UserError("--num-samples must be at least 1 and --seed at least 0, with 62 bits at most")
    device = choose_device(args.device_type)
    dtype, _ = choose_compute_dtype(device)
    trained = load_trained(args.model_tag, args.step, device, dtype, args.tokenizer_dir)
    note(f"{trained.name} on {device_name(device)} in {dtype}")
    asks = not args.prompt and sys.stdin.isatty()
    n_samples = n_tokens = 0
    started = time.perf_counter()
    try:
        for prompt in args.prompt or (ask() if asks else lines()):
            try:
                for seed in range(args.seed, args.seed + args.num_samples):
                    n_tokens += show(args, trained, prompt, seed)
                    n_samples += 1
            except (UserError, KeyboardInterrupt) as error:  # in a terminal they end one prompt
                if not asks:
                    raise
                note(str(error) or "interrupted")
    except BrokenPipeError:  # whoever read has gone
        warn("the output was closed; stopped")
        return 0
    speed = "" if asks else f", {n_tokens / (time.perf_counter() - started):,.0f} tok/s"
    given = {"--model-tag": args.model_tag, "--step": args.step, "--tokenizer-dir": args.tokenizer_dir}
    flags = [word for flag, value in given.items() if value not in ("", "latest") for word in (flag, value)]
    note(f"{n_samples} sample(s), {n_tokens:,} tokens{speed}; take the model elsewhere with\n"
         + shlex.join(["python", "-m", "scripts.export", *flags, "--to", trained.tag]))
    return 0


def ask():
    """Prompts from a terminal, until its end of file or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() edits lines by it)
    note("a prompt a line; Ctrl-C stops a sample, Ctrl-D ends")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def lines():
    """Prompts from the lines of the standard input."""
    sys.stdin.reconfigure(errors="replace")
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def show(args, trained, prompt, seed):
    """Print a prompt and its continuation as it is made; returns the number of new tokens."""
    tokenizer, n_tokens = trained.tokenizer, 0

    def new_tokens():
        nonlocal n_tokens
        special = np.flatnonzero(tokenizer.token_bytes() == 0).tolist()  # the next document's BOS, a chat's end
        for [token] in stream(trained.model, [tokenizer.bos_id, *tokenizer.encode(prompt)], args.max_new_tokens,
                              temperature=args.temperature, top_k=args.top_k or None, seed=seed, stop_ids=special):
            n_tokens += 1
            yield token

    pieces = whole_characters(new_tokens(), tokenizer.decode)
    first = next(pieces, "")  # what cannot be sampled is refused before anything is printed
    try:
        for piece in itertools.chain((prompt, first), pieces):
            print(piece.translate(VISIBLE) if sys.stdout.isatty() else piece, end="", flush=True)
    finally:
        print(flush=True)
    return n_tokens


def note(line):
    """One line beside the text: on stderr."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
