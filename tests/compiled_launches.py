"""What a compiler makes of our kernels' ops for a GPU, run on a CPU: in compiled code the compiler launches our kernels
by itself, with sizes and strides that it has worked out, and here the interpreter takes each launch.

A program for a process of its own, without TRITON_INTERPRET: `compiled_launches.py opcheck|aot_eager|inductor`.
"""

import sys
from types import SimpleNamespace

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_heuristics
from torch._library.triton import get_triton_kernels_for_op
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from dev.lowering.fake_h100 import answer_for_triton
from nanochat.kernels import embedding
from nanochat.kernels import rms_norm as norms
from nanochat.kernels.rms_norm import rms_norm, rope_qk_norm
from nanochat.gpt import plain_rms_norm, plain_rope_qk_norm

KERNELS = {"rms_norm": "_norm_kernel", "rms_norm_backward": "_norm_kernel", "rope_norm": "_rope_norm_kernel",
           "rope_norm_backward": "_rope_norm_kernel", "embedding_gradient": "_rows_sum_kernel"}
launched = []


def launch(kernel, *args, grid, num_warps=None, num_stages=None, warmup=False, **kwargs):
    """In JITFunction.run's place, with its arguments."""
    launched.append(kernel.__name__)
    InterpretedFunction(kernel.fn).run(*args, grid=grid, warmup=False, **kwargs)


def user_autotune(triton_meta, **_):
    """Inductor's decorator of our kernels: what its code then calls takes all but the constants, then the grid."""
    names = [name for name, kind in triton_meta["signature"].items() if kind != "constexpr"]

    def decorated(kernel):
        def run(*args, stream):
            launch(kernel, grid=args[-3:], **dict(zip(names, args[:-3], strict=True)), **triton_meta["constants"])

        return SimpleNamespace(run=run)

    return decorated


def interpret_launches():
    answer_for_triton(torch)
    torch._functorch.config.force_non_lazy_backward_lowering = True  # the interpreter leaves tl changed: trace before
    JITFunction.run = launch
    JITFunction.__call__ = lambda kernel, *args, **kwargs: InterpretedFunction(kernel.fn)(*args, **kwargs)
    triton_heuristics.user_autotune = user_autotune
    AsyncCompile.triton = lambda _, name, source, device_str: getattr(PyCodeCache.load(source), name)


def tensors():
    generator = torch.Generator().manual_seed(0)
    table, weight, upstream, angle = (torch.randn(shape, generator=generator)
                                      for shape in ((7, 24), (24, 96), (2, 5, 2), (1, 9, 1, 8)))
    ids = torch.randint(7, (2, 5), generator=generator)
    return table, weight, upstream, ids, angle.cos()[:, :5], angle.sin()[:, :5]


def results(look_up, norm, rope, compiled):
    """[a block's output, its gradients]: q and k are strided views into one product, their gradients transposed."""
    table, weight, upstream, ids, cos, sin = tensors()
    order = embedding.by_id(ids, len(table))

    def block(table, weight):
        heads = (norm(look_up(table, ids, *order)) @ weight).unflatten(-1, (3, 2, 16))
        q, k = rope(heads[:, :, 0], heads[:, :, 1], cos, sin)
        return (q.transpose(1, 2) * k.transpose(1, 2)).sum(-1).relu().transpose(1, 2) + heads[:, :, 2].sum(-1)

    leaves = table.requires_grad_(), weight.requires_grad_()
    y = compiled(block)(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def opcheck():
    table, _, _, ids, cos, sin = tensors()
    x = table[ids]
    rows, q = x.flatten(0, 1), x[..., :16].unsqueeze(2)
    torch.library.opcheck(norms._rms_norm, (rows.clone().requires_grad_(), 1e-6))
    torch.library.opcheck(norms._rms_norm_backward, (rows, 2 * rows, 1e-6))
    torch.library.opcheck(norms._rope_norm, (q.clone().requires_grad_(), cos, sin, 1.2, 1e-6))
    torch.library.opcheck(norms._rope_norm_backward, (q, 2 * q, cos, sin, 1.2, 1e-6))
    torch.library.opcheck(embedding._embedding_gradient, (x, *embedding.by_id(ids, len(table))))


def compare(backend):
    for op, kernel in KERNELS.items():
        assert [found.__name__ for found in get_triton_kernels_for_op(f"nanochat::{op}")] == [kernel]
    found = results(embedding._Embedding.apply, rms_norm, rope_qk_norm,
                    lambda block: torch.compile(block, fullgraph=True, backend=backend))
    expected = results(lambda table, ids, *order: torch.nn.functional.embedding(ids, table), plain_rms_norm,
                       plain_rope_qk_norm, lambda block: block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(launched) == sorted([*KERNELS.values(), "_rope_norm_kernel", "_rope_norm_kernel"]), launched


if __name__ == "__main__":
    interpret_launches()
    opcheck() if sys.argv[1] == "opcheck" else compare(sys.argv[1])
