"""Causal attention with an optional sliding window, behind one function; the backend is torch's SDPA."""

import torch
import torch.nn.functional as F


def causal_attention(q, k, v, window):
    """Causal attention of the last queries over all keys.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; any float dtype.
    Query i sits at position Tk - Tq + i and sees itself and up to `window` tokens to its left.
    Scale 1/sqrt(D). Returns (B, Tq, H, D) in q's dtype.
    """
    query_len, key_len = q.size(1), k.size(1)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    grouped = q.size(2) != k.size(2)
    sees_all = window >= key_len - 1
    if sees_all and query_len == key_len:
        out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
    else:
        mask = None if sees_all and query_len == 1 else _window_mask(query_len, key_len, window, q.device)
        out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def _window_mask(query_len, key_len, window, device):
    query = torch.arange(key_len - query_len, key_len, device=device).unsqueeze(1)
    distance = query - torch.arange(key_len, device=device)
    return (distance >= 0) & (distance <= window)
