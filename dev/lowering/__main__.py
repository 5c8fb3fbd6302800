"""Count launches and bytes of the training step on an H100, from Inductor's code, without one.

    python -m dev.lowering --out dev/lowered_h100.csv

Lowers forward, backward and the optimizer in bf16 for a faked H100 and counts graphs, launches,
bytes and (N, V) buffers in the generated code; no time is measured. Bytes are the inputs and
outputs of every kernel, as if there were no caches. Needs g++.
"""

import argparse
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dev.lowering import fake_h100
from nanochat.common import command

VOCAB_SIZE = 32768
FLAGS = {"none": {}, "both": {"fused_rmsnorm": True, "chunked_ce": True}, "fp8": {"fp8": True}}


@dataclass(frozen=True)
class Case:
    """One step: a micro-batch of `rows` x `seq_len` tokens of the protocol's model of `depth`."""

    depth: int
    rows: int
    seq_len: int
    window_pattern: str
    flags: str


SHAPES = [(12, 16, 512, "L"), (12, 16, 2048, "SSSL"), (24, 16, 2048, "SSSL")]
CASES = [Case(*shape, flags) for shape, flags in itertools.product(SHAPES, FLAGS)]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="lowering", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="", help="CSV to write")
    parser.add_argument("--depth", type=int, nargs="+", help="only these depths")
    parser.add_argument("--seq-len", type=int, nargs="+", help="only these lengths")
    parser.add_argument("--flags", nargs="+", choices=FLAGS, help="only these flags")
    parser.add_argument(
        "--largest", type=int, default=0, help="print so many kernels of each phase, by bytes"
    )
    parser.add_argument("--code", default="", help="folder to write the generated code to")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    fake_h100.pretend(Path(tempfile.gettempdir()) / "nanochat_fake_h100")
    from dev.lowering.step import lowered_rows

    rows = []
    for case in CASES:
        if all(
            not wanted or value in wanted
            for wanted, value in (
                (args.depth, case.depth),
                (args.seq_len, case.seq_len),
                (args.flags, case.flags),
            )
        ):
            rows += lowered_rows(
                case, VOCAB_SIZE, FLAGS[case.flags], largest=args.largest, code=args.code
            )
            if args.out:  # what is done is kept
                import pandas as pd

                pd.DataFrame(rows).to_csv(args.out, index=False, lineterminator="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
