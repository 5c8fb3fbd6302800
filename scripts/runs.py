"""List runs, newest first, or compare runs. Both read the records in <cache>/runs.

python -m scripts.runs                          list all runs
python -m scripts.runs 'lane_c*'                list runs by name
python -m scripts.runs --compare RUN RUN ...    compare flags and metrics, the baseline first

<cache> is $NANOCHAT_BASE_DIR, or ~/.cache/nanochat if that is not set.
"""

import fnmatch
from datetime import datetime, timedelta

import pandas as pd

from nanochat.common import Parser, UserError, command, newest_in_words, runs_dir
from nanochat.experiments.gates import document_notes, paired
from nanochat.experiments.table import age_sec, recipe_of, runs_table
from nanochat.runlog import find_run, read_run

COMPARED = ["min_val_bpb", "final_val_bpb", "final_val_bpb_se", "core_metric",
            "time_to_target_sec", "tok_per_sec_median", "training_sec", "total_tokens",
            "peak_memory_mib"]


def parse_args(argv=None):
    parser = Parser("python -m scripts.runs", __doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], metavar="NAME",
                        help="ids of runs to list; * and ? are wildcards (default: all)")
    parser.add_argument("--compare", nargs="+", metavar="RUN",
                        help="ids, folders or model tags of runs to compare")
    return parser.parse_args(argv)


def list_runs(patterns):
    """Return a line per run of these names, newest first, and a line per unreadable record."""
    tables, broken = [], []
    for folder in sorted(path for path in runs_dir().glob("[!.]*") if path.is_dir()):
        if any(fnmatch.fnmatchcase(folder.name, pattern) for pattern in patterns):
            try:
                record = read_run(folder)
                tables.append(runs_table([record]).assign(run=folder.name, age=age_sec(record)))
            except (UserError, OSError) as error:
                broken.append(f"broken: {folder.name}: {' '.join(str(error).split())}")
    if not tables and not broken:
        if patterns == ["*"]:
            return f"no runs in {runs_dir()}"
        raise UserError(f"no run {' '.join(patterns)} in {runs_dir()}; "
                        f"{newest_in_words(runs_dir())}")
    if tables:
        rows = pd.concat(tables).sort_values(["age", "run"]).itertuples()
        broken.insert(0, as_text(pd.DataFrame(map(cells, rows)).set_index("run")))
    return "\n".join(broken)


def cells(row):
    """Return the columns of the list for a row of the table."""
    of = "" if pd.isna(row.num_iterations) else f"/{row.num_iterations:,.0f}"
    target = ""
    if pd.notna(row.target_metric_threshold):
        seconds, how = row.time_to_target_sec_measured, "reached after"
        if row.state == "running" and pd.isna(seconds):
            seconds, how = row.time_to_target_sec_extrapolated, "extrapolated to"
        when = "not reached" if pd.isna(seconds) else f"{how} {seconds:,.0f} s"
        target = f"{row.target_metric_threshold:g} {when}"
    written = datetime.now() - timedelta(seconds=row.age)
    return {"run": row.run, "state": row.state, "written": f"{written:%Y-%m-%d %H:%M}",
            "steps": f"{row.steps:,.0f}{of}", "tokens": f"{row.total_tokens / 1e6:,.2f}M",
            "min val_bpb": f"{row.min_val_bpb:.4f}", "tok/s": f"{row.tok_per_sec_median:,.0f}",
            "target": target}


def compare(table):
    """Return the flags that differ, the metrics, and each candidate's difference to the first."""
    for (_, seed), runs in table.groupby(["candidate", "seed"]):
        if len(runs) > 1:
            raise UserError(f"{' and '.join(runs.run_id)} have the same flags and the seed {seed}; "
                            "name one of them")
    recipes = {name: pd.Series(recipe_of(record), dtype=object).map(str)
               for name, record in zip(table.candidate, table.record, strict=True)}
    recipes = pd.DataFrame(recipes).fillna("")
    different = recipes[recipes.nunique(axis=1) > 1].rename_axis("flag")

    columns = [name for name in COMPARED if table[name].notna().any()]
    shown = table.set_index(table.run_id.rename("run"))[["state", *columns]]
    groups = {name: runs[runs.state == "finished"].set_index("seed")
              for name, runs in table.groupby("candidate", sort=False)}
    for name, runs in groups.items():
        if len(runs) > 1:
            shown.loc[f"{name} mean"] = runs[columns].mean()
            shown.loc[f"{name} sd"] = runs[columns].std()

    first, *others = groups
    blocks = [as_text(different) if others else "runs of one candidate: equal flags, dataset and "
              "device", as_text(shown)]
    for other in others:
        lines = differences(groups[first], groups[other], columns)
        blocks.append("\n  ".join([f"{other} minus {first}, over the seeds that both have "
                                   "finished:", *lines]))
    return "\n\n".join(blocks)


def differences(before, after, columns):
    """Return the paired difference over seeds per column, and that over validation documents."""
    seeds = before.index.intersection(after.index)
    before, after = before.loc[seeds], after.loc[seeds]
    lines = []
    for name in columns:
        change = (after[name] - before[name]).dropna()
        if change.any() and name != "final_val_bpb_se":
            percent = 100 * change.mean() / before[name][change.index].mean()
            lines.append(f"{name}: {paired(change).describe(f'({percent:+.1f} %)')}")
    lines += document_notes(before.record, after.record)
    return lines or ["no difference can be given"]


def as_text(table):
    """Return a table as text with its index to the left."""
    table = table.rename_axis(columns=table.index.name, index=None)
    return table.to_string(na_rep="·", float_format="{:,.6g}".format)


@command
def main(argv=None):
    args = parse_args(argv)
    if args.compare:
        text = compare(runs_table(find_run(name, runs_dir()) for name in args.compare))
    else:
        text = list_runs(args.patterns)
    # A record may come from somebody else: its text must not control the terminal.
    print("".join(x if x.isprintable() or x == "\n" else "?" for x in text))


if __name__ == "__main__":
    main()
