"""Memory of one rank in training, by part: counted where it is the program's own tensors, else by what its compiled
graphs keep. Bytes everywhere."""

from dataclasses import dataclass

from nanochat.attention import BLOCK_QUERIES, choose_backend
from nanochat.kernels.linear_cross_entropy import default_chunk_bytes
from nanochat.planning.parts import model_parts

# Activations that a compiled graph keeps from the forward pass to the backward one, in elements a token: read from the
# graphs of two and four layers, in bf16.
KEPT_PER_LAYER = 18.5  # times the width: q, k, v before and after rotary and norm, the MLP's two, the residual's
KEPT_OUTSIDE = 3  # times the width: around the layers
KEPT_FP32_PER_LAYER = 8  # bytes a token: the norms' scales; and as much again for each head


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Weights, copies and state stay; activations, logits and gradients come and go in a step."""

    weights: int  # fp32, embeddings in the compute dtype
    copies: int  # of the weights, in the compute dtype and in fp8
    optimizer_state: int  # this rank's share
    gradients: int  # of the whole step
    micro_batch_gradients: int  # beside them, where a step has several micro-batches
    embedding_sums: int  # of the embeddings' gradients, in fp32, at a backward pass's end; none on a GPU
    activations: int
    logits: int
    update: int  # what the optimizer needs beside the gradients

    @property
    def peak(self):
        """The most that is held at a time: in the backward pass or in the update."""
        whole_step, own = (self.gradients, self.micro_batch_gradients) if self.micro_batch_gradients else (
            0, self.gradients)
        backward = whole_step + max(self.activations + self.logits, own + self.embedding_sums)
        return self.weights + self.copies + self.optimizer_state + max(backward, self.gradients + self.update)


def memory_of(config, model, dtype, device, accumulation, world_size):
    """Memory of a rank of a run: a TrainingConfig, its GPTConfig, compute dtype, torch.device, micro-batches a step."""
    parts, item = model_parts(model, dtype), dtype.itemsize
    tokens = config.device_batch_size * config.max_seq_len
    has_copies = item < 4
    gradient_item = 4 if accumulation > 1 else item  # of what has a copy
    matrices = sum(stack.padded(world_size) * stack.numel for stack in parts.stacks)
    copied = [tensor for tensor in parts.tensors if tensor.has_copy]
    plain = sum(tensor.numel * tensor.itemsize for tensor in parts.tensors if not tensor.has_copy)
    with_copy = matrices + sum(tensor.numel for tensor in copied)
    quantised = (parts.fp8_numel + (0 if config.chunked_ce else parts.head_numel)) if config.fp8 else 0
    gradients = with_copy * gradient_item + plain
    return Memory(
        weights=4 * matrices + sum(tensor.numel * tensor.itemsize for tensor in parts.tensors) + parts.buffer_bytes,
        copies=with_copy * item * has_copies + 2 * quantised,  # fp8: in two layouts
        optimizer_state=4 * matrices // world_size + sum(
            2 * tensor.share(world_size) * tensor.itemsize for tensor in parts.tensors),
        gradients=gradients,
        micro_batch_gradients=with_copy * item + plain if accumulation > 1 else 0,
        embedding_sums=4 * parts.embedding_numel * (has_copies and device.type != "cuda"),  # kernels.embedding: none
        activations=tokens * _kept_bytes_per_token(config, model, dtype, device),
        logits=_logits_bytes(config, model, dtype, device, tokens),
        update=_update_bytes(parts, gradient_item, item, matrices, world_size))


def _kept_bytes_per_token(config, model, dtype, device):
    item = dtype.itemsize
    kept = (KEPT_PER_LAYER * model.n_layer + KEPT_OUTSIDE) * model.n_embd * item
    kept += (KEPT_FP32_PER_LAYER * (1 + model.n_head)) * model.n_layer
    heads = model.n_head, model.n_kv_head, model.head_dim
    for window in model.windows:
        backend = config.attention
        if backend == "auto" and device.type == "cpu":  # no GPU chooses what keeps scores
            backend, _ = choose_backend(device, dtype, heads, model.sequence_len, window)
        if backend == "blockwise":  # keeps the scores in fp32 and the probabilities: of a query, its block's keys
            seen = min(window + BLOCK_QUERIES, (model.sequence_len + BLOCK_QUERIES) // 2)
            kept += seen * model.n_head * (4 + item)
    return round(kept)


def _logits_bytes(config, model, dtype, device, tokens):
    """The loss's (tokens, vocabulary), kept for the backward pass. There a GPU's compiler writes the gradient in their
    place (dev.lowering finds no such buffer), a CPU's beside them (measured)."""
    whole = tokens * model.padded_vocab_size * dtype.itemsize
    if not config.chunked_ce:
        return whole if device.type == "cuda" else 2 * whole
    head_gradient = model.padded_vocab_size * model.n_embd * 4
    return min(whole, default_chunk_bytes(device, dtype)) + head_gradient + tokens * model.n_embd * dtype.itemsize


def _update_bytes(parts, gradient_item, item, matrices, world_size):
    """All stacks of gradients at once, a rank's share of them, and the orthogonalisation of the largest stack's."""
    share = 0 if world_size == 1 else matrices // world_size
    largest = max(stack.padded(world_size) // world_size * stack.numel for stack in parts.stacks)
    return (matrices + share) * gradient_item + 3 * largest * item
