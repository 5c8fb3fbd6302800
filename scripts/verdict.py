"""Judge an experiment's candidates by the four gates: python -m scripts.verdict --experiment lane_c

--log writes the decisions to the change log, newest first.
"""

import argparse
from pathlib import Path

from nanochat.common import UserError, check_output, command, runs_dir, utc_now
from nanochat.experiments.change_log import add_entry, verdict_entry
from nanochat.experiments.comparison import RULES
from nanochat.experiments.gates import judge_all
from nanochat.experiments.trials import facts_of, load_trials


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.verdict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", required=True, help="the experiment's name in the ledger")
    parser.add_argument("--miniseries", help="the experiment over depths that gate 4 judges by")
    parser.add_argument("--candidates", nargs="+", metavar="NAME", help="all of the experiment's when left out")
    parser.add_argument("--ledger", default="dev/experiments.csv", help="the CSV file of runs (dev/experiments.csv)")
    parser.add_argument("--log", nargs="?", const="dev/LOG_lane_c.md", type=Path, metavar="FILE",
                        help="also add the decisions to this change log (dev/LOG_lane_c.md)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if args.log:
        check_output("--log", args.log)
    trials = load_trials(args.ledger, args.experiment, runs_dir())
    absent = sum(trial.record is None for trial in trials)
    if absent:
        missing = f"{absent} of {len(trials)} runs have no record in {runs_dir()}, so gates 2 and 3 cannot see them"
        if args.log:
            raise UserError(f"{missing}; judge them with --log where they were made (NANOCHAT_BASE_DIR)")
        print(f"note: {missing}\n")
    series = load_trials(args.ledger, args.miniseries, runs_dir()) if args.miniseries else []
    verdicts = judge_all(trials, series, runs_dir(), args.candidates)
    print("\n".join(RULES.describe()), end="\n\n")
    for verdict in verdicts:
        print("\n".join(verdict.describe()), end="\n\n")
    if args.log:
        entry = verdict_entry(utc_now()[:10], args.experiment, args.miniseries, facts_of(trials), verdicts)
        added = add_entry(args.log, entry)
        print(f"added to {args.log}" if added else f"{args.log}: its newest entry says the same, nothing added")


if __name__ == "__main__":
    main()
