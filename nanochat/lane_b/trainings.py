"""The trainings of scripts.lane_b: calibration runs within a budget, and runs for the verdict."""

from itertools import count

from nanochat.common import UserError, print0, runs_dir
from nanochat.config import parse_config
from nanochat.experiments.runner import run_module
from nanochat.gpt import flops_per_token
from nanochat.lane_b import Refusal, verdict
from nanochat.lane_b.answer import compare
from nanochat.lane_b.calibration import MIN_STEPS, RATES, RECIPE, Setup, curve_of, setup_of
from nanochat.lane_b.inference import infer
from nanochat.runlog import CONFIG, find_run

ALWAYS = ["--core-metric-every=-1", "--sample-every=-1", "--save-every=-1", "--save-minutes=5",
          "--keep-checkpoints=1", "--resume-from-step=auto"]
FIXED = (*RATES, *RECIPE, "dataset", "total_batch_size", "num_iterations")
EVALUATIONS = 28  # per run
TIMED_STEPS = 41  # 30 on the clock
GROWTH = 2.0  # least growth in parameters from the first depth to the second


class Trainings:
    """The runs of one call: their flags, ids and records."""

    def __init__(self, args, tokenizer_dir, vocab_size):
        self.name = args.name
        self.flags = [*args.flags, f"--dataset={args.dataset}", f"--tokenizer-dir={tokenizer_dir}"]
        self.common = [*self.flags, *ALWAYS, *(["--quiet"] if args.quiet else [])]
        config = parse_config(self.flags)
        self.setup = Setup(config, vocab_size, "", "", config.total_batch_size, None, {})

    def depths(self, least):
        """Return the first depth from `least` with MIN_STEPS at ratio 4, and the next one."""
        n_params, steps = self.setup.n_params, self.setup.own_steps
        first = next(depth for depth in count(least) if steps(depth, 4) >= MIN_STEPS)
        return first, next(depth for depth in count(first)
                           if n_params(depth) >= GROWTH * n_params(first))

    def flops(self, depth, ratio):
        model = self.setup.model(depth)
        return ratio * self.setup.n_params(depth) * flops_per_token(model)

    def one(self, depth, ratio, seed, kind="", steps=None, extra=()):
        """Return (run id, flags) of a run of `steps`, by default those of the ratio."""
        run_id = f"{self.name}.{kind}d{depth}.r{ratio:.4g}.s{seed}"
        steps = steps or self.setup.own_steps(depth, ratio)
        every = max(1, steps // EVALUATIONS) if steps > TIMED_STEPS else -1
        return run_id, [*self.common, *extra, f"--num-iterations={steps}", f"--eval-every={every}",
                        f"--depth={depth}", f"--seed={seed}", f"--run-id={run_id}",
                        f"--model-tag={run_id}"]

    def train(self, *run, **options):
        """Train a run (see `one`), or continue it, unless it is complete; return its record."""
        run_id, flags = self.one(*run, **options)
        if not (runs_dir() / run_id / CONFIG).exists() or (
                find_run(run_id, runs_dir()).status != "ok"):
            print0(f"lane B: training {run_id}")
            run_module("scripts.base_train", flags)
        record, wanted = find_run(run_id, runs_dir()), parse_config(flags).to_dict()
        changed = [name for name in FIXED if record.config["flags"].get(name) != wanted[name]]
        if changed:
            raise UserError(f"run {run_id} exists with another {', '.join(changed)}; give another "
                            "--name")
        return record

    def time(self, depth):
        """Train a few steps of a depth for their seconds; return the record."""
        return self.train(depth, 4, 0, kind="timing.", steps=TIMED_STEPS)


def extend(trainings, records, timing, extra, args):
    """Train the extra runs (depth, ratio, seed) in their order while the budget allows."""
    for depth, ratio, seed in extra:
        setup = setup_of(records, timing)
        try:
            inference = infer([curve_of(record, setup) for record in records], setup,
                              args.target_metric_threshold, args.depth)
        except Refusal:  # reported by conclude
            return
        now, then = inference.cost(), inference.cost([(depth, ratio)])
        print0(f"lane B: {len(records)} runs cost {now[0]:.0%} of the FLOPs and {now[1]:.0%} of "
               f"the seconds of depth {inference.named.depth} at ratio {inference.named.ratio:.3g}"
               f"; with one more {then[0]:.0%} and {then[1]:.0%} (budget {args.budget:.0%})")
        if max(then) > args.budget:
            return
        records.append(trainings.train(depth, ratio, seed))


def verify(trainings, document):
    """Train the named model and the baseline to the target, in turns, and print the verdict."""
    if document["default"] is None:
        print0("lane B: no depth in reach is forecast to reach the target at ratio 12: there is no "
               "baseline to compare with")
        return
    if document["default"] == document["named"]:
        print0("lane B: the default ratio 12 is named: there is nothing to compare")
        return
    print0("Rules of the verdict:", *verdict.RULES, sep="\n  ")
    extra = [f"--target-metric-threshold={document['target_metric_threshold']!r}",
             "--stop-at-target"]
    runs = {"default": [], "named": []}
    for seed in verdict.SEEDS:
        for name, records in runs.items():
            option = document[name]
            records.append(trainings.train(option["depth"], option["ratio"], seed, kind=f"{name}.",
                                           steps=option["horizon"], extra=extra))
        print0(f"{records[-1].run_id}: {compare(records[-1], document)}")
    calibration = [find_run(run_id, runs_dir()) for run_id in document["calibration_runs"]]
    print0(*verdict.judge(runs["named"], runs["default"], calibration), sep="\n")
