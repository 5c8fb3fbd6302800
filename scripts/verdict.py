"""Judge an experiment's candidates by the four gates.

python -m scripts.verdict --experiment lane_c --miniseries depths
"""

import argparse

from nanochat.common import command, runs_dir
from nanochat.experiments.gates import RULES, judge_all
from nanochat.experiments.table import experiment_table


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.verdict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="name of the experiment in the ledger")
    parser.add_argument("--miniseries", help="name of the experiment over depths, for gate 4")
    parser.add_argument("--candidates", nargs="+", metavar="NAME",
                        help="candidates to judge (default: all of the experiment)")
    parser.add_argument("--ledger", default="dev/experiments.csv",
                        help="CSV file of runs (default: %(default)s)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    table = experiment_table(args.ledger, args.experiment, runs_dir())
    series = None
    if args.miniseries:
        series = experiment_table(args.ledger, args.miniseries, runs_dir())
    verdicts = judge_all(table, series, runs_dir(), args.candidates)
    print("\n".join(RULES.describe()), end="\n\n")
    for verdict in verdicts:
        print("\n".join(verdict.describe()), end="\n\n")


if __name__ == "__main__":
    main()
