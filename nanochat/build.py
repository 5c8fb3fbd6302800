"""The parts of a pretraining run, each built from its configuration; scripts/base_train.py joins them."""

from dataclasses import dataclass

import torch

from nanochat import checkpoint, schedule, segments
from nanochat.attention import plan_attention
from nanochat.common import UserError, choose_compute_dtype, print0
from nanochat.core_bundle import bundle_folder
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TokenLoader
from nanochat.dataset import Dataset, open_dataset
from nanochat.distributed import broadcast_from_rank0
from nanochat.fp8 import check_fp8, train_in_fp8
from nanochat.gpt import GPT, SOFTCAP, GPTConfig, flops_per_token, scaling_params
from nanochat.kernels.linear_cross_entropy import check_linear_cross_entropy
from nanochat.kernels.rms_norm import check_rms_norm
from nanochat.loop import Hooks
from nanochat.loss_eval import SplitRows, evaluate_split, sample_documents
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.saving import Saver
from nanochat.tokenizer import Tokenizer, load_tokenizer
from nanochat.tokens import TokenShard, token_shards


@dataclass(frozen=True)
class Data:
    """A dataset with its tokenizer and both splits as token shards."""

    dataset: Dataset
    tokenizer: Tokenizer
    train: list[TokenShard]
    val: list[TokenShard]

    @property
    def n_train_tokens(self):
        return sum(shard.n_tokens for shard in self.train)

    def train_loader(self, config, micro_batches, ranks, device, resumed=None):
        """The training stream in steps of `micro_batches`, continued from a checkpoint's meta when there is one."""
        state = resumed["loop_state"]["loader"] if resumed else None
        return TokenLoader(self.train, config.device_batch_size, config.max_seq_len, config.seed, rank=ranks.rank,
                           world_size=ranks.world_size, step_batches=micro_batches, device=device, crop=config.crop,
                           state=state)


def training_dtype(device):
    """(compute dtype, reason); fp16 is refused: it needs loss scaling."""
    dtype, reason = choose_compute_dtype(device)
    if dtype == torch.float16:
        raise UserError("NANOCHAT_DTYPE=float16 cannot train: it needs loss scaling; use bfloat16 or float32")
    return dtype, reason


def open_data(config):
    """The Data that --dataset and --tokenizer-dir name; shards are tokenised now where the cache lacks them."""
    tokenizer = load_tokenizer(config.tokenizer_dir)
    dataset = open_dataset(config.dataset)
    return Data(dataset, tokenizer, token_shards(dataset, tokenizer, "train"), token_shards(dataset, tokenizer, "val"))


def model_config(config, vocab_size, depth=None):
    """The GPTConfig that a TrainingConfig describes (or the one of another depth)."""
    shape = schedule.model_shape(depth or config.depth, config.aspect_ratio, config.head_dim)
    return GPTConfig(config.max_seq_len, vocab_size, shape.n_layer, shape.n_head, shape.n_head, shape.n_embd,
                     config.window_pattern)


def check_kernels(config, device, dtype):
    """Refuse flags whose kernels cannot run here, before any text is tokenised; say what computes attention."""
    model = model_config(config, vocab_size=1)  # the tokenizer is not known yet, and only the widths matter
    for line in plan_attention(config.attention, device, dtype, model, compiled=not config.no_compile):
        print0(line)
    if config.fp8:
        check_fp8(device, dtype, model.n_embd, config.device_batch_size * config.max_seq_len)
    if config.fused_rmsnorm:
        check_rms_norm(device, dtype, model.n_embd, model.head_dim)
    if config.chunked_ce:
        check_linear_cross_entropy(device, dtype, model.padded_vocab_size, SOFTCAP,
                                   implementation="triton" if device.type == "cuda" else "torch")


def plan(config, model):
    """The Horizon of a run of the GPTConfig `model`."""
    reference = model_config(config, model.vocab_size, schedule.REFERENCE_DEPTH)
    return schedule.plan_horizon(
        scaling_params(model), scaling_params(reference), flops_per_token(model),
        num_iterations=config.num_iterations, target_flops=config.target_flops,
        target_param_data_ratio=config.target_param_data_ratio, total_batch_size_tokens=config.total_batch_size)


