"""The plan of a run before it starts: memory and time from the flags of base_train.

Memory is counted from the program's tensors, plus the activations that its compiled graphs keep.
Time is a roofline per kind of work plus an alpha-beta model of the collectives of one node; nothing
overlaps. dev/plan_records.csv compares the plan with published records.
"""

import dataclasses
import math
from functools import cache
from typing import NamedTuple

import torch

from nanochat import schedule
from nanochat.attention import BLOCK_QUERIES, choose_backend
from nanochat.common import UserError
from nanochat.config import model_config, run_horizon
from nanochat.device import memory_bytes
from nanochat.gpt import GPT, flops_per_token, parameter_counts, scaling_params
from nanochat.kernels.linear_cross_entropy import default_chunk_bytes
from nanochat.optim import SMALL_NUMEL, parameter_groups, polar_express_flops


class Gpu(NamedTuple):
    """Datasheet of one GPU: dense FLOP/s; links in one direction, per GPU."""

    name: str
    bf16_flop_per_sec: float
    fp8_flop_per_sec: float | None  # None: no fp8
    memory_bytes: float
    memory_bytes_per_sec: float
    link_bytes_per_sec: float = 32e9  # PCIe 4.0 x16


GPUS = {
    "a100": Gpu("A100", 312e12, None, 80e9, 2.04e12, 300e9),  # SXM 80 GB, NVLink 3
    "h100": Gpu("H100", 989e12, 1979e12, 80e9, 3.35e12, 450e9),  # SXM, NVLink 4
    "h200": Gpu("H200", 989e12, 1979e12, 141e9, 4.8e12, 450e9),  # SXM, NVLink 4
    "b200": Gpu("B200", 2250e12, 4500e12, 180e9, 8.0e12, 900e9),  # SXM, NVLink 5
}

# Shares of the peaks that a training step reaches. They were estimated for an H100 before the plan
# was compared with any record, are used for all GPUs, and are fitted to none of the records.
MATMUL_SHARE = 0.66  # of the peak of the matmul's dtype: 574 TFLOP in 880 ms
ATTENTION_SHARE = 0.47  # of bf16's peak, T keys per query in full layers: 51.9 TFLOP in 112 ms
POLAR_SHARE = 0.50  # of bf16's peak, in Muon's orthogonalisation: 1.63 TFLOP in 3.3 ms
BANDWIDTH_SHARE = 0.81  # of the memory's bandwidth: 16.8 GB in 6.2 ms
LINK_SHARE = 0.82  # of the links: 370 of 450 GB/s
USABLE_SHARE = 0.90  # of the memory; the assumed rest is for CUDA, NCCL's buffers and fragments

GAP_SEC = 2e-3 / 12  # between kernels, per layer and micro-batch: 2 ms at depth 12
LINK_ALPHA_SEC = 3.4e-6  # per hop of a ring, from NCCL's tuning table

# Activations that a compiled graph keeps for its backward pass, counted at 2 and 4 layers.
KEPT_PER_LAYER = 18.5  # elements per token and channel: q, k, v, the MLP's two, the residual's
KEPT_RECOMPUTED = 12.5  # the same where memory is short: elementwise results are recomputed
KEPT_OUTSIDE = 3  # elements per token and channel, around the layers
KEPT_FP32_PER_LAYER = 8  # bytes per token and norm: one norm per layer and one per head

# Bytes that compiled kernels move, without any cache: counted at depth 12 (dev/lowered_h100.csv);
# at depth 24 they give 175.2 GB where 175.4 GB were counted.
BYTES_PER_LAYER_CHANNEL = 125  # per token, forward and backward
BYTES_RECOMPUTED = 12  # more, if elementwise results are recomputed
BYTES_PER_LOGIT = 6  # loss: one read in the forward pass, a read and a write in the backward pass
BYTES_PER_EMBEDDING_ELEMENT = 5  # per micro-batch: the gradients of the tables
MUON_BYTES = 38  # per matrix element that a rank updates
ADAMW_BYTES = {2: 14, 4: 30}  # per element of that many bytes
QUANTISED_BYTES = 7  # per fp8 operand element: read twice, written, and transposed for dW
QUANTISED_CHANNELS = 16  # per layer and channel: 7 widths of inputs, 9 of output gradients


