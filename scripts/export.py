"""Export a checkpoint: a folder for Hugging Face's transformers, or in upstream's layout.

python -m scripts.export --model-tag quickstart --to my_model
"""

import argparse
import shlex
from pathlib import Path

import torch

from nanochat.checkpoint import load_trained
from nanochat.common import command
from nanochat.export import FORMATS, check_new, new_folder


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-tag", required=True, help="checkpoint folder, ours or upstream's: a name under "
        "<cache>/base_checkpoints, or an absolute path")
    add("--to", required=True, type=Path, metavar="FOLDER", help="folder to write; must be new or "
        "empty")
    add("--format", choices=FORMATS, default="hf", help="hf: weights in fp32 (safetensors), "
        "tokenizer.json and the model's code for transformers; upstream: a cache folder for "
        "upstream's programs (%(default)s)")
    add("--step", default="latest", help="step of the checkpoint, or latest (%(default)s)")
    add("--tokenizer-dir", default="", help="folder of the tokenizer (default: the checkpoint's, "
        "else <cache>/tokenizer)")
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
        print(f"try it with transformers: {args.to / 'README.md'} has the lines of Python")


if __name__ == "__main__":
    main()
