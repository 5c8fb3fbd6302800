"""Embedding lookup whose gradient is written once, in the table's dtype and in a fixed order.

The compiler's gradient would add atomically, in varying order, to an fp32 table. Here positions are
sorted by token once for all tables, and each row of a table sums its own positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanochat.kernels import runtime
from nanochat.kernels.runtime import jit, kernel_op, store_rounded, tl, triton, wrap_triton

MAX_BLOCK = 256  # columns per program
POSITIONS = 8  # loaded at a time; most tokens occur less often, the commonest hundreds of times


@jit
def _rows_sum_kernel(grad, positions, starts, out, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write part of a table row: the sum of grad[positions[starts[row] : starts[row + 1]]]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.load(starts + row + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.load(starts + row), end, ROWS):
        here = start + tl.arange(0, ROWS)[:, None]
        position = tl.load(positions + here, mask=here < end, other=0)
        mask = (here < end) & (column < WIDTH)
        total += tl.load(grad + position * WIDTH + column, mask=mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    store_rounded(out + row * WIDTH + column, total, column < WIDTH, INTERPRETED)


def rows_sum_tiling(width):
    """Return (blocks per row, launch constants of the kernel)."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return triton.cdiv(width, block), {"ROWS": POSITIONS, "BLOCK": block, "num_warps": 4}


@kernel_op("nanochat::embedding_gradient")
def _embedding_gradient(grad: torch.Tensor, positions: torch.Tensor,
                        starts: torch.Tensor) -> torch.Tensor:
    grad = grad.reshape(-1, grad.size(-1)).contiguous()
    n_rows, width = starts.numel() - 1, grad.size(1)
    out = grad.new_empty(n_rows, width)
    if out.numel():
        blocks, tile = rows_sum_tiling(width)
        wrap_triton(_rows_sum_kernel)[(n_rows, blocks)](
            grad, positions, starts, out, WIDTH=width, INTERPRETED=runtime.INTERPRETED, **tile)
    return out


@_embedding_gradient.register_fake
def _(grad, positions, starts):
    return grad.new_empty(starts.numel() - 1, grad.size(-1))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, positions, starts):
        ctx.save_for_backward(positions, starts)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, grad):
        return _embedding_gradient(grad, *ctx.saved_tensors), None, None, None


def by_id(ids, n_rows):
    """Return int64 (positions, starts): id i is at positions[starts[i] : starts[i + 1]] of ids."""
    in_order, positions = ids.flatten().sort(stable=True)
    return positions, torch.searchsorted(in_order, torch.arange(n_rows + 1, device=ids.device))


def lookup(ids, n_rows):
    """Return a function from a table (n_rows, d) to its rows (..., d) for ids (...).

    On a GPU the gradient is summed in fp32 and rounded to the table's dtype once.
    """
    if not (torch.is_grad_enabled() and ids.is_cuda and triton):
        return lambda table: F.embedding(ids, table)
    order = by_id(ids, n_rows)
    return lambda table: _Embedding.apply(table, ids, *order)
