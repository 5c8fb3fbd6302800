import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nanochat import attention
from nanochat.attention import causal_attention, choose_backend, plan_attention, why_not
from nanochat.common import UserError
from nanochat.config import TrainingConfig
from nanochat.gpt import GPTConfig


def brute_force(q, k, v, window):
    """One query, one head at a time, in fp64: softmax over the keys that the query may see."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    (rows, query_len, heads, channels), key_len = q.shape, k.shape[1]
    queries_per_kv = heads // k.shape[2]
    out = np.zeros_like(q)
    for row in range(rows):
        for i in range(query_len):
            position = key_len - query_len + i
            seen = range(max(0, position - window), position + 1)
            for head in range(heads):
                kv = head // queries_per_kv
                score = np.array([q[row, i, head] @ k[row, j, kv] for j in seen]) / math.sqrt(channels)
                weight = np.exp(score - score.max())
                out[row, i, head] = sum(w * v[row, j, kv] for w, j in zip(weight / weight.sum(), seen, strict=True))
    return torch.from_numpy(out)


def qkv(rows, query_len, key_len, heads, kv_heads, channels, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, query_len, heads, channels)] + [(rows, key_len, kv_heads, channels)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 2), query_len=st.integers(1, 9), past=st.integers(0, 9), kv_heads=st.integers(1, 3),
       group=st.integers(1, 3), channels=st.sampled_from([2, 4, 6]), window=st.integers(0, 22), seed=st.integers(0, 99))
def test_equals_brute_force(rows, query_len, past, kv_heads, group, channels, window, seed):
    q, k, v = qkv(rows, query_len, past + query_len, kv_heads * group, kv_heads, channels, seed=seed)
    out = causal_attention(q, k, v, window)
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out, brute_force(q, k, v, window), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [0, 1, 5, 11, 12, 13, 10**9])
@pytest.mark.parametrize("query_len", [1, 4, 12])
def test_edges_of_the_window(query_len, window):
    """12 keys: a window of 11 is the first that hides nothing."""
    q, k, v = qkv(2, query_len, 12, 4, 2, 8)
    torch.testing.assert_close(causal_attention(q, k, v, window), brute_force(q, k, v, window), rtol=1e-9, atol=1e-10)


def test_window_of_0_sees_only_the_token_itself():
    q, k, v = qkv(2, 7, 7, 2, 2, 4)
    torch.testing.assert_close(causal_attention(q, k, v, 0), v)


@pytest.mark.parametrize("window", [3, 100])
def test_what_a_query_does_not_see_changes_nothing(window):
    q, k, v = qkv(1, 10, 10, 2, 1, 4)
    before = causal_attention(q, k, v, window)
    for hidden in [*range(6, 10), *range(max(0, 5 - window))]:  # after position 5, and left of its window
        k[:, hidden], v[:, hidden] = 100.0, -100.0
    torch.testing.assert_close(causal_attention(q, k, v, window)[:, 5], before[:, 5], rtol=0, atol=0)


@pytest.mark.parametrize("window", [0, 2, 5, 100])
@pytest.mark.parametrize("query_len", [3, 6])
def test_gradients_are_those_of_finite_differences(query_len, window):
    tensors = [x.requires_grad_() for x in qkv(1, query_len, 6, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, window), tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(("query_len", "window"), [(33, 100), (33, 8), (1, 100), (5, 8)])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_dtype_stays_and_is_within_its_rounding(dtype, tolerance, query_len, window, kv_heads):
    q, k, v = qkv(2, query_len, 33, 4, kv_heads, 16, dtype)
    out = causal_attention(q, k, v, window)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), brute_force(q, k, v, window), rtol=tolerance, atol=tolerance)


def test_large_scores_do_not_overflow():
    q, k, v = (x * scale for x, scale in zip(qkv(1, 8, 8, 2, 2, 4, torch.float32), (1e3, 1e3, 1.0), strict=True))
    torch.testing.assert_close(causal_attention(q, k, v, 3).double(), brute_force(q, k, v, 3), rtol=1e-3, atol=1e-3)


# --- backends --------------------------------------------------------------------------------------------------------

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.mark.parametrize("backend", ["sdpa", "blockwise"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [0, 100, 300, 999])
def test_backends_agree_with_their_gradients_on_a_cpu(backend, kv_heads, window):
    tensors = [x.requires_grad_() for x in qkv(2, 300, 300, 4, kv_heads, 8)]
    upstream = torch.randn(2, 300, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = [(out := function(*tensors), *torch.autograd.grad(out, tensors, upstream)) for function in (
        lambda q, k, v: causal_attention(q, k, v, window, backend),
        lambda q, k, v: F.scaled_dot_product_attention(  # a bias of numbers, not a mask of booleans
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=torch.full((300, 300), -math.inf, dtype=torch.float64)
            .triu(1).add(torch.full((300, 300), -math.inf, dtype=torch.float64).tril(-window - 1)),
            enable_gqa=True).transpose(1, 2))]
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [0, 70, 149, 999])
def test_flex_has_the_same_numbers(window):
    """Its forward alone, and uncompiled: all that a CPU offers."""
    q, k, v = qkv(1, 150, 150, 2, 1, 16, torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        out = attention.BACKENDS["flex"](q, k, v, window)
    torch.testing.assert_close(out.double(), brute_force(q, k, v, window), rtol=1e-5, atol=1e-5)


def varlen_by_its_documentation(q, k, v, starts_q, starts_k, max_q, max_k, *, window_size):
    """Sequences end to end (T, H, D), sequence i at starts[i] to starts[i + 1]; -1 is a window without a bound."""
    left, right = (math.inf if side == -1 else side for side in window_size)
    assert starts_q.dtype == torch.int32 and torch.equal(starts_q, starts_k) and starts_q[-1] == len(q)
    outputs = []
    for start, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        assert end - start <= max_q == max_k
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / math.sqrt(q.size(-1))
        scores = scores.masked_fill((distance > left) | (-distance > right), -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [0, 3, 10, 11, 999])
def test_varlen_is_called_as_documented(monkeypatch, window):
    monkeypatch.setattr(attention, "varlen_attn", varlen_by_its_documentation)
    q, k, v = qkv(3, 12, 12, 2, 2, 8)
    torch.testing.assert_close(attention.BACKENDS["varlen"](q, k, v, window), brute_force(q, k, v, window))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 100, 128, 255, 999])
@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa", "blockwise"])
def test_backends_agree_with_their_gradients_on_a_gpu(backend, window):
    tensors = [x.to(CUDA).requires_grad_() for x in qkv(2, 256, 256, 4, 4, 64, torch.bfloat16)]
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16")
    compiled = torch.compile(lambda q, k, v: causal_attention(q, k, v, window, backend), fullgraph=True, dynamic=False)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for value, expected in zip(
            (out := compiled(*tensors), *torch.autograd.grad(out.float().square().sum(), tensors)),
            (out := causal_attention(*exact, window, "blockwise"), *torch.autograd.grad(out.square().sum(), exact)),
            strict=True):
        assert (value.double() - expected).norm() < 1e-2 * expected.norm()


# --- the choice ------------------------------------------------------------------------------------------------------

@pytest.fixture
def capability(monkeypatch):
    """A function that sets the compute capability of the only GPU."""
    return lambda *number: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: number)


@pytest.mark.parametrize(("expected", "changes"), [
    ("varlen", {}),
    ("varlen", {"compiled": False}),
    ("sdpa", {"window": 2047}),
    ("flex", {"capability": (7, 5)}),
    ("flex", {"dtype": torch.float32}),
    ("flex", {"heads": (6, 6, 260)}),
    ("flex", {"heads": (6, 3, 128)}),
    ("sdpa", {"dtype": torch.float32, "compiled": False}),
    ("sdpa", {"device": CPU}),
    ("sdpa", {"device": torch.device("mps")}),
    ("blockwise", {"device": CPU, "length": 512}),
    ("sdpa", {"device": CPU, "length": 512, "heads": (6, 3, 128)}),
])
def test_choice(capability, expected, changes):
    case = {"device": CUDA, "dtype": torch.bfloat16, "heads": (6, 6, 128), "compiled": True, "length": 2048,
            "window": 512, "capability": (9, 0), **changes}
    capability(*case.pop("capability"))
    name, reason = choose_backend(**case)
    assert name == expected and reason
    assert why_not(name, *(case[key] for key in ("device", "dtype", "heads", "compiled"))) is None


def test_the_plan_says_which_layers_run_on_what(capability):
    capability(8, 0)
    config = GPTConfig(n_layer=8)
    assert plan_attention("auto", CUDA, torch.bfloat16, config, True) == [
        "attention: varlen in 6 of 8 layers: skips the keys out of the window",
        "attention: sdpa in 2 of 8 layers: no window hides anything: torch's causal kernels"]
    assert plan_attention("flex", CUDA, torch.float32, config, True) == ["attention: flex in 8 of 8 layers: asked for"]


@pytest.mark.parametrize(("backend", "device", "dtype", "compiled", "reason"), [
    ("varlen", CPU, torch.bfloat16, True, "needs a CUDA device"),
    ("varlen", CUDA, torch.float32, True, "bfloat16 and float16 alone"),
    ("flex", CPU, torch.float32, True, "no backward pass on cpu"),
    ("flex", CUDA, torch.float32, False, "leave --no-compile out"),
])
def test_a_backend_that_cannot_train_here_is_refused(capability, backend, device, dtype, compiled, reason):
    capability(9, 0)
    with pytest.raises(UserError, match=f"--attention {backend} .*{reason}"):
        plan_attention(backend, device, dtype, GPTConfig(), compiled)


def test_the_flag_knows_every_backend():
    [flag] = [flag for flag in dataclasses.fields(TrainingConfig) if flag.name == "attention"]
    assert flag.metadata["choices"] == (flag.default, *attention.BACKENDS)


def graph_for_a_gpu(backend, windows, length):
    """What the compiler is given of layers of attention on a GPU; tracing needs none."""
    graphs = []

    def layers(x):
        for window in windows:
            x = causal_attention(x, x, x, window, backend)
        return x

    def keep(graph, inputs):
        graphs.append(graph.graph)
        return graph

    torch._dynamo.reset()
    with FakeTensorMode():
        x = torch.empty(2, length, 4, 64, dtype=torch.bfloat16, device=CUDA)
        torch.compile(layers, backend=keep, fullgraph=True, dynamic=False)(x)
    [graph] = graphs
    return graph


def test_no_dense_mask_in_a_compiled_step(capability):
    """Of the default window pattern. What the compiler makes of the whole step: dev/lowering."""
    capability(9, 0)

    def masks(graph):
        shapes = [node.meta["example_value"].shape for node in graph.nodes
                  if isinstance(node.meta.get("example_value"), torch.Tensor)]
        return [shape for shape in shapes if shape[-2:] == (2048, 2048)]

    windows = GPTConfig(2048, n_layer=4).windows
    graph = graph_for_a_gpu("auto", windows, 2048)
    names = [str(node.target) for node in graph.nodes]
    assert [sum(op in name for name in names) for op in ("_varlen_attn", "scaled_dot_product_attention")] == [3, 1]
    assert not masks(graph)
    assert masks(graph_for_a_gpu("sdpa", windows, 2048))


def test_only_a_compiled_model_may_use_cudnn(monkeypatch):
    allowed = []

    def sdpa(q, k, v, **options):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return q

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    with FakeTensorMode(), torch.device(CUDA):
        q, k = torch.empty(1, 3, 2, 8), torch.empty(1, 9, 2, 8)
        causal_attention(q, k, k, 99)
        causal_attention(k, k, k, 99, "sdpa")
        assert allowed == [False, False]
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        causal_attention(k, k, k, 99, "sdpa")
    assert allowed[2:] == [torch.backends.cuda.cudnn_sdp_enabled()] == [True]
