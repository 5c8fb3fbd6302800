"""The verdicts of a whole experiment, from the ledger and the runs' records."""

from nanochat.experiments.gates import judge
from nanochat.experiments.probe import read_probe
from nanochat.experiments.trials import load_trials, split


def judge_experiment(ledger, experiment_name, runs_dir, miniseries=None, candidates=None):
    """A Verdict for each candidate (all that the experiment has, when None), in the ledger's order.

    Errors: UserError as load_trials and judge give it.
    """
    trials = load_trials(ledger, experiment_name, runs_dir)
    over_depths = load_trials(ledger, miniseries, runs_dir) if miniseries else ()
    return [judge(candidate, trials, over_depths, read_probe(runs_dir, experiment_name, candidate))
            for candidate in candidates or split(trials)[1]]