def build_model(config, model, device, dtype):
    """A freshly initialised GPT of the GPTConfig `model` on `device`."""
    built = GPT(model, dtype, attention=config.attention, fused_rmsnorm=config.fused_rmsnorm,
                chunked_ce=config.chunked_ce)
    built.init_weights(config.seed)
    return built.to(device)


def build_optimizer(config, model, horizon, ranks, dtype):
    """Muon and AdamW on the model's parameters, learning rates and decay scaled by the horizon's batch."""
    groups = parameter_groups(
        model, embedding_lr=config.embedding_lr, unembedding_lr=config.unembedding_lr, matrix_lr=config.matrix_lr,
        scalar_lr=config.scalar_lr, weight_decay=config.weight_decay, batch_lr_scale=horizon.batch_lr_scale,
        decay_scale=horizon.decay_scale)
    return MuonAdamW(groups, ranks, matmul_dtype=dtype, compiled=not config.no_compile, casts=model.keep_casts())


def compile_model(config, model, optimizer):
    """The model, ready to train, compiled for its fixed shapes, or itself with --no-compile."""
    if config.fp8:
        train_in_fp8(model, optimizer, compiled=not config.no_compile)
    if config.no_compile:
        return model
    print0("compiling: up to a minute before the first step, less where the code is cached ...")
    return torch.compile(model, dynamic=False)


def warm_up(config, compiled, optimizer, micro_batches, place):
    """Compile what steps and evaluations need, on every rank, and wait for the slowest outside of collectives: one that
    has it all in its cache would run into their time limit. Changes no number."""
    if place.ranks.world_size == 1 or config.no_compile:
        return
    batch = torch.zeros(2, config.device_batch_size, config.max_seq_len, dtype=torch.int64, device=place.device)
    compiled(*batch.unbind(0)).backward()
    if micro_batches > place.ranks.world_size:
        optimizer.accumulate()
    optimizer.warm_up()
    optimizer.zero_grad()
    if config.eval_every > 0:
        compiled.eval()
        with torch.no_grad():
            compiled(*batch.unbind(0), "none")
        compiled.train()
    place.watchdog.wait_for_all("compiled")


# --- resuming --------------------------------------------------------------------------------------------------------

def identity(config, data, horizon):
    """What must be equal for a run to go on from a checkpoint: it decides the data and the updates."""
    return {"dataset_id": data.dataset.dataset_id, "tokenizer_id": data.tokenizer.tokenizer_id, "seed": config.seed,
            "total_batch_size_tokens": horizon.total_batch_size_tokens, "num_iterations": horizon.num_iterations}


def resume_step(config, folder, ranks):
    """The step of the checkpoint in `folder` that --resume-from-step asks for, or None when the run is to begin."""
    if config.resume_from_step == "auto":
        return broadcast_from_rank0(ranks, lambda: checkpoint.newest_usable_step(folder))
    return None if config.resume_from_step == "-1" else checkpoint.find_checkpoint(folder, config.resume_from_step)


def resume_meta(config, folder, step, model, data, horizon, segment):
    """(meta of the checkpoint to resume from, what changed since); (None, []) without one.

    segment: as nanochat.segments has it, of this process. Errors: UserError when the checkpoint is of another run or
    cannot be resumed, and for changes of what decides the numbers (segments.changes) without --allow-changed."""
    if step is None:
        return None, []
    meta = checkpoint.read_meta(folder, step)
    if "loader" not in (meta.get("loop_state") or {}):
        raise UserError(f"the checkpoint of step {step} in {folder} is not one of this program: evaluate it with "
                        "scripts.base_eval, but it cannot be resumed")
    if not meta.get("good", True):
        raise UserError(f"the run had diverged at step {step} in {folder}: weights or validation are not finite; "
                        "resume an earlier step, or start again with lower learning rates")
    flags = segments.part_of(meta, "user_config")
    wanted = {**identity(config, data, horizon), "crop": config.crop, **model.to_dict()}
    found = {"crop": flags.get("crop", "drop"), **meta, **meta["model_config"]}  # before there was --crop, all dropped
    other = [(name, found.get(name), value) for name, value in wanted.items() if found.get(name) != value]
    if other:
        raise UserError(f"cannot resume step {step} in {folder}, it is of another run: {segments.in_words(other)}; "
                        "give the flags of the run that made it")
    fixed = config.fixed_on_resume()
    before = {**segments.part_of(meta, "segment"), "flags": {**fixed, **flags}}  # earlier versions had none
    changed = segments.changes(before, segment, fixed)
    if changed and not config.allow_changed:
        raise UserError(f"cannot resume step {step} in {folder} and keep its numbers: {segments.in_words(changed)}; "
                        "resume as it was, or with --allow-changed")
    commits = before.get("git_commit"), segment["git_commit"]
    for line in ([f"resumed with changes: {segments.in_words(changed)}"] if changed else []) + (
            [f"the checkpoint of step {step} is of commit {commits[0]:.12}, this is {commits[1]:.12}: should they "
             "compute differently, so does the run from here on"] if all(commits) and len(set(commits)) > 1 else []):
        print0(f"warning: {line}")
    return meta, changed


