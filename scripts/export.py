"""Export a checkpoint for Hugging Face's transformers or for karpathy/nanochat ("upstream").

python -m scripts.export --model-tag quickstart --to my_model
"""

import argparse
import shlex
from pathlib import Path

import torch

from nanochat.checkpoint import load_trained
from nanochat.common import MODEL_TAG_HELP, STEP_HELP, TOKENIZER_DIR_HELP, command
from nanochat.export import FORMATS, check_new, new_folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-tag", required=True, help=MODEL_TAG_HELP)
    add("--to", required=True, type=Path, metavar="FOLDER",
        help="folder to write; it must not exist or must be empty")
    add("--format", choices=FORMATS, default="hf", help="hf: weights in fp32 (safetensors), "
        "tokenizer.json and the model's code for transformers; upstream: a folder that upstream's "
        "programs take as NANOCHAT_BASE_DIR (%(default)s)")
    add("--step", default="latest", help=STEP_HELP)
    add("--tokenizer-dir", default="", help=TOKENIZER_DIR_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    check_new(args.to)
    trained = load_trained(args.model_tag, args.step, torch.device("cpu"), torch.float32,
                           args.tokenizer_dir)
    with new_folder(args.to) as folder:
        FORMATS[args.format](folder, trained, args.to.absolute().name)
    files = sorted(path for path in args.to.rglob("*") if path.is_file())
    size_mb = sum(path.stat().st_size for path in files) / 1e6
    names = ", ".join(path.relative_to(args.to).as_posix() for path in files)
    print(f"{trained.name} is exported to {args.to}, {size_mb:,.1f} MB: {names}")
    if args.format == "upstream":
        print(f"try it: NANOCHAT_BASE_DIR={shlex.quote(str(args.to))} "
              f"python -m scripts.sample --model-tag {trained.tag}")
    else:
        print(f"try it with transformers: {args.to / 'README.md'} has an example in Python")


if __name__ == "__main__":
    main()
