"""Launches of our kernels by compiled code, with sizes and strides that the compiler worked out.

Without a GPU, the interpreter performs each launch. Run it in its own process, without
TRITON_INTERPRET: `compiled_launches.py opcheck|aot_eager|inductor`.
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
from nanochat.gpt import plain_rms_norm, plain_rope_qk_norm
from nanochat.kernels import embedding
from nanochat.kernels import rms_norm as norms
from nanochat.kernels.rms_norm import rms_norm, rope_qk_norm

KERNELS = {
    "rms_norm": "_norm_kernel",
    "rms_norm_backward": "_norm_kernel",
    "rope_norm": "_rope_norm_kernel",
    "rope_norm_backward": "_rope_norm_kernel",
    "embedding_gradient": "_rows_sum_kernel",
}
launched = []


def launch(kernel, *args, grid, num_warps=None, num_stages=None, warmup=False, **kwargs):
    """Replace JITFunction.run, with its arguments."""
    launched.append(kernel.__name__)
    InterpretedFunction(kernel.fn).run(*args, grid=grid, warmup=False, **kwargs)


def user_autotune(triton_meta, **_):
    """Replace inductor's decorator of our kernels; its code passes variables, then the grid."""
    names = [name for name, kind in triton_meta["signature"].items() if kind != "constexpr"]

    def decorated(kernel):
        def run(*args, stream):
            variables = dict(zip(names, args[:-3], strict=True))
            launch(kernel, grid=args[-3:], **variables, **triton_meta["constants"])

        return SimpleNamespace(run=run)

    return decorated


def call(kernel, *args, **kwargs):
    return InterpretedFunction(kernel.fn)(*args, **kwargs)


def interpret_launches():
    answer_for_triton(torch)
    # the interpreter leaves triton.language changed, so the backward pass has to be traced before
    torch._functorch.config.force_non_lazy_backward_lowering = True
    JITFunction.run = launch
    JITFunction.__call__ = call
    triton_heuristics.user_autotune = user_autotune
    AsyncCompile.triton = lambda _, name, source, device_str: getattr(
        PyCodeCache.load(source), name)


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 24), (24, 96), (2, 5, 2), (1, 9, 1, 8))
    table, weight, upstream, angle = (torch.randn(shape, generator=generator) for shape in shapes)
    ids = torch.randint(7, (2, 5), generator=generator)
    return table, weight, upstream, ids, angle.cos()[:, :5], angle.sin()[:, :5]


def results(look_up, norm, rope, compiled):
    """Return a block's output and gradients; q and k are strided views of one product."""
    table, weight, upstream, ids, cos, sin = tensors()
    order = embedding.by_id(ids, len(table))

    def block(table, weight):
        heads = (norm(look_up(table, ids, *order)) @ weight).unflatten(-1, (3, 2, 16))
        q, k = rope(heads[:, :, 0], heads[:, :, 1], cos, sin)
        scores = (q.transpose(1, 2) * k.transpose(1, 2)).sum(-1)
        return scores.relu().transpose(1, 2) + heads[:, :, 2].sum(-1)

    leaves = table.requires_grad_(), weight.requires_grad_()
    y = compiled(block)(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def opcheck():
    table, _, _, ids, cos, sin = tensors()
    x = table[ids]
    rows, q = x.flatten(0, 1), x[..., :16].unsqueeze(2)
    torch.library.opcheck(norms._rms_norm, (rows.clone().requires_grad_(),))
    torch.library.opcheck(norms._rms_norm_backward, (2 * rows, rows))
    torch.library.opcheck(norms._rope_norm, (q.clone().requires_grad_(), cos, sin))
    torch.library.opcheck(norms._rope_norm_backward, (2 * q, q, cos, sin))
    torch.library.opcheck(embedding._embedding_gradient, (x, *embedding.by_id(ids, len(table))))


def compare(backend):
    for op, kernel in KERNELS.items():
        [found] = get_triton_kernels_for_op(f"nanochat::{op}")
        assert found.__name__ == kernel
    found = results(embedding._Embedding.apply, rms_norm, rope_qk_norm,
                    lambda block: torch.compile(block, fullgraph=True, backend=backend))
    expected = results(lambda table, ids, *order: torch.nn.functional.embedding(ids, table),
                       plain_rms_norm, plain_rope_qk_norm, lambda block: block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    rope_twice = ["_rope_norm_kernel"] * 2  # for q and for k
    assert sorted(launched) == sorted([*KERNELS.values(), *rope_twice]), launched


if __name__ == "__main__":
    interpret_launches()
    opcheck() if sys.argv[1] == "opcheck" else compare(sys.argv[1])