class Part(NamedTuple):
    """An AdamW parameter, or Muon's matrices of one shape, padded to a multiple of the ranks."""

    numel: int
    padded_numel: int
    share: int  # elements whose optimizer state one rank keeps
    itemsize: int
    compute_itemsize: int  # of the copy in the compute dtype, if there is one
    matrix: tuple[int, int] | None  # shape of Muon's matrices

    def gradient_itemsize(self, accumulation):
        """Return the bytes per element: several micro-batches are summed in the master's dtype."""
        return self.itemsize if accumulation > 1 else self.compute_itemsize


@cache
def model_parts(shape, dtype, world_size):
    """Return (Parts of a GPTConfig's model, bytes of its buffers), without making its values."""
    with torch.device("meta"):
        model = GPT(shape, dtype)
    copies, parts = model.keep_casts(), []
    for group in parameter_groups(model):
        is_muon, params = group["kind"] == "muon", group["params"]
        for stack in [params] if is_muon else [[p] for p in params]:
            p, numel = stack[0], len(stack) * stack[0].numel()
            padded = numel
            if is_muon:
                padded = math.ceil(len(stack) / world_size) * world_size * p.numel()
            is_sharded = is_muon or (numel >= SMALL_NUMEL and p.size(0) % world_size == 0)
            parts.append(Part(
                numel, padded, padded // world_size if is_sharded else numel, p.itemsize,
                dtype.itemsize if p in copies else p.itemsize,
                tuple(p.shape) if is_muon else None))
    return parts, sum(buffer.nbytes for buffer in model.buffers())


def _fp8_numel(config, counts):
    """Return the number of weights that --fp8 quantises; the gates, which it leaves, are tiny."""
    if not config.fp8:
        return 0
    return counts["transformer_matrices"] + (0 if config.chunked_ce else counts["lm_head"])


# --- memory ---------------------------------------------------------------------------------------

def memory_of(config, model, dtype, device, accumulation, world_size, recompute=False):
    """Return ({part: bytes}, peak) of one rank that runs `accumulation` micro-batches per step.

    recompute: the compiled backward pass recomputes elementwise results.
    """
    parts, buffer_bytes = model_parts(model, dtype, world_size)
    counts, muon = parameter_counts(model), [part for part in parts if part.matrix]
    copied = [part for part in parts if part.compute_itemsize < part.itemsize]

    gradients = sum(p.padded_numel * p.gradient_itemsize(accumulation) for p in parts)
    micro_batch = sum(p.padded_numel * p.compute_itemsize for p in parts)
    summed = gradients if accumulation > 1 else 0
    if copied and device.type != "cuda":  # gradients of embeddings are summed in fp32
        micro_batch += 4 * (counts["wte"] + counts["value_embeds"])
    stacks = sum((p.padded_numel + (p.share if world_size > 1 else 0))
                 * p.gradient_itemsize(accumulation) for p in muon)
    memory = {
        "weights": sum(p.padded_numel * p.itemsize for p in parts) + buffer_bytes,
        "copies": sum(p.padded_numel * p.compute_itemsize for p in copied)
        + 2 * _fp8_numel(config, counts),  # fp8: two layouts
        "optimizer state": sum(p.share * (4 if p.matrix else 2 * p.itemsize) for p in parts),
        "gradients": summed + micro_batch,
        "activations": _activation_bytes(config, model, dtype, device, recompute),
        "logits": _logits_bytes(config, model, dtype, device),
        "update": stacks + 3 * max(p.share for p in muon) * dtype.itemsize,
    }
    kept = memory["weights"] + memory["copies"] + memory["optimizer state"]
    backward = summed + max(memory["activations"] + memory["logits"], micro_batch)
    return memory, kept + max(backward, gradients + memory["update"])


