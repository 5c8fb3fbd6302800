"""Causal attention with an optional sliding window: one function, three backends.

sdpa       torch's scaled_dot_product_attention; a window that hides keys is a dense (T, T) mask
varlen     FlashAttention 2, or 3 if installed, which skips key blocks outside the window
blockwise  plain matmuls and softmax for one block of queries and the keys it can see at a time;
           needs one key/value head per query head
"""

import importlib.util
import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from nanochat.common import UserError

# The backward pass of SDPA is slow on a CPU. For short sequences, blockwise attention took half its
# time (dev/LOG.md); for longer ones its scores would need too much memory.
BLOCKWISE_MAX_LENGTH = 512
BLOCK_QUERIES = 128

# All SDPA kernels except cuDNN, which takes tens of milliseconds per new shape to plan, and prompts
# have many lengths.
ANY_SHAPE_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(q, k, v, window, backend="auto"):
    """Return the causal attention of the last queries over all keys, (B, Tq, H, D) in q's dtype.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; any float dtype.
    Query i has position Tk - Tq + i and sees itself and up to `window` tokens to its left. The
    scale is 1/sqrt(D). Decoding (Tq < Tk) always uses sdpa.
    """
    if q.size(1) != k.size(1):
        return _sdpa(q, k, v, window)
    if backend == "auto":
        heads = q.size(2), k.size(2), q.size(3)
        backend = choose_backend(q.device, q.dtype, heads, q.size(1), window)
    return BACKENDS[backend](q, k, v, window)


def choose_backend(device, dtype, heads, length, window):
    """Return the fastest backend for self-attention over `length` tokens; heads: (H, Hkv, D)."""
    if device.type == "cpu" and length <= BLOCKWISE_MAX_LENGTH and heads[0] == heads[1]:
        return "blockwise"
    hides_keys = window < length - 1
    return "varlen" if hides_keys and supports_varlen(device, dtype, heads) else "sdpa"


def supports_varlen(device, dtype, heads):
    """Return whether FlashAttention can run with such tensors."""
    n_head, n_kv_head, head_dim = heads
    return (device.type == "cuda" and _capability(device) >= (8, 0)
            and dtype in (torch.bfloat16, torch.float16)
            and head_dim % 8 == 0 and head_dim <= 256 and n_head == n_kv_head)


def plan_attention(backend, device, dtype, config):
    """Return a log line with the layers' backends; activate FlashAttention 3 where it applies.

    backend: the value of --attention. Raise UserError if it cannot train such a model here.
    """
    heads = config.n_head, config.n_kv_head, config.head_dim
    if backend == "varlen" and not supports_varlen(device, dtype, heads):
        raise UserError("--attention varlen needs a CUDA device of compute capability 8.0 or "
                        "higher, bfloat16, and --head-dim a multiple of 8 up to 256; use "
                        "--attention auto")
    names = [backend] * config.n_layer
    if backend == "auto":
        names = [choose_backend(device, dtype, heads, config.sequence_len, window)
                 for window in config.windows]
    has_fa3 = importlib.util.find_spec("flash_attn_interface") is not None
    if "varlen" in names and has_fa3 and _capability(device)[0] == 9:
        activate_flash_attention_impl("FA3")
    counts = Counter(names).items()
    return "attention: " + ", ".join(f"{name} in {n} of {len(names)} layers" for name, n in counts)


@torch.compiler.assume_constant_result
def _capability(device):
    return torch.cuda.get_device_capability(device)


# --- the backends ---------------------------------------------------------------------------------

def _sdpa(q, k, v, window):
    query_len, key_len = q.size(1), k.size(1)
    sees_all = window >= key_len - 1
    mask, is_causal = None, False
    if sees_all and query_len == key_len:  # an expression could become a symbol in compiled code
        is_causal = True
    elif not sees_all or query_len > 1:
        query = torch.arange(key_len - query_len, key_len, device=q.device)
        mask = _visible(query, torch.arange(key_len, device=q.device), window)
    options = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": q.size(2) != k.size(2)}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and not torch.compiler.is_compiling():
        with sdpa_kernel(ANY_SHAPE_KERNELS):
            return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _varlen(q, k, v, window):
    """Treat the rows of the batch as consecutive sequences of equal length."""
    B, T = q.shape[:2]
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    left = -1 if window >= T - 1 else window
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, starts, starts, T, T, window_size=(left, 0))
    return out.unflatten(0, (B, T))


def _blockwise(q, k, v, window):
    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B * H, T, D) for x in (q, k, v))
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    position = torch.arange(T, device=q.device)
    outputs = []
    for start in range(0, T, BLOCK_QUERIES):
        queries = slice(start, min(start + BLOCK_QUERIES, T))
        keys = slice(max(0, start - window), queries.stop)
        scores = (q[:, queries] @ k[:, keys].mT).to(score_dtype) / math.sqrt(D)
        hidden = ~_visible(position[queries], position[keys], window)
        scores = scores.masked_fill(hidden, -math.inf)
        outputs.append(torch.softmax(scores, dim=-1).to(v.dtype) @ v[:, keys])
    return torch.cat(outputs, dim=1).view(B, H, T, D).transpose(1, 2)


BACKENDS = {"varlen": _varlen, "sdpa": _sdpa, "blockwise": _blockwise}


def _visible(query, key, window):
    """Return a boolean (queries, keys) mask: causal, and at most `window` tokens to the left."""
    distance = query.unsqueeze(1) - key
    return (distance >= 0) & (distance <= window)
