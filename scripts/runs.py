"""List runs, newest first, or compare runs. Both read the records in <cache>/runs.

python -m scripts.runs                          list all runs
python -m scripts.runs 'lane_c*'                list runs by name
python -m scripts.runs --compare RUN RUN ...    compare flags and metrics, the baseline first

<cache> is $NANOCHAT_BASE_DIR, or ~/.cache/nanochat if that is not set.
"""

import fnmatch

import pandas as pd

from nanochat.common import Parser, UserError, command, newest_in_words, runs_dir
from nanochat.experiments.gates import document_notes, paired
from nanochat.experiments.ledger import SHOWN, age_sec, recipe_of, runs_table, text_table
from nanochat.runlog import find_run, read_run


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
                tables.append(runs_table([record]).assign(
                    run_id=folder.name, candidate=folder.name, age_sec=age_sec(record)))
            except (UserError, OSError) as error:
                broken.append(f"broken: {folder.name}: {' '.join(str(error).split())}")
    if not tables and not broken:
        if patterns == ["*"]:
            return f"no runs in {runs_dir()}"
        raise UserError(f"no run {' '.join(patterns)} in {runs_dir()}; "
                        f"{newest_in_words(runs_dir())}")
    if tables:
        broken.insert(0, text_table(pd.concat(tables).sort_values("age_sec")).to_string())
    return "\n".join(broken)


def compare(table):
    """Return the flags that differ, the metrics, and each candidate's difference to the first."""
    for (_, seed), runs in table.groupby(["candidate", "seed"]):
        if len(runs) > 1:
            raise UserError(f"{' and '.join(runs.run_id)} have the same flags and the seed {seed}; "
                            "name one of them")
    recipes = {name: pd.Series(recipe_of(record), dtype=object).map(str)
               for name, record in zip(table.candidate, table.record, strict=True)}
    recipes = pd.DataFrame(recipes).fillna("")
    groups = {name: runs[runs.ok].set_index("seed")
              for name, runs in table.groupby("candidate", sort=False)}
    blocks = [text_table(table).to_string()]
    if len(groups) > 1:
        blocks.insert(0, recipes[recipes.nunique(axis=1) > 1].to_string())
    first, *others = groups
    for other in others:
        lines = differences(groups[first], groups[other])
        blocks.append("\n  ".join([f"{other} minus {first}, over the seeds that both have "
                                   "finished:", *lines]))
    return "\n\n".join(blocks)


def differences(before, after):
    """Return the paired difference over seeds per metric, and that over validation documents."""
    seeds = before.index.intersection(after.index)
    if seeds.empty:
        return ["no difference is computed: there is no such seed; train both with the same --seed"]
    before, after = before.loc[seeds], after.loc[seeds]
    lines = []
    for name, (heading, _) in SHOWN.items():
        change = (after[name] - before[name]).dropna()
        if change.any() and name != "final_val_bpb_se":
            percent = 100 * change.mean() / before[name][change.index].mean()
            lines.append(f"{heading}: {paired(change).describe(f'({percent:+.1f} %)')}")
    return [*lines, *document_notes(before.record, after.record)] or ["no difference"]


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
