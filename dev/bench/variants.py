"""The variants that `python -m dev.bench.kernels` compares: ours, torch eager and compiled, peers.

All functions of a table have one signature: losses (x, weight, targets, vocab_size) -> loss,
QK-norms (q, k, cos, sin) -> (q, k). A peer that cannot be imported, or cannot run
on this device, is reported with the reason.
"""

import importlib
from functools import partial

import torch
import torch.nn.functional as F

from nanochat.gpt import plain_cross_entropy, plain_rope_qk_norm
from nanochat.kernels.linear_cross_entropy import SOFTCAP, linear_cross_entropy
from nanochat.kernels.rms_norm import rope_qk_norm


class Unavailable(Exception):
    """Why a variant cannot run here."""


NEEDS_CUDA = Unavailable("needs CUDA")


def sliced_loss(x, weight, targets, vocab_size):
    """Return the usual loss: fp32 logits of the real columns, softcap, cross-entropy."""
    logits = F.linear(x, weight.to(x.dtype))[:, :vocab_size].float()
    return F.cross_entropy(SOFTCAP * torch.tanh(logits / SOFTCAP), targets, ignore_index=-1)


def masked_loss(x, weight, targets, vocab_size):
    """Return the loss with padded columns masked after the softcap instead of sliced off before."""
    logits = F.linear(x, weight.to(x.dtype)).float()
    logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
    column = torch.arange(weight.size(0), device=x.device)
    return F.cross_entropy(
        torch.where(column < vocab_size, logits, -torch.inf), targets, ignore_index=-1
    )


def plain_loss(x, weight, targets, vocab_size):
    """Return the loss as the model computes it by default."""
    return plain_cross_entropy(F.linear(x, weight.to(x.dtype)), targets, vocab_size)


def torch_chunks(x, weight, targets, vocab_size):
    return linear_cross_entropy(x, weight, targets, vocab_size, implementation="torch")


def triton_chunks(x, weight, targets, vocab_size):
    return linear_cross_entropy(x, weight, targets, vocab_size, implementation="triton")


def losses(device):
    """Return {variant: loss function, or Unavailable}."""
    table = {
        "torch eager, sliced": sliced_loss,
        "torch compiled, sliced": _compiled(sliced_loss),
        "torch compiled, masked": _compiled(masked_loss),
        "torch compiled, plain path": _compiled(plain_loss),
        "ours (torch)": torch_chunks,
        "ours (torch), compiled around": _compiled(torch_chunks),
    }
    if device.type != "cuda":
        return table | dict.fromkeys(
            ("liger", "cut-cross-entropy, exact", "quack (has no softcap)"), NEEDS_CUDA
        )
    return table | {
        "ours (triton)": triton_chunks,
        "ours (triton), compiled around": _compiled(triton_chunks),
        "liger": _peer("liger_kernel.ops.fused_linear_cross_entropy", _liger_loss),
        "cut-cross-entropy, exact": _peer("cut_cross_entropy", partial(_cut_loss, filter_eps=None)),
        "cut-cross-entropy, filtered": _peer(
            "cut_cross_entropy", partial(_cut_loss, filter_eps="high")
        ),
        "quack (has no softcap)": _peer("quack.linear_cross_entropy", _quack_loss),
    }


def qk_norms():
    """Return {variant: rotary embedding, norm and scale of q and k}."""
    return {
        "torch eager": plain_rope_qk_norm,
        "torch compiled": _compiled(plain_rope_qk_norm),
        "ours": rope_qk_norm,
    }


def interpreted_losses():
    """Return {variant: loss function} for the dry run without a GPU, in the interpreter."""
    return {"ours (triton)": triton_chunks}


def _compiled(function):
    """Compile to one graph per shape: code for varying shapes would be slower."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _peer(module, function):
    try:
        return partial(function, importlib.import_module(module))
    except Exception as reason:  # peers fail to import in many ways
        return Unavailable(f"{type(reason).__name__}: {reason}")


def _liger_loss(module, x, weight, targets, vocab_size):
    return module.LigerFusedLinearCrossEntropyFunction.apply(
        x, weight[:vocab_size].to(x.dtype), targets, None, None, -1, 0.0, 0.0, "mean", SOFTCAP
    )[0]


def _cut_loss(module, x, weight, targets, vocab_size, filter_eps):
    return module.linear_cross_entropy(
        x,
        weight[:vocab_size].to(x.dtype),
        targets,
        ignore_index=-1,
        softcap=SOFTCAP,
        filter_eps=filter_eps,
    )


def _quack_loss(module, x, weight, targets, vocab_size):
    return module.chunked_linear_cross_entropy(
        x, weight[:vocab_size].to(x.dtype), targets, ignore_index=-1
    )
