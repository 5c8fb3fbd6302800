"""Evaluate a checkpoint of ours or of upstream, or a model of Hugging Face: CORE, bits per byte, samples.

python -m scripts.base_eval --model-tag d12 --eval core,bpb,sample,position
"""

import argparse

from nanochat import validation
from nanochat.common import (
    QUIET_HELP,
    UserError,
    base_dir,
    check_output,
    choose_compute_dtype,
    choose_device,
    command,
    device_name,
    keep_freed_memory,
    print0,
    print_next_command,
    set_quiet,
    write_json,
)
from nanochat.core_bundle import bundle_folder
from nanochat.core_eval import evaluate_core
from nanochat.dataset import open_dataset
from nanochat.distributed import on_main, start_ranks, stop_ranks
from nanochat.hf_model import load_hf
from nanochat.tokens import token_shards
from nanochat.checkpoint import load_trained

KINDS = ("core", "bpb", "sample", "position")
SPLIT_TOKENS, SPLIT_TOKENS_CPU = 40 * 524288, 2**17


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.base_eval", description=__doc__.splitlines()[0])
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model-tag", help="checkpoints: a name under <cache>, or an absolute path")
    which.add_argument("--hf-path", help="a causal language model of Hugging Face: a folder, or a name on the hub "
                                         "(openai-community/gpt2); needs the extra hf; core, bpb and position")
    add("--eval", default=argparse.SUPPRESS, help=f"what to evaluate: {','.join(KINDS)} (bpb,sample; with --hf-path "
                                                  "core)")
    add("--step", default="latest", help="the checkpoint's step, or latest (%(default)s)")
    add("--dataset", default="", help="stdlib, climbmix, fineweb-edu, or a folder of text; empty: what the checkpoint "
                                      "says it was trained on, else climbmix")
    add("--tokenizer-dir", default="", help="folder of the tokenizer; empty: what the checkpoint says, else "
                                            "<cache>/tokenizer")
    add("--split-tokens", type=int, default=-1, help=f"tokens evaluated of each split; -1: {SPLIT_TOKENS:,}, on a CPU "
                                                     f"{SPLIT_TOKENS_CPU:,}")
    add("--device-batch-size", type=int, default=32, help="rows per device and batch (%(default)s)")
    add("--max-per-task", type=int, default=-1, help="core: examples answered of each task; -1 all (%(default)s)")
    add("--prompt", action="append", help="sample: a text to continue instead of the beginnings of validation "
                                          "documents; several times for several")
    add("--num-samples", type=int, dest="n_samples", help="sample: continuations of each prompt (%(default)s)")
    add("--max-new-tokens", type=int, help="sample: tokens of each at most (%(default)s)")
    add("--temperature", type=float, help="sample: 0 takes the likeliest token (%(default)s)")
    add("--top-k", type=int, help="sample: among so many likeliest tokens; 0: all (%(default)s)")
    parser.set_defaults(**validation.SAMPLING)
    add("--quiet", action="store_true", help=QUIET_HELP)
    add("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    add("--out", "--output-json", default="", help="write the results to this JSON file too")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    set_quiet(args.quiet)
    kinds = getattr(args, "eval", "core" if args.hf_path else "bpb,sample").split(",")
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"--eval {','.join(sorted(unknown))} is unknown; use some of {','.join(KINDS)}")
    if args.hf_path and "sample" in kinds:
        raise UserError("--hf-path has no samples; use --eval core,bpb,position")
    if not 1 <= args.device_batch_size <= 1 << 20 or (args.split_tokens < 1 and args.split_tokens != -1):
        raise UserError("--device-batch-size and --split-tokens must be at least 1, the first at most 2^20")
    if args.out:
        check_output("--out", args.out)
    device = choose_device(args.device_type)
    dtype, reason = choose_compute_dtype(device)
    keep_freed_memory(device)
    ranks = start_ranks(device)
    try:
        subject = (load_hf(args.hf_path, device, dtype) if args.hf_path
                   else load_trained(args.model_tag, args.step, device, dtype, args.tokenizer_dir))
        print0(f"{subject.name} on {device_name(device)} in {dtype}: {reason}")
        needs_text = {"bpb", "position"} & set(kinds) or ("sample" in kinds and not args.prompt)
        named = args.dataset or subject.user_config.get("dataset") or "climbmix"
        dataset = open_dataset(named) if needs_text else None
        results = evaluate(args, kinds, subject, dataset, device, ranks)
        if args.out and ranks.is_main:
            write_results(args.out, {
                "model_tag": subject.tag, "step": subject.step, "tokens": subject.tokens, "dataset_id":
                dataset and dataset.dataset_id, "tokenizer_id": subject.tokenizer.tokenizer_id, **results})
        if args.model_tag:
            print_next_command("scripts.sample", "--model-tag", args.model_tag)
    finally:
        stop_ranks()
    return 0


def evaluate(args, kinds, subject, dataset, device, ranks):
    """The results of the kinds asked for, printed as they come."""
    model, tokenizer, results = subject.model, subject.tokenizer, {}
    if "sample" in kinds:
        samples = on_main(ranks, lambda: sample(args, model, tokenizer, dataset))
        results |= {"samples": samples} if ranks.is_main else {}
    if {"bpb", "position"} & set(kinds):
        split_tokens = args.split_tokens
        if split_tokens == -1:
            split_tokens = SPLIT_TOKENS_CPU if device.type == "cpu" else SPLIT_TOKENS
        splits = validation.evaluate_splits(model, dataset, tokenizer, split_tokens, args.device_batch_size,
                                            subject.row_tokens, device, ranks)
        for split, loss in splits.items():
            print0(f"{split}: {loss.bits_per_byte:.4f} bits per byte, {loss.nats_per_token:.4f} nats per token "
                   f"on {loss.n_tokens:,} tokens")
        if "bpb" in kinds:
            results |= {f"{split}_bpb": loss.bits_per_byte for split, loss in splits.items()}
        if "position" in kinds:
            results["nats_by_position"] = splits["val"].nats_by_position
            results["counts_by_position"] = splits["val"].counts_by_position
            print0(validation.position_table(splits["val"]))
    if "core" in kinds:
        core = evaluate_core(model, tokenizer, bundle_folder(), device, max_per_task=args.max_per_task,
                             max_tokens=subject.max_tokens, rank=ranks.rank, world_size=ranks.world_size)
        results |= {"core_metric": core.core_metric, "core_tasks": core.centered}
        table = base_dir() / "base_eval" / f"{subject.name}.csv"
        if ranks.is_main:
            core.write_csv(table)
        print0(*(f"{label}: {accuracy:.4f} right" for label, accuracy in core.accuracy.items()), sep="\n")
        print0(f"CORE {core.core_metric:.4f}; table: {table}")
    return results


def sample(args, model, tokenizer, dataset):
    """Print and return the samples."""
    sampling = {**{name: getattr(args, name) for name in validation.SAMPLING}, "top_k": args.top_k or None}
    if args.prompt:
        samples = validation.sample_prompts(model, tokenizer, args.prompt, **sampling)
    else:
        samples = validation.sample_documents(model, tokenizer, token_shards(dataset, tokenizer, "val")[0], **sampling)
    print0(*(f"sample: {sample['prompt']}[...]{sample['text']}\n" for sample in samples), sep="\n")
    return samples


def write_results(path, results):
    """Write the results as JSON. UserError when they hold a NaN or the disk is full."""
    try:
        write_json(path, results)
    except ValueError:  # JSON has no NaN
        raise UserError(f"{path} is not written: the model's losses are not finite; evaluate an earlier step") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out") from None
    print(f"results: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
