"""Lane B from a corpus to who won: python -m scripts.lane_b --profile cpu

Target, calibration, statistics, inference, the baseline beside the inferred ratio and its one neighbour, rows, report.
Stop it at any time: the same command goes on.
"""

import argparse
import shlex

from nanochat.common import QUIET_HELP, base_dir, command, set_quiet
from nanochat.experiments.lane_b_study import SETTINGS, Study, commands
from nanochat.experiments.runner import run_module
from nanochat.target import check_target


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu", help=f"training protocol: {', '.join(SETTINGS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                        help="of the proof (0 1 2); the gates ask for three. Target and calibration have others")
    parser.add_argument("--target-metric-threshold", type=float, metavar="BITS_PER_BYTE",
                        help="the target (default: the end of baseline runs of two more seeds)")
    parser.add_argument("--name", help="of experiments, rows and report (lane_b_<profile>)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, as far as they are known already")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    name = args.name or f"lane_b_{args.profile}"
    study = Study(name, args.profile, tuple(args.seeds), base_dir() / name, args.target_metric_threshold)
    if args.target_metric_threshold is not None:
        check_target("val_bpb", args.target_metric_threshold)
    for module, flags in commands(study):
        if args.dry_run:
            print(shlex.join(["python", "-m", module, *map(str, flags)]))
        else:
            study.folder.mkdir(exist_ok=True)
            run_module(module, flags)


if __name__ == "__main__":
    main()
