"""Pretrain a model: python -m scripts.base_train, or torchrun --nproc-per-node=8 -m scripts.base_train.

The same program at every size. Sizes, horizon, batch and learning rates follow from --depth.
"""

import argparse
import time

from nanochat.errors import UserError, command
from nanochat.machine import choose_device, device_name, keep_freed_memory
from nanochat.model.gpt import flops_per_token
from nanochat.ranks import on_main, print0, start_ranks, stop_ranks
from nanochat.training import build, checkpoint, schedule
from nanochat.training.loop import Cadence, Hooks, Schedule, Trainer, close_failed_record, close_record


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="base_train", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    def topic(title, *flags):
        group = parser.add_argument_group(title)
        for name, default, text in flags:
            kind = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
            group.add_argument(name, help=text, **kind)

    topic("record",
          ("--run", "dummy", "wandb run name; dummy turns wandb off"),
          ("--run-id", "", "name of the run's record under <cache>/runs; empty: made from tag, time and seed"),
          ("--model-tag", "", "name of the checkpoint folder; empty: d<depth>"))
    topic("machine",
          ("--device-type", "", "cuda, mps or cpu; empty: the best there is"),
          ("--no-compile", False, "run the model uncompiled (slower; starts at once)"))
    topic("data",
          ("--dataset", "climbmix", "stdlib, climbmix, fineweb-edu, or a folder of text"),
          ("--tokenizer-dir", "", "folder of the tokenizer; empty: <cache>/tokenizer"),
          ("--seed", 42, "seed of the initial values and of the data order"))
    topic("model",
          ("--depth", 20, "layers"),
          ("--aspect-ratio", 64, "width = depth * aspect ratio, rounded up to whole heads"),
          ("--head-dim", 128, "channels per attention head"),
          ("--max-seq-len", 2048, "context length in tokens"),
          ("--window-pattern", "SSSL", "attention per layer, tiled: L full, S a quarter; the last is full"),
          ("--fused-rmsnorm", False, "rotary + QK-norm in one Triton kernel; uncompiled, the other norms too (lane C)"),
          ("--chunked-ce", False, "chunked linear cross-entropy (lane C)"))
    topic("horizon (the first that is given)",
          ("--num-iterations", -1, "optimizer steps"),
          ("--target-flops", -1.0, "total training FLOPs"),
          ("--target-param-data-ratio", 12.0, "tokens per scaling parameter"))
    topic("optimization",
          ("--device-batch-size", 32, "rows per device and micro-batch"),
          ("--total-batch-size", -1, "tokens per optimizer step; -1: automatic"),
          ("--embedding-lr", 0.3, "AdamW, embeddings"),
          ("--unembedding-lr", 0.008, "AdamW, head"),
          ("--matrix-lr", 0.02, "Muon"),
          ("--scalar-lr", 0.5, "AdamW, scalars"),
          ("--weight-decay", 0.28, "Muon, scheduled to 0"),
          ("--warmup-steps", 40, "linear warmup of the learning rates"),
          ("--warmdown-ratio", 0.65, "share of the steps with falling learning rates"),
          ("--final-lr-frac", 0.05, "last learning rate over the peak"),
          ("--resume-from-step", "-1", "a step, or latest: go on from that checkpoint"))
    topic("evaluation, samples, checkpoints (every so many steps; -1 never)",
          ("--eval-every", 250, "validation bits per byte"),
          ("--eval-tokens", 80 * 524288, "tokens of each validation"),
          ("--core-metric-every", 2000, "CORE"),
          ("--core-metric-max-per-task", 500, "examples per CORE task; -1 all"),
          ("--sample-every", 2000, "samples from the model"),
          ("--save-every", -1, "checkpoints; -1 at the end only, 0 never"),
          ("--position-losses", False, "save the loss by position of the last validation with the run"),
          ("--target-metric-name", "val_bpb", "metric of the time to target: val_bpb or core"),
          ("--target-metric-threshold", float("nan"), "its threshold; nan: no target"))
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    started = time.monotonic()
    build.check_flags(args)
    device = choose_device(args.device_type)
    dtype, dtype_reason = build.training_dtype(device)
    keep_freed_memory(device)
    ranks = start_ranks(device)
    try:
        return train(args, device, dtype, dtype_reason, ranks, started)
    finally:
        stop_ranks()


