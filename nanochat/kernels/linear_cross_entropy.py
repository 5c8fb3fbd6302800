"""Cross-entropy of softcapped logits straight from hidden states, one chunk of rows at a time.

The forward pass replaces the logits of each chunk by their gradient and multiplies it into dx and
dW at once, like Liger (arXiv:2410.10989) and CCE (arXiv:2411.09009). The softcap bounds the
exponentials, so no running maximum is needed.
"""

from __future__ import annotations

import math

import torch

from nanochat.kernels import runtime
from nanochat.kernels.runtime import jit, store_rounded, tl, triton

DTYPES = (torch.bfloat16, torch.float32)
IGNORED = -1
SOFTCAP = 15.0  # of the model
LOG2_E = math.log2(math.e)
SCRATCH_ELEMENTS = 1 << 20  # fp32, per scratch array of the torch form: they stay in the cache
PRODUCT_ROWS = 8192  # rows of dW summed at a time on a CPU


# --- kernels --------------------------------------------------------------------------------------

@jit
def _tanh(x, APPROXIMATE: tl.constexpr):
    """tanh in fp32: the hardware's (relative error 2^-11), or within 2 ulp by exp2 and Cephes."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
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
def _rows_kernel(logits, targets, losses, scale, stride, n_rows, VOCAB_SIZE: tl.constexpr,
                 N_COLUMNS: tl.constexpr, CAP: tl.constexpr, INVERSE_CAP: tl.constexpr,
                 CAP_LOG2_E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                 GRADIENT: tl.constexpr, APPROXIMATE: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write the losses of ROWS rows; with GRADIENT replace logits by scale * d loss / d logits.

    A sweep over the columns is two loops: blocks completely inside the vocabulary need no masks.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    is_row = row < n_rows
    column = tl.arange(0, BLOCK)[None, :]
    unmasked: tl.constexpr = VOCAB_SIZE // BLOCK * BLOCK
    logits += row * stride
    target = tl.load(targets + row, mask=is_row, other=-1)
    ignored = target == -1
    in_range = (target >= 0) & (target < VOCAB_SIZE)
    at_target = tl.load(logits + target, mask=in_range, other=0.0).to(tl.float32)
    partial = tl.zeros((ROWS, BLOCK), tl.float32)
    for masked in tl.static_range(2):
        for start in range(unmasked if masked else 0, N_COLUMNS if masked else unmasked, BLOCK):
            here = start + column
            inside = is_row & (here < N_COLUMNS) if masked else is_row
            a = tl.load(logits + here, mask=inside, other=0.0).to(tl.float32)
            e = tl.exp2(_tanh(a * INVERSE_CAP, APPROXIMATE) * CAP_LOG2_E)
            partial += tl.where(here < VOCAB_SIZE, e, 0.0) if masked else e
    total = tl.sum(partial, axis=1, keep_dims=True)
    total = tl.where(in_range | ignored, total, float("nan"))
    loss = tl.log(total) - CAP * _tanh(at_target * INVERSE_CAP, APPROXIMATE)
    tl.store(losses + row, tl.where(ignored, 0.0, loss), mask=is_row)
    if GRADIENT:
        tl.debug_barrier()  # all warps have read the target's logit; now logits are overwritten
        one_hot = tl.load(scale)
        softmax = one_hot / total
        own_column = tl.where(in_range, target, -1).to(tl.int32)  # int64 would cost instructions
        for masked in tl.static_range(2):
            for start in range(unmasked if masked else 0, N_COLUMNS if masked else unmasked, BLOCK):
                here = start + column
                inside = is_row & (here < N_COLUMNS) if masked else is_row
                a = tl.load(logits + here, mask=inside, other=0.0).to(tl.float32)
                t = _tanh(a * INVERSE_CAP, APPROXIMATE)
                p = tl.exp2(t * CAP_LOG2_E) * softmax
                gradient = tl.where(here == own_column, p - one_hot, p) * (1.0 - t * t)
                counts = (target != -1) & (here < VOCAB_SIZE) if masked else target != -1
                gradient = tl.where(counts, gradient, 0.0)
                store_rounded(logits + here, gradient, inside, INTERPRETED)


def rows_tiling(n_rows, n_columns):
    """Return the launch constants of the rows kernel."""
    block = min(4096, triton.next_power_of_2(n_columns))
    rows = min(runtime.TILE_ELEMENTS // block, triton.next_power_of_2(n_rows))
    return {"ROWS": rows, "BLOCK": block, "num_warps": 8}


def _rows_by_triton(logits, targets, losses, scale, vocab_size):
    """Write `losses` of a chunk's logits; replace these by their gradient times `scale`, if any."""
    n_rows, n_columns = logits.shape
    gradient = scale is not None
    has_fast_tanh = logits.is_cuda and torch.version.hip is None
    tile = rows_tiling(n_rows, n_columns)
    _rows_kernel[(triton.cdiv(n_rows, tile["ROWS"]),)](
        logits, targets, losses, scale if gradient else losses, logits.stride(0), n_rows,
        VOCAB_SIZE=vocab_size, N_COLUMNS=n_columns, CAP=SOFTCAP, INVERSE_CAP=1 / SOFTCAP,
        CAP_LOG2_E=SOFTCAP * LOG2_E, GRADIENT=gradient, INTERPRETED=runtime.INTERPRETED,
        APPROXIMATE=gradient and logits.dtype == torch.bfloat16 and has_fast_tanh, **tile)


