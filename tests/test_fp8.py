"""fp8 training: the quantisation against fp64 emulation, the matmuls against fp64, when it applies and when not."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.fp8 import E4M3, E5M2, Fp8Weight, check_fp8, quantised, train_in_fp8
from nanochat.gpt import GPT, GPTConfig, Linear
from nanochat.optim import MuonAdamW, parameter_groups

FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}  # mantissa bits, least normal exponent, largest value
CONFIG = GPTConfig(16, 130, n_layer=1, n_head=2, n_kv_head=2, n_embd=128)  # small: a CPU multiplies fp8 one by one


def rounded(values, dtype):
    """fp64 values to the nearest of the format, ties to even, beyond the largest value that value."""
    bits, least_exponent, largest = FORMATS[dtype]
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 1e-300))), least_exponent)
    unit = 2.0 ** (exponent - bits)
    return np.clip(np.round(values / unit) * unit, -largest, largest)


def emulated(x, dtype):
    """x after quantisation with one scale, in fp64."""
    x = x.detach().double().numpy()
    scale = np.abs(x).max() / FORMATS[dtype][2]
    return rounded(x / scale, dtype) * scale


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(value, truth):
    return np.linalg.norm(value.detach().double().numpy() - truth) / np.linalg.norm(truth)


# --- the layer -------------------------------------------------------------------------------------------------------

def in_fp8(layer):
    """The optimizer of a model of one Linear, that trains it in fp8."""
    layer.chunked_ce, layer.lm_head = False, None
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    train_in_fp8(layer, optimizer, compiled=False)
    return optimizer


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30), exponent=st.integers(-20, 20))
def test_quantised_is_the_nearest_value_of_the_format(dtype, values, exponent):
    """Powers of two as largest magnitude, so that the scale is one as well and nothing else is rounded."""
    largest = FORMATS[dtype][2]
    x = torch.tensor([*values, 1.0]) * largest * 2.0**exponent
    found, scale = quantised(x, dtype)
    assert scale.dtype == torch.float32 and scale.item() == 2.0**exponent
    np.testing.assert_array_equal(found.double().numpy(), rounded(x.double().numpy() / 2.0**exponent, dtype))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantised_at_the_edges(dtype):
    zeros, scale = quantised(torch.zeros(4), dtype)
    assert not zeros.float().any() and scale.isfinite()
    for bad in (torch.nan, torch.inf):
        values, scale = quantised(torch.tensor([1.0, bad]), dtype)
        assert (values.float() * scale)[1].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lead", [(48,), (3, 16)])
def test_matmuls_agree_with_fp64_on_emulated_operands(dtype, lead):
    torch.manual_seed(0)  # a value half way between two others falls either way
    layer = Linear(256, 144)
    in_fp8(layer)
    x = normal(*lead, 256, dtype=dtype).requires_grad_()
    upstream = 1e-6 * normal(*lead, 144, seed=1, dtype=dtype)
    out = layer(x)
    out.backward(upstream)
    assert out.shape == (*lead, 144) and out.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    x8, w8 = (emulated(tensor.reshape(-1, tensor.size(-1)), E4M3) for tensor in (x, layer.weight))
    g8 = emulated(upstream.reshape(-1, 144), E5M2)
    store = 2e-3 if dtype == torch.bfloat16 else 1e-6  # rounding of the result to bf16
    assert relative(out.flatten(0, -2), x8 @ w8.T) < store
    assert relative(x.grad.flatten(0, -2), g8 @ w8) < store
    assert relative(layer.weight.grad, g8.T @ x8) < 1e-6


def test_results_are_near_those_of_fp32_but_not_them():
    layer, reference = Linear(256, 128), Linear(256, 128)
    reference.load_state_dict(layer.state_dict())
    in_fp8(layer)
    xs = [normal(64, 256).requires_grad_() for _ in range(2)]
    for x, used in zip(xs, (layer, reference), strict=True):
        (used(x) * normal(64, 128, seed=1)).sum().backward()
    for value, truth, least, most in ((layer(xs[0]), reference(xs[0]), 0.02, 0.05),
                                      (xs[0].grad, xs[1].grad, 0.04, 0.09),
                                      (layer.weight.grad, reference.weight.grad, 0.04, 0.09)):
        assert least < relative(value, truth.detach().double().numpy()) < most


def test_weights_are_quantised_once_a_step():
    layer = Linear(128, 128)
    optimizer = in_fp8(layer)
    x = normal(16, 128)
    before = layer(x)
    before.sum().backward()
    with torch.no_grad():
        layer.weight.mul_(3)  # no step of the optimizer: the quantised values stay
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)
    optimizer.step()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=0.2, atol=0.1 * before.std().item())
    assert (layer(x) - before).norm() > before.norm()


def test_evaluation_does_without():
    layer = Linear(128, 128)
    in_fp8(layer)
    x = normal(16, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight), rtol=0, atol=0)
    assert not torch.equal(layer(x), F.linear(x, layer.weight))


# --- in the model ----------------------------------------------------------------------------------------------------

def model_and_optimizer(**flags):
    model = GPT(CONFIG, **flags)
    model.init_weights(0)
    optimizer = MuonAdamW(parameter_groups(model))
    train_in_fp8(model, optimizer, compiled=False)
    return model, optimizer


def tokens():
    return torch.randint(130, (1, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunked_ce", [False, True])
def test_large_layers_and_the_head_are_in_fp8(chunked_ce):
    """Not the gates, and not the head of the chunked loss, which multiplies by itself."""
    model, _ = model_and_optimizer(chunked_ce=chunked_ce)
    used = {name for name, module in model.named_modules() if isinstance(getattr(module, "fp8", None), Fp8Weight)}
    blocks = {f"transformer.h.0.{layer}" for layer in (
        "attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert used == blocks | (set() if chunked_ce else {"lm_head"})
    ids = tokens()
    model(ids[:, :-1], ids[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpoints_do_not_know_of_it():
    model, _ = model_and_optimizer()
    plain = GPT(CONFIG)
    plain.init_weights(0)
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), plain(tokens()), rtol=0, atol=0)


def test_a_run_that_goes_back_multiplies_by_the_weights_that_it_went_back_to():
    model, optimizer = model_and_optimizer()
    ids = tokens()
    saved = {name: value.clone() for name, value in model.state_dict().items()}, optimizer.state_dict()
    before = model(ids[:, :-1], ids[:, 1:])
    before.backward()
    optimizer.step()
    assert model(ids[:, :-1], ids[:, 1:]) != before
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert model(ids[:, :-1], ids[:, 1:]) == before


def test_training_follows_that_without():
    losses = []
    for fp8 in (False, True):
        model = GPT(CONFIG)
        model.init_weights(0)
        optimizer = MuonAdamW(parameter_groups(model))
        if fp8:
            train_in_fp8(model, optimizer, compiled=False)
        ids = tokens()
        for _ in range(5):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[0] < 0.8 * math.log(130) and 0 < abs(losses[1] - losses[0]) < 0.1, losses


def test_the_compiler_gets_one_graph_with_the_same_numbers():
    model, _ = model_and_optimizer()
    ids = tokens()
    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)):
        model.zero_grad(set_to_none=True)
        loss = function(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append((loss.detach(), *(parameter.grad for parameter in model.parameters())))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("device", "dtype", "width", "n_tokens", "reason"), [
    ("cuda", torch.bfloat16, 768, 4096, "compute capability 8.9"),
    ("mps", torch.float32, 768, 4096, "this run is on mps"),
    ("cpu", torch.float16, 768, 4096, "bfloat16"),
    ("cpu", torch.bfloat16, 64, 4096, "widths from 128"),
    ("cpu", torch.bfloat16, 200, 4096, "multiples of 16"),
    ("cpu", torch.bfloat16, 768, 100, "micro-batches of a multiple of 16 tokens"),
])
def test_what_cannot_be_trained_in_fp8_is_refused(monkeypatch, device, dtype, width, n_tokens, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UserError, match=f"--fp8 .*{reason}"):
        check_fp8(torch.device(device), dtype, width, n_tokens)


def test_what_can_is_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8(torch.device("cuda"), torch.bfloat16, 768, 8192)
