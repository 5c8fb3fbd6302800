"""A row of dev/LEADERBOARD.md from runs of one command in several seeds."""

import statistics

from nanochat.common import UserError


def leaderboard_row(records, what):
    """The Markdown row of finished RunRecords with CORE: hours, CORE, val_bpb, `what` was run, commit.

    Hours and CORE are means, with the standard deviation from two runs on. Errors: UserError naming a run without CORE,
    or commits that differ.
    """
    for record in records:
        if record.status != "ok" or record.summary.get("core_metric") is None:
            raise UserError(f"{record.run_id} ended {record.status}, without CORE; the leaderboard takes runs that "
                            "ended ok with --core-metric-every")
    commits = {f"{str(record.config.get('git_commit') or 'unknown')[:12]}"
               f"{' (changed files)' if record.config.get('git_dirty') else ''}" for record in records}
    if len(commits) > 1:
        raise UserError(f"the runs are of several commits ({', '.join(sorted(commits))}); a row is of one")

    def of(name, scale, digits):
        values = [record.summary[name] / scale for record in records]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    return (f"| {of('train_time_sec', 3600, 2)} | {of('core_metric', 1, 4)} ({len(records)}) | "
            f"{of('final_val_bpb', 1, 5)} | {what} | {commits.pop()} |")


def time_to_target_line(record):
    """When a run reached its target, as its record says; rule 2 of the leaderboard still asks for the mean of 3."""
    said = [event["description"] for event in record.of("target")]
    return f"{record.run_id}: {said[-1] if said else 'its record has no target'}"
