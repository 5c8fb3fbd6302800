"""Print a row for dev/LEADERBOARD.md from runs of the same command with different seeds.

python -m scripts.leaderboard RUN [RUN ...]
"""

import argparse
import statistics

from nanochat.common import UserError, check_name, command, runs_dir
from nanochat.runlog import read_run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.leaderboard", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="id of a finished run")
    parser.add_argument("--what", default="`runs/speedrun.sh` on 8×H100",
                        help="description in the row (%(default)s)")
    return parser.parse_args(argv)


def leaderboard_row(records, what):
    """Return the Markdown row of finished RunRecords: hours, CORE, val_bpb, `what`, commit.

    Several runs give means with standard deviations. Raise UserError for a run without CORE and for
    runs of different commits.
    """
    for record in records:
        if record.status != "ok" or record.summary.get("core_metric") is None:
            problem = f"ended {record.status}" if record.status != "ok" else "ended without CORE"
            raise UserError(f"{record.run_id} {problem}; give runs that ended ok and were trained "
                            "with --core-metric-every")
    commits = {str(record.config.get("git_commit") or "unknown")[:12]
               + (" (changed files)" if record.config.get("git_dirty") else "")
               for record in records}
    if len(commits) > 1:
        raise UserError(f"the runs were made with several commits ({', '.join(sorted(commits))}); "
                        "give runs of one commit")

    def mean(name, scale, digits):
        values = [record.summary[name] / scale for record in records]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    return (f"| {mean('train_time_sec', 3600, 2)} | {mean('core_metric', 1, 4)} ({len(records)}) | "
            f"{mean('final_val_bpb', 1, 5)} | {what} | {commits.pop()} |")


def time_to_target_line(record):
    """Return a line that says when a run reached its target, according to its record."""
    targets = [event["description"] for event in record.of("target")]
    return f"{record.run_id}: {targets[-1] if targets else 'its record has no target'}"


@command
def main(argv=None):
    args = parse_args(argv)
    records = [read_run(runs_dir() / check_name("RUN", run_id)) for run_id in args.runs]
    print("\n".join([*map(time_to_target_line, records), leaderboard_row(records, args.what)]))


if __name__ == "__main__":
    main()
