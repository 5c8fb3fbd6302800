"""Fused RoPE + QK-norm against complex numbers in fp64 and against the plain form."""

import pytest
import torch
from kernel_cases import assert_as_exact, error, kernel_device, with_gradients

from nanochat.common import UserError
from nanochat.gpt import plain_rope_qk_norm
from nanochat.kernels import rms_norm as module
from nanochat.kernels.rms_norm import NORM_EPS, check_rms_norm, rope_qk_norm

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture
def device():
    return kernel_device()


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def angles(n_positions, head_dim, dtype, device):
    frequency = 100000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    theta = torch.outer(torch.arange(n_positions), frequency)[None, :, None]
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def by_complex_numbers(q, k, cos, sin):
    """The halves as real and imaginary parts, times exp(-i theta), in fp64."""
    def one(x):
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos, -sin)
        x = torch.cat((turned.real, turned.imag), dim=-1)
        return 1.2 * x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()

    return one(q), one(k)


def run(function, tensors, cos, sin):
    """Return the outputs and the gradients at q, k; tensors: q, k and the upstream gradients."""
    q, k = (x.detach().requires_grad_() for x in tensors[:2])
    return with_gradients(lambda q, k: function(q, k, cos, sin), [q, k], tensors[2:])


def assert_exact(tensors, cos, sin):
    ours, plain = (run(form, tensors, cos, sin) for form in (rope_qk_norm, plain_rope_qk_norm))
    doubles = [x.double() for x in tensors]
    assert_as_exact(ours, plain, run(by_complex_numbers, doubles, cos.double(), sin.double()))
    assert all(result.dtype == tensors[0].dtype for result in ours)
    return ours


@dtypes
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["mha", "gqa"])
def test_is_as_exact_as_the_plain_form(device, dtype, head_dim, heads):
    tensors = [random(2, 9, n, head_dim, dtype=dtype, device=device, seed=seed)
               for seed, n in enumerate((*heads, *heads))]
    assert_exact(tensors, *angles(9, head_dim, dtype, device))


@pytest.mark.parametrize("form", [plain_rope_qk_norm, rope_qk_norm])
def test_bf16_results_are_rounded_once(device, form):
    """One rounding gives 1.7e-3; rotating in bf16 before the norm gave 3.0e-3."""
    tensors = [random(2, 64, 4, 128, dtype=torch.bfloat16, device=device, seed=seed)
               for seed in range(4)]
    cos, sin = angles(64, 128, torch.bfloat16, device)
    doubles = [x.double() for x in tensors]
    exact = run(by_complex_numbers, doubles, cos.double(), sin.double())
    errors = [error(*pair) for pair in zip(run(form, tensors, cos, sin), exact, strict=True)]
    assert max(errors) < 1.8e-3, errors


@dtypes
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-3, 1e4])
def test_extreme_rows_are_as_exact_as_in_the_plain_form(device, dtype, magnitude):
    """At 1e-3 eps is a visible part of the mean square: it has to be that of F.rms_norm."""
    tensors = [random(1, 3, 2, 64, dtype=dtype, device=device, seed=seed) for seed in range(4)]
    tensors[0] *= magnitude
    tensors[0][:, 1] = 0
    ours = assert_exact(tensors, *angles(3, 64, dtype, device))
    assert not ours[0][:, 1].any() and torch.isfinite(ours[2]).all()


def test_q_and_k_may_be_views_and_gradients_expanded(device):
    cos, sin = (x[:, 3:] for x in angles(12, 64, torch.float32, device))  # later positions
    packed = random(2, 9, 10, 64, device=device)
    heads_first = packed.transpose(1, 2).contiguous().transpose(1, 2)
    upstream = [random(64, device=device).expand(2, 9, n, 64) for n in (6, 2)]
    expected = run(plain_rope_qk_norm, [packed[:, :, :6], packed[:, :, 6:8], *upstream], cos, sin)
    for x in (packed, heads_first):
        found = run(rope_qk_norm, [x[:, :, :6], x[:, :, 6:8], *upstream], cos, sin)
        torch.testing.assert_close(found, expected)


def test_ops_pass_opcheck(device):
    q, (cos, sin) = random(2, 5, 2, 64, device=device), angles(5, 64, torch.float32, device)
    torch.library.opcheck(module._rope_norm, (q.clone().requires_grad_(), cos, sin))
    torch.library.opcheck(module._rope_norm_backward, (q.clone(), q, cos, sin))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor
def test_compiles_to_one_graph_with_the_same_results(device, backend):
    cos, sin = angles(5, 64, torch.float32, device)

    def block(x):
        q = (2 * x).view(2, 5, 3, 64)
        q, k = rope_qk_norm(q, q[:, :, :1], cos, sin)
        return (q + k).transpose(1, 2)

    x, upstream = random(2, 5, 192, device=device), random(2, 3, 5, 64, device=device, seed=1)
    x.requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(with_gradients(compiled, [x], [upstream]),
                               with_gradients(block, [x], [upstream]))


def test_unsuitable_models_are_refused(device):
    check_rms_norm(device, torch.bfloat16)
    with pytest.raises(UserError, match="--fused-rmsnorm cannot run"):
        check_rms_norm(device, torch.float64)
