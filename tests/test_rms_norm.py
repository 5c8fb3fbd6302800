"""Fused RMSNorm and RoPE + QK-norm against fp64 and against the unfused forms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import assert_as_exact, kernel_device

from nanochat.common import UserError
from nanochat.kernels import rms_norm as module
from nanochat.kernels.rms_norm import check_rms_norm, rms_norm, rope_qk_norm
from nanochat.kernels.runtime import triton
from nanochat.gpt import plain_rms_norm, plain_rope_qk_norm

EPS = torch.finfo(torch.float32).eps
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture
def device():
    return kernel_device()


def random(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def with_gradients(function, inputs, upstream):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs, inputs, upstream))


def norm_in_fp64(x, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def doubles(tensors):
    return [tensor.double() for tensor in tensors]


# --- RMSNorm ---------------------------------------------------------------------------------------------------------

@dtypes
@pytest.mark.parametrize("width", [64, 80, 96, 128, 512, 768, 1536, 2048])
@pytest.mark.parametrize("leading", [(3, 43), (2, 5, 7)], ids=["3d", "4d"])
def test_norm_matches_fp64_as_well_as_the_unfused_norm(device, dtype, width, leading):
    x, upstream = (random(*leading, width, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    ours = with_gradients(rms_norm, [x], [upstream])
    assert_as_exact(ours, with_gradients(plain_rms_norm, [x], [upstream]),
                    with_gradients(norm_in_fp64, doubles([x]), doubles([upstream])))
    assert all(result.dtype == dtype and result.shape == x.shape for result in ours)


@dtypes
@pytest.mark.parametrize("magnitude", [0.0, 1e-20, 1e-3, 1e4])
def test_norm_of_extreme_rows_is_as_exact_as_the_unfused_norm(device, dtype, magnitude):
    """Of 1e-3 the eps is a visible part: it has to be F.rms_norm's default."""
    x = random(6, 96, dtype=dtype, device=device) * magnitude
    x[2] = 0
    upstream = random(6, 96, dtype=dtype, device=device, seed=1)
    ours = with_gradients(rms_norm, [x], [upstream])
    assert_as_exact(ours, with_gradients(plain_rms_norm, [x], [upstream]),
                    with_gradients(norm_in_fp64, doubles([x]), doubles([upstream])))
    assert not ours[0][2].any() and torch.isfinite(ours[1]).all()


def test_a_poisoned_row_stays_alone(device):
    x = random(130, 64, device=device)
    clean = rms_norm(x)
    x[7, 3] = float("nan")
    others = torch.arange(130, device=device) != 7
    assert torch.equal(rms_norm(x)[others], clean[others]) and torch.isnan(rms_norm(x)[7]).all()


