"""Time of one optimizer step on GPUs: a roofline for each kind of work, an alpha-beta model of the collectives.

Kinds of work follow one another, as they do on a GPU's one stream; nothing is hidden behind anything else.

    matmul, attention, orthogonalisation    FLOPs / (peak * its share)
    elementwise, quantisation, update       bytes read and written / (memory bandwidth * its share)
    gaps                                    a constant for each layer and micro-batch
    communication                           of a collective over W ranks on several nodes that moves S bytes:
                                            S (W - 1)/W / bandwidth + (W - nodes) alpha_link + nodes alpha_network

A ring through nodes of g GPUs uses the links within, and between them g networks side by side: the slower counts.
"""

import dataclasses
from dataclasses import dataclass

from nanochat.gpt import flops_per_token, scaling_params
from nanochat.planning import gpus
from nanochat.planning.parts import model_parts
from nanochat.optim import polar_express_flops

# Bytes that compiled kernels read and write, as if no cache held any of them: the solution of the counts at depth 12,
# 8,192 and 32,768 tokens (dev/lowered_h100.csv); at depth 24 they give 175.2 GB where 175.4 were counted
BYTES_PER_LAYER_CHANNEL = 137  # a token, forward and backward
BYTES_PER_LOGIT = 6  # the loss: one read forward, a read and a write backward
BYTES_PER_EMBEDDING_ELEMENT = 5  # a micro-batch, whatever its tokens: the gradients' tables
MUON_BYTES = 38  # a matrix element that a rank updates
ADAMW_BYTES = {2: 14, 4: 30}  # an element of that many bytes
# fp8, from its code: an operand is read for its maximum (2), read (2), written (1), for dW transposed (2)
QUANTISED_BYTES = 7
QUANTISED_CHANNELS = 16  # a layer's inputs 7 widths, its outputs' gradients 9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one GPU of `world_size`, by kind of work."""

    matmul: float
    attention: float
    elementwise: float
    quantisation: float
    gaps: float
    orthogonalisation: float
    update: float
    communication: float

    @property
    def total(self):
        return sum(dataclasses.astuple(self))


def step_time(config, model, dtype, gpu, tokens, accumulation, nodes, gpus_per_node):
    """StepTime of a TrainingConfig on `nodes` x `gpus_per_node` of a Gpu; tokens: of the whole step, all ranks.

    model: its GPTConfig; dtype: the compute dtype; accumulation: micro-batches a rank.
    """
    world_size, parts, item = nodes * gpus_per_node, model_parts(model, dtype), dtype.itemsize
    here = tokens * accumulation / max(1, round(tokens / config.device_batch_size / config.max_seq_len))
    bf16 = gpu.bf16_flop_per_sec
    matmul_flops = 6 * scaling_params(model)
    in_fp8 = (6 * (parts.fp8_numel + (0 if config.chunked_ce else parts.head_numel))) if config.fp8 else 0
    matmul_sec = (matmul_flops - in_fp8) / bf16 + (in_fp8 and in_fp8 / gpu.fp8_flop_per_sec)
    channels = model.n_layer * model.n_embd
    quantised = (QUANTISED_CHANNELS * channels + (0 if config.chunked_ce else model.n_embd + model.padded_vocab_size))
    elementwise = here * (BYTES_PER_LAYER_CHANNEL * channels + BYTES_PER_LOGIT * model.padded_vocab_size)
    elementwise += accumulation * BYTES_PER_EMBEDDING_ELEMENT * parts.embedding_numel
    bandwidth = gpu.bytes_per_sec * gpus.BANDWIDTH_SHARE
    return StepTime(
        matmul=here * matmul_sec / gpus.MATMUL_SHARE,
        attention=here * (flops_per_token(model) - matmul_flops) / (bf16 * gpus.ATTENTION_SHARE),
        elementwise=elementwise / bandwidth,
        quantisation=here * QUANTISED_BYTES * quantised / bandwidth if config.fp8 else 0.0,
        gaps=accumulation * model.n_layer * gpus.GAP_SEC,
        orthogonalisation=sum(stack.padded(world_size) // world_size * polar_express_flops(stack.rows, stack.cols)
                              for stack in parts.stacks) / (bf16 * gpus.POLAR_SHARE),
        update=_update_bytes(parts, item, accumulation, world_size) / bandwidth,
        communication=sum(collective_sec(gpu, size, nodes, gpus_per_node)
                          for size in collective_bytes(parts, item, accumulation, world_size)))


def _update_bytes(parts, item, accumulation, world_size):
    """Of the optimizer on one rank, and of adding up the gradients of several micro-batches."""
    gradient_item = 4 if accumulation > 1 else item
    moved = 0
    for stack in parts.stacks:
        padded = stack.padded(world_size)
        moved += stack.numel * (MUON_BYTES * padded // world_size + 2 * gradient_item * padded)  # the stack is a copy
        if accumulation > 1:
            moved += accumulation * stack.numel * stack.count * (item + 8)
    for tensor in parts.tensors:
        moved += ADAMW_BYTES[tensor.itemsize] * tensor.share(world_size)
        if accumulation > 1:
            moved += accumulation * tensor.numel * (item + 8 if tensor.has_copy else 3 * tensor.itemsize)
    return moved


def collective_bytes(parts, item, accumulation, world_size):
    """Bytes of each collective of one step: gradients reduced and scattered, then what the model uses gathered."""
    if world_size == 1:
        return []
    gradient_item = 4 if accumulation > 1 else item
    sizes = []
    for stack in parts.stacks:
        elements = stack.padded(world_size) * stack.numel
        sizes += [elements * gradient_item, elements * item]
    for tensor in parts.tensors:
        if tensor.share(world_size) < tensor.numel:
            sizes += [tensor.numel * (gradient_item if tensor.has_copy else tensor.itemsize),
                      tensor.numel * (item if tensor.has_copy else tensor.itemsize)]
    replicated = sum(tensor.numel for tensor in parts.tensors if tensor.share(world_size) == tensor.numel)
    return [*sizes, 2 * 4 * replicated]  # an all-reduce moves its bytes twice; the loss's is as small


def collective_sec(gpu, size_bytes, nodes, gpus_per_node):
    """Seconds of one collective over all ranks that moves `size_bytes` in total."""
    world_size = nodes * gpus_per_node
    bandwidths = ([gpu.link_bytes_per_sec] if gpus_per_node > 1 else []) + (
        [gpus_per_node * gpu.network_bytes_per_sec] if nodes > 1 else [])
    alpha = (world_size - nodes) * gpus.LINK_ALPHA_SEC + (nodes if nodes > 1 else 0) * gpus.NETWORK_ALPHA_SEC
    return size_bytes * (world_size - 1) / world_size / (min(bandwidths) * gpus.LINK_SHARE) + alpha
