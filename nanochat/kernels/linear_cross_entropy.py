"""Cross-entropy of softcapped logits straight from hidden states, a chunk of rows at a time.

The (N, V) logits never exist as a whole: each chunk's logits are turned into their own gradient in
place and multiplied into dx and dW at once, in the forward pass (Liger, arXiv:2410.10989, and CCE,
arXiv:2411.09009, do the same). With z = cap * tanh(a / cap), |z| <= cap bounds exp(z), so no running
maximum is needed. Order: kernels, chunk loop, ops, public functions.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from nanochat.common import UserError
from nanochat.kernels.runtime import (
    INTERPRETED,
    TILE_ELEMENTS,
    jit,
    require_dtype,
    require_kernels,
    store_rounded,
    tl,
    triton,
)

DTYPES = (torch.bfloat16, torch.float32)
IGNORED = -1
SOFTCAP = 15.0  # the model's
MAX_SOFTCAP = 40.0  # exp(-80), the least that the torch forms sum, is a normal fp32
_LOG2_E = math.log2(math.e)
_SCRATCH_ELEMENTS = {"cpu": 1 << 20, "gpu": 1 << 26}  # of each of the torch form's two fp32 scratch arrays
_PRODUCT_ROWS = 8192  # rows of dW summed at a time on a CPU


# --- kernels ---------------------------------------------------------------------------------------------------------

@jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    """tanh in fp32: the hardware's (relative error 2^-11), or within 2 ulp by exp2 and Cephes' polynomial near 0."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    magnitude = tl.abs(x)
    decay = tl.exp2(magnitude * -2.8853900817779268)  # exp(-2|x|) never overflows
    far = (1.0 - decay) / (1.0 + decay)
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    return tl.where(magnitude < 0.625, near * z * x + x, tl.where(x < 0, -far, far))


@jit
def _rows_kernel(logits, targets, losses, scale, stride, n_rows, VOCAB_SIZE: tl.constexpr, N_COLUMNS: tl.constexpr,
                 CAP: tl.constexpr, INVERSE_CAP: tl.constexpr, CAP_LOG2_E: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, GRADIENT: tl.constexpr, APPROXIMATE: tl.constexpr, INTERPRETED: tl.constexpr):
    """ROWS rows a program: their losses, and with GRADIENT their logits replaced by scale * d loss / d logits.

    A sweep over the columns is two loops: blocks that lie in the vocabulary as a whole need no masks, the rest does.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = row < n_rows
    column = tl.arange(0, BLOCK)[None, :]
    whole: tl.constexpr = VOCAB_SIZE // BLOCK * BLOCK
    logits += row * stride
    target = tl.load(targets + row, mask=is_row, other=-1)
    ignored = target == -1
    in_range = (target >= 0) & (target < VOCAB_SIZE)
    at_target = tl.load(logits + target, mask=in_range, other=0.0).to(tl.float32)
    partial = tl.zeros((ROWS, BLOCK), tl.float32)
    for masked in tl.static_range(2):
        for start in range(whole if masked else 0, N_COLUMNS if masked else whole, BLOCK):
            here = start + column
            a = tl.load(logits + here, mask=is_row & (here < N_COLUMNS) if masked else is_row, other=0.0)
            e = tl.exp2(_tanh(a.to(tl.float32) * INVERSE_CAP, APPROXIMATE) * CAP_LOG2_E)
            partial += tl.where(here < VOCAB_SIZE, e, 0.0) if masked else e
    total = tl.where(in_range | ignored, tl.sum(partial, axis=1, keep_dims=True), float("nan"))
    loss = tl.log(total) - CAP * _tanh(at_target * INVERSE_CAP, APPROXIMATE)
    tl.store(losses + row, tl.where(ignored, 0.0, loss), mask=is_row)
    if GRADIENT:
        tl.debug_barrier()  # every warp has read the target's logit; from here on logits are overwritten
        one_hot = tl.load(scale)
        softmax = one_hot / total
        own_column = tl.where(in_range, target, -1).to(tl.int32)  # 64-bit comparisons cost two instructions
        for masked in tl.static_range(2):
            for start in range(whole if masked else 0, N_COLUMNS if masked else whole, BLOCK):
                here = start + column
                inside = is_row & (here < N_COLUMNS) if masked else is_row
                t = _tanh(tl.load(logits + here, mask=inside, other=0.0).to(tl.float32) * INVERSE_CAP, APPROXIMATE)
                p = tl.exp2(t * CAP_LOG2_E) * softmax
                gradient = tl.where(here == own_column, p - one_hot, p) * (1.0 - t * t)
                wanted = (target != -1) & (here < VOCAB_SIZE) if masked else target != -1
                store_rounded(logits + here, tl.where(wanted, gradient, 0.0), inside, INTERPRETED)


def rows_tiling(n_rows, n_columns, wide=False):
    """Tile of the rows kernel; `wide`: half as many rows in flight, which the second sweep may find in the L2 cache."""
    elements = 8192 if wide else 4096
    block = min(elements, triton.next_power_of_2(n_columns))
    rows = min(max(elements, TILE_ELEMENTS) // block, triton.next_power_of_2(n_rows))
    return {"ROWS": rows, "BLOCK": block, "num_warps": 16 if wide else 8}


def _has_fast_tanh(device):
    return (device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_capability(device) >= (7, 5))


def _rows_by_triton(logits, targets, losses, scale, vocab_size, softcap, wide=False):
    """Fill `losses` from a chunk's logits; unless `scale` is None, turn the logits into their scaled gradient."""
    n_rows, n_columns = logits.shape
    gradient, tile = scale is not None, rows_tiling(n_rows, n_columns, wide)
    approximate = gradient and logits.dtype == torch.bfloat16 and _has_fast_tanh(logits.device)
    _rows_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
        logits, targets, losses, scale if gradient else losses, logits.stride(0), n_rows,
        VOCAB_SIZE=vocab_size, N_COLUMNS=n_columns, CAP=softcap, INVERSE_CAP=1 / softcap, CAP_LOG2_E=softcap * _LOG2_E,
        GRADIENT=gradient, APPROXIMATE=approximate, INTERPRETED=INTERPRETED, **tile)


