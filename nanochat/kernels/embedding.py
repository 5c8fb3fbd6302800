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
POSITIONS = 8  # loaded at a time
TILE = 32  # positions; a hot row is a sum of tiles, so that no program sums all its positions


@jit
def _rows_sum_kernel(grad, tiles, ids, positions, starts, out, WIDTH: tl.constexpr,
                     TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                     OF_TILES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write part of a table row: the sum of grad[positions[starts[row] : starts[row + 1]]].

    The tiles of TILE positions that lie inside this range are read as sums from `tiles`, which a
    launch with OF_TILES has written: the sum of a tile if all its positions have one token, else 0.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if OF_TILES:
        start = row * TILE
        is_of_one = tl.load(ids + start) == tl.load(ids + start + TILE - 1)
        end = tl.where(is_of_one, start + TILE, start)
        first_tile, last_tile = row, row
    else:
        start, end = tl.load(starts + row), tl.load(starts + row + 1)
        first_tile = tl.cdiv(start, TILE)
        last_tile = tl.maximum(first_tile, end // TILE)
    in_tiles = (last_tile - first_tile) * TILE
    for at in range(start, end - in_tiles, ROWS):
        here = at + tl.arange(0, ROWS)[:, None]
        here = tl.where(here < first_tile * TILE, here, here + in_tiles)  # skip the tiles
        position = tl.load(positions + here, mask=here < end, other=0)
        mask = (here < end) & (column < WIDTH)
        total += tl.load(grad + position * WIDTH + column, mask=mask, other=0.0)
    if not OF_TILES:
        for at in range(first_tile, last_tile, ROWS):
            here = at + tl.arange(0, ROWS)[:, None]
            mask = (here < last_tile) & (column < WIDTH)
            total += tl.load(tiles + here * WIDTH + column, mask=mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    store_rounded(out + row * WIDTH + column, total, column < WIDTH, INTERPRETED)


def rows_sum_tiling(width):
    """Return (blocks per row, launch constants of the kernel)."""
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    return triton.cdiv(width, block), {
        "TILE": TILE, "ROWS": POSITIONS, "BLOCK": block, "num_warps": 4}


@kernel_op("nanochat::embedding_gradient")
def _embedding_gradient(grad: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor,
                        starts: torch.Tensor) -> torch.Tensor:
    grad = grad.reshape(-1, grad.size(-1)).contiguous()
    width = grad.size(1)
    blocks, constants = rows_sum_tiling(width)
    tiles = grad.new_empty(len(ids) // TILE, width, dtype=torch.float32)
    out = grad.new_empty(len(starts) - 1, width)
    for target in (tiles, out):
        if target.numel():
            wrap_triton(_rows_sum_kernel)[(len(target), blocks)](
                grad, tiles, ids, positions, starts, target, WIDTH=width,
                OF_TILES=target is tiles, INTERPRETED=runtime.INTERPRETED, **constants)
    return out


@_embedding_gradient.register_fake
def _(grad, ids, positions, starts):
    return grad.new_empty(starts.numel() - 1, grad.size(-1))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, *order):
        ctx.save_for_backward(*order)
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx, grad):
        return _embedding_gradient(grad, *ctx.saved_tensors), None, None, None, None


def by_id(ids, n_rows):
    """Return int64 (sorted ids, their positions, starts) of ids.

    Id i is at positions[starts[i] : starts[i + 1]].
    """
    in_order, positions = ids.flatten().sort(stable=True)
    rows = torch.arange(n_rows + 1, device=ids.device)
    return in_order, positions, torch.searchsorted(in_order, rows)


def lookup(ids, n_rows):
    """Return a function from a table (n_rows, d) to its rows (..., d) for ids (...).

    On a GPU the gradient is summed in fp32 and rounded to the table's dtype once.
    """
    if not (torch.is_grad_enabled() and ids.is_cuda and triton):
        return lambda table: F.embedding(ids, table)
    order = by_id(ids, n_rows)
    return lambda table: _Embedding.apply(table, ids, *order)