def _rows_by_torch(logits, targets, losses, scale, vocab_size):
    """Compute the row kernel's results in eager torch, a few rows at a time."""
    n_rows, n_columns = logits.shape
    step = max(1, SCRATCH_ELEMENTS // n_columns)
    scratch = torch.empty(2, min(step, n_rows), n_columns, device=logits.device)
    for start in range(0, n_rows, step):
        rows = slice(start, min(start + step, n_rows))
        t, e = scratch[:, : rows.stop - start]
        _few_rows_by_torch(logits[rows], targets[rows], losses[rows], scale, vocab_size, t, e)


def _few_rows_by_torch(logits, targets, losses, scale, vocab_size, t, e):
    """With logits a, t = sigmoid(2a / cap): cap * tanh(a / cap) = cap + z, z = 2 cap (t - 1) <= 0.

    e = exp(z). tanh and exp would take three to five times as long as sigmoid and exp2.
    """
    torch.mul(logits.float(), 2 / SOFTCAP, out=t).sigmoid_()
    slope = 2 * SOFTCAP * LOG2_E
    torch.add(torch.full((), -slope, device=t.device), t, alpha=slope, out=e).exp2_()
    e[:, vocab_size:] = 0
    ignored = targets == IGNORED
    in_range = (targets >= 0) & (targets < vocab_size)
    total = torch.where(ignored | in_range, e.sum(1), torch.nan)
    index = targets.clamp(0, vocab_size - 1)[:, None]
    loss = total.log() - 2 * SOFTCAP * (t.gather(1, index)[:, 0] - 1)
    losses.copy_(loss.masked_fill_(ignored, 0))
    if scale is None:
        return
    scale = 4 * scale  # dz/da = 1 - tanh^2 = 4 t (1 - t)
    e.mul_((scale / total)[:, None])
    e.scatter_(1, index, e.gather(1, index) - scale)
    torch.ops.aten.sigmoid_backward.grad_input(e, t, grad_input=e)
    logits.copy_(e)
    if ignored.any():
        logits.masked_fill_(ignored[:, None], 0)


# --- the loop over chunks -------------------------------------------------------------------------

def chunk_rows(n_rows, row_bytes, chunk_bytes):
    """Return the rows per chunk: within the budget, a multiple of 128 if possible, evenly split."""
    most = chunk_bytes // row_bytes
    assert most >= 1, "the chunk budget is smaller than one row of logits"
    if most >= n_rows:
        return max(n_rows, 1)
    tile = 128 if most >= 128 else 1
    most -= most % tile
    n_chunks = math.ceil(n_rows / most)
    return math.ceil(n_rows / n_chunks / tile) * tile


def _each_chunk(x, weight, targets, vocab_size, implementation, chunk_bytes, scale=None, dx=None,
                dweight=None):
    """Return the fp32 losses of x (N, d).

    With a scale also write dx (x's dtype) and add to dweight (fp32), both times `scale`.
    """
    rows_by = {"triton": _rows_by_triton, "torch": _rows_by_torch}[implementation]
    weight, targets = weight.to(x.dtype), targets.contiguous()
    n_rows, n_columns = len(x), len(weight)
    step = chunk_rows(n_rows, n_columns * x.element_size(), chunk_bytes)
    losses = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    buffer = x.new_empty(min(step, n_rows), n_columns)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        chunk = x[rows]
        logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
        rows_by(logits, targets[rows], losses[rows], scale, vocab_size)
        if scale is not None:
            torch.mm(logits, weight, out=dx[rows])
            _add_product(dweight, logits, chunk)
    return losses


def _add_product(dweight, gradient, chunk):
    """Compute dweight += gradient^T chunk with fp32 sums."""
    if chunk.dtype == torch.float32:
        dweight.addmm_(gradient.T, chunk)
    elif chunk.is_cuda:
        torch.addmm(dweight, gradient.T, chunk, out_dtype=torch.float32, out=dweight)
    else:  # in pieces, so that each bf16 product is still in the cache when it is added
        for start in range(0, len(dweight), PRODUCT_ROWS):
            piece = slice(start, start + PRODUCT_ROWS)
            dweight[piece] += gradient[:, piece].T @ chunk


# --- ops ------------------------------------------------------------------------------------------

@torch.library.custom_op("nanochat::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int,
    implementation: str, chunk_bytes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (mean loss, d loss/dx, d loss/dweight); backward multiplies by its own gradient."""
    # stays on the device: nothing waits for the number of valid targets
    scale = (targets != IGNORED).sum().clamp(min=1).float().reciprocal()
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.zeros(weight.shape, device=x.device)
    losses = _each_chunk(x, weight, targets, vocab_size, implementation, chunk_bytes, scale, dx,
                         dweight)
    return _mean(losses, targets), dx, dweight.to(weight.dtype)


@_loss_and_gradients.register_fake
def _(x, weight, targets, *_):
    loss = x.new_empty((), dtype=torch.float32)
    return loss, x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_gradients(ctx, inputs, output):
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.save_for_backward(dx.detach(), dweight.detach())
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs dx and dweight


def _scale_gradients(ctx, grad, *_):
    dx, dweight = ctx.saved_tensors  # not changed in place: there may be a second backward pass
    return dx * grad, dweight * grad, None, None, None, None


_loss_and_gradients.register_autograd(_scale_gradients, setup_context=_save_gradients)


@torch.library.custom_op("nanochat::linear_cross_entropy_losses", mutates_args=())
def _losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, vocab_size: int,
            implementation: str, chunk_bytes: int) -> torch.Tensor:
    """Return the loss per token, without gradients."""
    return _each_chunk(x, weight, targets, vocab_size, implementation, chunk_bytes)


@_losses.register_fake
def _(x, *_):
    return x.new_empty(x.size(0), dtype=torch.float32)


def _mean(losses, targets):
    """Return the mean loss, which is NaN if all targets are ignored, as in torch."""
    return losses.sum() / (targets != IGNORED).sum()


# --- public functions -----------------------------------------------------------------------------

def linear_cross_entropy(x, weight, targets, vocab_size, reduction="mean",
                         implementation="triton", chunk_bytes=None):
    """Return the cross-entropy of SOFTCAP * tanh(x W^T / SOFTCAP), first vocab_size columns only.

    x (..., d) bf16 or fp32; weight (Vpad, d) fp32 or x's dtype; targets (...) int64: -1 is ignored,
    another target out of range makes the loss NaN. reduction: mean (an fp32 scalar, differentiable
    once) or none (fp32, of targets' shape, without gradients). implementation: triton or torch.
    """
    if chunk_bytes is None:
        chunk_bytes = default_chunk_bytes(x.device, x.dtype)
    shape, targets = targets.shape, targets.reshape(-1)
    options = vocab_size, implementation, chunk_bytes
    x = x.reshape(-1, x.size(-1))
    needs_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if reduction == "mean" and needs_gradients:
        return _loss_and_gradients(x, weight, targets, *options)[0]
    losses = _losses(x.detach(), weight.detach(), targets, *options)
    return losses.view(shape) if reduction == "none" else _mean(losses, targets)


def default_chunk_bytes(device, dtype):
    """Return the memory of the logits that exist at a time."""
    # GPU: rewriting dW stays below 2 % of the matmuls. CPU: 16M logits, the best of several sizes.
    return 896 << 20 if device.type == "cuda" else dtype.itemsize << 24


def check_linear_cross_entropy(device, dtype):
    """Raise UserError if this loss cannot run: on a GPU it needs Triton."""
    if device.type == "cuda":
        runtime.require_kernels("--chunked-ce", device)
    runtime.require_dtype("--chunked-ce", dtype, DTYPES)
