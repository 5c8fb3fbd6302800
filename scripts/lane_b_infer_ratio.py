"""Corpus statistics and calibration runs -> infer.json: the target-param-data ratio with an interval, or a refusal.

python -m scripts.lane_b_infer_ratio --stats-json stats.json --calibration-run cal-1-s0 cal-1-s1 cal-2-s0 ... \\
    --baseline-run base-s0 base-s1 --out infer.json --plot infer.png
"""

import argparse

from nanochat.errors import UserError, command
from nanochat.files import check_output, write_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.figure import check_plot
from nanochat.lane_b.infer import inputs
from nanochat.lane_b.infer.calibration import BitsPerByte
from nanochat.lane_b.infer.horizon import ALPHA_SOURCES, DEFAULT_RATIO, infer_horizon
from nanochat.lane_b.infer.horizon_figure import draw_inference
from nanochat.lane_b.infer.inference_file import VERSION, describe, inference_document
from nanochat.paths import runs_dir
from nanochat.provenance import utc_now
from nanochat.runlog import find_run

MIN_RESAMPLES = 100  # a 95 % interval of fewer is its extremes


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stats-json", required=True, help="from scripts.lane_b_stats")
    parser.add_argument("--alpha-source", choices=ALPHA_SOURCES, default="auto",
                        help="theory: gamma/(2 beta); calibration: fitted; auto: theory where its premises hold")
    points = parser.add_mutually_exclusive_group(required=True)
    points.add_argument("--calibration-run", nargs="+", metavar="RUN", help="run ids or folders, whole schedules")
    points.add_argument("--calibration", nargs="+", metavar="TOKENS:METRIC", help="by hand, in bits per byte")
    threshold = parser.add_mutually_exclusive_group(required=True)
    threshold.add_argument("--target-metric-threshold", type=float, metavar="BITS_PER_BYTE")
    threshold.add_argument("--baseline-run", nargs="+", metavar="RUN", help="threshold: median of their min val_bpb")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--n-scaling-params", type=int, help="default: the calibration runs'")
    size.add_argument("--depth", type=int, help="or the parameters of the model of this depth")
    parser.add_argument("--aspect-ratio", type=int, default=64, help="with --depth")
    parser.add_argument("--head-dim", type=int, default=128, help="with --depth")
    parser.add_argument("--context-tokens", type=int, help="default: the calibration runs', else the statistics'")
    parser.add_argument("--default-ratio", type=float, default=DEFAULT_RATIO)
    parser.add_argument("--fallback", action="store_true",
                        help="where the inference refuses, write the default ratio with decision=fallback instead")
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--out", "--output-json", required=True, metavar="FILE.json")
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args(argv)
    for name, least in (("n_scaling_params", 1), ("depth", 1), ("aspect_ratio", 1), ("head_dim", 1),
                        ("context_tokens", 1), ("resamples", MIN_RESAMPLES), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


def params_of_depth(args, vocab_size):
    """Scaling parameters of the model that scripts.base_train would build."""
    from nanochat.model.gpt import GPTConfig, scaling_params
    from nanochat.training.schedule import model_shape

    shape = model_shape(args.depth, args.aspect_ratio, args.head_dim)
    return scaling_params(GPTConfig(vocab_size=vocab_size, n_layer=shape.n_layer, n_head=shape.n_head,
                                    n_kv_head=shape.n_head, n_embd=shape.n_embd))


def gather(args, corpus):
    """(points, threshold, where the threshold is from, scaling parameters, context length) as the flags say."""
    runs = [find_run(name, runs_dir()) for name in args.calibration_run or ()]
    points = [inputs.point_of_run(run, corpus) for run in runs] or list(map(inputs.parse_point, args.calibration))
    params, step_tokens, context_tokens = inputs.common_model(runs) if runs else (None, None, None)
    given = params_of_depth(args, corpus.vocab_size) if args.depth else args.n_scaling_params
    if given is not None and params not in (None, given):
        raise Refusal(f"{given} scaling parameters asked for, the calibration runs have {params}; "
                      "calibrate with the model that is to be trained")
    if (given or params) is None:
        raise UserError("give --n-scaling-params or --depth: points by hand do not say how big the model is")
    if args.baseline_run:
        baseline = [find_run(name, runs_dir()) for name in args.baseline_run]
        threshold = inputs.threshold_of_baseline(baseline, corpus)
        inputs.check_baseline(baseline, given or params, step_tokens)
        source = f"median min val_bpb of {', '.join(run.run_id for run in baseline)}"
    else:
        threshold, source = BitsPerByte(args.target_metric_threshold), "given"
    return points, threshold, source, given or params, args.context_tokens or context_tokens


@command
def main(argv=None):
    args = parse_args(argv)
    check_output("--out", args.out)
    check_plot(args.plot)
    corpus = inputs.read_statistics(args.stats_json)
    points, threshold, threshold_source, params, context_tokens = gather(args, corpus)
    inference, reason = None, None
    try:
        inference = infer_horizon(points, threshold, params, corpus, alpha_source=args.alpha_source,
                                  default_ratio=args.default_ratio, context_tokens=context_tokens,
                                  resamples=args.resamples, seed=args.seed)
        reason = inference.refusal
    except Refusal as refusal:
        reason = str(refusal)
    if reason and not args.fallback:
        raise Refusal(reason)
    document = {"schema_version": VERSION, "created_utc": utc_now(),
                "settings": vars(args), "dataset_id": corpus.dataset_id, "tokenizer_id": corpus.tokenizer_id,
                "target_metric_name": "val_bpb", "target_metric_threshold": threshold.value,
                "threshold_source": threshold_source, "n_scaling_params": params,
                **inference_document(inference, args.default_ratio, reason)}
    write_json(args.out, document)
    print(describe(document))
    if args.plot and inference is not None:
        draw_inference(inference, args.plot)


if __name__ == "__main__":
    main()
