"""What a model and its optimizer are made of, tensor by tensor: the program's own model, built without its numbers."""

from dataclasses import dataclass
from functools import cache

import torch

from nanochat.fp8 import LEAST_SIDE, SIDE_MULTIPLE
from nanochat.gpt import GPT
from nanochat.optim import SMALL_NUMEL, parameter_groups


@dataclass(frozen=True)
class MatrixStack:
    """Muon's matrices of one shape: `count` of (rows, cols)."""

    count: int
    rows: int
    cols: int

    def padded(self, world_size):
        """Matrices that travel and are kept: the optimizer adds zeros until the ranks share them evenly."""
        return -(-self.count // world_size) * world_size

    @property
    def numel(self):
        return self.rows * self.cols


@dataclass(frozen=True)
class Tensor:
    """A parameter that AdamW updates: elements, first dimension, bytes an element, whether a copy is kept of it."""

    numel: int
    first: int
    itemsize: int
    has_copy: bool

    def share(self, world_size):
        """Elements whose state a rank keeps."""
        is_sharded = self.numel >= SMALL_NUMEL and self.first % world_size == 0
        return self.numel // world_size if is_sharded else self.numel


@dataclass(frozen=True)
class ModelParts:
    """Muon's stacks, AdamW's tensors, and how many weights fp8 would quantise (without the head; the head's)."""

    stacks: tuple[MatrixStack, ...]
    tensors: tuple[Tensor, ...]
    fp8_numel: int
    head_numel: int
    buffer_bytes: int
    embedding_numel: int


@cache
def model_parts(config, dtype):
    """ModelParts of a GPTConfig in a compute dtype (torch.dtype)."""
    with torch.device("meta"):
        model = GPT(config, dtype)
    casts = model.keep_casts()
    groups = parameter_groups(model)
    matrices = [group["params"] for group in groups if group["kind"] == "muon"]
    adamw = [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    quantised = [p.numel() for params in matrices for p in params
                 if all(side >= LEAST_SIDE and side % SIDE_MULTIPLE == 0 for side in p.shape)]
    return ModelParts(
        tuple(MatrixStack(len(params), *params[0].shape) for params in matrices),
        tuple(Tensor(p.numel(), p.size(0), p.element_size(), p in casts) for p in adamw),
        sum(quantised), model.lm_head.weight.numel(), sum(b.numel() * b.element_size() for b in model.buffers()),
        sum(e.weight.numel() for e in (model.transformer.wte, *model.value_embeds.values())))