def _activation_bytes(config, model, dtype, device, recompute):
    kept = KEPT_RECOMPUTED if recompute else KEPT_PER_LAYER
    per_token = (kept * model.n_layer + KEPT_OUTSIDE) * model.n_embd * dtype.itemsize
    per_token += KEPT_FP32_PER_LAYER * (1 + model.n_head) * model.n_layer
    heads = model.n_head, model.n_kv_head, model.head_dim
    for window in model.windows:
        backend = config.attention
        if backend == "auto" and device.type == "cpu":
            backend = choose_backend(
                device, dtype, heads, model.sequence_len, window)
        if backend == "blockwise":  # keeps the scores in fp32 and the probabilities
            keys = min(window + BLOCK_QUERIES, (model.sequence_len + BLOCK_QUERIES) // 2)
            per_token += keys * model.n_head * (4 + dtype.itemsize)
    return round(config.device_batch_size * config.max_seq_len * per_token)


def _logits_bytes(config, model, dtype, device):
    """Return the bytes of the logits and of their gradient, which a GPU writes in place of them."""
    tokens = config.device_batch_size * config.max_seq_len
    logits = tokens * model.padded_vocab_size * dtype.itemsize
    if not config.chunked_ce:
        return logits if device.type == "cuda" else 2 * logits
    gradients = model.padded_vocab_size * model.n_embd * 4 + tokens * model.n_embd * dtype.itemsize
    return min(logits, default_chunk_bytes(device, dtype)) + gradients


def memory_within(n_bytes, config, *run):
    """Return (recompute, memory, peak): memory_of, recomputing only if the rest needs too much."""
    for recompute in (False, True):
        memory, peak = memory_of(config, *run, recompute)
        if config.no_compile or peak <= USABLE_SHARE * n_bytes:
            break
    return recompute, memory, peak


# --- time -----------------------------------------------------------------------------------------

def step_time(config, model, dtype, gpu, step_tokens, accumulation, world_size, recompute=False):
    """Return {kind of work: seconds per step} of `world_size` GPUs in one node.

    step_tokens: of all ranks. accumulation: micro-batches of the rank that has the most.
    """
    parts, _ = model_parts(model, dtype, world_size)
    micro_batches = max(1, round(step_tokens / config.device_batch_size / config.max_seq_len))
    tokens = step_tokens * accumulation / micro_batches
    bandwidth = gpu.memory_bytes_per_sec * BANDWIDTH_SHARE
    channels, counts = model.n_layer * model.n_embd, parameter_counts(model)

    matmul_flops, fp8_flops = 6 * scaling_params(model), 6 * _fp8_numel(config, counts)
    matmul_sec, quantised = (matmul_flops - fp8_flops) / gpu.bf16_flop_per_sec, 0
    if config.fp8:
        matmul_sec += fp8_flops / gpu.fp8_flop_per_sec
        head = 0 if config.chunked_ce else model.n_embd + model.padded_vocab_size
        quantised = QUANTISED_CHANNELS * channels + head
    attention_flops = flops_per_token(model) - matmul_flops
    polar_flops = sum(p.share // math.prod(p.matrix) * polar_express_flops(*p.matrix)
                      for p in parts if p.matrix)
    moved = BYTES_PER_LAYER_CHANNEL * channels + BYTES_PER_LOGIT * model.padded_vocab_size
    moved += BYTES_RECOMPUTED * channels if recompute else 0
    embedding_bytes = BYTES_PER_EMBEDDING_ELEMENT * (counts["wte"] + counts["value_embeds"])
    return {
        "matmul": tokens * matmul_sec / MATMUL_SHARE,
        "attention": tokens * attention_flops / (gpu.bf16_flop_per_sec * ATTENTION_SHARE),
        "elementwise": (tokens * moved + accumulation * embedding_bytes) / bandwidth,
        "quantisation": tokens * QUANTISED_BYTES * quantised / bandwidth,
        "gaps": accumulation * model.n_layer * GAP_SEC,
        "orthogonalisation": polar_flops / (gpu.bf16_flop_per_sec * POLAR_SHARE),
        "update": sum(_update_bytes(part, accumulation) for part in parts) / bandwidth,
        "communication": communication_sec(gpu, parts, accumulation, world_size),
    }


def _update_bytes(part, accumulation):
    """Return the bytes that a rank moves to sum a part's gradients and to update its share."""
    moved = (MUON_BYTES if part.matrix else ADAMW_BYTES[part.itemsize]) * part.share
    if part.matrix:  # the gradients are copied into a stack
        moved += 2 * part.gradient_itemsize(accumulation) * part.padded_numel
    if accumulation > 1:
        moved += accumulation * part.numel * (part.compute_itemsize + 2 * part.itemsize)
    return moved


def communication_sec(gpu, parts, accumulation, world_size):
    """Return the seconds of a step's collectives: bytes over the links, and a latency per hop.

    Gradients are scattered and weights gathered; small parameters are reduced on all ranks.
    """
    sizes, replicated = [], 0
    for part in parts:
        if part.share < part.padded_numel:
            sizes.append(part.padded_numel * part.gradient_itemsize(accumulation))
            sizes.append(part.padded_numel * part.compute_itemsize)
        else:
            replicated += part.numel
    sizes.append(2 * 4 * replicated)  # an all-reduce moves its bytes twice
    links_sec = sum(sizes) * (1 - 1 / world_size) / (gpu.link_bytes_per_sec * LINK_SHARE)
    return links_sec + len(sizes) * (world_size - 1) * LINK_ALPHA_SEC


# --- estimates ------------------------------------------------------------------------------------

class Estimate:
    """Requirements of a run in bf16: bytes per rank and seconds per step, both by part.

    Raise UserError for sizes that do not divide, and for fp8 on a GPU that has none.
    """

    def __init__(self, config, vocab_size, gpu, n_gpus=8):
        if n_gpus < 1:
            raise UserError(f"--gpus {n_gpus} must be at least 1")
        if config.fp8 and gpu.fp8_flop_per_sec is None:
            raise UserError(f"--fp8: the {gpu.name} has no fp8; leave the flag out")
        self.gpu, self.n_gpus, self.device_batch_size = gpu, n_gpus, config.device_batch_size
        self.model = model_config(config, vocab_size)
        self.horizon = run_horizon(config, self.model)
        tokens, dtype = self.horizon.total_batch_size_tokens, torch.bfloat16
        accumulation = math.ceil(schedule.count_micro_batches(
            tokens, config.device_batch_size, config.max_seq_len, n_gpus) / n_gpus)
        self.recompute, self.memory, self.peak_bytes = memory_within(
            gpu.memory_bytes, config, self.model, dtype, torch.device("cuda"), accumulation, n_gpus)
        self.fits = self.peak_bytes <= USABLE_SHARE * gpu.memory_bytes
        self.time = step_time(
            config, self.model, dtype, gpu, tokens, accumulation, n_gpus, self.recompute)
        self.step_sec = sum(self.time.values())
        # of all steps, without evaluation, checkpoints and compilation
        self.train_hours = self.step_sec * self.horizon.num_iterations / 3600

    def describe(self, price_per_gpu_hour=0.0):
        """Return lines: memory and step time by part; horizon, hours and cost."""
        horizon, gpu_hours = self.horizon, self.train_hours * self.n_gpus
        usable = in_gb(USABLE_SHARE * self.gpu.memory_bytes)
        kinds = (f"{kind} {1e3 * seconds:.0f}" for kind, seconds in self.time.items() if seconds)
        cost = f", cost {price_per_gpu_hour * gpu_hours:,.2f}" if price_per_gpu_hour else ""
        return [
            f"memory per GPU: {in_gb(self.peak_bytes)} with --device-batch-size "
            f"{self.device_batch_size}; {usable} of {in_gb(self.gpu.memory_bytes)} are usable: "
            f"{'fits' if self.fits else 'DOES NOT FIT'}",
            f"  {memory_in_words(self.memory, self.recompute)}",
            f"step on {self.n_gpus} x {self.gpu.name}: {1e3 * self.step_sec:.0f} ms, "
            f"{horizon.total_batch_size_tokens / self.step_sec:,.0f} tokens per second",
            f"  {', '.join(kinds)}",
            f"training: {horizon.num_iterations} steps, {horizon.target_tokens / 1e9:.3f}B tokens, "
            f"{self.train_hours:.2f} hours, {gpu_hours:,.1f} GPU hours{cost}"]


def largest_fitting(config, vocab_size, gpu, n_gpus=8):
    """Return the Estimate at the largest device batch size, a power of two, that fits and divides.

    Raise UserError as Estimate does, and when not even one row per GPU fits.
    """
    for rows in (256, 128, 64, 32, 16, 8, 4, 2, 1):
        sized = dataclasses.replace(config, device_batch_size=rows)
        try:
            found = Estimate(sized, vocab_size, gpu, n_gpus)
        except UserError:
            if rows == 1:
                raise
            continue
        if found.fits:
            return found
    raise UserError(f"one row needs {in_gb(found.peak_bytes)}, and "
                    f"{in_gb(USABLE_SHARE * gpu.memory_bytes)} of a {gpu.name} are usable; lower "
                    "--depth or --max-seq-len")


def at_start(config, shape, micro_batches, world_size, device, dtype):
    """Return (base_train's line about memory, whether the backward pass must recompute).

    shape: the run's GPTConfig. micro_batches: of all ranks, per step.
    """
    recompute, memory, peak = memory_within(
        memory_bytes(device), config, shape, dtype, device,
        math.ceil(micro_batches / world_size), world_size)
    bound = "at least " if config.no_compile else ""
    words = memory_in_words(memory, recompute)
    return f"plan: memory {bound}{in_gb(peak)} per rank: {words}", recompute


def memory_in_words(memory, recompute):
    parts = ", ".join(f"{part} {in_gb(n_bytes)}" for part, n_bytes in memory.items())
    note = "; memory is short: elementwise results are recomputed in the backward pass"
    return parts + (note if recompute else "")


def in_gb(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
