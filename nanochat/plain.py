"""The model's parts in plain torch, as it runs by default; lane C's kernels do the same in fewer passes."""

import torch
import torch.nn.functional as F

from nanochat.kernels.linear_cross_entropy import IGNORED, SOFTCAP
from nanochat.kernels.rms_norm import QK_SCALE


def plain_rms_norm(x):
    """RMSNorm over the last dimension, without weight; eps is fp32's machine epsilon (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def plain_rope_qk_norm(q, k, cos, sin):
    """Halves of q and k (B, T, H, D) rotated by minus theta (arXiv:2104.09864), RMSNorm, times QK_SCALE.

    cos, sin (1, T, 1, D/2) in their dtype.
    """
    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)

    return tuple(plain_rms_norm(rotated(x)) * QK_SCALE for x in (q, k))


def plain_linear_cross_entropy(x, weight, targets, vocab_size, softcap=SOFTCAP, reduction="mean"):
    """`plain_cross_entropy` of the logits of x (..., d) and weight (Vpad, d), which is cast to x's dtype."""
    return plain_cross_entropy(F.linear(x, weight.to(x.dtype)), targets, vocab_size, softcap, reduction)


def plain_cross_entropy(logits, targets, vocab_size, softcap=SOFTCAP, reduction="mean"):
    """The unfused loss in the form that compiles best: one pass over the columns forward, one backward.

    logits (..., Vpad), before the softcap; targets (...) int64 with -1 ignored, anything else out of range NaN; loss
    in fp32. The softcap bounds the logits, so it stands in for their maximum, and the target's logit is a sum over
    the same columns: neither needs a pass of its own, as F.cross_entropy's would. Columns are int32, half a float's
    lanes else.
    """
    def below_cap(x):
        return 2 * softcap * (torch.sigmoid(2 / softcap * x) - 1)  # softcap * (tanh(x / softcap) - 1)

    targets_shape, targets = targets.shape, targets.reshape(-1)
    logits = logits.reshape(-1, logits.size(-1)).float()
    column = torch.arange(logits.size(-1), device=logits.device, dtype=torch.int32)
    is_target = column == targets.int().unsqueeze(-1)
    capped = below_cap(logits)
    partition = torch.exp(capped)
    if logits.is_cuda:  # in this form, mask included, the compiler writes the gradient over the logits
        partition = partition.masked_fill(column >= vocab_size, 0.0)
        of_target = torch.where(is_target, capped, 0.0).sum(dim=-1)
    else:  # a CPU's would write `capped` for its two readers
        if vocab_size < logits.size(-1):
            partition = partition.masked_fill(column >= vocab_size, 0.0)
        of_target = below_cap(torch.where(is_target, logits, 0.0).sum(dim=-1))
    losses = partition.sum(dim=-1).log() - of_target
    losses = torch.where((targets >= 0) & (targets < vocab_size), losses, torch.nan)
    losses = torch.where(targets == IGNORED, 0.0, losses)
    if reduction == "none":
        return losses.view(targets_shape)
    return losses.sum() / ((targets != IGNORED).sum() if reduction == "mean" else 1)
