"""The parts of a pretraining run, each built from the program's flags; scripts/base_train.py joins them."""

import math
import time
from dataclasses import dataclass
from datetime import datetime, timezone

import torch
import torch.distributed as dist

from nanochat.data.dataloader import RowPlanner, TokenLoader
from nanochat.data.sources import Dataset, open_dataset
from nanochat.data.tokenizer import Tokenizer, load_tokenizer
from nanochat.data.tokens import TokenShard, token_shards
from nanochat.errors import UserError
from nanochat.evaluation.core import evaluate_core
from nanochat.evaluation.core_bundle import bundle_folder
from nanochat.evaluation.loss import evaluate_loss
from nanochat.kernels.linear_cross_entropy import check_linear_cross_entropy
from nanochat.kernels.rms_norm import check_rms_norm
from nanochat.kernels.runtime import INTERPRETED
from nanochat.machine import choose_compute_dtype, device_name
from nanochat.model.engine import generate
from nanochat.model.gpt import GPT, SOFTCAP, GPTConfig, flops_per_token, parameter_counts, scaling_params
from nanochat.model.optim import MuonAdamW, parameter_groups
from nanochat.paths import base_dir, runs_dir
from nanochat.provenance import git_commit, versions
from nanochat.ranks import print0
from nanochat.runlog import RunLog, check_new_run
from nanochat.target import check_metric_name, check_target
from nanochat.training import checkpoint, schedule
from nanochat.training.console import ConsoleSink, WandbSink

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS, N_SAMPLES = 16, 96, 2
POSITIVE_FLAGS = ("depth", "max_seq_len", "device_batch_size", "eval_tokens")
OPTIMIZER_FLAGS = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
SCHEDULE_FLAGS = ("warmup_steps", "warmdown_ratio", "final_lr_frac")


@dataclass(frozen=True)
class Data:
    """A dataset with its tokenizer and both splits as token shards."""

    dataset: Dataset
    tokenizer: Tokenizer
    train: list[TokenShard]
    val: list[TokenShard]

    def train_loader(self, args, ranks, device, resumed=None):
        """The training stream, continued from a checkpoint's meta when there is one."""
        state = resumed["loop_state"]["loader"] if resumed else None
        return TokenLoader(self.train, args.device_batch_size, args.max_seq_len, args.seed, rank=ranks.rank,
                           world_size=ranks.world_size, device=device, state=state)


def check_flags(args):
    """Refuse values that no run can have, before anything slow begins."""
    for flag in POSITIVE_FLAGS:
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 1")
    for flag in ("seed", "final_lr_frac", *OPTIMIZER_FLAGS):
        if not 0 <= getattr(args, flag) < math.inf:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be a number of at least 0")
    if not 0 <= args.warmdown_ratio <= 1 or args.warmup_steps < 0:
        raise UserError("--warmdown-ratio must be between 0 and 1 and --warmup-steps at least 0")
    check_metric_name(args.target_metric_name)
    if target_of(args)[1] is not None:
        check_target(*target_of(args))


def target_of(args):
    """(metric name, threshold) of the run's target; the threshold is None where the run has none."""
    threshold = args.target_metric_threshold
    return args.target_metric_name, None if math.isnan(threshold) else threshold


def training_dtype(device):
    """(compute dtype, reason); fp16 is refused: it needs loss scaling."""
    dtype, reason = choose_compute_dtype(device)
    if dtype == torch.float16:
        raise UserError("NANOCHAT_DTYPE=float16 cannot train: it needs loss scaling; use bfloat16 or float32")
    return dtype, reason


def open_data(args):
    """The Data that --dataset and --tokenizer-dir name; shards are tokenised now where the cache lacks them."""
    tokenizer = load_tokenizer(args.tokenizer_dir or base_dir() / "tokenizer")
    dataset = open_dataset(args.dataset)
    return Data(dataset, tokenizer, token_shards(dataset, tokenizer, "train"), token_shards(dataset, tokenizer, "val"))


def model_config(args, vocab_size, depth=None):
    """The GPTConfig that the flags describe (or the one of another depth)."""
    shape = schedule.model_shape(depth or args.depth, args.aspect_ratio, args.head_dim)
    return GPTConfig(args.max_seq_len, vocab_size, shape.n_layer, shape.n_head, shape.n_head, shape.n_embd,
                     args.window_pattern)


def check_kernels(args, device, dtype):
    """Refuse lane C's flags where their kernels cannot run; before any text is tokenised."""
    config = model_config(args, vocab_size=1)  # the tokenizer is not known yet, and only the widths matter
    if args.fused_rmsnorm:
        check_rms_norm(device, dtype, config.n_embd, config.head_dim)
    if args.chunked_ce:
        check_linear_cross_entropy(device, dtype, config.padded_vocab_size, SOFTCAP,
                                   implementation="triton" if device.type == "cuda" else "torch")


