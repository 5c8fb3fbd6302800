"""Infer the depth and the ratio that reach a target first from runs of small models.

python -m scripts.lane_b_infer_ratio --calibration-run d2-r4 d2-r8 d3-r4 \\
    --target-metric-threshold 1.62 --out infer.json --plot infer.png

Exit code 0: state ok. 3: refused, infer.json has the default ratio. 4: an answer that is uncertain.
"""

import argparse

from nanochat.common import check_output, command, print0, read_json, runs_dir, write_json
from nanochat.lane_b import Refusal, Uncertain
from nanochat.lane_b.answer import describe, document_of
from nanochat.lane_b.calibration import curve_of, of, setup_of
from nanochat.lane_b.figures import check_plot, draw_inference
from nanochat.lane_b.inference import infer
from nanochat.runlog import find_run
from nanochat.target import check_target


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b_infer_ratio",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration-run", nargs="+", required=True, metavar="RUN",
                        help="run ids or folders: complete runs of at least two depths and two "
                        "ratios, with one batch")
    parser.add_argument("--target-metric-threshold", type=float, required=True,
                        metavar="BITS_PER_BYTE", help="val_bpb to reach")
    parser.add_argument("--depth", type=int, help="infer only the ratio of this depth")
    parser.add_argument("--timing-run", nargs="+", default=[], metavar="RUN",
                        help="short runs of other depths, for their seconds per step")
    parser.add_argument("--half-rate-run", nargs="+", default=[], metavar="RUN",
                        help="runs as the calibration's of the smallest and the largest depth at "
                        "half the learning rates, to test the rates")
    parser.add_argument("--stats-json", help="from scripts.lane_b_stats; its exponent is printed "
                        "beside the law's and not used")
    parser.add_argument("--seed", type=int, default=0, help="seed of the intervals (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE.json",
                        help="output file, read by lane_b_log_run, plan and report")
    parser.add_argument("--plot", metavar="FILE.png", help="also draw curves and cost")
    return parser.parse_args(argv)


def theory_of(path, setup):
    """Return alpha_theory of a stats.json. Raise Refusal if it is of another text."""
    if not path:
        return None
    statistics = read_json(path, "make the file again with scripts.lane_b_stats")
    for name in ("dataset_id", "tokenizer_id"):
        if statistics.get(name) != getattr(setup, name):
            raise Refusal(f"{path} has {name} {statistics.get(name)}, the runs have "
                          f"{getattr(setup, name)}; leave out --stats-json", "mixed_setup")
    return statistics.get("alpha_theory")


def rate_pairs(names, records):
    """Return pairs (run at half the rates, the calibration run of the same depth and horizon)."""
    pairs = []
    for half in (find_run(name, runs_dir()) for name in names):
        same = [record for record in records if of(record, "num_iterations")
                == of(half, "num_iterations") and record.config.get("n_scaling_params")
                == half.config.get("n_scaling_params")]
        if not same:
            raise Refusal(f"no calibration run has the depth and horizon of {half.run_id}",
                          "mixed_setup")
        pairs.append((half, min(same, key=lambda one: one.config["seed"] != half.config["seed"])))
    return pairs


@command
def main(argv=None):
    args = parse_args(argv)
    check_output("--out", args.out)
    check_plot(args.plot)
    check_target("val_bpb", args.target_metric_threshold)
    records = [find_run(name, runs_dir()) for name in args.calibration_run]
    setup = setup_of(records, [find_run(name, runs_dir()) for name in args.timing_run])
    target, theory = args.target_metric_threshold, theory_of(args.stats_json, setup)
    inference = None
    try:
        curves = [curve_of(record, setup) for record in records]
        inference = infer(curves, setup, target, args.depth, args.seed,
                          rate_pairs(args.half_rate_run, records))
        document = document_of(setup, target, inference, alpha_theory=theory)
    except Refusal as refusal:
        write_json(args.out, document_of(setup, target, refusal=refusal, alpha_theory=theory))
        raise
    write_json(args.out, document)
    print0(describe(document))
    if args.plot:
        draw_inference(inference, args.plot)
    if inference.reasons:
        raise Uncertain(f"uncertain ({', '.join(inference.reasons)}); the reasons are above and in "
                        f"{args.out}")


if __name__ == "__main__":
    main()
