"""A change log, as dev/LOG_lane_c.md: entries newest first under its title line."""

import re
import textwrap
from pathlib import Path

from nanochat.common import UserError, locked, write_text

WIDTH = 120  # of a line of prose


def verdict_entry(date, experiment_name, miniseries, facts, verdicts):
    """A Markdown entry: date, exact change, (name, value) facts, result against the baseline, decision."""
    against = f", miniseries `{miniseries}`" if miniseries else ""
    names = ", ".join(f"{v.candidate}: {v.decision}" for v in verdicts) or "no candidate"
    lines = [f"## {date} · {experiment_name}: {names}", "", f"Experiment `{experiment_name}`{against}, "
             "judged by `python -m scripts.verdict` against the baseline at the same seeds.",
             "; ".join(f"{name} {value}" for name, value in facts) + ".", ""]
    for verdict in verdicts:
        lines += [f"**{verdict.candidate}** (`{verdict.flags}`): **{verdict.decision}**, decided by "
                  f"{verdict.decided_by}.", ""]
        lines += [f"- gate {gate.name}: {gate.standing}. {gate.detail}" for gate in verdict.gates] + [""]
    return "\n".join(line if line.startswith("#") else textwrap.fill(
        line, WIDTH, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False) for line in lines)


def add_entry(path, entry):
    """Put `entry` under the log's title, above the older ones; the rest stays as it is.

    Returns False, the file untouched, when the newest entry says the same, whatever its date.
    Errors: UserError when the file is missing or does not begin with a `# ` title.
    """
    path = Path(path)
    with locked(path):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"there is no {path}; create it with a first line `# Log`") from None
        title, newline, rest = text.partition("\n")
        if not title.startswith("# "):
            raise UserError(f"{path}, line 1: not a `# ` title; the newest entry goes under one")
        newest = re.split(r"\n(?=## )", rest.strip(), maxsplit=1)[0]
        if _undated(newest) == _undated(entry):
            return False
        write_text(path, f"{title}\n\n{entry.strip()}\n\n{rest.lstrip(newline)}")
    return True


def _undated(entry):
    return re.sub(r"^## \d{4}-\d\d-\d\d", "##", entry.strip())
