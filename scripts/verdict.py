"""Judge the candidates of an experiment by the four gates of lane C (see ideas/README.md).

python -m scripts.verdict --experiment lane_c_d12-protocol --miniseries miniseries_d12-protocol
"""


from nanochat.common import Parser, command, runs_dir
from nanochat.experiments.gates import RULES, gate_lines, judge_all
from nanochat.experiments.ledger import experiment_table


def parse_args(argv=None):
    parser = Parser("python -m scripts.verdict", __doc__)
    parser.add_argument("--experiment", required=True, help="name of the experiment")
    parser.add_argument("--miniseries",
                        help="name of the experiment with several depths, for gate 4")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    table = experiment_table(args.experiment, runs_dir())
    series = experiment_table(args.miniseries, runs_dir()) if args.miniseries else None
    print(*RULES, sep="\n")
    for verdict in judge_all(table, series, runs_dir()):
        print(f"\n{verdict.candidate}: {verdict.decision.upper()} ({verdict.decided_by})")
        print(*gate_lines(verdict.gates), sep="\n")


if __name__ == "__main__":
    main()
