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

from nanochat.common import QUIET_HELP, Parser, UserError, base_dir, command, print0, set_quiet
from nanochat.experiments.runner import run_module
from nanochat.lane_b import Uncertain, verdict
from nanochat.lane_b.answer import conclude, read_inference
from nanochat.lane_b.calibration import RATES, setup_of
from nanochat.lane_b.inference import depths_in_reach
from nanochat.lane_b.trainings import Trainings, extend, verify
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


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b", __doc__)
    add = parser.add_argument
    add("--target-metric-threshold", type=float, metavar="BITS_PER_BYTE", help="val_bpb to reach")
    add("--dataset", default="stdlib", help="name of a dataset, or a folder of text (%(default)s)")
    add("--tokenizer-dir", default="", help="tokenizer folder; empty: trained on the text")
    add("--budget", type=float, default=0.25, metavar="SHARE", help="train further "
        "calibration runs while all of them cost at most this share of the named model's run, in "
        "FLOPs and in seconds (%(default)s)")
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
    timing = [trainings.time(depth)
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
