"""Two independent implementations as oracles in fp32: Liger-Kernel and cut-cross-entropy."""

import pytest
import torch
from kernel_cases import error, kernel_device, with_gradients

from nanochat.kernels import runtime
from nanochat.kernels.linear_cross_entropy import linear_cross_entropy
from nanochat.kernels.rms_norm import NORM_EPS, rope_qk_norm

both = pytest.mark.parametrize("implementation", ["triton", "torch"])


@pytest.fixture
def device():
    return kernel_device()


def peer(module):
    """Import a peer; the extra `dev` installs both where Triton runs."""
    return pytest.importorskip(module, exc_type=ImportError)


def numpy_function(function):
    """An elementwise function of libdevice, which the interpreter lacks, computed by numpy."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def apply(x):
        values = function(x.handle.data.astype(np.float64)).astype(np.float32)
        return runtime.tl.tensor(TensorHandle(values, x.handle.dtype), x.type)

    return apply


class Scalar(float):
    """A float argument of a kernel with the `.to` that compiled kernels have."""

    def to(self, dtype):
        return float(self)


@pytest.fixture
def libdevice(monkeypatch, device):
    """The tanh, rsqrt and log1p of the peers in the interpreter, else None."""
    if not runtime.INTERPRETED:
        return None
    import numpy as np
    from triton.language.extra import libdevice as module

    functions = {"tanh": np.tanh, "log1p": np.log1p, "rsqrt": lambda x: 1 / np.sqrt(x)}
    for name, function in functions.items():
        monkeypatch.setattr(module, name, numpy_function(function))
    return module


@pytest.fixture(params=[0.5, 30.0], ids=lambda amplitude: f"logits of {amplitude}")
def problem(request, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 96, generator=generator)
    weight = torch.randn(256, 96, generator=generator) * request.param / 96**0.5
    targets = torch.randint(0, 256, (65,), generator=generator)
    targets[::7] = -1
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def assert_agree(ours, theirs):
    assert all(error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


def assert_losses_agree(problem, implementation, theirs):
    x, weight, targets = problem
    ours = linear_cross_entropy(x, weight, targets, 256, implementation=implementation)
    assert_agree(*((loss, *torch.autograd.grad(loss, (x, weight))) for loss in (ours, theirs)))


@both
def test_the_loss_agrees_with_liger(problem, libdevice, monkeypatch, implementation):
    fused = peer("liger_kernel.ops.fused_linear_cross_entropy")
    if libdevice:
        monkeypatch.setattr("liger_kernel.ops.cross_entropy.tanh", libdevice.tanh)
    theirs = fused.LigerFusedLinearCrossEntropyFunction.apply(
        *problem, None, None, -1, 0.0, 0.0, "mean", Scalar(15.0))[0]
    assert_losses_agree(problem, implementation, theirs)


@both
def test_the_loss_agrees_with_cut_cross_entropy(problem, libdevice, monkeypatch, implementation):
    module = peer("cut_cross_entropy")

    class HalfIsSingle:
        """torch for CCE's backward, which refuses fp32 only by an assertion on the dtype."""

        float16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr("cut_cross_entropy.cce_backward.torch", HalfIsSingle())
    theirs = module.linear_cross_entropy(*problem, ignore_index=-1, softcap=15.0, filter_eps=None)
    assert_losses_agree(problem, implementation, theirs)


def test_rope_with_norm_agrees_with_liger(device, libdevice, monkeypatch):
    """Liger rotates the other way, so it gets our sine negated, and (B, H, T, D) in place."""
    rope, norm = peer("liger_kernel.ops.rope"), peer("liger_kernel.ops.rms_norm")
    if libdevice:
        monkeypatch.setattr(norm, "rsqrt", libdevice.rsqrt)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 64, generator=generator).to(device) for heads in (4, 2))
    theta = torch.outer(torch.arange(7), 100000 ** (-torch.arange(0, 64, 2) / 64)).to(device)
    cos, sin = theta.cos(), theta.sin()

    def liger(q, k):
        turned = rope.LigerRopeFunction.apply(
            q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), cos.repeat(1, 2)[None],
            -sin.repeat(1, 2)[None])
        return tuple(1.2 * norm.LigerRMSNormFunction.apply(
            x.transpose(1, 2), None, Scalar(NORM_EPS), Scalar(0.0), "llama", False, None)
            for x in turned)

    def ours(q, k):
        return rope_qk_norm(q, k, cos[None, :, None], sin[None, :, None])

    inputs = q.requires_grad_(), k.requires_grad_()
    upstream = [torch.randn(x.shape, generator=generator).to(device) for x in inputs]
    assert_agree(*(with_gradients(form, inputs, upstream) for form in (ours, liger)))
