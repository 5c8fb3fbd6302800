"""Evaluate a checkpoint of ours or of upstream: python -m scripts.base_eval --model-tag d12 --eval bpb,sample."""

import argparse
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from nanochat.data.sources import open_dataset
from nanochat.data.tokenizer import load_tokenizer
from nanochat.data.tokens import token_shards
from nanochat.errors import UserError, command
from nanochat.evaluation.core import evaluate_core
from nanochat.evaluation.core_bundle import bundle_folder
from nanochat.evaluation.validation import evaluate_split, n_eval_batches, sample_documents
from nanochat.files import check_output, write_json
from nanochat.machine import choose_compute_dtype, choose_device, device_name, keep_freed_memory
from nanochat.paths import base_dir
from nanochat.ranks import print0, start_ranks, stop_ranks
from nanochat.training import checkpoint

KINDS = ("bpb", "position", "sample", "core")
SPLIT_TOKENS, SPLIT_TOKENS_CPU = 40 * 524288, 2**17


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="base_eval", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--eval", default="bpb,sample", help=f"what to evaluate: {','.join(KINDS)}")
    parser.add_argument("--model-tag", required=True, help="checkpoints: a name under <cache>, or an absolute path")
    parser.add_argument("--step", default="latest", help="the checkpoint's step, or latest")
    parser.add_argument("--dataset", default="", help="stdlib, climbmix, fineweb-edu, or a folder of text; empty: what "
                                                      "the checkpoint says it was trained on, else climbmix")
    parser.add_argument("--tokenizer-dir", default="", help="folder of the tokenizer; empty: what the checkpoint says, "
                                                            "else <cache>/tokenizer")
    parser.add_argument("--split-tokens", type=int, default=-1, help=f"tokens evaluated of each split; -1: "
                                                                     f"{SPLIT_TOKENS:,}, on a CPU {SPLIT_TOKENS_CPU:,}")
    parser.add_argument("--device-batch-size", type=int, default=32, help="rows per device and batch")
    parser.add_argument("--max-per-task", type=int, default=-1, help="examples per CORE task; -1 all")
    parser.add_argument("--device-type", default="", help="cuda, mps or cpu; empty: the best there is")
    parser.add_argument("--out", "--output-json", default="", help="write the results to this JSON file too")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    kinds = args.eval.split(",")
    if unknown := set(kinds) - set(KINDS):
        raise UserError(f"--eval {','.join(sorted(unknown))} is unknown; use some of {','.join(KINDS)}")
    if args.device_batch_size < 1 or (args.split_tokens < 1 and args.split_tokens != -1):
        raise UserError("--device-batch-size and --split-tokens must be at least 1")
    if args.out:
        check_output("--out", args.out)
    device = choose_device(args.device_type)
    dtype, reason = choose_compute_dtype(device)
    keep_freed_memory(device)
    ranks = start_ranks(device)
    try:
        path = Path(args.model_tag)
        folder = path if path.is_absolute() else checkpoint.checkpoint_folder(args.model_tag)
        step = checkpoint.find_checkpoint(folder, args.step)
        trained_with = checkpoint.read_meta(folder, step).get("user_config") or {}
        tokenizer = load_tokenizer(args.tokenizer_dir or trained_with.get("tokenizer_dir")
                                   or base_dir() / "tokenizer")
        model, meta = checkpoint.load_model(folder, step, device, dtype)
        if model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(f"the model's vocabulary is {model.config.vocab_size}, the tokenizer's "
                            f"{tokenizer.vocab_size}; give the one it was trained with (--tokenizer-dir)")
        if meta.get("tokenizer_id", tokenizer.tokenizer_id) != tokenizer.tokenizer_id:
            raise UserError(f"the model was trained with tokenizer {meta['tokenizer_id']}, this one is "
                            f"{tokenizer.tokenizer_id}; give the one it was trained with (--tokenizer-dir)")
        model.eval()
        print0(f"{folder.name}, step {step}, on {device_name(device)} in {dtype}: {reason}")
        dataset = open_dataset(args.dataset or trained_with.get("dataset") or "climbmix")
        results = evaluate(args, kinds, model, dataset, tokenizer, device, ranks)
        if args.out and ranks.is_main:
            tokens = step * meta.get("total_batch_size_tokens", meta.get("total_batch_size", 0))
            write_results(args.out, {
                "model_tag": folder.name, "step": step, "tokens": tokens, "dataset_id": dataset.dataset_id,
                "tokenizer_id": tokenizer.tokenizer_id, **results})
    finally:
        stop_ranks()
    return 0


