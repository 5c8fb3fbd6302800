"""Linear layers' matmuls in 8-bit floating point, one scale a tensor: e4m3 for activations and weights, e5m2, which
has the wider range, for gradients (arXiv:2209.05433). Products are summed in fp32 and rounded to the compute dtype.

y = x W^T, dx = g W, dW = g^T x. The hardware multiplies rows of the left factor by columns of the right one, each of
consecutive elements, so W is kept in both layouts. Both are made once an optimizer step, however many micro-batches.
"""

import torch
import torch.nn as nn

from nanochat.common import UserError
from nanochat.gpt import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST_SIDE = 128  # below it, quantising takes longer than the matmul gains
SIDE_MULTIPLE = 16  # the hardware's
LEAST_AMAX = 1e-12  # keeps the scale of a tensor of zeros finite
COMPUTE_DTYPES = (torch.bfloat16, torch.float32)


def train_in_fp8(model, optimizer, compiled):
    """Give each large Linear of a model an Fp8Weight as its `fp8`, to be used while gradients are recorded.

    The weights are quantised now, after every step of the optimizer, and when it loads a state (a run that goes back:
    load the weights before), so call it when they are on their device and hold the values that training starts from;
    of a weight with a copy the copy, which alone is whole on every rank. `compiled` fuses the passes. The head is one
    of them, unless `model.chunked_ce`: that loss multiplies it by itself.
    """
    head = model.lm_head if model.chunked_ce else None
    layers = [layer for layer in model.modules() if isinstance(layer, Linear) and layer is not head and all(
        side >= LEAST_SIDE and side % SIDE_MULTIPLE == 0 for side in layer.weight.shape)]
    quantise = torch.compile(_quantise, dynamic=False, fullgraph=True) if compiled else _quantise

    @torch.no_grad()
    def quantise_all(*_):
        for layer in layers:
            weight, fp8 = layer.weight if layer.cast is None else layer.cast, layer.fp8
            quantise(weight, fp8.rows, fp8.columns, fp8.scale)

    for layer in layers:
        layer.fp8 = Fp8Weight(layer.weight)
    quantise_all()
    optimizer.register_step_post_hook(quantise_all)
    optimizer.register_load_state_dict_post_hook(quantise_all)


class Fp8Weight(nn.Module):
    """The e4m3 values of a weight (out, in), and the matmul with them.

    Its buffers are in no state dict: checkpoints do not know of fp8.
    """

    def __init__(self, weight):
        super().__init__()
        out_features, in_features = weight.shape
        for name, shape, dtype in (("rows", (out_features, in_features), E4M3),
                                   ("columns", (in_features, out_features), E4M3), ("scale", (), torch.float32)):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=weight.device), persistent=False)

    def forward(self, x, weight):
        """x (..., in) times the quantised weight, in x's dtype; `weight` only receives the gradient, in its dtype."""
        flat = _Fp8Matmul.apply(x.flatten(0, -2), weight, self.rows, self.columns, self.scale)
        return flat.unflatten(0, x.shape[:-1])


def _quantise(weight, rows, columns, scale):
    """Write a weight's values, in both layouts, and its scale."""
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
        return torch._scaled_mm(values, rows.t(), scale, weight_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):
        values, scale, columns, weight_scale = ctx.saved_tensors
        grads, grad_scale = quantised(grad, E5M2)
        dx = torch._scaled_mm(grads, columns.t(), grad_scale, weight_scale, out_dtype=grad.dtype)
        dweight = torch._scaled_mm(grads.t().contiguous(), values.t().contiguous().t(), grad_scale, scale,
                                   out_dtype=ctx.weight_dtype)
        return dx, dweight, None, None, None


def quantised(x, dtype):
    """(values of x in an 8-bit dtype, the fp32 scale to multiply them by): x's largest magnitude takes the dtype's.

    A NaN or an infinity in x makes the scale, or all values, NaN.
    """
    largest = torch.finfo(dtype).max
    per_unit = largest / x.abs().amax().float().clamp(min=LEAST_AMAX)
    return (x.float() * per_unit).clamp(-largest, largest).to(dtype), per_unit.reciprocal()


def check_fp8(device, dtype, model_dim, rows_tokens):
    """UserError when such a model cannot be trained in fp8 here; rows_tokens: tokens of a micro-batch on one device."""
    if device.type == "cuda":
        if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 9):
            raise UserError("--fp8 needs an NVIDIA GPU of compute capability 8.9 or more; leave the flag out")
    elif device.type != "cpu":  # there it works, slowly: for tests
        raise UserError(f"--fp8 needs an NVIDIA GPU, and this run is on {device.type}; leave the flag out")
    if dtype not in COMPUTE_DTYPES:
        raise UserError("--fp8 needs bfloat16 as the compute dtype; unset NANOCHAT_DTYPE or leave the flag out")
    if model_dim < LEAST_SIDE or model_dim % SIDE_MULTIPLE:
        raise UserError(f"--fp8 takes widths from {LEAST_SIDE}, multiples of {SIDE_MULTIPLE}, not {model_dim}; leave "
                        "the flag out")
    if rows_tokens % SIDE_MULTIPLE:
        raise UserError(f"--fp8 takes micro-batches of a multiple of {SIDE_MULTIPLE} tokens, not {rows_tokens}; "
                        "change --device-batch-size")
