"""Export a checkpoint for Hugging Face's transformers.

python -m scripts.export --model-tag quickstart --to my_model
"""

from pathlib import Path

import torch

from nanochat.checkpoint import load_trained
from nanochat.common import NEWEST_HELP, STEP_HELP, TOKENIZER_DIR_HELP, Parser, command
from nanochat.export import new_folder, write_hf


def parse_args(argv=None):
    parser = Parser("python -m scripts.export", __doc__)
    add = parser.add_argument
    add("--model-tag", default="", help=NEWEST_HELP)
    add("--to", required=True, type=Path, metavar="FOLDER",
        help="folder to write (weights in fp32, tokenizer, the model's code); it must not exist or "
        "must be empty")
    add("--step", default="latest", help=STEP_HELP)
    add("--tokenizer-dir", default="", help=TOKENIZER_DIR_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    trained = load_trained(args.model_tag, args.step, torch.device("cpu"), torch.float32,
                           args.tokenizer_dir)
    with new_folder(args.to) as folder:
        write_hf(folder, trained, args.to.absolute().name)
    size_mb = sum(path.stat().st_size for path in args.to.iterdir()) / 1e6
    print(f"{trained.name} is exported to {args.to}, {size_mb:,.1f} MB; {args.to / 'README.md'} "
          "has an example in Python")


if __name__ == "__main__":
    main()
