"""What a run will need and cost, before it starts: python -m scripts.plan --depth 24 --gpu h100 --ratio 8 --fp8

Steps, tokens and FLOPs are the training program's own; memory and time are models (README.md has how well they did).
"""

import argparse
import dataclasses
import math

from nanochat.common import UserError, command, warn
from nanochat.config import TrainingConfig
from nanochat.gpt import scaling_params
from nanochat.lane_b.infer.inference_file import read_inference
from nanochat.planning.estimate import MAX_NODES, estimate, with_fitting_rows
from nanochat.planning.gpus import GPUS, find_gpu
from nanochat.planning.report import describe, logits_in_words, nodes_table

# flags of scripts.base_train that a plan depends on
PLANNED = ("depth", "aspect_ratio", "head_dim", "max_seq_len", "window_pattern", "fp8", "fused_rmsnorm", "chunked_ce",
           "num_iterations", "target_param_data_ratio", "total_batch_size")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in dataclasses.fields(TrainingConfig):
        if flag.name in PLANNED:
            kind = {"action": "store_true"} if flag.type is bool else {
                "type": flag.type, "metavar": flag.metadata["unit"], "default": flag.default}
            also = ["--ratio"] if flag.name == "target_param_data_ratio" else []
            parser.add_argument(f"--{flag.name.replace('_', '-')}", *also, **kind,
                                help=flag.metadata["help"] + ("" if flag.type is bool else " (%(default)s)"))
    parser.add_argument("--device-batch-size", type=int, default=0, help="rows; 0: the most that fit (0)")
    parser.add_argument("--vocab-size", type=int, default=32768, help="of the tokenizer (%(default)s)")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(GPUS)} (h100)")
    parser.add_argument("--gpus", type=int, default=8, help="of one node (%(default)s)")
    parser.add_argument("--nodes", type=int, default=1, help=f"a table for 1, 2, 4, ... up to {MAX_NODES} nodes")
    parser.add_argument("--price-per-gpu-hour", type=float, default=0.0, help="for the cost, in any currency")
    parser.add_argument("--inference-json", default="", help="lane B's infer.json: its ratio, with its interval")
    parser.add_argument("--as-flags", action="store_true", help="print only the flags for scripts.base_train")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    for flag in ("price_per_gpu_hour", "device_batch_size"):
        if not 0 <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 0 and finite")
    if not 1 <= args.nodes <= MAX_NODES:
        raise UserError(f"--nodes {args.nodes} must be 1 to {MAX_NODES}")
    gpu = find_gpu(args.gpu)
    inference = read_inference(args.inference_json) if args.inference_json else None
    if inference:
        args.target_param_data_ratio = inference.ratio_of(
            "fallback" if inference.decision == "fallback" else "inferred")
    config = TrainingConfig(**{name: getattr(args, name) for name in PLANNED})
    planned = planned_at(config, args, gpu)
    if inference and inference.n_scaling_params != scaling_params(planned.model):
        warn(f"{args.inference_json} is of a model of {inference.n_scaling_params:,} scaling parameters, this one has "
             f"{scaling_params(planned.model):,}: that its ratio holds here is an assumption")
    if args.as_flags:
        print(" ".join(as_flags(config, planned)))
        return 0
    print(describe(planned, args.price_per_gpu_hour))
    print(logits_in_words(config, args.vocab_size, gpu, gpus_per_node=args.gpus))
    if inference:
        for name, ratio in (("lower", inference.ratio_lo), ("upper", inference.ratio_hi)):
            if ratio:
                end = planned_at(dataclasses.replace(config, target_param_data_ratio=ratio), args, gpu)
                print(f"{name} end of the inferred ratio: {ratio:.4g}, {end.train_sec / 3600:.2f} hours")
    if args.nodes > 1:
        print(*nodes_table(config, args.vocab_size, gpu, args.gpus, args.nodes, args.price_per_gpu_hour), sep="\n")
    return 0


def planned_at(config, args, gpu):
    """The Estimate on one node at --device-batch-size, or at the most rows that fit."""
    if not args.device_batch_size:
        return with_fitting_rows(config, args.vocab_size, gpu, gpus_per_node=args.gpus)
    return estimate(dataclasses.replace(config, device_batch_size=args.device_batch_size), args.vocab_size, gpu,
                    gpus_per_node=args.gpus)


def as_flags(config, planned):
    """The flags of scripts.base_train that differ from its defaults, the device batch always among them."""
    config = dataclasses.replace(config, device_batch_size=planned.rows)
    for flag in dataclasses.fields(config):
        value, name = getattr(config, flag.name), f"--{flag.name.replace('_', '-')}"
        if flag.name == "device_batch_size" or (flag.name in PLANNED and value != flag.default):
            yield name if value is True else f"{name}={value}"


if __name__ == "__main__":
    raise SystemExit(main())