def train(args, device, dtype, dtype_reason, ranks, started):
    """Join the parts, run the loop, close the record; returns the exit code."""
    name = device_name(device)
    print0(f"device: {name}, {ranks.world_size} rank(s), compute dtype {dtype}: {dtype_reason}")
    build.check_kernels(args, device, dtype)
    data = build.open_data(args)
    config = build.model_config(args, data.tokenizer.vocab_size)
    horizon = build.plan(args, config)
    accumulation = schedule.accumulation_steps(horizon.total_batch_size_tokens, args.device_batch_size,
                                               args.max_seq_len, ranks.world_size)
    tag = args.model_tag or f"d{args.depth}"
    folder = checkpoint.checkpoint_folder(tag)
    resume_step = build.resume_step(args, folder)
    resumed = build.resume_meta(args, folder, resume_step, config, data, horizon)

    model = build.build_model(args, config, device, dtype)
    optimizer = build.build_optimizer(args, model, horizon, ranks, dtype)
    if resumed:
        build.restore(model, optimizer, folder, resume_step, resumed, device, ranks)
    run_id = args.run_id or (resumed or {}).get("run_id") or build.new_run_id(tag, args.seed, ranks)
    record = build.run_config(args, data, config, horizon, ranks, device, dtype, dtype_reason)
    print0(build.describe(config, horizon, accumulation, data))

    compiled = build.compile_model(args, model)
    loader = data.train_loader(args, ranks, device, resumed)
    meta = {"model_config": config.to_dict(), "user_config": record["flags"], "run_id": run_id,
            **build.identity(args, data, horizon)}

    def save(loop_state):
        checkpoint.save_checkpoint(folder, loop_state["step"], model.state_dict(), optimizer.state_dict(),
                                   {**meta, "loop_state": loop_state}, ranks)
        return {"path": str(folder)}

    hooks = Hooks(build.evaluator(args, compiled, data, ranks, device), save,
                  core=build.core_evaluator(args, model, data, ranks, device),
                  sample=build.sampler(model, data) if ranks.is_main else None)
    with loader:
        # last of all that can fail: until here nothing has been written or moved
        log = on_main(ranks, lambda: build.open_record(args.run, run_id, record, folder, resume_step))
        trainer = Trainer(
            compiled, optimizer, loader, accumulation=accumulation, step_tokens=horizon.total_batch_size_tokens,
            schedule=Schedule(horizon.num_iterations, args.warmup_steps, args.warmdown_ratio, args.final_lr_frac),
            cadence=Cadence(args.eval_every, args.core_metric_every, args.sample_every, args.save_every), hooks=hooks,
            log=log or build.NoLog(), ranks=ranks, device=device, device_name=name,
            flops_per_token=flops_per_token(config), loop_state=resumed and resumed["loop_state"])
        try:
            status = trainer.run()
        except BaseException:
            if ranks.is_main:
                close_failed_record(log, device, build.target_of(args), started)
            raise
    # the others wait: were another rank gone, torchrun would end rank 0 in the middle of it
    summary = on_main(ranks, lambda: close_record(log, status, device, build.target_of(args), started))
    if ranks.is_main:
        print(build.describe_end(summary, log.folder), flush=True)
        if status == "nan":
            raise UserError(f"the loss is not finite at step {trainer.step}; the run stopped there without saving. "
                            "Lower the learning rates or resume an earlier checkpoint")
    return {"ok": 0, "nan": UserError.exit_code, "interrupted": 128 + trainer.stop_signal}[status]


if __name__ == "__main__":
    raise SystemExit(main())
