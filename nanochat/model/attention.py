"""Causal attention with an optional sliding window, behind one function with two backends."""

import math

import torch
import torch.nn.functional as F

# On a CPU, SDPA's backward is slow: for short sequences the scores of one block of queries at a time, matmuls and
# softmax left to the compiler, took half its time (dev/LOG.md). Longer ones would need too much memory for the scores.
BLOCKWISE_MAX_LENGTH = 512
BLOCK_QUERIES = 128


def causal_attention(q, k, v, window):
    """Causal attention of the last queries over all keys.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; any float dtype.
    Query i sits at position Tk - Tq + i and sees itself and up to `window` tokens to its left.
    Scale 1/sqrt(D). Returns (B, Tq, H, D) in q's dtype.
    """
    query_len, key_len = q.size(1), k.size(1)
    if q.device.type == "cpu" and query_len == key_len <= BLOCKWISE_MAX_LENGTH and q.size(2) == k.size(2):
        return _blockwise(q, k, v, window)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grouped = q.size(2) != k.size(2)
    sees_all = window >= key_len - 1
    if sees_all and query_len == key_len:
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
    else:
        query = torch.arange(key_len - query_len, key_len, device=q.device)
        mask = None if sees_all and query_len == 1 else _visible(query, torch.arange(key_len, device=q.device), window)
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def _blockwise(q, k, v, window):
    """Self-attention block of queries by block of queries, each with the keys that its queries can see alone."""
    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    position = torch.arange(T, device=q.device)
    outputs = []
    for start in range(0, T, BLOCK_QUERIES):
        queries = slice(start, min(start + BLOCK_QUERIES, T))
        keys = slice(max(0, start - window), queries.stop)
        scores = (q[:, queries] @ k[:, keys].mT).to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(D)
        scores = scores.masked_fill(~_visible(position[queries], position[keys], window), -math.inf)
        outputs.append(torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, keys])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2)


def _visible(query, key, window):
    """Boolean (queries, keys): causal, and no further to the left than the window."""
    distance = query.unsqueeze(1) - key
    return (distance >= 0) & (distance <= window)
