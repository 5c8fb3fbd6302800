"""What runs there are, from their records alone: python -m scripts.runs

python -m scripts.runs 'lane_c*' --state running      those with such names, in such a state
python -m scripts.runs --watch RUN                    follow one to its end
python -m scripts.runs --compare RUN RUN ...          flags that differ, figures, seeds grouped
python -m scripts.runs --prune                        what checkpoints and leftovers could be freed; --yes frees them
"""

import argparse

from nanochat.common import UserError, base_dir, checkpoints_dir, command, locks_dir, runs_dir, say
from nanochat.experiments.runs.compare import compare
from nanochat.experiments.runs.listing import STATES, list_runs, printable, read_state, table
from nanochat.experiments.runs.prune import free, leftovers, what_to_free
from nanochat.experiments.runs.watch import watch
from nanochat.runlog import find_run


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.runs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", metavar="NAME", help="run ids, also with * and ?; all when left out")
    parser.add_argument("--state", nargs="+", choices=STATES, default=[], metavar="STATE", help=", ".join(STATES))
    parser.add_argument("--newest", type=int, metavar="N", help="the N that were written last")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--watch", metavar="RUN", help="follow a run: its curve and the time left; ends with the run")
    doing.add_argument("--compare", nargs="+", metavar="RUN", help="ids or folders")
    doing.add_argument("--prune", action="store_true", help="say what could be freed: checkpoints that are neither a "
                       "run's newest nor its best, those of runs that diverged, what killed writers left")
    parser.add_argument("--yes", action="store_true", help="with --prune: free it")
    parser.add_argument("--with-last", action="store_true", help="with --prune and NAMEs: of those runs also the "
                        "newest and the best checkpoint")
    args = parser.parse_args(argv)
    if (args.yes or args.with_last) and not args.prune:
        parser.error("--yes and --with-last go with --prune")
    if (args.watch or args.compare) and (args.patterns or args.state or args.newest):
        parser.error("--watch and --compare name their runs; NAME, --state and --newest are for the list and --prune")
    return args


def prune(runs, args):
    """Say what of these runs' files could go, and with --yes let it go."""
    if args.with_last and not args.patterns:
        raise UserError("--with-last takes runs' last checkpoints too: name the runs ('*' for all)")
    freed, kept, notes = what_to_free(checkpoints_dir(), locks_dir(), runs, args.with_last)
    if not (args.patterns or args.state or args.newest):  # of no run in particular
        freed += leftovers(base_dir())
    for item in freed:
        say(printable(f"{size(item.n_bytes):>9}  {item.what}: {item.why}"))
    for note in notes:
        say(printable(f"left alone: {note}"))
    if kept:
        say(f"kept: {len(kept)} newest and best checkpoints, {size(sum(item.n_bytes for item in kept))}; "
            "--with-last and the runs' names take them too")
    total = size(sum(item.n_bytes for item in freed))
    if not args.yes:
        return say(f"{total} could be freed" + ("; --yes frees it" if freed else ""))
    n_bytes, refused = free(freed, locks_dir())
    for line in refused:
        say(printable(f"left alone: {line}"))
    return say(f"{size(n_bytes)} freed")


def size(n_bytes):
    return f"{n_bytes / 2**20:,.1f} MiB"


@command
def main(argv=None):
    args = parse_args(argv)
    if args.newest is not None and args.newest < 1:
        raise UserError(f"--newest {args.newest} must be at least 1")
    if args.watch is not None:
        folder = find_run(args.watch, runs_dir()).folder
        try:
            return watch(lambda: read_state(folder, locks_dir()))
        except KeyboardInterrupt:  # how one leaves a run that goes on
            return 130
    if args.compare:
        runs = [read_state(find_run(name, runs_dir()).folder, locks_dir()) for name in args.compare]
        return say("\n".join(map(printable, compare(runs))))
    runs, broken = list_runs(runs_dir(), locks_dir(), args.patterns, args.state, args.newest)
    if args.prune:
        return prune(runs, args)
    asked = "such run" if args.patterns or args.state else "runs"
    say("\n".join(table([run.cells() for run in runs])) if runs else f"no {asked} in {runs_dir()}")
    for name, reason in broken:
        say(printable(f"broken: {name}: {reason}"))
    return None


if __name__ == "__main__":
    raise SystemExit(main())
