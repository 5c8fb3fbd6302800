"""Embedding lookup whose gradient, on a GPU, is the library's sorted sum.

A compiler makes of it a table of zeros in fp32, atomic additions, and a pass that casts the table: at the protocol's
d12 about four times the bytes, for each of seven tables, in an order that differs from run to run.
"""

import torch
import torch.nn.functional as F


@torch.library.custom_op("nanochat::embedding_gradient", mutates_args=())
def _embedding_gradient(grad: torch.Tensor, ids: torch.Tensor, n_rows: int) -> torch.Tensor:
    """(n_rows, d) in grad's dtype: row i the sum, in fp32, of grad's rows (..., d) where ids is i."""
    return torch.ops.aten.embedding_dense_backward(grad, ids, n_rows, -1, False)


@_embedding_gradient.register_fake
def _(grad, ids, n_rows):
    return grad.new_empty(n_rows, grad.size(-1))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.n_rows = weight.size(0)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        [ids] = ctx.saved_tensors
        return None, _embedding_gradient(grad.contiguous(), ids, ctx.n_rows)


def embedding(ids, weight):
    """Rows of weight (V, d) for ids (...): (..., d) in weight's dtype. On a CPU the sorted sum is in weight's dtype, so
    there the compiler's own is taken."""
    return _Embedding.apply(ids, weight) if weight.is_cuda else F.embedding(ids, weight)
