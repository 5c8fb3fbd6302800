"""Fused RMSNorm and RoPE + QK-norm against fp64 and against the plain forms."""

import pytest
import torch
from kernel_cases import assert_as_exact, kernel_device, with_gradients

from nanochat.common import UserError
from nanochat.gpt import plain_rms_norm, plain_rope_qk_norm
from nanochat.kernels import rms_norm as module
from nanochat.kernels.rms_norm import NORM_EPS, check_rms_norm, rms_norm, rope_qk_norm

dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture
def device():
    return kernel_device()


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(function, inputs, upstream):
    return with_gradients(function, [x.detach().requires_grad_() for x in inputs], upstream)


def norm_in_fp64(x):
    return x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


def assert_norm_as_exact(x, upstream):
    ours = run(rms_norm, [x], [upstream])
    plain = run(plain_rms_norm, [x], [upstream])
    assert_as_exact(ours, plain, run(norm_in_fp64, doubles([x]), doubles([upstream])))
    assert all(result.dtype == x.dtype and result.shape == x.shape for result in ours)
    return ours


# --- RMSNorm --------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("width", [64, 80, 768, 1536])
@pytest.mark.parametrize("leading", [(3, 43), (2, 5, 7)], ids=["3d", "4d"])
def test_norm_is_as_exact_as_the_plain_norm(device, dtype, width, leading):
    x, upstream = (random(*leading, width, dtype=dtype, device=device, seed=seed)
                   for seed in (0, 1))
    assert_norm_as_exact(x, upstream)


@dtypes
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-3, 1e4])
def test_norm_of_extreme_rows_is_as_exact_as_the_plain_norm(device, dtype, magnitude):
    """At 1e-3 eps is a visible part of the mean square: it has to be that of F.rms_norm."""
    x = random(6, 96, dtype=dtype, device=device) * magnitude
    x[2] = 0
    ours = assert_norm_as_exact(x, random(6, 96, dtype=dtype, device=device, seed=1))
    assert not ours[0][2].any() and torch.isfinite(ours[1]).all()


def test_a_poisoned_row_does_not_reach_others(device):
    x = random(130, 64, device=device)
    clean = rms_norm(x)
    x[7, 3] = float("nan")
    others = torch.arange(130, device=device) != 7
    assert torch.equal(rms_norm(x)[others], clean[others]) and torch.isnan(rms_norm(x)[7]).all()


def test_norm_of_strided_inputs_and_expanded_gradients(device):
    wide, square = random(40, 200, device=device), random(96, 40, device=device)
    batch = random(2, 96, 20, device=device).transpose(1, 2)
    upstream = random(1, 96, device=device)
    for x in (wide[:, 50:146], square.T, wide[::2, :96], batch):
        gradient = upstream.expand(x.shape)
        strided = run(rms_norm, [x], [gradient])
        contiguous = run(rms_norm, [x.contiguous()], [gradient.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


# --- RoPE + QK-norm -------------------------------------------------------------------------------

def angles(n_positions, head_dim, dtype, device):
    frequency = 100000 ** (-torch.arange(0, head_dim, 2) / head_dim)
    theta = torch.outer(torch.arange(n_positions), frequency)[None, :, None]
    return theta.cos().to(device, dtype), theta.sin().to(device, dtype)


def rope_norm_by_complex_numbers(q, k, cos, sin):
    """The halves as real and imaginary parts, times exp(-i theta), in fp64."""
    def one(x):
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos, -sin)
        return 1.2 * norm_in_fp64(torch.cat((turned.real, turned.imag), dim=-1))

    return one(q), one(k)


@dtypes
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=["mha", "gqa"])
def test_rope_qk_norm_is_as_exact_as_the_plain_form(device, dtype, head_dim, heads):
    tensors = [random(2, 9, n, head_dim, dtype=dtype, device=device, seed=seed)
               for seed, n in enumerate((*heads, *heads))]
    inputs, upstream = tensors[:2], tensors[2:]
    cos, sin = angles(9, head_dim, dtype, device)

    def with_angles(function, cos, sin):
        return lambda q, k: function(q, k, cos, sin)

    exact = with_angles(rope_norm_by_complex_numbers, cos.double(), sin.double())
    ours = run(with_angles(rope_qk_norm, cos, sin), inputs, upstream)
    plain = run(with_angles(plain_rope_qk_norm, cos, sin), inputs, upstream)
    assert_as_exact(ours, plain, run(exact, doubles(inputs), doubles(upstream)))
    assert all(result.dtype == dtype for result in ours)


def test_q_and_k_may_be_views_of_one_packed_tensor(device):
    cos, sin = (x[:, 3:] for x in angles(12, 64, torch.float32, device))  # later positions
    packed = random(2, 9, 10, 64, device=device)
    heads_first = packed.transpose(1, 2).contiguous().transpose(1, 2)
    expected = plain_rope_qk_norm(packed[:, :, :6], packed[:, :, 6:8], cos, sin)
    for x in (packed, heads_first):
        found = rope_qk_norm(x[:, :, :6], x[:, :, 6:8], cos, sin)
        torch.testing.assert_close(found, expected)


# --- ops ------------------------------------------------------------------------------------------

def test_backward_twice_gives_equal_gradients(device):
    x = random(33, 96, dtype=torch.bfloat16, device=device).requires_grad_()
    y = rms_norm(x).float().square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_ops_pass_opcheck(device):
    x, upstream = random(5, 96, device=device), random(5, 96, device=device, seed=1)
    q, (cos, sin) = random(2, 5, 2, 64, device=device), angles(5, 64, torch.float32, device)
    torch.library.opcheck(module._rms_norm, (x.clone().requires_grad_(),))
    torch.library.opcheck(module._rms_norm_backward, (upstream, x))
    torch.library.opcheck(module._rope_norm, (q.clone().requires_grad_(), cos, sin))
    torch.library.opcheck(module._rope_norm_backward, (q.clone(), q, cos, sin))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor
def test_compiles_to_one_graph_with_the_same_results(device, backend):
    cos, sin = angles(5, 64, torch.float32, device)

    def block(x):
        q = rms_norm(2 * x).view(2, 5, 3, 64)
        q, k = rope_qk_norm(q, q[:, :, :1], cos, sin)
        return (q + k).transpose(1, 2)

    x, upstream = random(2, 5, 192, device=device), random(2, 3, 5, 64, device=device, seed=1)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, [x], [upstream]), run(block, [x], [upstream]))


def test_unsuitable_models_are_refused(device):
    check_rms_norm(device, torch.bfloat16)
    with pytest.raises(UserError, match="--fused-rmsnorm needs bfloat16 or float16 or float32"):
        check_rms_norm(device, torch.float64)