def test_norm_of_sliced_and_transposed_inputs_and_expanded_gradients(device):
    wide, square = random(40, 200, device=device), random(96, 40, device=device)
    upstream = random(1, 96, device=device).expand(40, 96)
    for x in (wide[:, 50:146], square.T, wide[::2, :96], random(2, 96, 20, device=device).transpose(1, 2)):
        g = upstream[:x.numel() // 96].reshape(x.shape) if x.dim() == 3 else upstream[:len(x)]
        strided = with_gradients(rms_norm, [x], [g])
        contiguous = with_gradients(rms_norm, [x.contiguous()], [g.contiguous()])
        assert all(torch.equal(a, b) for a, b in zip(strided, contiguous, strict=True))


def test_norm_takes_eps_empty_inputs_and_frozen_ones(device):
    x = random(4, 64, device=device)
    torch.testing.assert_close(rms_norm(x, eps=0.1), F.rms_norm(x, (64,), eps=0.1))
    assert rms_norm(x[:0]).shape == (0, 64)
    assert not rms_norm(x).requires_grad
    with torch.no_grad():
        assert not rms_norm(x.requires_grad_()).requires_grad


# --- RoPE + QK-norm --------------------------------------------------------------------------------------------------

def angles(n_positions, head_dim, dtype, device):
    theta = torch.outer(torch.arange(n_positions), 100000 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return tuple(f(theta)[None, :, None].to(device, dtype) for f in (torch.cos, torch.sin))


def rope_norm_by_complex_numbers(q, k, cos, sin):
    """The same in fp64: halves as real and imaginary part, times exp(-i theta)."""
    def one(x):
        first, second = x.chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.complex(cos, -sin)
        return 1.2 * norm_in_fp64(torch.cat((turned.real, turned.imag), dim=-1))
    return one(q), one(k)


@dtypes
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=["mha", "gqa", "mqa"])
def test_rope_qk_norm_matches_fp64_as_well_as_the_unfused_form(device, dtype, head_dim, heads):
    q, k, gq, gk = (random(2, 9, n, head_dim, dtype=dtype, device=device, seed=seed)
                    for seed, n in enumerate((*heads, *heads)))
    cos, sin = angles(9, head_dim, dtype, device)
    ours = with_gradients(lambda q, k: rope_qk_norm(q, k, cos, sin), [q, k], [gq, gk])
    plain = with_gradients(lambda q, k: plain_rope_qk_norm(q, k, cos, sin), [q, k], [gq, gk])
    exact = with_gradients(lambda q, k: rope_norm_by_complex_numbers(q, k, cos.double(), sin.double()),
                           doubles([q, k]), doubles([gq, gk]))
    assert_as_exact(ours, plain, exact)
    assert all(result.dtype == dtype for result in ours)


def test_q_and_k_may_be_views_into_one_packed_projection(device):
    packed, (cos, sin) = random(2, 9, 10, 64, device=device), angles(12, 64, torch.float32, device)
    cos, sin = cos[:, 3:], sin[:, 3:]  # a later stretch of positions, as in decoding
    q, k = packed[:, :, :6], packed[:, :, 6:8]
    expected = rope_qk_norm(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(rope_qk_norm(q, k, cos, sin), expected, strict=True))
    torch.testing.assert_close(expected, plain_rope_qk_norm(q, k, cos, sin))
    heads_first = packed.transpose(1, 2).contiguous().transpose(1, 2)
    again = rope_qk_norm(heads_first[:, :, :6], heads_first[:, :, 6:8], cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_only_the_inputs_that_need_it_get_a_gradient(device):
    q, k = random(1, 5, 2, 64, device=device).requires_grad_(), random(1, 5, 2, 64, device=device)
    turned_q, turned_k = rope_qk_norm(q, k, *angles(5, 64, torch.float32, device))
    assert turned_q.requires_grad and not turned_k.requires_grad
    turned_q.sum().backward()
    assert q.grad.shape == q.shape


# --- as ops ----------------------------------------------------------------------------------------------------------

def test_backward_twice_gives_equal_gradients(device):
    x = random(33, 96, dtype=torch.bfloat16, device=device).requires_grad_()
    y, upstream = rms_norm(x), random(33, 96, dtype=torch.bfloat16, device=device, seed=1)
    first, second = (torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    q = random(1, 5, 2, 64, device=device).requires_grad_()
    y, _ = rope_qk_norm(q, q, *angles(5, 64, torch.float32, device))
    first, second = (torch.autograd.grad(y.square().sum(), q, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_ops_pass_opcheck(device):
    x, upstream = random(5, 96, device=device), random(5, 96, device=device, seed=1)
    q, (cos, sin) = random(2, 5, 2, 64, device=device), angles(5, 64, torch.float32, device)
    torch.library.opcheck(module._rms_norm, (x.clone().requires_grad_(), EPS))
    torch.library.opcheck(module._rms_norm_backward, (x, upstream, EPS))
    torch.library.opcheck(module._rope_norm, (q.clone().requires_grad_(), cos, sin, 1.2, EPS))
    torch.library.opcheck(module._rope_norm_backward, (q, q.clone(), cos, sin, 1.2, EPS))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # raised while inductor is imported
def test_compiles_whole_and_gives_what_eager_gives(device, backend):
    cos, sin = angles(5, 64, torch.float32, device)

    def block(x):
        q = rms_norm(2 * x).view(2, 5, 3, 64)
        q, k = rope_qk_norm(q, q[:, :, :1], cos, sin)
        return (q + k).transpose(1, 2)

    x, upstream = random(2, 5, 192, device=device), random(2, 3, 5, 64, device=device, seed=1)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    torch.testing.assert_close(with_gradients(compiled, [x], [upstream]), with_gradients(block, [x], [upstream]))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton; a GPU has the tests above")
@pytest.mark.parametrize("check", ["aot_eager", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("opcheck", "inductor"))])
def test_what_a_compiler_launches_by_itself(check):
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, tests / "compiled_launches.py", check], capture_output=True, text=True,
                         env=environment | {"PYTHONPATH": str(tests.parent)})
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("changes", "words"), [
    ({"dtype": torch.float64}, "bfloat16 or float16 or float32"),
    ({"model_dim": 20000}, "width up to"),
    ({"head_dim": 65}, "even head size"),
    ({"head_dim": 1024}, "head size up to"),
])
def test_unsuitable_models_are_refused_in_one_line(device, changes, words):
    arguments = {"device": device, "dtype": torch.bfloat16, "model_dim": 768, "head_dim": 128, **changes}
    check_rms_norm(device, torch.bfloat16, 768, 128)
    with pytest.raises(UserError, match=words) as caught:
        check_rms_norm(**arguments)
    assert "\n" not in str(caught.value)
