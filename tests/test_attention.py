import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.model.attention import causal_attention


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
