"""How often the gates promote what is equal, and what is quicker: experiments made of noise, judged by the gates.

    python -m dev.study.gate_power [--experiments 1000] [--seeds 2 3 5]

Every run has a noise of val_bpb (the same over the run) and one of its clock, independent of the others'. A kernel's
gain shortens its time to target; a horizon's moves its curve forward, so its noise is that of val_bpb over the curve's
slope. Gates 1 and 2 alone: 3 and 4 count as passed. For horizons the rule of three seeds is lifted, to show what two
would say. Prints a Markdown table.
"""

import argparse

import numpy as np

from nanochat.common import command
from nanochat.experiments import horizon_gates
from nanochat.experiments.comparison import FAIL, PASS, RULES, Comparison
from nanochat.experiments.findings import Gate
from nanochat.experiments.gates import decide, quality_gate, time_gate
from nanochat.experiments.ledger import ExperimentRow
from nanochat.experiments.trials import Trial
from nanochat.runlog import RunRecord
from nanochat.target import evaluations_of, time_to_target

KERNEL, HORIZON = "--chunked-ce", "--num-iterations 1344"
NOISES = ((0.01, 0.001), (0.04, 0.004))  # sd of log time, sd of val_bpb over seeds: the least and the most measured
GAINS = (0.0, 0.05, 0.10)
STEPS, EVALUATIONS, STEP_SEC = 1344, 28, 0.05
LEVEL, HEIGHT, EXPONENT = 1.6, 0.31, 0.36  # ends at 1.91, falling there by 0.11 a factor e: ratio 12 of the study
THRESHOLD = 1.93  # from outside, reached at 0.84 of the run
PASSED = (Gate("3 stability", PASS, {}), Gate("4 generalisation", PASS, {}))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000, help="of each cell")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5])
    return parser.parse_args(argv)


def made_trial(rng, seed, flags, gain, noise):
    """A run's Trial. `flags`: none (the baseline, without gain), KERNEL or HORIZON; `noise`: one of NOISES."""
    clock = STEP_SEC * np.exp(noise[0] * rng.standard_normal())
    steps = np.linspace(0, STEPS, EVALUATIONS + 1)[1:]
    sooner = steps / STEPS / (1 - gain if flags == HORIZON else 1)
    bpb = LEVEL + HEIGHT * sooner**-EXPONENT + noise[1] * rng.standard_normal()
    events = [{"kind": "val", "step": int(step), "tokens": int(step), "val_bpb": float(value),
               "train_time_sec": float(step * clock)} for step, value in zip(steps, bpb, strict=True)]
    reached_sec = time_to_target(evaluations_of(events, "val_bpb"), "val_bpb", THRESHOLD).measured_sec
    if flags != HORIZON:  # a baseline of horizons has its time from its curve, by on_one_clock
        reached_sec = STEPS * clock * (1 - gain)
    row = ExperimentRow("", "", "", seed, 2, "val_bpb", THRESHOLD, reached_sec, None, None, 1000 * clock, None,
                        min(bpb), "ok", flags, "text", STEPS, "CPU", None, "")
    return Trial(row, RunRecord(None, {}, events, {"status": "ok", "steps": STEPS, "train_time_sec": STEPS * clock}))


def outcome(rng, n_seeds, flags, gain, noise):
    """(whether the candidate is promoted, whether gate 2 fails it) in one experiment."""
    runs = Comparison(*({(2, seed): made_trial(rng, seed, *which, noise) for seed in range(n_seeds)}
                        for which in (("", 0.0), (flags, gain))))
    if flags == HORIZON:
        runs = horizon_gates.on_one_clock(runs)
        gates = time_gate(runs, RULES, horizon_gates.unfit(runs)), horizon_gates.reach_gate(runs, RULES)
    else:
        gates = time_gate(runs, RULES), quality_gate(runs, RULES)
    return decide((*gates, *PASSED))[0] == "promote", gates[1].outcome == FAIL


@command
def main(argv=None):
    args = parse_args(argv)
    print("| rules of | seeds | sd of time, of val_bpb | promoted: equal | 5 % quicker | 10 % quicker | "
          "gate 2 fails an equal one |\n|---|---|---|---|---|---|---|")
    for name, flags in (("kernels", KERNEL), ("horizons", HORIZON)):
        for n_seeds in args.seeds:
            for noise in NOISES:
                shares = []
                for gain in GAINS:
                    rng = np.random.default_rng(0)
                    shares.append(100 * np.mean([outcome(rng, n_seeds, flags, gain, noise)
                                                 for _ in range(args.experiments)], axis=0))
                promoted = " | ".join(f"{share:.1f} %" for share, _ in shares)
                print(f"| {name} | {n_seeds} | {noise[0]:.0%}, {noise[1]:g} | {promoted} | {shares[0][1]:.1f} % |")


if __name__ == "__main__":
    raise SystemExit(main())
