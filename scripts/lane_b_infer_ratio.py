"""From runs of small models infer the depth and ratio that reach a target in the least time.

python -m scripts.lane_b_infer_ratio --calibration-run d2-r4 d2-r8 d3-r4 \\
    --target-metric-threshold 1.62 --out infer.json --plot infer.png

Exit code 0: inferred; 3: no answer, and no file is written; 4: inferred, but uncertain.
"""


from nanochat.common import Parser, command, runs_dir
from nanochat.lane_b.answer import conclude
from nanochat.runlog import find_run


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b_infer_ratio", __doc__)
    add = parser.add_argument
    add("--calibration-run", nargs="+", required=True, metavar="RUN", help="run ids or folders: "
        "complete runs of at least two depths and two ratios")
    add("--target-metric-threshold", type=float, required=True, metavar="BITS_PER_BYTE",
        help="val_bpb to reach")
    add("--depth", type=int, help="infer only the ratio of this depth")
    add("--timing-run", nargs="+", default=[], metavar="RUN",
        help="short runs of other depths, for their seconds per step")
    add("--half-rate-run", nargs="+", default=[], metavar="RUN", help="calibration "
        "runs of the smallest and the largest depth, repeated at half the learning rates, to test "
        "whether the rates transfer")
    add("--stats-json", help="stats.json of scripts.lane_b_stats; its exponent is only "
        "printed beside that of the scaling law")
    add("--out", required=True, metavar="FILE.json",
        help="output file, read by scripts.lane_b_log_run and scripts.plan")
    add("--plot", metavar="FILE.png", help="also draw curves and cost")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    records, timing, half_rates = (
        [find_run(name, runs_dir()) for name in names]
        for names in (args.calibration_run, args.timing_run, args.half_rate_run))
    conclude(records, args.target_metric_threshold, args.out, timing=timing, half_rates=half_rates,
             depth=args.depth, stats_json=args.stats_json, plot=args.plot)


if __name__ == "__main__":
    main()
