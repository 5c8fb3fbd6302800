"""Estimate memory per GPU, time and cost of a run, and the largest device batch size that fits.

python -m scripts.plan --gpu h100 --gpus 8 --depth 24 --target-param-data-ratio 8 --fp8

Every flag of scripts.base_train is accepted, too. dev/plan_records.csv compares the estimates with
published records.
"""

import shlex

from nanochat.common import Parser, UserError, command
from nanochat.config import parse_config
from nanochat.lane_b.answer import read_inference
from nanochat.plan import GPUS, Estimate, Gpu, largest_fitting


def parse_args(argv=None):
    """Return (the plan's own flags, the flags for scripts.base_train)."""
    parser = Parser("python -m scripts.plan", __doc__)
    add = parser.add_argument
    add("--gpu", default="h100", choices=GPUS, metavar="NAME",
        help="type of GPU: %(choices)s (%(default)s)")
    add("--gpu-memory-gb", type=float, help="memory of a GPU that --gpu does not know; needs "
        "--gpu-tflops, too")
    add("--gpu-tflops", type=float, help="dense bf16 TFLOP/s of a GPU that --gpu does not know; "
        "its fp8 is assumed to be twice as fast, and its memory bandwidth to have the same ratio "
        "to TFLOP/s as an H100's; needs --gpu-memory-gb, too")
    add("--gpus", type=int, default=8, help="GPUs in one node (%(default)s)")
    add("--vocab-size", type=int, default=32768, help="tokens in the vocabulary (%(default)s)")
    add("--price-per-gpu-hour", type=float, default=0.0, help="price of one GPU hour in any "
        "currency; prints the cost of the run")
    add("--inference-json", default="", help="take --target-param-data-ratio from this infer.json "
        "of lane B")
    add("--as-flags", action="store_true", help="print only the flags for scripts.base_train")
    return parser.parse_known_args(argv)


def find_gpu(args):
    """Return the Gpu that the flags describe."""
    if args.gpu_memory_gb is None and args.gpu_tflops is None:
        return GPUS[args.gpu]
    if not (args.gpu_memory_gb or 0) > 0 or not (args.gpu_tflops or 0) > 0:
        raise UserError("give both --gpu-memory-gb and --gpu-tflops, above 0")
    flops, h100 = args.gpu_tflops * 1e12, GPUS["h100"]
    bandwidth = h100.memory_bytes_per_sec * flops / h100.bf16_flop_per_sec
    return Gpu("given GPU", flops, 2 * flops, args.gpu_memory_gb * 1e9, bandwidth)


@command
def main(argv=None):
    args, flags = parse_args(argv)
    gpu = find_gpu(args)
    inferred = read_inference(args.inference_json) if args.inference_json else {}
    if args.inference_json:
        flags.append(f"--target-param-data-ratio={inferred['chosen_ratio']}")
    config = parse_config(flags, prog="python -m scripts.plan")
    if inferred.get("chosen_depth") not in (None, config.depth):
        raise UserError(f"{args.inference_json} is for --depth {inferred['chosen_depth']}, not "
                        f"{config.depth}; give that depth, or infer with --depth {config.depth}")

    has_batch = any(flag.startswith("--device-batch-size") for flag in flags)
    plan = Estimate if has_batch else largest_fitting
    found = plan(config, args.vocab_size, gpu, args.gpus)
    if args.as_flags:
        print(shlex.join([*flags, f"--device-batch-size={found.device_batch_size}"]))
    else:
        print(*found.describe(args.price_per_gpu_hour), sep="\n")


if __name__ == "__main__":
    main()
