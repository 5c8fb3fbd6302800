"""The row of dev/LEADERBOARD.md of runs of one command, a seed each: python -m scripts.leaderboard RUN [RUN ...]"""

import argparse

from nanochat.common import check_name, command, runs_dir
from nanochat.experiments.leaderboard import leaderboard_row, time_to_target_line
from nanochat.runlog import read_run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.leaderboard", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run ids")
    parser.add_argument("--what", default="`runs/speedrun.sh` on 8×H100", help="the row's description")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    records = [read_run(runs_dir() / check_name("RUN", run_id)) for run_id in args.runs]
    for record in records:
        print(time_to_target_line(record))
    print(leaderboard_row(records, args.what))


if __name__ == "__main__":
    main()
