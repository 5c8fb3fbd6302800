"""Pretrain a model: python -m scripts.base_train, or torchrun --nproc-per-node=8 -m scripts.base_train.

The same program at every size. Sizes, horizon, batch and learning rates follow from --depth.
"""

import argparse
import dataclasses
import math
import time

from nanochat import build, record, schedule
from nanochat.checkpoint import checkpoint_folder, newest_usable
from nanochat.common import (
    UserError,
    choose_device,
    command,
    device_name,
    keep_freed_memory,
    print0,
    print_next_command,
    set_quiet,
)
from nanochat.config import TrainingConfig
from nanochat.distributed import on_main, start_ranks, stop_ranks
from nanochat.gpt import flops_per_token
from nanochat.loop import Trainer
from nanochat.planning.report import at_start
from nanochat.run_plan import Cadence, Place, Plan, Schedule
from nanochat.watchdog import Watchdog


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.base_train", description=__doc__)
    topics = {}
    for flag in dataclasses.fields(TrainingConfig):
        marks = flag.metadata
        topic = topics[marks["topic"]] = topics.get(marks["topic"]) or parser.add_argument_group(marks["topic"])
        kind = {"action": "store_true"} if flag.type is bool else {"type": flag.type, "metavar": marks["unit"]}
        shown = "" if flag.default in ("", False) else f" ({flag.default})"
        topic.add_argument(f"--{flag.name.replace('_', '-')}", default=flag.default, help=marks["help"] + shown, **kind)
    return TrainingConfig(**vars(parser.parse_args(argv)))


@command
def main(argv=None):
    started = time.monotonic()
    config = parse_args(argv)
    set_quiet(config.quiet)
    device = choose_device(config.device_type)
    dtype, dtype_reason = build.training_dtype(device)
    keep_freed_memory(device)
    ranks = start_ranks(device)
    place = Place(device, device_name(device), ranks, Watchdog(ranks, config.rank_timeout_sec))
    try:
        with place.watchdog:
            return train(config, place, dtype, dtype_reason, started)
    finally:
        stop_ranks()


def train(config, place, dtype, dtype_reason, started):
    """Join the parts, run the loop, close the record; returns the exit code."""
    device, ranks = place.device, place.ranks
    print0(f"device: {place.name}, {ranks.world_size} rank(s), compute dtype {dtype}: {dtype_reason}")
    build.check_kernels(config, device, dtype)
    data = build.open_data(config)
    shape = build.model_config(config, data.tokenizer.vocab_size)
    horizon = build.plan(config, shape)
    micro_batches = schedule.count_micro_batches(horizon.total_batch_size_tokens, config.device_batch_size,
                                                 config.max_seq_len, ranks.world_size)
    folder = checkpoint_folder(config.tag)
    resume_step = build.resume_step(config, folder, ranks)
    segment = record.segment_facts(config, ranks, device, dtype, dtype_reason)
    resumed, changed = build.resume_meta(config, folder, resume_step, shape, data, horizon, segment)

    model = build.build_model(config, shape, device, dtype)
    optimizer = build.build_optimizer(config, model, horizon, ranks, dtype)
    if resumed:
        build.restore(model, optimizer, folder, resume_step, resumed, device, ranks)
    run_id = config.run_id or (resumed or {}).get("run_id") or record.new_run_id(config.tag, config.seed, ranks)
    facts = record.run_config(config, data, shape, horizon, segment)
    print0(record.describe(shape, horizon, micro_batches, ranks, data))
    print0(at_start(config, shape, horizon, micro_batches, place, dtype))

    compiled = build.compile_model(config, model, optimizer)
    loader = data.train_loader(config, micro_batches, ranks, device, resumed)
    meta = {"model_config": shape.to_dict(), "user_config": segment["flags"], "run_id": run_id,
            "segment": {name: segment[name] for name in segment if name != "flags"},
            **build.identity(config, data, horizon)}
    hooks = build.build_hooks(config, model, compiled, optimizer, data, folder, meta, ranks, device)
    plan = Plan(Schedule(horizon.num_iterations, config.warmup_steps, config.warmdown_ratio, config.final_lr_frac),
                Cadence(config.eval_every, config.core_metric_every, config.sample_every, config.save_every),
                micro_batches, horizon.total_batch_size_tokens, flops_per_token(shape),
                config.target if config.stop_at_target else None, 60 * config.save_minutes or math.inf,
                started + 60 * config.time_limit_minutes if config.time_limit_minutes else None,
                config.max_rollbacks if config.on_nan == "rollback" else 0)
    with loader:
        build.warm_up(config, compiled, optimizer, micro_batches, place)
        # last of all that can fail: until here nothing has been written or moved
        log = on_main(ranks, lambda: record.open_record(config.run, run_id, facts, folder, resume_step,
                                                         {**segment, "changed": changed}))
        trainer = Trainer(compiled, optimizer, loader, plan, hooks, log or record.NoLog(), place,
                          resumed and resumed["loop_state"])
        try:
            status = trainer.run()
        except BaseException:
            if ranks.is_main:
                record.close_failed_record(log, device, config.target, started, loader)
            raise
    # the others wait: were another rank gone, torchrun would end rank 0 in the middle of it
    summary = on_main(ranks, lambda: record.close_record(log, status, device, config.target, started, loader))
    if ranks.is_main:
        print0(record.describe_end(summary, log.folder))
        if status == "ok":
            print_next_command(*(("scripts.sample", "--model-tag", config.tag) if config.save_every != 0 else
                       ("scripts.report", run_id)))
        if status == "nan":
            raise UserError(f"the run diverged: loss, validation or weights are not finite at step {trainer.step}; "
                            "start again with lower learning rates, or leave out the text that led there with "
                            f"--on-nan rollback ({newest_usable(folder)})")
    return {"ok": 0, "nan": UserError.exit_code, "interrupted": 128 + trainer.signals.number}[status]


if __name__ == "__main__":
    raise SystemExit(main())