def restore(model, optimizer, folder, step, meta, device, ranks):
    """Load a checkpoint's weights and this rank's share of the optimizer state, saved by any number of ranks."""
    checkpoint.load_state(model, checkpoint.load_model_state(folder, step, meta, device), folder, step)
    optimizer.write_casts()
    n_shards = checkpoint.n_optimizer_shards(meta)
    if n_shards == ranks.world_size:
        optimizer.load_state_dict(checkpoint.load_optimizer_state(folder, step, meta, device, ranks.rank))
    else:
        print0(f"the optimizer's state, saved by {n_shards} rank(s), is shared out anew over {ranks.world_size}")
        optimizer.load_shards((checkpoint.load_optimizer_state(folder, step, meta, "cpu", rank)
                               for rank in range(n_shards)), n_shards)


# --- what happens between the steps ----------------------------------------------------------------------------------

def build_hooks(config, model, compiled, optimizer, data, folder, meta, ranks, device):
    """The Hooks of a run whose checkpoints go to `folder` with `meta`. CORE and samples take the uncompiled model:
    their prompts come in many lengths."""
    def roll_back(steps):
        step = broadcast_from_rank0(ranks, lambda: checkpoint.newest_good(folder, steps))
        if step is None:
            return None
        restore(model, optimizer, folder, step, checkpoint.read_meta(folder, step), device, ranks)
        return {"step": step, "flags": meta["user_config"], **meta["segment"]}

    return Hooks(_evaluator(config, compiled, data, ranks, device),
                 Saver(folder, meta, model, optimizer, ranks, config.keep_checkpoints), roll_back,
                 core=_core_evaluator(config, model, data, ranks, device),
                 sample=(lambda: sample_documents(model, data.tokenizer, data.val[0])) if ranks.is_main else None)


def _evaluator(config, model, data, ranks, device):
    """Validation as a function of (is it the last one?): the fields of a `val` event."""
    rows = SplitRows(data.val, config.max_seq_len, config.eval_tokens, config.crop)
    token_bytes = data.tokenizer.token_bytes()

    def evaluate(last):
        result = evaluate_split(model, rows, config.device_batch_size, token_bytes, device, ranks)
        fields = result.event_fields()
        if last and config.position_losses:
            fields["position_losses"] = {"nats_by_position": result.nats_by_position,
                                         "counts_by_position": result.counts_by_position}
        return fields

    return evaluate


def _core_evaluator(config, model, data, ranks, device):
    """CORE as the fields of a `core` event, or None when it is never asked for or its bundle is not there."""
    if config.core_metric_every <= 0:
        return None
    bundle = bundle_folder()
    if not bundle.exists():
        print0(f"CORE is not evaluated: {bundle} is missing (python -m nanochat.core_eval downloads it)")
        return None

    def evaluate():
        result = evaluate_core(model, data.tokenizer, bundle, device, max_per_task=config.core_metric_max_per_task,
                               max_tokens=model.cos.size(1), rank=ranks.rank, world_size=ranks.world_size)
        return {"core_metric": result.core_metric, "tasks": result.centered}

    return evaluate