def plan(args, config):
    """The Horizon of the run."""
    reference = model_config(args, config.vocab_size, schedule.REFERENCE_DEPTH)
    return schedule.plan_horizon(
        scaling_params(config), scaling_params(reference), flops_per_token(config),
        num_iterations=args.num_iterations, target_flops=args.target_flops,
        target_param_data_ratio=args.target_param_data_ratio, total_batch_size_tokens=args.total_batch_size)


def build_model(args, config, device, dtype):
    """A freshly initialised model on `device`."""
    model = GPT(config, dtype, fused_rmsnorm=args.fused_rmsnorm, chunked_ce=args.chunked_ce)
    model.init_weights(args.seed)
    return model.to(device)


def build_optimizer(args, model, horizon, ranks, dtype):
    """Muon and AdamW on the model's parameters, learning rates and decay scaled by the horizon's batch."""
    groups = parameter_groups(
        model, embedding_lr=args.embedding_lr, unembedding_lr=args.unembedding_lr, matrix_lr=args.matrix_lr,
        scalar_lr=args.scalar_lr, weight_decay=args.weight_decay, batch_lr_scale=horizon.batch_lr_scale,
        decay_scale=horizon.decay_scale)
    return MuonAdamW(groups, ranks, matmul_dtype=dtype, compiled=not args.no_compile)


def compile_model(args, model):
    """The model compiled for its fixed shapes, or itself with --no-compile."""
    if args.no_compile:
        return model
    print0("compiling: up to a minute before the first step, less where the code is cached ...")
    return torch.compile(model, dynamic=False)


def run_config(args, data, config, horizon, ranks, device, dtype, dtype_reason):
    """config.json of the run's record, without its id."""
    commit, dirty = git_commit()
    return {
        "created_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"), "flags": flags_of(args),
        "git_commit": commit, "git_dirty": dirty, "versions": versions(),
        "device": {"type": device.type, "name": device_name(device), "compute_dtype": str(dtype).removeprefix("torch."),
                   "dtype_reason": dtype_reason, "world_size": ranks.world_size, "triton_interpreted": INTERPRETED},
        **identity(args, data, horizon), "model_config": config.to_dict(),
        "n_params": parameter_counts(config)["total"], "n_scaling_params": scaling_params(config),
        "flops_per_token": flops_per_token(config), "target_tokens": horizon.target_tokens,
        "target_param_data_ratio": horizon.target_tokens / scaling_params(config),
    }


def open_record(wandb_name, run_id, config, folder, resume_step):
    """The run's log and its sinks, begun or continued; a new run moves another's checkpoints in `folder` aside."""
    runs = runs_dir()
    if resume_step is None:
        check_new_run(runs, run_id)  # before wandb hears of it
    sinks = [ConsoleSink(config["num_iterations"], resume_step or 0)]
    if wandb_name != "dummy":
        sinks.append(WandbSink(wandb_name, run_id, config))
    if resume_step is not None:
        return RunLog.resume(runs, run_id, resume_step, sinks)
    checkpoint.set_aside(folder)
    return RunLog.create(runs, run_id, config, sinks)


def identity(args, data, horizon):
    """What must be equal for a run to go on from a checkpoint: it decides the data and the updates."""
    return {"dataset_id": data.dataset.dataset_id, "tokenizer_id": data.tokenizer.tokenizer_id, "seed": args.seed,
            "total_batch_size_tokens": horizon.total_batch_size_tokens, "num_iterations": horizon.num_iterations}


def resume_step(args, folder):
    """The step of the checkpoint in `folder` that --resume-from-step asks for, or None when it asks for none."""
    return None if args.resume_from_step == "-1" else checkpoint.find_checkpoint(folder, args.resume_from_step)


def resume_meta(args, folder, step, config, data, horizon):
    """The meta of the checkpoint to resume from, or None without one. UserError when it is of another run."""
    if step is None:
        return None
    meta = checkpoint.read_meta(folder, step)
    if "loader" not in (meta.get("loop_state") or {}):
        raise UserError(f"the checkpoint of step {step} in {folder} is not one of this program: evaluate it with "
                        "scripts.base_eval, but it cannot be resumed")
    expected = {**identity(args, data, horizon), "model_config": config.to_dict(),
                **{flag: getattr(args, flag) for flag in (*OPTIMIZER_FLAGS, *SCHEDULE_FLAGS)}}
    found = {**(meta.get("user_config") or {}), **meta}
    for name, value in expected.items():
        if found.get(name) != value:
            raise UserError(f"cannot resume step {step} in {folder}: its {name} is {found.get(name)}, this run's is "
                            f"{value}; give the flags of the run that made it")
    return meta


def restore(model, optimizer, folder, step, meta, device, ranks):
    """Load a checkpoint's weights and this rank's optimizer state."""
    checkpoint.load_state(model, checkpoint.load_model_state(folder, step, meta, device), folder, step)
    optimizer.load_state_dict(checkpoint.load_optimizer_state(folder, step, meta, device, ranks))