def _rows_by_torch(logits, targets, losses, scale, vocab_size, softcap):
    """The same in eager torch: a few rows at a time, so that the two fp32 scratch arrays stay in a CPU's cache."""
    n_columns = logits.size(1)
    step = max(1, _SCRATCH_ELEMENTS["cpu" if logits.device.type == "cpu" else "gpu"] // n_columns)
    scratch = torch.empty(2, min(step, len(logits)), n_columns, dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        t, e = scratch[:, :len(logits[rows])]
        _few_rows_by_torch(logits[rows], targets[rows], losses[rows], scale, vocab_size, softcap, t, e)


def _few_rows_by_torch(logits, targets, losses, scale, vocab_size, softcap, t, e):
    """With t = sigmoid(2a / cap), logits a: cap * tanh(a / cap) = cap + z, z = 2 cap (t - 1) <= 0; e = exp(z).

    Each line is one vectorised pass. tanh itself and exp take three to five times as long as sigmoid and exp2.
    """
    if logits.dtype == torch.float32:
        torch.mul(logits, 2 / softcap, out=t)
    else:
        t.copy_(logits).mul_(2 / softcap)
    t.sigmoid_()
    slope = 2 * softcap * _LOG2_E
    torch.add(torch.full((), -slope, device=t.device), t, alpha=slope, out=e).exp2_()
    e[:, vocab_size:] = 0
    ignored = targets == IGNORED
    in_range = (targets >= 0) & (targets < vocab_size)
    total = torch.where(ignored | in_range, e.sum(1), torch.nan)
    index = targets.clamp(0, vocab_size - 1)[:, None]
    loss = total.log() - 2 * softcap * (t.gather(1, index)[:, 0] - 1)
    losses.copy_(loss.masked_fill_(ignored, 0))
    if scale is None:
        return
    scale = 4 * scale  # dz/da = 1 - tanh^2 = 4 t (1 - t)
    e.mul_((scale / total)[:, None])
    e.scatter_(1, index, e.gather(1, index) - scale)
    torch.ops.aten.sigmoid_backward.grad_input(e, t, grad_input=e)
    logits.copy_(e)
    if logits.device.type != "cpu" or ignored.any():  # a GPU would have to be waited for
        logits.masked_fill_(ignored[:, None], 0)


# --- the chunk loop --------------------------------------------------------------------------------------------------

def chunk_rows(n_rows, row_bytes, chunk_bytes):
    """Rows of a chunk: what the budget holds, a multiple of 128 when it holds that many, chunks of about equal size."""
    most = chunk_bytes // row_bytes
    if most < 1:
        raise UserError(f"a chunk budget of {chunk_bytes} bytes is smaller than one row of logits ({row_bytes} bytes); "
                        "raise chunk_bytes to that at least")
    if most >= n_rows:
        return max(n_rows, 1)
    tile = 128 if most >= 128 else 1
    most -= most % tile
    n_chunks = math.ceil(n_rows / most)
    return math.ceil(n_rows / n_chunks / tile) * tile


def _each_chunk(x, weight, targets, scale, vocab_size, softcap, implementation, chunk_bytes, dx=None, dweight=None):
    """Per-token fp32 losses of x (N, d); fills dx (x's dtype) and adds to dweight (fp32) where they are given."""
    rows_by = {"triton": _rows_by_triton, "triton-wide": partial(_rows_by_triton, wide=True),
               "torch": _rows_by_torch}[implementation]
    weight, targets = weight.to(x.dtype), targets.contiguous()
    n_rows, n_columns = len(x), len(weight)
    step = chunk_rows(n_rows, n_columns * x.element_size(), chunk_bytes)
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    buffer = x.new_empty(min(step, n_rows), n_columns)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        chunk = x[rows]
        logits = torch.mm(chunk, weight.T, out=buffer[:len(chunk)])
        rows_by(logits, targets[rows], losses[rows], scale, vocab_size, softcap)
        if dx is not None:
            torch.mm(logits, weight, out=dx[rows])
        if dweight is not None:
            _add_product(dweight, logits, chunk)
    return losses


def _add_product(dweight, gradient, chunk):
    """dweight += gradient^T chunk, summed in fp32 whatever the factors' dtype."""
    if chunk.dtype == torch.float32:
        dweight.addmm_(gradient.T, chunk)
    elif chunk.is_cuda:
        torch.addmm(dweight, gradient.T, chunk, out_dtype=torch.float32, out=dweight)
    else:  # in pieces, so that the bf16 product is still in the cache when it is added
        for start in range(0, len(dweight), _PRODUCT_ROWS):
            piece = slice(start, start + _PRODUCT_ROWS)
            dweight[piece] += gradient[:, piece].T @ chunk


# --- ops -------------------------------------------------------------------------------------------------------------

@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float, mean: bool,
    implementation: str, chunk_bytes: int, need_dx: bool, need_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, d loss/dx, d loss/dweight): right for any scalar upstream gradient, which backward multiplies in."""
    scale = _row_scale(targets, mean)
    dx = x.new_empty(x.shape if need_dx else 0)
    dweight = torch.zeros(weight.shape if need_dweight else 0, dtype=torch.float32, device=x.device)
    losses = _each_chunk(x, weight, targets, scale, vocab_size, softcap, implementation, chunk_bytes,
                         dx if need_dx else None, dweight if need_dweight else None)
    return _reduced(losses, targets, mean), dx, dweight.to(weight.dtype)


@_loss_and_gradients.register_fake
def _(x, weight, targets, vocab_size, softcap, mean, implementation, chunk_bytes, need_dx, need_dweight):
    return (x.new_empty((), dtype=torch.float32), x.new_empty(x.shape if need_dx else 0),
            weight.new_empty(weight.shape if need_dweight else 0))


def _save_gradients(ctx, inputs, output):
    _, dx, dweight = output
    ctx.need_dx, ctx.need_dweight = inputs[-2:]
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx.detach(), dweight.detach())
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx, grad, *_):
    if grad is None:
        return (None,) * 10
    dx, dweight = ctx.saved_tensors  # multiplied out of place: a second backward finds them unchanged
    return (dx * grad if ctx.need_dx else None, dweight * grad if ctx.need_dweight else None, *(None,) * 8)


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("nanochat::linear_cross_entropy_losses", mutates_args=())
def _losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int, softcap: float,
            implementation: str, chunk_bytes: int) -> torch.Tensor:
    """Per-token losses for evaluation: no gradients are made."""
    return _each_chunk(x, weight, targets, None, vocab_size, softcap, implementation, chunk_bytes)


@_losses.register_fake
def _(x, weight, targets, vocab_size, softcap, implementation, chunk_bytes):
    return x.new_empty(x.size(0), dtype=torch.float32)


def _row_scale(targets, mean):
    """What each row's loss counts for, a device scalar: nobody waits for the number of valid targets."""
    if mean:
        return (targets != IGNORED).sum().clamp(min=1).float().reciprocal()
    return torch.ones((), device=targets.device)


def _reduced(losses, targets, mean):
    """Mean (NaN when every target is ignored, as F.cross_entropy has it) or sum."""
    return losses.sum() / (targets != IGNORED).sum() if mean else losses.sum()


# --- public functions ------------------------------------------------------------------------------------------------

def linear_cross_entropy(x, weight, targets, vocab_size, softcap=SOFTCAP, reduction="mean", implementation="triton",
                         chunk_bytes=None):
    """Cross-entropy of softcap * tanh(x W^T / softcap) over the first vocab_size columns, without the (N, V) logits.

    x (..., d) bf16 or fp32; weight (Vpad, d) fp32 or x's dtype; targets (...) int64: -1 is ignored, anything else
    out of range makes the loss NaN. mean and sum: fp32 scalar, differentiable once in x and weight;
    none: fp32 losses of targets' shape, without gradients. chunk_bytes bounds the logits alive at a time.
    """
    assert reduction in ("mean", "sum", "none") and implementation in ("triton", "triton-wide", "torch")
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(x.device, x.dtype)
    rows, flat_targets = x.reshape(-1, x.size(-1)), targets.reshape(-1)
    need_dx, need_dweight = (torch.is_grad_enabled() and tensor.requires_grad for tensor in (x, weight))
    if reduction != "none" and (need_dx or need_dweight):
        return _loss_and_gradients(rows, weight, flat_targets, vocab_size, float(softcap), reduction == "mean",
                                   implementation, chunk_bytes, need_dx, need_dweight)[0]
    losses = _losses(rows.detach(), weight.detach(), flat_targets, vocab_size, float(softcap), implementation,
                     chunk_bytes)
    if reduction == "none":
        return losses.view(targets.shape)
    return _reduced(losses, flat_targets, reduction == "mean")


def default_chunk_bytes(device, dtype):
    """Bytes of logits alive at a time. On a CPU 16M logits: dev/LOG_lane_c.md has the sizes tried.

    On a GPU 896 MiB: dW's rewriting stays below 2 % of the matmuls, and with the cast weight it stays within 1 GiB.
    """
    return 896 << 20 if device.type == "cuda" else dtype.itemsize << 24


def check_linear_cross_entropy(device, dtype, padded_vocab_size, softcap=SOFTCAP, implementation="triton",
                               chunk_bytes=None, flag="--chunked-ce"):
    """UserError when this loss cannot serve such a model; call it before building one."""
    device = torch.device(device)
    if implementation != "torch":
        require_kernels(device, flag)
    require_dtype(dtype, DTYPES, flag)
    if not 0 < softcap <= MAX_SOFTCAP:
        raise UserError(f"{flag} takes a softcap above 0, up to {MAX_SOFTCAP:g}, not {softcap:g}; leave the flag out")
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(device, dtype)
    chunk_rows(1, padded_vocab_size * dtype.itemsize, chunk_bytes)
