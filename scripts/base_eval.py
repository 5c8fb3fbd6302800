"""Evaluate a checkpoint of scripts.base_train or of karpathy/nanochat, or a Hugging Face model.

python -m scripts.base_eval --model-tag d12 --eval core,bpb,sample,position
"""

import math
from functools import partial

from nanochat import common
from nanochat.checkpoint import load_trained
from nanochat.common import NEWEST_HELP, STEP_HELP, TOKENIZER_DIR_HELP, Parser, UserError, print0
from nanochat.config import TrainingConfig
from nanochat.core_eval import bundle_folder, evaluate_core, load_hf
from nanochat.dataset import open_dataset
from nanochat.device import choose_compute_dtype, choose_device, device_name, keep_freed_memory
from nanochat.distributed import on_main, start_ranks, stop_ranks
from nanochat.loss_eval import SplitRows, evaluate_split, position_table, sample_documents
from nanochat.tokens import token_shards

KINDS = ("core", "bpb", "sample", "position")
SPLIT_TOKENS = {"cpu": 2**17, "mps": 40 * 2**19, "cuda": 40 * 2**19}  # per split, by device


def parse_args(argv=None):
    summary = __doc__.splitlines()[0]
    parser = Parser("python -m scripts.base_eval", summary)
    add = parser.add_argument
    add("--model-tag", default="", help=NEWEST_HELP)
    add("--hf-path", default="", help="evaluate CORE of this folder or hub name of a Hugging Face "
        "causal language model instead, for example openai-community/gpt2; needs pip install -e "
        "'.[hf]'")
    add("--eval", default="", help="evaluations to run, separated by commas: core, bpb (bits per "
        "byte), sample, position (loss at each position of the context) (default: bpb,sample; with "
        "--hf-path: core)")
    add("--step", default="latest", help=STEP_HELP)
    add("--dataset", default="", help="stdlib, climbmix, fineweb-edu, or a folder of text "
        "(default: the one of the checkpoint, else climbmix)")
    add("--tokenizer-dir", default="", help=TOKENIZER_DIR_HELP)
    add("--split-tokens", type=int, default=-1, help="tokens to evaluate per split, at most one "
        f"pass over it (-1: {SPLIT_TOKENS['cuda']:,}, or {SPLIT_TOKENS['cpu']:,} on a CPU)")
    add("--device-batch-size", type=int, default=32,
        help="rows of text per device and batch (%(default)s)")
    add("--max-per-task", type=int, default=-1, help="examples to evaluate per CORE task (-1: all)")
    add("--quiet", action="store_true", help=common.QUIET_HELP)
    add("--device-type", default="", help="cuda, mps or cpu (default: the best available)")
    add("--out", default="", help="also write the results to this JSON file")
    return parser.parse_args(argv)


@common.command
def main(argv=None):
    args = parse_args(argv)
    common.set_quiet(args.quiet)
    kinds = set((args.eval or ("core" if args.hf_path else "bpb,sample")).split(","))
    if unknown := kinds.difference(KINDS):
        raise UserError(f"--eval {','.join(unknown)} is unknown; use some of {','.join(KINDS)}")
    if args.hf_path and (args.model_tag or kinds != {"core"}):
        raise UserError("--hf-path cannot be used with --model-tag; it takes only --eval core")
    if args.device_batch_size < 1 or (args.split_tokens < 1 and args.split_tokens != -1):
        raise UserError("--device-batch-size and --split-tokens must be at least 1")
    if args.out:
        common.check_output("--out", args.out)

    device = choose_device(args.device_type)
    dtype, reason = choose_compute_dtype(device)
    keep_freed_memory(device)
    ranks = start_ranks(device)
    try:
        if args.hf_path:
            subject = load_hf(args.hf_path, device, dtype)
        else:
            subject = load_trained(args.model_tag, args.step, device, dtype, args.tokenizer_dir)
        newest = "" if args.model_tag or args.hf_path else " (the newest checkpoint)"
        print0(f"{subject.name}{newest} on {device_name(device)} in {dtype}: {reason}")
        results = {"model_tag": subject.tag, "step": subject.step, "tokens": subject.tokens,
                   "tokenizer_id": subject.tokenizer.tokenizer_id}
        if kinds - {"core"}:
            results |= evaluate_on_text(args, kinds, subject, device, ranks)
        if "core" in kinds:
            core = evaluate_core(subject.model, subject.tokenizer, bundle_folder(), device,
                                 max_per_task=args.max_per_task, max_tokens=subject.max_tokens,
                                 rank=ranks.rank, world_size=ranks.world_size)
            results |= {"core_metric": core.core_metric, "core_tasks": core.centered}
            table = common.base_dir() / "base_eval" / f"{subject.name}.csv"
            if ranks.is_main:
                core.write_csv(table)
            for label, accuracy in core.accuracy.items():
                print0(f"{label}: {accuracy:.4f} right")
            print0(f"CORE {core.core_metric:.4f}; table: {table}")
        if args.out and ranks.is_main:
            common.write_json(args.out, results)
            print0(f"results: {args.out}")
    finally:
        stop_ranks()
    return 0


def evaluate_on_text(args, kinds, trained, device, ranks):
    """Print and return samples, bits per byte and losses by position."""
    tokenizer, flags = trained.tokenizer, trained.user_config
    name = args.dataset or flags.get("dataset") or "climbmix"
    dataset = open_dataset(name)
    own_id = trained.meta.get("dataset_id")
    is_own = own_id in (None, dataset.dataset_id)
    if not is_own and not args.dataset:
        raise UserError(f"the checkpoint was trained on {own_id}, but {name} is now "
                        f"{dataset.dataset_id}; to evaluate on it, give --dataset {name}")
    crop = (is_own and flags.get("crop")) or TrainingConfig(dataset=name).crop
    note = "" if is_own else f" (the checkpoint was trained on {own_id})"
    print0(f"text: {dataset.dataset_id}{note}, crop rule {crop}")

    results = {"dataset_id": dataset.dataset_id}
    if "sample" in kinds:
        shard = token_shards(dataset, tokenizer, "val")[0]
        samples = on_main(ranks, lambda: sample_documents(trained.model, tokenizer, shard))
        results["samples"] = samples
        print0(*(f"sample: {s['prompt']}[...]{s['text']}\n" for s in samples or ()), sep="\n")
    for split in ("val", "train") if {"bpb", "position"} & kinds else ():
        n_tokens = SPLIT_TOKENS[device.type] if args.split_tokens == -1 else args.split_tokens
        shards = token_shards(dataset, tokenizer, split)
        rows = SplitRows(shards, trained.row_tokens, n_tokens, crop)
        bar = partial(common.progress, desc=f"evaluating {split}", shown=ranks.is_main)
        loss = evaluate_split(trained.model, rows, min(args.device_batch_size, len(rows.plan)),
                              tokenizer.token_bytes(), device, ranks, bar)
        print0(f"{split}: {loss.describe()}")
        if not math.isfinite(loss.bits_per_byte):
            raise UserError("the losses are not finite; evaluate an earlier --step")
        if "bpb" in kinds:
            fields = loss.event_fields().items()
            results |= {f"{split}_{key.removeprefix('val_')}": value for key, value in fields}
        if split == "val" and loss.warning():
            print0(f"warning: {loss.warning()}")
        if split == "val" and "position" in kinds:
            results["nats_by_position"] = loss.nats_by_position
            results["counts_by_position"] = loss.counts_by_position
            print0(position_table(loss))
    return results


if __name__ == "__main__":
    raise SystemExit(main())
