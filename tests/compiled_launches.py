"""What a compiler makes of the norms' ops for a GPU, run on a CPU: in compiled code the compiler launches our kernels
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
from nanochat.kernels import rms_norm as module
from nanochat.kernels.rms_norm import rms_norm, rope_qk_norm
from nanochat.model.plain import plain_rms_norm, plain_rope_qk_norm

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
    x, weight, upstream, angle = (torch.randn(shape, generator=generator)
                                  for shape in ((2, 5, 24), (24, 96), (2, 5, 2), (1, 9, 1, 8)))
    return x, weight, upstream, angle.cos()[:, :5], angle.sin()[:, :5]


def results(norm, rope, compiled):
    """[a block's output, its gradients]: q and k strided views into one product, the gradient of a transposed one."""
    x, weight, upstream, cos, sin = tensors()

    def block(x, weight):
        heads = (norm(x) @ weight).unflatten(-1, (3, 2, 16))
        q, k = rope(heads[:, :, 0], heads[:, :, 1], cos, sin)
        return ((q.transpose(1, 2) * k.transpose(1, 2)).sum(-1).relu().transpose(1, 2)) + heads[:, :, 2].sum(-1)

    leaves = x.requires_grad_(), weight.requires_grad_()
    y = compiled(block)(*leaves)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def opcheck():
    x, _, _, cos, sin = tensors()
    rows, q = x.flatten(0, 1), x[..., :16].unsqueeze(2)
    torch.library.opcheck(module._rms_norm, (rows.clone().requires_grad_(), 1e-6))
    torch.library.opcheck(module._rms_norm_backward, (rows, 2 * rows, 1e-6))
    torch.library.opcheck(module._rope_norm, (q.clone().requires_grad_(), cos, sin, 1.2, 1e-6))
    torch.library.opcheck(module._rope_norm_backward, (q, 2 * q, cos, sin, 1.2, 1e-6))


def compare(backend):
    for op, kernel in (("rms_norm", "_norm_kernel"), ("rope_norm", "_rope_norm_kernel")):
        for name in (op, f"{op}_backward"):  # by these a compiler's cache notices that a kernel has been edited
            assert [k.__name__ for k in get_triton_kernels_for_op(f"nanochat::{name}")] == [kernel]
    found = results(rms_norm, rope_qk_norm, lambda block: torch.compile(block, fullgraph=True, backend=backend))
    expected = results(plain_rms_norm, plain_rope_qk_norm, lambda block: block)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(launched) == 2 * ["_norm_kernel"] + 4 * ["_rope_norm_kernel"], launched


if __name__ == "__main__":
    interpret_launches()
    opcheck() if sys.argv[1] == "opcheck" else compare(sys.argv[1])
