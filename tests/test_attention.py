"""Attention against brute force in fp64, the choice of a backend, and the compiler's graph."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat import attention
from nanochat.attention import causal_attention, choose_backend, plan_attention
from nanochat.common import UserError
from nanochat.gpt import GPTConfig

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def brute_force(q, k, v, window):
    """One query and one head at a time, in fp64: softmax over the keys that the query may see."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    (rows, query_len, heads, channels), key_len = q.shape, k.shape[1]
    queries_per_kv = heads // k.shape[2]
    out = np.zeros_like(q)
    for row, i, head in np.ndindex(rows, query_len, heads):
        position, kv = key_len - query_len + i, head // queries_per_kv
        seen = slice(max(0, position - window), position + 1)
        score = k[row, seen, kv] @ q[row, i, head] / math.sqrt(channels)
        weight = np.exp(score - score.max())
        out[row, i, head] = weight / weight.sum() @ v[row, seen, kv]
    return torch.from_numpy(out)


def qkv(rows, query_len, key_len, heads, kv_heads, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, n, channels) for length, n in (
        (query_len, heads), (key_len, kv_heads), (key_len, kv_heads))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in shapes]


def assert_exact(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 2), query_len=st.integers(1, 9), past=st.integers(0, 9),
       kv_heads=st.integers(1, 3), group=st.integers(1, 3), channels=st.sampled_from([2, 4, 6]),
       window=st.integers(0, 22), seed=st.integers(0, 99))
def test_equals_brute_force(rows, query_len, past, kv_heads, group, channels, window, seed):
    key_len = past + query_len
    q, k, v = qkv(rows, query_len, key_len, kv_heads * group, kv_heads, channels, seed=seed)
    out = causal_attention(q, k, v, window)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert_exact(out, brute_force(q, k, v, window))


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(("query_len", "window"), [(33, 100), (33, 8), (1, 100), (5, 8)])
def test_every_dtype_is_kept_and_within_its_rounding(dtype, tolerance, query_len, window):
    q, k, v = qkv(2, query_len, 33, 4, 2, 16, dtype)
    out = causal_attention(q, k, v, window)
    assert out.dtype == dtype
    expected = brute_force(q, k, v, window)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


# --- backends -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("backend", "kv_heads"), [("sdpa", 1), ("sdpa", 4), ("blockwise", 4)])
@pytest.mark.parametrize("window", [0, 100, 999])
def test_backends_agree_with_a_bias_of_numbers_on_a_cpu(backend, kv_heads, window):
    tensors = [x.requires_grad_() for x in qkv(2, 300, 300, 4, kv_heads, 8)]
    hidden = torch.full((300, 300), -math.inf, dtype=torch.float64)
    bias = hidden.triu(1) + hidden.tril(-window - 1)
    out = causal_attention(*tensors, window, backend)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in tensors), attn_mask=bias, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn_like(out)
    gradients = [torch.autograd.grad(each, tensors, upstream) for each in (out, expected)]
    assert_exact(out, expected)
    assert_exact(*gradients)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100, 128, 255, 999])
@pytest.mark.parametrize("backend", attention.BACKENDS)
def test_backends_agree_with_their_gradients_on_a_gpu(backend, window):
    def results(function, tensors):
        out = function(*tensors)
        return out, *torch.autograd.grad(out.double().square().sum(), tensors)

    tensors = [x.to(CUDA).requires_grad_() for x in qkv(2, 256, 256, 4, 4, 64, torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    compiled = torch.compile(lambda q, k, v: causal_attention(q, k, v, window, backend),
                             fullgraph=True, dynamic=False)
    expected = results(lambda q, k, v: causal_attention(q, k, v, window, "blockwise"), exact)
    for value, truth in zip(results(compiled, tensors), expected, strict=True):
        assert (value.double() - truth).norm() < 1e-2 * truth.norm()


# --- the choice of a backend ----------------------------------------------------------------------

@pytest.fixture
def capability(monkeypatch):
    """Return a function that sets the compute capability of the only GPU."""
    def set_capability(*number):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: number)

    return set_capability


@pytest.mark.parametrize(("expected", "changes"), [
    ("varlen", {}),
    ("sdpa", {"window": 2047}),
    ("sdpa", {"capability": (7, 5)}),
    ("sdpa", {"dtype": torch.float32}),
    ("sdpa", {"heads": (6, 6, 260)}),
    ("sdpa", {"heads": (6, 3, 128)}),
    ("sdpa", {"device": CPU}),
    ("sdpa", {"device": torch.device("mps")}),
    ("blockwise", {"device": CPU, "length": 512}),
    ("sdpa", {"device": CPU, "length": 512, "heads": (6, 3, 128)}),
])
def test_choice(capability, expected, changes):
    case = {"device": CUDA, "dtype": torch.bfloat16, "heads": (6, 6, 128), "length": 2048,
            "window": 512, "capability": (9, 0), **changes}
    capability(*case.pop("capability"))
    assert choose_backend(**case) == expected


def test_the_plan_names_the_backends_and_refuses_one_that_cannot_train(capability):
    capability(8, 0)
    config = GPTConfig(n_layer=8)
    line = plan_attention("auto", CUDA, torch.bfloat16, config)
    assert line == "attention: varlen in 6 of 8 layers, sdpa in 2 of 8 layers"
    line = plan_attention("sdpa", CUDA, torch.float32, config)
    assert line == "attention: sdpa in 8 of 8 layers"
    for device, dtype in ((CPU, torch.bfloat16), (CUDA, torch.float32)):
        with pytest.raises(UserError, match="--attention varlen needs"):
            plan_attention("varlen", device, dtype, config)


def test_a_compiled_step_on_a_gpu_has_no_dense_mask(capability):
    capability(9, 0)
    graphs = []

    def layers(x):
        for window in GPTConfig(2048, n_layer=4).windows:
            x = causal_attention(x, x, x, window)
        return x

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        x = torch.empty(2, 2048, 4, 64, dtype=torch.bfloat16, device=CUDA)
        torch.compile(layers, backend=keep, fullgraph=True, dynamic=False)(x)
    [graph] = graphs
    names = [str(node.target) for node in graph.nodes]
    assert sum("_varlen_attn" in name for name in names) == 3
    assert sum("scaled_dot_product_attention" in name for name in names) == 1
    values = [node.meta.get("example_value") for node in graph.nodes]
    assert not any(torch.is_tensor(x) and x.shape[-2:] == (2048, 2048) for x in values)
