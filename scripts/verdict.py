"""Judge the candidates of an experiment by the four gates (see ideas/README.md).

python -m scripts.verdict --experiment lane_c_d12 --miniseries miniseries_d12
"""


from nanochat.common import Parser, command, runs_dir
from nanochat.experiments.gates import RULES, judge_all
from nanochat.experiments.ledger import LEDGER_HELP, find_ledger
from nanochat.experiments.table import experiment_table


def parse_args(argv=None):
    parser = Parser("python -m scripts.verdict", __doc__)
    parser.add_argument("--experiment", required=True, help="name of the experiment in the ledger, "
                        "the CSV file of runs")
    parser.add_argument("--miniseries",
                        help="name of the experiment with several depths, for gate 4")
    parser.add_argument("--candidates", nargs="+", metavar="NAME",
                        help="candidates to judge (default: all in the experiment)")
    parser.add_argument("--ledger", help=LEDGER_HELP)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    ledger = args.ledger or find_ledger(args.experiment)
    table = experiment_table(ledger, args.experiment, runs_dir())
    series = experiment_table(ledger, args.miniseries, runs_dir()) if args.miniseries else None
    verdicts = judge_all(table, series, runs_dir(), args.candidates)
    print("\n".join(RULES), end="\n\n")
    for verdict in verdicts:
        print(f"{verdict.candidate}: {verdict.decision.upper()} ({verdict.decided_by})")
        for name, (outcome, sentence) in verdict.gates.items():
            print(f"  {name:<16} {outcome:<13} {sentence}")
        print()


if __name__ == "__main__":
    main()
