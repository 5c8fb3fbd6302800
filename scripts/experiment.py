"""Run an experiment: train every combination of candidate, seed and depth.

python -m scripts.experiment --name my_test --profile cpu --candidates baseline chunked-ce

A candidate is a set of flags that is compared with the baseline. Each run leaves a record, which
scripts.verdict and scripts.report read, and a row in the ledger, a CSV file. Repeat the command to
continue an interrupted experiment. Flags after `--` are passed to every scripts.base_train; for
another text give -- --dataset NAME --tokenizer-dir FOLDER. Profiles:

"""

import shlex
import sys
from functools import partial
from pathlib import Path

from nanochat.common import QUIET_HELP, Parser, check_output, command, print0, runs_dir, set_quiet
from nanochat.config import parse_config
from nanochat.dataset import download_shards
from nanochat.experiments import runner
from nanochat.experiments.gates import RULES
from nanochat.experiments.ledger import ExperimentRow, read_rows
from nanochat.experiments.profiles import BASELINE, CANDIDATES, PROFILES, candidate_flags


def parse_args(argv=None):
    profiles = "".join(f"  {name:<13} {one.description}\n" for name, one in PROFILES.items())
    parser = Parser("python -m scripts.experiment", __doc__ + profiles)
    add = parser.add_argument
    add("--name", required=True, help="name of the experiment, used in the ledger and in run ids")
    add("--profile", required=True, choices=PROFILES, metavar="PROFILE",
        help="fixed training flags and dataset (see above)")
    add("--candidates", nargs="+", default=[BASELINE], metavar="NAME",
        help=f"candidates: {', '.join(CANDIDATES)}, or NAME='--its-flags ...' ({BASELINE})")
    add("--seeds", nargs="+", type=int, default=[0, 1],
        help="seeds to train every candidate with (0 1)")
    add("--depths", nargs="+", type=int, help="depths to train (default: those of the profile)")
    target = parser.add_mutually_exclusive_group().add_argument
    target("--target-metric-threshold", type=float, metavar="VALUE",
           help="val_bpb whose time to target is measured (default: no target)")
    target("--target-from", metavar="EXPERIMENT", help="use as target the worst min val_bpb of the "
           f"baseline seeds of this finished experiment plus {runner.SLACK_BPB:g}")
    add("--nproc-per-node", type=int, default=1, metavar="N",
        help="train each run on N devices with torchrun (1)")
    add("--probe", action="store_true", help="also run the stability probe of each candidate, "
        "which gate 3 needs: a short run that is resumed from its middle")
    add("--ledger", help="path of the ledger (default: dev/experiments.csv, which people commit; "
        "for the profiles cpu and cpu-short experiments.csv in the cache folder)")
    add("--quiet", action="store_true", help=QUIET_HELP)
    add("--dry-run", action="store_true", help="print the rules and the commands; run nothing")
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:at])
    args.extra_flags = given[at + 1:]
    args.ledger = args.ledger or PROFILES[args.profile].ledger()
    return args


def experiment_of(args):
    """Return the Experiment that the flags ask for."""
    profile = PROFILES[args.profile]
    threshold = args.target_metric_threshold
    if args.target_from:
        threshold = runner.threshold_from(args.target_from, args.name, runs_dir())
    return runner.Experiment(
        args.name, profile, dict(map(candidate_flags, args.candidates)),
        tuple(dict.fromkeys(args.seeds)), tuple(dict.fromkeys(args.depths or [profile.depth])),
        threshold, tuple(args.extra_flags))


def prepare(experiment):
    """Download the profile's dataset and train its tokenizer if they are missing."""
    profile = experiment.profile
    if profile.n_train_files:
        download_shards(profile.dataset, profile.n_train_files)
    if not profile.tokenizer_dir().exists():
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
    for run in runs:
        parse_config(run.flags)  # raises for flags that base_train refuses
    missing = [run for run in runs if not runner.has_ended(runs_dir() / run.run_id)]
    print0(f"{experiment.name}: {experiment.profile.description}; {len(runs)} runs, {len(missing)} "
           "of them missing. Rules of the verdict, fixed before the runs:", *RULES, sep="\n  ")
    if args.dry_run:
        print0(*(shlex.join(training(run.flags)) for run in missing), sep="\n")
        return
    check_output("--ledger", args.ledger)
    if Path(args.ledger).exists():
        read_rows(args.ledger, ExperimentRow)  # raises for a broken row before any download
    own_data = any(flag.startswith("--dataset") for flag in experiment.extra_flags)
    if missing and not own_data:
        prepare(experiment)
    n_trained = runner.run_experiment(experiment, args.ledger, runs_dir(), training)
    if args.probe:
        runner.probe_candidates(experiment, runs_dir(), training)
    print0(f"{n_trained} runs were trained; their rows are in {args.ledger}, their records in "
           f"{runs_dir()}")


if __name__ == "__main__":
    main()
