"""Lane B from a corpus to who won: python -m scripts.lane_b --profile cpu

Baseline and threshold, calibration, statistics, inference, the inferred ratio and its one neighbour, rows, report.
Stop it at any time: the same command goes on.
"""

import argparse
import shlex
import signal
import sys

from nanochat.errors import command
from nanochat.experiments.lane_b_study import SETTINGS, Study, commands
from nanochat.experiments.launch import run_module
from nanochat.paths import base_dir


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="lane_b", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu", help=f"training protocol: {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="the same for every run (0 1)")
    parser.add_argument("--name", help="of experiments, rows and report (lane_b_<profile>)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, as far as they are known already")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    name = args.name or f"lane_b_{args.profile}"
    study = Study(name, args.profile, tuple(args.seeds), base_dir() / name)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    for module, flags in commands(study):
        if args.dry_run:
            print(shlex.join(["python", "-m", module, *map(str, flags)]))
        else:
            study.folder.mkdir(exist_ok=True)
            run_module(module, flags)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
