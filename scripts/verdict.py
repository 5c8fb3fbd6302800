"""Judge the candidates of an experiment by the four gates (see ideas/README.md).

python -m scripts.verdict --experiment lane_c_d12 --miniseries miniseries_d12
"""

import argparse

from nanochat.common import command, runs_dir
from nanochat.experiments.gates import RULES, judge_all
from nanochat.experiments.table import experiment_table


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.verdict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="name of the experiment in the ledger, "
                        "the CSV file of runs")
    parser.add_argument("--miniseries",
                        help="name of the experiment with several depths, for gate 4")
    parser.add_argument("--candidates", nargs="+", metavar="NAME",
                        help="candidates to judge (default: all in the experiment)")
    parser.add_argument("--ledger", default="dev/experiments.csv",
                        help="path of the ledger (default: %(default)s)")
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
