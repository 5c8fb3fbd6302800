"""Train a few small models on a text; name the depth and ratio that reach a target first.

python -m scripts.lane_b --dataset FOLDER --target-metric-threshold 1.62
python -m scripts.lane_b --dataset FOLDER --target-metric-threshold 1.62 --name gpu -- FLAGS

FLAGS of scripts.base_train replace the default recipe, which is for a CPU. Repeat the command to
continue. Exit code 0: named; 3: refused; 4: named but uncertain.
"""

import argparse
import contextlib
import importlib.util
import math
import shlex

from nanochat.common import (
    QUIET_HELP,
    UserError,
    base_dir,
    command,
    print0,
    read_json,
    runs_dir,
    set_quiet,
    write_json,
)
from nanochat.config import model_config, parse_config
from nanochat.experiments.runner import run_module
from nanochat.gpt import scaling_params
from nanochat.lane_b import Refusal
from nanochat.lane_b.answer import read_inference
from nanochat.lane_b.calibration import MIN_STEPS, RATES, curve_of, setup_of
from nanochat.lane_b.inference import depths_in_reach, infer
from nanochat.runlog import CONFIG, find_run
from nanochat.target import check_target
from nanochat.tokenizer import load_tokenizer
from scripts import lane_b_infer_ratio

# The recipe with which the method was tested. Its rates are 16 times those of base_train, whose
# automatic scale is much too low for 2,048 tokens per step.
RECIPE = shlex.split(
    "--aspect-ratio=32 --head-dim=32 --window-pattern=L --max-seq-len=128 --device-batch-size=16 "
    "--total-batch-size=2048 --matrix-lr=0.32 --embedding-lr=4.8 --unembedding-lr=0.128 "
    "--eval-tokens=262144")
ALWAYS = ["--core-metric-every=-1", "--sample-every=-1", "--save-every=-1", "--save-minutes=5",
          "--keep-checkpoints=1", "--resume-from-step=auto"]
EVALUATIONS = 28  # per run
TIMED_STEPS = 41  # 30 on the clock
GROWTH = 2.0  # least growth in parameters from the first depth to the second
MAX_DEPTH = 200
VOCAB_SIZE = 2048  # of the tokenizer that is trained on the text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target-metric-threshold", type=float, required=True,
                        metavar="BITS_PER_BYTE", help="val_bpb to reach")
    parser.add_argument("--dataset", default="stdlib", help="name or folder (%(default)s)")
    parser.add_argument("--tokenizer-dir", default="",
                        help="tokenizer folder; empty: trained on the text, 2,048 tokens")
    parser.add_argument("--budget", type=float, default=0.25, metavar="SHARE", help="further runs "
                        "are trained while the calibration costs at most this share of the named "
                        "run, in FLOPs and in seconds (%(default)s)")
    parser.add_argument("--smallest-depth", type=int, default=1, help="least depth to calibrate")
    parser.add_argument("--depth", type=int, help="infer only the ratio of this depth")
    parser.add_argument("--rates-probe", action="store_true",
                        help="also train at half the learning rates, to test whether they transfer")
    parser.add_argument("--name", default="lane_b", help="prefix of the run ids (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument("--dry-run", action="store_true", help="print the first trainings only")
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="flags of base_train, after --")
    return parser.parse_args(argv)


class Calibration:
    """The trainings of one call: their flags, ids and records."""

    def __init__(self, args, tokenizer_dir, vocab_size):
        self.args = args
        self.flags = [*(args.flags or RECIPE), f"--dataset={args.dataset}",
                      f"--tokenizer-dir={tokenizer_dir}"]
        self.config, self.vocab_size = parse_config(self.flags), vocab_size
        if self.config.total_batch_size < 1:
            raise UserError("the flags need --total-batch-size: all runs must have one batch")

    def n_params(self, depth):
        return scaling_params(model_config(self.config, self.vocab_size, depth))

    def depths(self):
        """Return the smallest depth whose ratio-4 horizon is long enough, and the next one."""
        least = MIN_STEPS * self.config.total_batch_size
        aspect, head = self.config.aspect_ratio, self.config.head_dim
        possible = [d for d in range(self.args.smallest_depth, MAX_DEPTH)
                    if math.ceil(d * aspect / head) * head >= 24]  # narrower models do not exist
        first = next((d for d in possible if 4 * self.n_params(d) >= least), MAX_DEPTH)
        second = next((d for d in range(first + 1, MAX_DEPTH)
                       if self.n_params(d) >= GROWTH * self.n_params(first)), MAX_DEPTH)
        return first, second

    def training(self, depth, ratio, seed, kind=""):
        """Return (run id, flags). kind: "half." (half the rates) or "timing." (few steps)."""
        run_id = f"{self.args.name}.{kind}d{depth}.r{ratio}.s{seed}"
        steps = int(ratio * self.n_params(depth)) // self.config.total_batch_size
        every, more = max(1, steps // EVALUATIONS), ["--quiet"] if self.args.quiet else []
        if kind == "timing.":
            steps, every = TIMED_STEPS, -1
        if kind == "half.":
            more += [f"--{name.replace('_', '-')}={getattr(self.config, name) / 2!r}"
                     for name in RATES]
        return run_id, [*self.flags, *ALWAYS, *more, f"--num-iterations={steps}",
                        f"--eval-every={every}", f"--depth={depth}", f"--seed={seed}",
                        f"--run-id={run_id}", f"--model-tag={run_id}"]


def train(training):
    """Train a run, or continue it, unless its record is complete; return the record."""
    run_id, flags = training
    if not (runs_dir() / run_id / CONFIG).exists() or find_run(run_id, runs_dir()).status != "ok":
        print0(f"lane B: training {run_id}")
        run_module("scripts.base_train", flags)
    return find_run(run_id, runs_dir())


def check_flags(path, flags):
    """Raise UserError if earlier runs of this name had other flags."""
    if path.exists() and read_json(path, "delete it")["flags"] != flags:
        raise UserError(f"{path}: earlier runs of this name had other flags; give another --name")
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"flags": flags})


