"""Rotary embedding followed by RMSNorm without weight (QK-norm) in one kernel, in fp32.

The backward pass recomputes the scale of a row from the saved input.
"""

from __future__ import annotations

import torch

from nanochat.kernels import runtime
from nanochat.kernels.runtime import jit, kernel_op, store_rounded, tl, triton, wrap_triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
QK_SCALE = 1.2  # of the model
NORM_EPS = torch.finfo(torch.float32).eps  # the default of F.rms_norm


@jit
def _rope_norm_kernel(x, grad, cos, sin, out, stride_token, stride_head, stride_grad_token,
                      stride_grad_head, n_rows, n_positions, HEADS: tl.constexpr,
                      HALF: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
                      ROWS: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
                      INTERPRETED: tl.constexpr):
    """A row is one head of one token. Rotation keeps the norm, so the scale comes from x itself."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < n_rows) & (column < HALF)
    token, head = (row // HEADS).to(tl.int64), row % HEADS  # 64-bit division would be slow
    angle = (row // HEADS % n_positions) * HALF + column
    c = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    first = x + token * stride_token + head * stride_head + column
    x1 = tl.load(first, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
    mean_square = tl.sum(x1 * x1 + x2 * x2, axis=1, keep_dims=True) / (2 * HALF)
    rstd = tl.rsqrt(mean_square + EPS)
    if BACKWARD:
        first = grad + token * stride_grad_token + head * stride_grad_head + column
        g1 = SCALE * tl.load(first, mask=mask, other=0.0).to(tl.float32)
        g2 = SCALE * tl.load(first + HALF, mask=mask, other=0.0).to(tl.float32)
        back1, back2 = g1 * c - g2 * s, g1 * s + g2 * c  # the transposed rotation
        unit1, unit2 = x1 * rstd, x2 * rstd
        dot = tl.sum(back1 * unit1 + back2 * unit2, axis=1, keep_dims=True) / (2 * HALF)
        y1, y2 = rstd * (back1 - unit1 * dot), rstd * (back2 - unit2 * dot)
    else:
        factor = SCALE * rstd
        y1, y2 = factor * (x1 * c + x2 * s), factor * (x2 * c - x1 * s)
    result = out + row.to(tl.int64) * (2 * HALF) + column
    store_rounded(result, y1, mask, INTERPRETED)
    store_rounded(result + HALF, y2, mask, INTERPRETED)


def tiling(n_rows, half):
    """Return (number of programs, launch constants) for rows of two halves of a head."""
    block = triton.next_power_of_2(half)
    rows = min(max(1, runtime.TILE_ELEMENTS // block), triton.next_power_of_2(n_rows))
    num_warps = 8 if rows * block >= 4096 else 4
    return triton.cdiv(n_rows, rows), {"ROWS": rows, "BLOCK": block, "num_warps": num_warps}


def _launch(x, grad, cos, sin):
    _, n_positions, n_heads, head_dim = x.shape
    half = head_dim // 2
    assert cos.shape == sin.shape == (1, n_positions, 1, half), "angles do not fit the input"
    heads = _heads(x)
    grads = heads if grad is None else _heads(grad)
    n_rows = heads.size(0) * n_heads
    assert n_rows < 2**31, "row numbers are 32-bit"
    out = x.new_empty(x.shape)
    n_programs, tile = tiling(n_rows, half)
    wrap_triton(_rope_norm_kernel)[(n_programs,)](
        heads, grads, cos.contiguous(), sin.contiguous(), out, *heads.stride()[:2],
        *grads.stride()[:2], n_rows, n_positions, HEADS=n_heads, HALF=half, SCALE=QK_SCALE,
        EPS=NORM_EPS, BACKWARD=grad is not None, INTERPRETED=runtime.INTERPRETED, **tile)
    return out


def _heads(x):
    """Return x as (tokens, heads, head_dim), without a copy where possible."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


@kernel_op("nanochat::rope_norm")
def _rope_norm(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return _launch(x, None, cos, sin)


@kernel_op("nanochat::rope_norm_backward")
def _rope_norm_backward(grad: torch.Tensor, x: torch.Tensor, cos: torch.Tensor,
                        sin: torch.Tensor) -> torch.Tensor:
    return _launch(x, grad, cos, sin)


for _op in (_rope_norm, _rope_norm_backward):
    _op.register_fake(lambda x, *others: x.new_empty(x.shape))
_rope_norm.register_autograd(
    lambda ctx, grad: (_rope_norm_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def rope_qk_norm(q, k, cos, sin):
    """Apply rotary embedding, RMSNorm and QK_SCALE to q (B, T, H, D) and k (B, T, Hkv, D).

    cos, sin (1, T, 1, D/2) are constants. q and k may be views of one packed tensor.
    """
    return _rope_norm(q, cos, sin), _rope_norm(k, cos, sin)


def check_rms_norm(device, dtype):
    """Raise UserError if this kernel cannot run; call it before building a model."""
    runtime.require_kernels("--fused-rmsnorm", device)
    runtime.require_dtype("--fused-rmsnorm", dtype, DTYPES)
