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
CPU = torch.device("cpu")
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


def test_weights_are_quantised_per_step_and_load_for_training_only():
    layer = Linear(128, 128)
    optimizer = in_fp8(layer)
    x = normal(16, 128)
    before = layer(x)
    for update in (optimizer.step, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        with torch.no_grad():
            layer.weight.mul_(3)  # not a step of the optimizer, so the quantised values stay
            expected = F.linear(x, layer.weight)
            assert torch.equal(layer(x), expected), "an evaluation does not use fp8"
        assert torch.equal(layer(x), before)
        update()
        after = layer(x)
        assert (after - expected).norm() < 0.1 * expected.norm()
        assert (after - before).norm() > before.norm()
        before = after


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
    model, _, _ = trainer(chunked_ce=chunked_ce)
    used = {name for name, module in model.named_modules() if getattr(module, "fp8", None)}
    layers = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    head = set() if chunked_ce else {"lm_head"}
    assert used == {f"transformer.h.0.{layer}" for layer in layers} | head
    assert list(model.state_dict()) == list(trainer(fp8=False)[0].state_dict())


def test_training_follows_that_without_fp8_and_compiles_to_one_graph():
    model, _, batch = trainer()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*batch), model(*batch), rtol=1e-4, atol=1e-6)
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


@pytest.mark.parametrize(("device", "dtype", "width", "n_tokens"), [
    ("cuda", torch.bfloat16, 768, 4096),  # of too low a compute capability
    ("mps", torch.float32, 768, 4096),
    ("cpu", torch.float16, 768, 4096),
    ("cpu", torch.bfloat16, 64, 4096),
    ("cpu", torch.bfloat16, 200, 4096),
    ("cpu", torch.bfloat16, 768, 100),
])
def test_unsuitable_runs_are_refused(monkeypatch, device, dtype, width, n_tokens):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    check_fp8(CPU, torch.bfloat16, 768, 4096)
    with pytest.raises(UserError, match="--fp8"):
        check_fp8(torch.device(device), dtype, width, n_tokens)