def evaluator(args, model, data, ranks, device):
    """Validation as a function of (is it the last one?): the fields of a `val` event."""
    n_batches = eval_batches(data.val, args.eval_tokens, args.device_batch_size * ranks.world_size, args.max_seq_len)
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes()).to(device)

    def evaluate(last):
        model.eval()
        with TokenLoader(data.val, args.device_batch_size, args.max_seq_len, rank=ranks.rank,
                         world_size=ranks.world_size, device=device, shuffle=False) as batches:
            result = evaluate_loss(model, batches, n_batches, token_bytes, data.tokenizer.bos_id, ranks)
        model.train()
        fields = {"val_bpb": result.bits_per_byte}
        if last and args.position_losses:
            fields["position_losses"] = {"nats_by_position": result.nats_by_position,
                                         "counts_by_position": result.counts_by_position}
        return fields

    return evaluate


def eval_batches(shards, eval_tokens, batch_rows, sequence_len):
    """Batches (over all ranks) of one evaluation: `eval_tokens`, but at most one pass over the split; at least 1."""
    planner = RowPlanner(shards, sequence_len + 1, seed=0, shuffle=False)
    wanted = max(1, eval_tokens // (batch_rows * sequence_len))
    for done in range(wanted):
        for _ in range(batch_rows):
            planner.next_row()
        epoch, position, buffered = planner.snapshot()
        if epoch * planner.order.n_docs + position - len(buffered) > planner.order.n_docs:
            return max(1, done)
    return wanted


def core_evaluator(args, model, data, ranks, device):
    """CORE as the fields of a `core` event, or None when it is never asked for or its bundle is not there."""
    if args.core_metric_every <= 0:
        return None
    bundle = bundle_folder()
    if not bundle.exists():
        print0(f"CORE is not evaluated: {bundle} is missing (python -m nanochat.core_eval downloads it)")
        return None

    def evaluate():
        result = evaluate_core(model, data.tokenizer, bundle, device, max_per_task=args.core_metric_max_per_task,
                               max_tokens=model.cos.size(1), rank=ranks.rank, world_size=ranks.world_size)
        return {"core_metric": result.core_metric, "tasks": result.centered}

    return evaluate


def sampler(model, data):
    """Continuations of the first tokens of validation documents: [{prompt, text}]."""
    def sample():
        model.eval()
        samples = [sample_document(model, data.tokenizer, data.val[0], i) for i in range(N_SAMPLES)]
        model.train()
        return samples

    return sample


def sample_document(model, tokenizer, shard, index):
    """One continuation of the beginning of document `index` of a shard, as {prompt, text}."""
    start, end = shard.offsets[index % shard.n_docs], shard.offsets[index % shard.n_docs + 1]
    prompt = shard.tokens[start:min(end, start + 1 + SAMPLE_PROMPT_TOKENS)].tolist()
    [new] = generate(model, prompt, SAMPLE_NEW_TOKENS, temperature=0.8, top_k=50, seed=index,
                     stop_ids=(tokenizer.bos_id,))
    return {"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)}


def new_run_id(tag, seed, ranks):
    """An id of tag, UTC time and seed, the same on every rank."""
    ids = [f"{tag}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-s{seed}"]
    if ranks.world_size > 1:
        dist.broadcast_object_list(ids, src=0)
    return ids[0]


def flags_of(args):
    """The flags as they go into records; a NaN (no target) as None."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in vars(args).items()}


def describe(config, horizon, accumulation, data):
    """What will be trained, on what, for how long: for the console."""
    millions = {name: f"{count / 1e6:.2f}M" for name, count in parameter_counts(config).items()}
    return (
        f"model: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads of {config.head_dim}, "
        f"{millions['total']} parameters ({millions['transformer_matrices']} matrices + {millions['lm_head']} head)\n"
        f"data: {data.dataset.dataset_id}, tokenizer {data.tokenizer.tokenizer_id} of {config.vocab_size}, "
        f"{sum(shard.n_tokens for shard in data.train) / 1e6:.1f}M training tokens\n"
        f"horizon: {horizon.num_iterations} steps of {horizon.total_batch_size_tokens} tokens "
        f"({accumulation} micro-batch(es) a rank), {horizon.target_tokens / 1e6:.2f}M tokens, "
        f"{horizon.target_tokens / scaling_params(config):.2f} per scaling parameter")


def describe_end(summary, folder):
    """How the run ended, for the console."""
    bits = "" if summary["min_val_bpb"] is None else f", min val_bpb {summary['min_val_bpb']:.4f}"
    speed = "" if summary["tok_per_sec_median"] is None else f", {summary['tok_per_sec_median']:,.0f} tok/s (median)"
    return (f"{summary['status']} after {summary['steps']} steps: {summary['train_time_sec']:.1f} s of training"
            f"{speed}{bits}, peak memory {summary['peak_memory_mib']:,.0f} MiB\nrecord: {folder}")


class NoLog:
    """The log of ranks above 0: the record has one writer."""

    def event(self, kind, **fields):
        pass