def evaluate(args, kinds, model, dataset, tokenizer, device, ranks):
    """The results of the kinds asked for, printed as they come."""
    results = {}
    if "sample" in kinds and ranks.is_main:
        shard = token_shards(dataset, tokenizer, "val")[0]
        results["samples"] = sample_documents(model, tokenizer, shard)
        for sample in results["samples"]:
            print(f"sample: {sample['prompt']}[...]{sample['text']}\n")
    if {"bpb", "position"} & set(kinds):
        splits = evaluate_splits(args, model, dataset, tokenizer, device, ranks)
        for split, loss in splits.items():
            print0(f"{split}: {loss.bits_per_byte:.4f} bits per byte, {loss.nats_per_token:.4f} nats per token "
                          f"on {loss.n_tokens:,} tokens")
        if "bpb" in kinds:
            results |= {f"{split}_bpb": loss.bits_per_byte for split, loss in splits.items()}
        if "position" in kinds:
            results["nats_by_position"] = splits["val"].nats_by_position
            results["counts_by_position"] = splits["val"].counts_by_position
            print0("tokens of context since BOS: nats per token")
            by_position = list(zip(results["nats_by_position"], results["counts_by_position"], strict=True))
            for n in (0, *(2**k for k in range(len(by_position).bit_length() - 1))):
                nats, count = by_position[n]
                print0(f"{n:6d}: {nats:.4f} ({count:,} tokens)" if count else f"{n:6d}: none")
    if "core" in kinds:
        core = evaluate_core(model, tokenizer, bundle_folder(), device, max_per_task=args.max_per_task,
                             max_tokens=model.cos.size(1), rank=ranks.rank, world_size=ranks.world_size)
        results |= {"core_metric": core.core_metric, "core_tasks": core.centered}
        print0(f"CORE {core.core_metric:.4f}")
    return results


def write_results(path, results):
    """Write the results as JSON. UserError when they hold a NaN or the disk is full."""
    try:
        write_json(path, results)
    except ValueError:  # JSON has no NaN
        raise UserError(f"{path} is not written: the model's losses are not finite; evaluate an earlier step") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); give another --out") from None
    print(f"results: {path}")


def evaluate_splits(args, model, dataset, tokenizer, device, ranks):
    """{val, train: LossEvaluation} on --split-tokens of each, at most one pass."""
    length = model.config.sequence_len
    token_bytes = torch.from_numpy(tokenizer.token_bytes()).to(device)
    split_tokens = args.split_tokens
    if split_tokens == -1:
        split_tokens = SPLIT_TOKENS_CPU if device.type == "cpu" else SPLIT_TOKENS
    losses = {}
    for split in ("val", "train"):
        shards = token_shards(dataset, tokenizer, split)
        n_batches = n_eval_batches(shards, split_tokens, args.device_batch_size, length)
        bar = partial(tqdm, desc=f"evaluating {split}", total=-(-n_batches // ranks.world_size),
                      disable=not ranks.is_main)
        losses[split] = evaluate_split(
            model, shards, n_batches, args.device_batch_size, length, token_bytes, tokenizer.bos_id, ranks, bar)
    return losses


if __name__ == "__main__":
    raise SystemExit(main())