def extend(calibration, records, timing, extra):
    """Train the extra runs (depth, ratio, seed) in their order while the budget allows."""
    args = calibration.args
    for depth, ratio, seed in extra:
        setup = setup_of(records, timing)
        curves = [curve_of(record, setup) for record in records]
        inference = infer(curves, setup, args.target_metric_threshold, args.depth)
        cost, named, steps = inference.cost(), inference.named, setup.steps(depth, ratio)
        shares = {"flops": setup.step_flops, "seconds": setup.seconds}
        costs = {what: cost[what] + steps * per_step(depth)
                 / (named.horizon * per_step(named.depth)) for what, per_step in shares.items()}
        print0(f"lane B: {len(records)} runs cost {cost['flops']:.0%} of the FLOPs and "
               f"{cost['seconds']:.0%} of the seconds of depth {named.depth} at ratio "
               f"{named.ratio:.3g}; with one more {costs['flops']:.0%} and {costs['seconds']:.0%}")
        if max(cost.values()) > args.budget:
            print0(f"lane B: that is more than the budget of {args.budget:.0%}: for this target "
                   "the calibration may not pay")
        if max(costs.values()) > args.budget:
            return
        records.append(train(calibration.training(depth, ratio, seed)))


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    check_target("val_bpb", args.target_metric_threshold)
    folder = base_dir() / args.name
    tokenizer_dir = args.tokenizer_dir or str(folder / "tokenizer")
    if not args.dry_run and not args.tokenizer_dir and not (folder / "tokenizer").exists():
        run_module("scripts.tok_train", ["--dataset", args.dataset, "--vocab-size", VOCAB_SIZE,
                                         "--tokenizer-dir", tokenizer_dir])
    is_known = not args.dry_run or args.tokenizer_dir
    vocab_size = load_tokenizer(tokenizer_dir).vocab_size if is_known else VOCAB_SIZE
    calibration = Calibration(args, tokenizer_dir, vocab_size)
    small, large = calibration.depths()
    first = [(small, 4, 0), (small, 8, 0), (large, 4, 0)]
    if args.dry_run:
        for run in first:
            _, flags = calibration.training(*run)
            print0(shlex.join(["python", "-m", "scripts.base_train", *flags]))
        return

    check_flags(folder / "flags.json", calibration.flags)
    records = [train(calibration.training(*run)) for run in first]
    sizes = sorted({calibration.n_params(depth) for depth in (small, large)})
    timing = [train(calibration.training(depth, 4, 0, "timing."))
              for depth in depths_in_reach(setup_of(records), sizes) if depth not in (small, large)]
    halves = [train(calibration.training(depth, 4, 0, "half."))
              for depth in (small, large) if args.rates_probe]
    with contextlib.suppress(Refusal):  # it is reported below, with infer.json
        extend(calibration, records, timing, [(large, 4, 1), (small, 8, 1), (small, 4, 1)])

    out = folder / "infer.json"
    out.unlink(missing_ok=True)
    flags = ["--calibration-run", *ids(records), f"--out={out}",
             f"--target-metric-threshold={args.target_metric_threshold!r}"]
    flags += ["--timing-run", *ids(timing)] if timing else []
    flags += ["--half-rate-run", *ids(halves)] if halves else []
    flags += [f"--depth={args.depth}"] if args.depth else []
    if importlib.util.find_spec("matplotlib"):
        flags.append(f"--plot={out.with_suffix('.png')}")
    try:
        lane_b_infer_ratio.main(flags)
    finally:
        if out.exists() and (depth := read_inference(out)["chosen_depth"]):
            print0("train it: " + shlex.join([
                "python", "-m", "scripts.base_train", *calibration.flags, f"--depth={depth}",
                f"--target-param-data-ratio={read_inference(out)['chosen_ratio']:.4g}",
                f"--target-metric-threshold={args.target_metric_threshold!r}"]))


def ids(records):
    return [record.run_id for record in records]


if __name__ == "__main__":
    main()
