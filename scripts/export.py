"""Take a model elsewhere: a folder for Hugging Face's transformers, or in upstream's layout.

python -m scripts.export --model-tag quickstart --to my_model
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from nanochat.checkpoint import load_trained
from nanochat.common import command, say
from nanochat.export.folder import check_replaceable, whole_folder
from nanochat.export.formats import FORMATS


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model-tag", required=True, help="checkpoints, ours or upstream's: a name under <cache>, or an absolute path")
    add("--to", required=True, metavar="DIR", help="the folder to write: a new one, or an earlier export to replace")
    add("--format", choices=FORMATS, default="hf", help="hf: fp32 safetensors, tokenizer.json, the model's code, for "
                                                        "transformers; upstream: a cache folder of upstream's "
                                                        "(%(default)s)")
    add("--step", default="latest", help="the checkpoint's step, or latest (%(default)s)")
    add("--tokenizer-dir", default="", help="folder of the tokenizer; empty: what the checkpoint says, else "
                                            "<cache>/tokenizer")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    check_replaceable(args.to)
    trained = load_trained(args.model_tag, args.step, torch.device("cpu"), torch.float32, args.tokenizer_dir)
    about = {"format": args.format, "model_tag": trained.tag, "step": trained.step,
             "tokenizer_id": trained.tokenizer.tokenizer_id}
    to = Path(args.to)
    with whole_folder(to, about) as folder:
        FORMATS[args.format](folder, trained, to.absolute().name)
    files = sorted(path for path in to.rglob("*") if path.is_file())
    say(f"{trained.name} is in {to}, {sum(path.stat().st_size for path in files) / 1e6:,.1f} MB: "
        f"{', '.join(path.relative_to(to).as_posix() for path in files)}")
    if args.format == "upstream":
        say(f"try it: NANOCHAT_BASE_DIR={shlex.quote(str(to))} python -m scripts.sample --model-tag {trained.tag}")
    else:
        say(f"try it with transformers (the extra hf): {to / 'README.md'} has the lines of Python")
    return 0


if __name__ == "__main__":
    sys.exit(main())
