"""Run an experiment: python -m scripts.experiment --name lane_c --profile cpu --candidates baseline chunked-ce

Candidates x seeds x depths, one training after the other, one row each in the ledger. The same command again
goes on where it was stopped. Flags after `--` are given to every training.
"""

import argparse
import shlex
import signal
import sys
from functools import partial

from nanochat.common import (
    QUIET_HELP,
    UserError,
    check_output,
    command,
    print0,
    runs_dir,
    set_quiet,
)
from nanochat.dataset import download_shards
from nanochat.experiments import runner
from nanochat.experiments.gates import RULES
from nanochat.experiments.launch import run_module
from nanochat.experiments.probe import probe_candidates
from nanochat.experiments.profiles import BASELINE, CANDIDATES, PROFILES, candidate_flags, find_profile


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.experiment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="the experiment's name in the ledger and in its run ids")
    parser.add_argument("--profile", required=True, help=f"training protocol: {', '.join(PROFILES)}")
    parser.add_argument("--candidates", nargs="+", default=[BASELINE], metavar="NAME",
                        help=f"{', '.join(CANDIDATES)}, or NAME='--its-flags ...' ({BASELINE})")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="the same for every candidate (0 1)")
    parser.add_argument("--depths", nargs="+", type=int, help="the profile's when left out")
    parser.add_argument("--series", action="store_true", help="the profile's series of depths, which gate 4 judges by")
    parser.add_argument("--dataset", default="", help="instead of the profile's, which is prepared when missing; the "
                        "tokenizer is then base_train's default, or that of -- --tokenizer-dir")
    parser.add_argument("--target-metric-name", default="val_bpb", help="val_bpb or core (%(default)s)")
    parser.add_argument("--target-metric-threshold", type=float, help="no time to target when left out")
    parser.add_argument("--target-from", metavar="EXPERIMENT",
                        help="take as threshold a val_bpb that every baseline seed of that experiment reached; rows "
                             "that are there keep theirs")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="more than 1: torchrun (1)")
    parser.add_argument("--probe", action="store_true", help="also make gate 3's save/resume and graph-break probe")
    parser.add_argument("--ledger", default="dev/experiments.csv", help="the CSV file of runs (dev/experiments.csv)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the gates' rules and the commands; run nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    own, extra = (given[:given.index("--")], given[given.index("--") + 1:]) if "--" in given else (given, [])
    args = parser.parse_args(own)
    args.extra_flags = extra
    return args


def experiment_of(args):
    """The Experiment that the flags ask for."""
    profile = find_profile(args.profile)
    depths = [profile.depth]
    if args.series:
        profile, depths = find_profile(profile.series), profile.series_depths
    threshold = args.target_metric_threshold
    if args.target_from:
        if threshold is not None or args.target_metric_name != "val_bpb":
            raise UserError("--target-from gives a val_bpb threshold; leave out --target-metric-name and -threshold")
        # rows that are there keep their threshold, whatever seeds that baseline has been given since
        threshold = runner.threshold_in_use(args.ledger, args.name)
        if threshold is None:
            threshold = runner.threshold_from(args.ledger, args.target_from, runs_dir())
    candidates = [candidate_flags(name) for name in args.candidates]
    if len(dict(candidates)) < len(candidates):
        raise UserError("a candidate is named twice; name each once")
    return runner.Experiment(args.name, profile, dict(candidates), tuple(args.seeds), tuple(args.depths or depths),
                      args.target_metric_name, threshold, args.dataset, tuple(args.extra_flags))


def prepare(experiment):
    """Download the profile's dataset and train its tokenizer, where they are not there yet."""
    profile = experiment.profile
    if not experiment.has_own_data:
        return
    if profile.n_train_files:
        download_shards(profile.dataset, profile.n_train_files)
    if not profile.tokenizer_dir().exists() and not any("tokenizer-dir" in word for word in experiment.extra_flags):
        run_module("scripts.tok_train", ["--dataset", profile.dataset, "--vocab-size", profile.vocab_size,
                                         "--tokenizer-dir", profile.tokenizer_dir()])


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    if args.nproc_per_node < 1:
        raise UserError(f"--nproc-per-node {args.nproc_per_node} must be at least 1")
    experiment = experiment_of(args)
    training = partial(runner.training_command, nproc_per_node=args.nproc_per_node)
    runs, finished = runner.plan(experiment), runner.finished_runs(experiment, args.ledger)
    changed = [f"depth {depth}" for depth in experiment.depths if depth != experiment.profile.depth]
    changed = ", ".join([*changed, *([shlex.join(args.extra_flags)] if args.extra_flags else [])])
    print0(f"{experiment.name}: profile {args.profile}, {experiment.profile.description}"
           + (f", but with {changed}" if changed else "") + f"; {len(runs)} runs, {len(finished)} of them done")
    print0("The rules, before the runs:\n  " + "\n  ".join(RULES.describe()))
    if args.dry_run:
        for run in runs:
            print(("# done: " if run.run_id in finished else "") + shlex.join(training(run.flags)))
        return
    check_output("--ledger", args.ledger)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if len(finished) < len(runs):
        prepare(experiment)
    made = runner.run_experiment(experiment, args.ledger, runs_dir(), training)
    if args.probe:
        probe_candidates(experiment, runs_dir(), training)
    print(f"{made} runs made; rows in {args.ledger}, records in {runs_dir()}")


if __name__ == "__main__":
    main()
