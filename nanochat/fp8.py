"""Matmuls of Linear layers in 8-bit floating point with one scale per tensor (arXiv:2209.05433).

y = x W^T, dx = g W, dW = g^T x: x and W are e4m3; g is e5m2, which has a wider range. Products are
summed in fp32 and rounded to the compute dtype. The hardware multiplies contiguous rows by
contiguous columns, so W is kept in both layouts, computed once per optimizer step.
"""

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.gpt import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST_SIDE = 128  # for smaller weights, quantising costs more than the matmul gains
SIDE_MULTIPLE = 16  # required by the hardware
LEAST_AMAX = 1e-12  # keeps the scale of an all-zero tensor finite


def train_in_fp8(model, optimizer, compiled):
    """Make every large Linear of a model multiply in fp8 while gradients are recorded.

    Weights are quantised now, after every optimizer step and after the optimizer loads a state. The
    head is left out with `model.chunked_ce`, whose loss contains its matmul.
    """
    head = model.lm_head if model.chunked_ce else None
    layers = [layer for layer in model.modules()
              if isinstance(layer, Linear) and layer is not head and _is_large(layer.weight)]
    quantise = torch.compile(_quantise, dynamic=False, fullgraph=True) if compiled else _quantise

    @torch.no_grad()
    def quantise_all(*_):
        for layer in layers:
            # the copy is complete on every rank, the fp32 weight is not
            weight = layer.weight if layer.cast is None else layer.cast
            quantise(weight, layer.fp8.rows, layer.fp8.columns, layer.fp8.scale)

    for layer in layers:
        layer.fp8 = Fp8Weight(layer.weight)
    quantise_all()
    optimizer.register_step_post_hook(quantise_all)
    optimizer.register_load_state_dict_post_hook(quantise_all)


def _is_large(weight):
    return all(side >= LEAST_SIDE and side % SIDE_MULTIPLE == 0 for side in weight.shape)


class Fp8Weight(nn.Module):
    """The e4m3 values of a weight (out, in), which are not in state dicts, and their matmul."""

    def __init__(self, weight):
        super().__init__()
        values = torch.empty_like(weight, dtype=E4M3)
        self.register_buffer("rows", values, persistent=False)
        self.register_buffer("columns", values.t().contiguous(), persistent=False)
        self.register_buffer("scale", weight.new_zeros((), dtype=torch.float32), persistent=False)

    def forward(self, x, weight):
        """Return x (..., in) times the weight in x's dtype; `weight` only receives the gradient."""
        flat = _Fp8Matmul.apply(x.flatten(0, -2), weight, self.rows, self.columns, self.scale)
        return flat.unflatten(0, x.shape[:-1])


def _quantise(weight, rows, columns, scale):
    """Write the e4m3 values of a weight, in both layouts, and their scale."""
    values, new_scale = quantised(weight, E4M3)
    rows.copy_(values)
    columns.copy_(values.t())
    scale.copy_(new_scale)


class _Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows, columns, weight_scale):
        values, scale = quantised(x, E4M3)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(values, scale, columns, weight_scale)
        return torch._scaled_mm(
            values, rows.t(), scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        values, scale, columns, weight_scale = ctx.saved_tensors
        grads, grad_scale = quantised(grad, E5M2)
        dx = torch._scaled_mm(grads, columns.t(), grad_scale, weight_scale, out_dtype=grad.dtype)
        dweight = torch._scaled_mm(
            grads.t().contiguous(), values.t().contiguous().t(), grad_scale, scale,
            out_dtype=ctx.weight_dtype)
        return dx, dweight, None, None, None


def quantised(x, dtype):
    """Return (x in an 8-bit dtype, the fp32 scale that multiplies it).

    The largest magnitude of x becomes the largest of the dtype. A NaN or an infinity in x makes the
    scale, or all values, NaN.
    """
    largest = torch.finfo(dtype).max
    per_unit = largest / x.abs().amax().float().clamp(min=LEAST_AMAX)
    return (x.float() * per_unit).clamp(-largest, largest).to(dtype), per_unit.reciprocal()


def check_fp8(device, dtype, model_dim, rows_tokens):
    """Raise UserError if such a model cannot be trained in fp8 on this device.

    rows_tokens: tokens per micro-batch on one device. A CPU works, slowly, for tests.
    """
    is_nvidia = device.type == "cuda" and not torch.version.hip
    is_new = is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)
    if not (is_new or device.type == "cpu"):
        raise UserError("--fp8 needs an NVIDIA GPU of compute capability 8.9 or higher")
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError("--fp8 needs bfloat16 as the compute dtype; unset NANOCHAT_DTYPE")
    if model_dim < LEAST_SIDE or model_dim % SIDE_MULTIPLE or rows_tokens % SIDE_MULTIPLE:
        raise UserError(f"--fp8 needs a model width of at least {LEAST_SIDE}, not {model_dim}, and "
                        f"{rows_tokens} tokens per micro-batch, both multiples of {SIDE_MULTIPLE}")
