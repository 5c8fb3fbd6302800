"""fp8: quantisation against emulation in fp64, matmuls against fp64, and when it applies."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.fp8 import E4M3, E5M2, check_fp8, quantised, train_in_fp8
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.optim import MuonAdamW, parameter_groups

# mantissa bits, smallest normal exponent, largest value
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
CONFIG = GPTConfig(16, 130, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)


def rounded(values, dtype):
    """Round fp64 values to the nearest of the format, ties to even, clipped at its largest."""
    bits, least_exponent, largest = FORMATS[dtype]
    magnitude = np.maximum(np.abs(values), 1e-300)
    unit = 2.0 ** (np.maximum(np.floor(np.log2(magnitude)), least_exponent) - bits)
    return np.clip(np.round(values / unit) * unit, -largest, largest)


def emulated(x, dtype):
    """Return x after quantisation with one scale, in fp64."""
    x = x.detach().double().numpy()
    scale = np.abs(x).max() / FORMATS[dtype][2]
    return rounded(x / scale, dtype) * scale


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value, truth):
    return np.linalg.norm(value.detach().double().numpy() - truth) / np.linalg.norm(truth)


# --- the layer ------------------------------------------------------------------------------------

def in_fp8(layer):
    """Make one Linear multiply in fp8; return an optimizer of it."""
    layer.chunked_ce, layer.lm_head = False, None
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    train_in_fp8(layer, optimizer, compiled=False)
    return optimizer


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30),
       exponent=st.integers(-20, 20))
def test_quantised_is_the_nearest_value_of_the_format(dtype, values, exponent):
    """The largest magnitude is a power of two times the format's, so scaling rounds nothing."""
    x = torch.tensor([*values, 1.0]) * FORMATS[dtype][2] * 2.0**exponent
    found, scale = quantised(x, dtype)
    assert scale.dtype == torch.float32 and scale.item() == 2.0**exponent
    expected = rounded(x.double().numpy() / 2.0**exponent, dtype)
    np.testing.assert_array_equal(found.double().numpy(), expected)


def test_zeros_nan_and_infinity():
    zeros, scale = quantised(torch.zeros(4), E4M3)
    assert not zeros.float().any() and scale.isfinite()
    for bad in (torch.nan, torch.inf):
        values, scale = quantised(torch.tensor([1.0, bad]), E4M3)
        assert (values.float() * scale)[1].isnan()


@pytest.mark.parametrize(("dtype", "lead"), [(torch.float32, (48,)), (torch.bfloat16, (3, 16))])
def test_matmuls_agree_with_fp64_on_emulated_operands(dtype, lead):
    torch.manual_seed(0)  # a value half way between two others may be rounded either way
    layer = Linear(256, 144)
    in_fp8(layer)
    x = normal(*lead, 256, dtype=dtype).requires_grad_()
    upstream = 1e-6 * normal(*lead, 144, seed=1, dtype=dtype)
    out = layer(x)
    out.backward(upstream)
    assert out.shape == (*lead, 144) and out.dtype == x.grad.dtype == dtype
    assert layer.weight.grad.dtype == torch.float32
    x8, w8 = emulated(x.flatten(0, -2), E4M3), emulated(layer.weight, E4M3)
    g8 = emulated(upstream.flatten(0, -2), E5M2)
    rounding = 2e-3 if dtype == torch.bfloat16 else 1e-6
    assert relative(out.flatten(0, -2), x8 @ w8.T) < rounding
    assert relative(x.grad.flatten(0, -2), g8 @ w8) < rounding
    assert relative(layer.weight.grad, g8.T @ x8) < 1e-6


def test_weights_are_quantised_once_per_step_for_training_only():
    layer = Linear(128, 128)
    optimizer = in_fp8(layer)
    x = normal(16, 128)
    before = layer(x)
    before.sum().backward()
    with torch.no_grad():
        layer.weight.mul_(3)  # not a step of the optimizer, so the quantised values stay
    assert torch.equal(layer(x), before)
    optimizer.step()
    expected = F.linear(x, layer.weight)
    torch.testing.assert_close(layer(x), expected, rtol=0.2, atol=0.1 * before.std().item())
    assert (layer(x) - before).norm() > before.norm()
    with torch.no_grad():  # an evaluation does not use fp8
        assert torch.equal(layer(x), expected)


# --- the model ------------------------------------------------------------------------------------

def trainer(fp8=True, **flags):
    model = GPT(CONFIG, **flags)
    model.init_weights(0)
    optimizer = MuonAdamW(parameter_groups(model))
    if fp8:
        train_in_fp8(model, optimizer, compiled=False)
    ids = torch.randint(130, (1, 17), generator=torch.Generator().manual_seed(0))
    return model, optimizer, (ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("chunked_ce", [False, True])
def test_large_layers_and_the_head_use_fp8(chunked_ce):
    """The gates do not, nor does the head of the chunked loss, which contains its matmul."""
    model, _, batch = trainer(chunked_ce=chunked_ce)
    used = {name for name, module in model.named_modules() if getattr(module, "fp8", None)}
    layers = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    head = set() if chunked_ce else {"lm_head"}
    assert used == {f"transformer.h.0.{layer}" for layer in layers} | head
    model(*batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpoints_do_not_depend_on_fp8_and_quantised_weights_follow_a_loaded_state():
    model, optimizer, batch = trainer()
    plain, _, _ = trainer(fp8=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    before = model(*batch)
    before.backward()
    optimizer.step()
    assert model(*batch) != before
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert model(*batch) == before


def test_training_follows_that_without_fp8():
    losses = []
    for fp8 in (False, True):
        model, optimizer, batch = trainer(fp8)
        for _ in range(5):
            loss = model(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] < 0.8 * math.log(130) and 0 < abs(losses[1] - losses[0]) < 0.1, losses


def test_the_model_compiles_to_one_graph_with_the_same_results():
    model, _, batch = trainer()
    torch._dynamo.reset()
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        loss = run(*batch)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("device", "dtype", "width", "n_tokens", "reason"), [
    ("cuda", torch.bfloat16, 768, 4096, "compute capability 8.9"),
    ("mps", torch.float32, 768, 4096, "NVIDIA GPU"),
    ("cpu", torch.float16, 768, 4096, "bfloat16"),
    ("cpu", torch.bfloat16, 64, 4096, "at least 128, not 64"),
    ("cpu", torch.bfloat16, 200, 4096, "multiples of 16"),
    ("cpu", torch.bfloat16, 768, 100, "100 tokens per micro-batch"),
    ("cpu", torch.bfloat16, 768, 4096, None),
])
def test_unsuitable_runs_are_refused(monkeypatch, device, dtype, width, n_tokens, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    if reason is None:
        check_fp8(torch.device(device), dtype, width, n_tokens)
        return
    with pytest.raises(UserError, match=f"--fp8 .*{reason}"):
        check_fp8(torch.device(device), dtype, width, n_tokens)
