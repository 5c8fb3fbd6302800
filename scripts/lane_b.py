"""Train small models on a text; infer the depth and ratio that reach a target in the least time.

python -m scripts.lane_b --dataset FOLDER --target-metric-threshold 1.62
python -m scripts.lane_b --dataset FOLDER --target-metric-threshold 1.62 --name gpu -- FLAGS
python -m scripts.lane_b --profile cpu

FLAGS of scripts.base_train replace the default recipe, which is for a CPU. The profile cpu is a
demonstration on two cores: it also trains the model of the inferred depth and ratio ("named model")
and the baseline, and compares them. Repeat the command to continue. Exit code 0: inferred; 3: no
answer, with the reason; 4: inferred, but uncertain.
"""

import importlib.util
import shlex
from itertools import count

from nanochat.common import (
    QUIET_HELP,
    Parser,
    UserError,
    base_dir,
    command,
    print0,
    runs_dir,
    set_quiet,
)
from nanochat.config import parse_config
from nanochat.experiments.runner import run_module
from nanochat.gpt import flops_per_token
from nanochat.lane_b import Refusal, Uncertain, verdict
from nanochat.lane_b.answer import compare, conclude, read_inference
from nanochat.lane_b.calibration import MIN_STEPS, RATES, RECIPE, Setup, curve_of, setup_of
from nanochat.lane_b.inference import depths_in_reach, infer
from nanochat.runlog import CONFIG, find_run
from nanochat.target import check_target
from nanochat.tokenizer import load_tokenizer

# The learning rates are 16 times those of base_train, whose automatic scale is much too low for
# batches of a few thousand tokens.
_SMALL = ("--window-pattern=L --max-seq-len=128 --matrix-lr=0.32 --embedding-lr=4.8 "
          "--unembedding-lr=0.128 ")
PROFILES = {  # flags, vocabulary of the tokenizer, target (None: given by the user), least depth
    "small": (_SMALL + "--aspect-ratio=32 --head-dim=32 --device-batch-size=16 "
              "--total-batch-size=2048 --eval-tokens=262144", 2048, None, 2),
    "cpu": (_SMALL + "--aspect-ratio=16 --head-dim=16 --device-batch-size=4 "
            "--total-batch-size=512 --eval-tokens=65536", 1024, 2.05, 2),
    # For one GPU, not measured. The least depth is at least an eighth of the target's size.
    "d12": ("--total-batch-size=131072 --eval-tokens=2097152", 32768, None, 5),
    "d24": ("--total-batch-size=-1 --eval-tokens=2097152", 32768, None, 12),
}
ALWAYS = ["--core-metric-every=-1", "--sample-every=-1", "--save-every=-1", "--save-minutes=5",
          "--keep-checkpoints=1", "--resume-from-step=auto"]
FIXED = (*RATES, *RECIPE, "dataset", "total_batch_size", "num_iterations")
EVALUATIONS = 28  # per run
TIMED_STEPS = 41  # 30 on the clock
GROWTH = 2.0  # least growth in parameters from the first depth to the second


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b", __doc__)
    add = parser.add_argument
    add("--target-metric-threshold", type=float, metavar="BITS_PER_BYTE", help="val_bpb to reach")
    add("--dataset", default="stdlib", help="name of a dataset, or a folder of text (%(default)s)")
    add("--tokenizer-dir", default="", help="tokenizer folder; empty: trained on the text")
    add("--budget", type=float, default=0.25, metavar="SHARE", help="train further "
        "calibration runs while all of them cost at most this share of the named model's run, in "
        "FLOPs and in seconds "
        "(%(default)s)")
    add("--smallest-depth", type=int, help="least depth to calibrate (default: of the profile)")
    add("--depth", type=int, help="infer only the ratio of this depth")
    add("--rates-probe", action="store_true",
        help="also train at half the learning rates, to test whether they transfer")
    add("--verify", action="store_true", help="also train the named model and the baseline (ratio "
        f"12) with {len(verdict.SEEDS)} seeds each, and judge them")
    add("--profile", choices=PROFILES, default="small", help="small: the default recipe; cpu: a "
        "smaller one with a target and --verify; d12, d24: for targets of these depths on a GPU")
    add("--name", help="prefix of the run ids (default: lane_b_PROFILE)")
    add("--quiet", action="store_true", help=QUIET_HELP)
    add("--dry-run", action="store_true", help="print the first trainings and their cost only")
    add("flags", nargs="*", metavar="FLAGS", help="flags of base_train, after --")
    args = parser.parse_args(argv)
    flags, args.vocab_size, target, least = PROFILES[args.profile]
    args.smallest_depth = args.smallest_depth or least
    args.name = args.name or f"lane_b_{args.profile}"
    args.flags = args.flags or shlex.split(flags)
    args.verify = args.verify or target is not None
    if args.target_metric_threshold is None:
        args.target_metric_threshold = target
    if args.target_metric_threshold is None:
        raise UserError(f"--profile {args.profile} has no target; give --target-metric-threshold")
    check_target("val_bpb", args.target_metric_threshold)
    return args


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


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    folder = base_dir() / args.name
    tokenizer_dir = args.tokenizer_dir or str(folder / "tokenizer")
    vocab_size = args.vocab_size
    if not args.dry_run and not args.tokenizer_dir and not (folder / "tokenizer").exists():
        run_module("scripts.tok_train", ["--dataset", args.dataset, "--vocab-size", vocab_size,
                                         "--tokenizer-dir", tokenizer_dir])
    if not args.dry_run or args.tokenizer_dir:
        vocab_size = load_tokenizer(tokenizer_dir).vocab_size
    trainings = Trainings(args, tokenizer_dir, vocab_size)
    small, large = trainings.depths(args.smallest_depth)
    first = [(small, 4, 0), (small, 8, 0), (large, 4, 0)]
    if args.dry_run:
        for run in first:
            print0(shlex.join(["python", "-m", "scripts.base_train", *trainings.one(*run)[1]]))
        print0(f"# {sum(trainings.flops(depth, ratio) for depth, ratio, _ in first):.3g} FLOPs")
        return

    records = [trainings.train(*run) for run in first]
    sizes = [trainings.setup.n_params(depth) for depth in (small, large)]
    timing = [trainings.train(depth, 4, 0, kind="timing.", steps=TIMED_STEPS)
              for depth in depths_in_reach(setup_of(records), sizes) if depth not in (small, large)]
    config = trainings.setup.config
    half = [f"--{name.replace('_', '-')}={getattr(config, name) / 2!r}" for name in RATES]
    half_rates = [trainings.train(depth, 4, 0, kind="half.", extra=half)
                  for depth in (small, large) if args.rates_probe]
    extend(trainings, records, timing, [(large, 4, 1), (small, 8, 1), (small, 4, 1)], args)

    out, uncertain = folder / "infer.json", None
    plot = out.with_suffix(".png") if importlib.util.find_spec("matplotlib") else None
    try:
        conclude(records, args.target_metric_threshold, out, timing=timing, half_rates=half_rates,
                 depth=args.depth, plot=plot)
    except Uncertain as error:  # raised at the end
        uncertain = error
    document = read_inference(out)
    print0("train it: " + shlex.join([
        "python", "-m", "scripts.base_train", *trainings.flags,
        f"--depth={document['chosen_depth']}",
        f"--target-param-data-ratio={document['chosen_ratio']:.4g}",
        f"--target-metric-threshold={args.target_metric_threshold!r}"]))
    if args.verify:
        verify(trainings, document)
    if uncertain:
        raise uncertain


if __name__ == "__main__":
    main()
