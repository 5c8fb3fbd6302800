"""Embedding lookup whose gradient is written once, in its own dtype, in the same order every time.

A compiler makes of that gradient a table of zeros in fp32, atomic additions, and a pass that casts the table: several
times the bytes, in an order that differs from run to run. Here positions are sorted by token once, for all tables that
are looked up by the same tokens, and each row of a table sums its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanochat.kernels.runtime import INTERPRETED, jit, kernel_op, store_rounded, tl, triton, wrap_triton

MAX_BLOCK = 256  # columns a program
POSITIONS = 8  # whose gradients it loads at a time: most tokens have fewer, the commonest some hundreds


@jit
def _rows_sum_kernel(grad, positions, starts, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                     INTERPRETED: tl.constexpr):
    """Part of one row of the table: the sum of grad's rows positions[starts[row] : starts[row + 1]]."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.load(starts + row + 1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(tl.load(starts + row), end, ROWS):
        here = start + tl.arange(0, ROWS)[:, None]
        position = tl.load(positions + here, mask=here < end, other=0)
        total += tl.load(grad + position * WIDTH + column, mask=(here < end) & (column < WIDTH), other=0.0)
    store_rounded(out + row * WIDTH + column, tl.sum(total, axis=0, keep_dims=True), column < WIDTH, INTERPRETED)


def rows_sum_tiling(width):
    """Blocks of a row, and the kernel's tile."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return triton.cdiv(width, block), {"ROWS": POSITIONS, "BLOCK": block, "num_warps": 4}


@kernel_op("nanochat::embedding_gradient")
def _embedding_gradient(grad: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    grad = grad.reshape(-1, grad.size(-1)).contiguous()
    n_rows, width = starts.numel() - 1, grad.size(1)
    out = grad.new_empty(n_rows, width)
    if out.numel():
        blocks, tile = rows_sum_tiling(width)
        wrap_triton(_rows_sum_kernel)[(n_rows, blocks)](grad, positions, starts, out, WIDTH=width,
                                                        INTERPRETED=INTERPRETED, **tile)
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
    """(positions, starts): the positions (N,) of ids, those of equal ids side by side and in order, and where those of
    each of n_rows ids begin among them (n_rows + 1,); both int64."""
    in_order, positions = ids.flatten().sort(stable=True)
    return positions, torch.searchsorted(in_order, torch.arange(n_rows + 1, device=ids.device))


def lookup(ids, n_rows):
    """A function that gives the rows (..., d) for ids (...) of any table (n_rows, d), in its dtype.

    On a GPU the gradient is summed in fp32 and rounded to the table's dtype once.
    """
    if not (torch.is_grad_enabled() and ids.is_cuda and triton):
        return lambda table: F.embedding(ids, table)
    order = by_id(ids, n_rows)
    return lambda table: _Embedding.apply(table, ids, *order)
