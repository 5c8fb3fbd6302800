"""Run an experiment: train every combination of candidate, seed and depth.

python -m scripts.experiment --name my_test --profile cpu --candidates baseline chunked-ce

A candidate is a set of flags that is compared with the baseline. Each run adds one row to the
ledger, a CSV file that scripts.verdict and scripts.report read. Repeat the command to continue an
interrupted experiment. Flags after `--` are passed to every scripts.base_train.
"""

import argparse
import shlex
import sys
from functools import partial

from nanochat.common import QUIET_HELP, UserError, check_output, command, runs_dir, set_quiet
from nanochat.dataset import download_shards
from nanochat.experiments import runner
from nanochat.experiments.gates import RULES
from nanochat.experiments.profiles import (
    BASELINE,
    CANDIDATES,
    PROFILES,
    candidate_flags,
    find_profile,
)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.experiment", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--name", required=True, help="name of the experiment, used in the ledger and in run ids")
    add("--profile", required=True, help=f"fixed training flags and dataset: {', '.join(PROFILES)}")
    add("--candidates", nargs="+", default=[BASELINE], metavar="NAME",
        help=f"candidates: {', '.join(CANDIDATES)}, or NAME='--its-flags ...' ({BASELINE})")
    add("--seeds", nargs="+", type=int, default=[0, 1],
        help="seeds to train every candidate with (0 1)")
    add("--depths", nargs="+", type=int, help="depths to train (default: those of the profile)")
    add("--series", action="store_true", help="train at the several depths of the profile's "
        "miniseries, which gate 4 needs")
    add("--dataset", default="", help="train on another dataset; give its tokenizer by adding "
        "-- --tokenizer-dir FOLDER (default: dataset and tokenizer of the profile, which are "
        "prepared if they are missing)")
    add("--target-metric-name", default="val_bpb", metavar="METRIC",
        help="metric whose time to target is measured: val_bpb or core (%(default)s)")
    add("--target-metric-threshold", type=float, metavar="VALUE",
        help="value of that metric that is the target (default: no target)")
    add("--target-from", metavar="EXPERIMENT", help="use as target the worst min val_bpb of the "
        f"baseline seeds of this finished experiment plus {runner.SLACK_BPB:g}")
    add("--nproc-per-node", type=int, default=1, metavar="N",
        help="train each run on N devices with torchrun (1)")
    add("--probe", action="store_true", help="also run the stability probe of each candidate, "
        "which gate 3 needs: a short run that is resumed from its middle")
    add("--ledger", default="dev/experiments.csv", help="path of the ledger (%(default)s)")
    add("--quiet", action="store_true", help=QUIET_HELP)
    add("--dry-run", action="store_true", help="print the rules and the commands; run nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    own, extra = given, []
    if "--" in given:
        own, extra = given[:given.index("--")], given[given.index("--") + 1:]
    args = parser.parse_args(own)
    args.extra_flags = extra
    return args


def experiment_of(args):
    """Return the Experiment that the flags ask for."""
    profile = find_profile(args.profile)
    depths = [profile.depth]
    if args.series:
        profile, depths = find_profile(profile.series), profile.series_depths
    threshold = args.target_metric_threshold
    if args.target_from:
        if threshold is not None or args.target_metric_name != "val_bpb":
            raise UserError("--target-from sets a val_bpb threshold; leave out --target-metric-...")
        threshold = runner.threshold_from(args.ledger, args.target_from, args.name)
    candidates = dict(map(candidate_flags, args.candidates))
    return runner.Experiment(
        args.name, profile, candidates, tuple(args.seeds), tuple(args.depths or depths),
        args.target_metric_name, threshold, args.dataset, tuple(args.extra_flags))


def prepare(experiment):
    """Download the profile's dataset and train its tokenizer if they are missing."""
    profile = experiment.profile
    if experiment.has_own_data and profile.n_train_files:
        download_shards(profile.dataset, profile.n_train_files)
    if experiment.has_own_data and not profile.tokenizer_dir().exists():
        runner.run_module("scripts.tok_train", [
            "--dataset", profile.dataset, "--vocab-size", profile.vocab_size,
            "--tokenizer-dir", profile.tokenizer_dir()])


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    experiment = experiment_of(args)
    training = partial(runner.training_command, nproc_per_node=args.nproc_per_node)
    runs = runner.training_runs(experiment)
    finished = runner.finished_runs(experiment, args.ledger)
    print(f"{experiment.name}: profile {args.profile} ({experiment.profile.description}); depths "
          f"{', '.join(map(str, experiment.depths))}; additional flags: "
          f"{shlex.join(experiment.extra_flags) or 'none'}; {len(runs)} runs, {len(finished)} of "
          "them finished", flush=True)
    print("Rules of the verdict, fixed before the runs:", *RULES.describe(), sep="\n  ", flush=True)
    if args.dry_run:
        for run in runs:
            done = "# finished: " if run.run_id in finished else ""
            print(done + shlex.join(training(run.flags)))
        return
    check_output("--ledger", args.ledger)
    if len(finished) < len(runs):
        prepare(experiment)
    n_trained = runner.run_experiment(experiment, args.ledger, runs_dir(), training)
    if args.probe:
        runner.probe_candidates(experiment, runs_dir(), training)
    print(f"{n_trained} runs were trained; their rows are in {args.ledger}, their records in "
          f"{runs_dir()}")


if __name__ == "__main__":
    main()
