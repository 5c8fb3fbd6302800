"""Two independent peers as oracles in fp32: Liger-Kernel and cut-cross-entropy, in the interpreter or on a GPU."""

import pytest
import torch
from kernel_cases import error, kernel_device

from nanochat.kernels import runtime
from nanochat.kernels.linear_cross_entropy import linear_cross_entropy
from nanochat.kernels.rms_norm import rms_norm, rope_qk_norm

EPS = torch.finfo(torch.float32).eps
both = pytest.mark.parametrize("implementation", ["triton", "torch"])


@pytest.fixture
def device():
    return kernel_device()


def peer(module):
    """A peer's module; the extra `dev` has both peers where Triton runs."""
    return pytest.importorskip(module, exc_type=ImportError)


def numpy_function(function):
    """What the interpreter lacks, libdevice's elementwise functions, computed in fp64 by numpy."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def apply(x):
        values = function(x.handle.data.astype(np.float64)).astype(np.float32)
        return runtime.tl.tensor(TensorHandle(values, x.handle.dtype), x.type)

    return apply


class Scalar(float):
    """A kernel's float argument: compiled code sees a tensor, with `.to`; the interpreter leaves a float."""

    def to(self, dtype):
        return float(self)


@pytest.fixture
def libdevice(monkeypatch, device):
    """Liger's and CCE's tanh, rsqrt and log1p, where they would otherwise be missing."""
    if runtime.INTERPRETED:
        import numpy as np
        from triton.language.extra import libdevice as module

        for name, function in {"tanh": np.tanh, "log1p": np.log1p, "rsqrt": lambda v: 1 / np.sqrt(v)}.items():
            monkeypatch.setattr(module, name, numpy_function(function))
        return module
    return None


@pytest.fixture(params=[0.5, 3.0, 30.0], ids=lambda amplitude: f"logits of {amplitude}")
def problem(request, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, 96, generator=generator)
    weight = torch.randn(256, 96, generator=generator) * request.param / 96**0.5
    targets = torch.randint(0, 256, (65,), generator=generator)
    targets[::7] = -1
    return x.to(device).requires_grad_(), weight.to(device).requires_grad_(), targets.to(device)


def with_gradients(loss, x, weight):
    return (loss, *torch.autograd.grad(loss, (x, weight)))


def assert_agree(ours, theirs):
    assert all(error(a, b) < 1e-6 for a, b in zip(ours, theirs, strict=True))


@both
def test_loss_and_gradients_agree_with_liger(problem, libdevice, monkeypatch, implementation):
    fused = peer("liger_kernel.ops.fused_linear_cross_entropy")
    if libdevice:
        monkeypatch.setattr("liger_kernel.ops.cross_entropy.tanh", libdevice.tanh)
    x, weight, targets = problem
    theirs = fused.LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets, None, None, -1, 0.0, 0.0, "mean",
                                                              Scalar(15.0))[0]
    ours = linear_cross_entropy(x, weight, targets, 256, implementation=implementation)
    assert_agree(with_gradients(ours, x, weight), with_gradients(theirs, x, weight))


@both
def test_loss_and_gradients_agree_with_cut_cross_entropy(problem, libdevice, monkeypatch, implementation):
    module = peer("cut_cross_entropy")

    class HalfIsSingle:
        """torch as CCE's backward sees it: its fp32 gradients are refused by an assertion alone."""

        float16 = torch.float32

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr("cut_cross_entropy.cce_backward.torch", HalfIsSingle())
    x, weight, targets = problem
    theirs = module.linear_cross_entropy(x, weight, targets, ignore_index=-1, softcap=15.0, filter_eps=None)
    ours = linear_cross_entropy(x, weight, targets, 256, implementation=implementation)
    assert_agree(with_gradients(ours, x, weight), with_gradients(theirs, x, weight))


def test_norm_and_its_gradient_agree_with_liger(device, libdevice, monkeypatch):
    liger = peer("liger_kernel.ops.rms_norm")
    if libdevice:
        monkeypatch.setattr(liger, "rsqrt", libdevice.rsqrt)
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(33, 96, generator=generator).to(device) for _ in range(2))
    x.requires_grad_()
    ours = rms_norm(x)
    theirs = liger.LigerRMSNormFunction.apply(x, None, Scalar(EPS), Scalar(0.0), "llama", False, None)
    assert_agree((ours, *torch.autograd.grad(ours, x, upstream)), (theirs, *torch.autograd.grad(theirs, x, upstream)))


def test_rope_then_norm_agrees_with_liger_rope_and_norm(device, libdevice, monkeypatch):
    """Liger turns the other way: its sine is ours negated. It rotates (B, H, T, D) in place."""
    rope = peer("liger_kernel.ops.rope")
    norm = peer("liger_kernel.ops.rms_norm")
    if libdevice:
        monkeypatch.setattr(norm, "rsqrt", libdevice.rsqrt)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 64, generator=generator).to(device) for heads in (4, 2))
    theta = torch.outer(torch.arange(7), 100000 ** (-torch.arange(0, 64, 2) / 64)).to(device)
    cos, sin = theta.cos(), theta.sin()
    ours = rope_qk_norm(q, k, cos[None, :, None], sin[None, :, None])
    turned = rope.LigerRopeFunction.apply(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(),
                                          cos.repeat(1, 2)[None], -sin.repeat(1, 2)[None])
    theirs = [1.2 * norm.LigerRMSNormFunction.apply(x.transpose(1, 2), None, Scalar(EPS), Scalar(0.0), "llama", False,
                                                    None) for x in turned]
    assert_agree(ours, theirs)
