"""Whole curves of calibration runs -> infer.json: the ratio that reaches a target first, with intervals, or a refusal.

python -m scripts.lane_b_infer_ratio --calibration-run cal-480-s0 cal-480-s1 cal-640-s0 cal-640-s1 \\
    --target-metric-threshold 1.49 --stats-json stats.json --out infer.json --plot infer.png
"""

import argparse
from dataclasses import asdict
from functools import cache, partial

from nanochat.common import check_output, command, runs_dir, utc_now, write_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.figure import check_plot
from nanochat.lane_b.infer import inputs
from nanochat.lane_b.infer.horizon import DEFAULT_RATIO, infer_horizon
from nanochat.lane_b.infer.horizon_figure import draw_inference
from nanochat.lane_b.infer.inference_file import (
    VERSION,
    describe,
    inference_document,
    refused_document,
)
from nanochat.runlog import find_run
from nanochat.schedule import lr_multipliers
from nanochat.target import check_target

MIN_RESAMPLES = 40  # a 95 % interval of fewer is their extremes


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b_infer_ratio", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--calibration-run", nargs="+", required=True, metavar="RUN",
                        help="run ids or folders: whole schedules of two horizons or more, two seeds each")
    threshold = parser.add_mutually_exclusive_group(required=True)
    threshold.add_argument("--target-metric-threshold", type=float, metavar="BITS_PER_BYTE",
                           help="the val_bpb to reach, as a number")
    threshold.add_argument("--baseline-run", nargs="+", metavar="RUN", help="threshold: median of their min val_bpb")
    parser.add_argument("--stats-json", help="from scripts.lane_b_stats: its alpha is printed beside the fit's")
    parser.add_argument("--default-ratio", type=float, default=DEFAULT_RATIO,
                        help=f"tokens per scaling parameter to compare with, and to fall back to ({DEFAULT_RATIO})")
    parser.add_argument("--fallback", action="store_true",
                        help="where the inference refuses, write the default ratio with decision=fallback instead")
    parser.add_argument("--resamples", type=int, default=200,
                        help=f"of the runs, for the intervals (200; {MIN_RESAMPLES} or more)")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (%(default)s)")
    parser.add_argument("--out", "--output-json", required=True, metavar="FILE.json",
                        help="where the inferred ratio goes: scripts.lane_b_log_run --inference-json reads it")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves, the law and the horizon")
    args = parser.parse_args(argv)
    for name, least in (("resamples", MIN_RESAMPLES), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not 0 < args.default_ratio < float("inf"):
        parser.error(f"--default-ratio {args.default_ratio:g} must be positive and finite")
    return args


def threshold_of(args, setting):
    """(bits per byte, where they are from)."""
    if args.baseline_run is None:
        check_target("val_bpb", args.target_metric_threshold)
        return args.target_metric_threshold, "given"
    baseline = [find_run(name, runs_dir()) for name in args.baseline_run]
    return (inputs.threshold_of_baseline(baseline, setting),
            f"median min val_bpb of {', '.join(run.run_id for run in baseline)}")


def statistics_of(args, setting):
    """The corpus' statistics where they are given. Errors: Refusal when they are of another text than the runs'."""
    corpus = inputs.read_statistics(args.stats_json) if args.stats_json else None
    for name in ("dataset_id", "tokenizer_id") if corpus else ():
        if getattr(corpus, name) != getattr(setting, name):
            raise Refusal(f"the calibration runs have {name} {getattr(setting, name)}, the statistics are of "
                          f"{getattr(corpus, name)}; make the statistics again, or leave out --stats-json")
    return corpus


@command
def main(argv=None):
    args = parse_args(argv)
    check_output("--out", args.out)
    check_plot(args.plot)
    records = [find_run(name, runs_dir()) for name in args.calibration_run]
    setting = inputs.common_setting(records)
    corpus, (threshold, source) = statistics_of(args, setting), threshold_of(args, setting)
    schedule = cache(partial(lr_multipliers, **setting.schedule))
    runs = [inputs.curve_of_run(record, schedule) for record in records]
    default_steps = args.default_ratio * setting.n_scaling_params / setting.step_tokens
    inference = None
    try:
        inference = infer_horizon(runs, threshold, schedule, default_steps, args.resamples, args.seed)
        found = inference_document(inference, setting, args.default_ratio)
    except Refusal as refusal:
        if not args.fallback:
            raise
        found = refused_document(refusal, args.default_ratio)
    planned_tokens = found["chosen_ratio"] * setting.n_scaling_params
    found["warnings"] += [*(corpus.warnings if corpus else ()), *inputs.repeated_text(records, planned_tokens)]
    document = {"schema_version": VERSION, "created_utc": utc_now(), "settings": vars(args),
                "dataset_id": setting.dataset_id, "tokenizer_id": setting.tokenizer_id, "target_metric_name": "val_bpb",
                "target_metric_threshold": threshold, "threshold_source": source,
                "n_scaling_params": setting.n_scaling_params, "total_batch_size_tokens": setting.step_tokens,
                "alpha_theory": asdict(corpus.alpha) if corpus else None, **found}
    write_json(args.out, document)
    print(describe(document))
    if args.plot and inference:
        draw_inference(inference, setting, args.plot)


if __name__ == "__main__":
    main()
