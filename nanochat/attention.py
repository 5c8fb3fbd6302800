"""Causal attention with an optional sliding window, behind one function with four backends.

sdpa       torch's scaled_dot_product_attention; a window that hides something is a dense (T, T) mask
varlen     FlashAttention 2, or 3 where it is installed and activated: skips the blocks of keys out of the window
flex       FlexAttention, a kernel that the compiler writes: skips them by a table of the blocks that are seen
blockwise  plain matmuls and softmax, one block of queries and the keys that it sees at a time
"""

import importlib.util
import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from nanochat.common import UserError

# On a CPU, SDPA's backward is slow: for short sequences the scores of one block of queries at a time, matmuls and
# softmax left to the compiler, took half its time (dev/LOG.md). Longer ones would need too much memory for the scores.
BLOCKWISE_MAX_LENGTH = 512
BLOCK_QUERIES = 128
# All but cuDNN, which plans anew for every shape (23 to 37 ms, issue trackers say): prompts come in many.
FOR_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(q, k, v, window, backend="auto"):
    """Causal attention of the last queries over all keys.

    q (B, Tq, H, D); k, v (B, Tk, Hkv, D) with Tk >= Tq and H a multiple of Hkv; any float dtype.
    Query i sits at position Tk - Tq + i and sees itself and up to `window` tokens to its left.
    Scale 1/sqrt(D). Returns (B, Tq, H, D) in q's dtype. A `backend` that cannot run here, and any for
    Tq < Tk (decoding), gives way to the one that can.
    """
    if q.size(1) != k.size(1):
        return _sdpa(q, k, v, window)
    where = q.device, q.dtype, (q.size(2), k.size(2), q.size(3)), torch.compiler.is_compiling()
    if backend == "auto" or why_not(backend, *where):
        backend, _ = choose_backend(*where, q.size(1), window)
    return BACKENDS[backend](q, k, v, window)


# --- the choice ------------------------------------------------------------------------------------------------------

def choose_backend(device, dtype, heads, compiled, length, window):
    """(backend, the reason in words) for self-attention over `length` tokens; heads: (H, Hkv, D)."""
    if device.type == "cpu" and length <= BLOCKWISE_MAX_LENGTH and heads[0] == heads[1]:
        return "blockwise", "rows are short, and its backward is the fastest on a CPU"
    if device.type != "cuda":
        return "sdpa", "no other backend trains here"
    if window >= length - 1:
        return "sdpa", "no window hides anything: torch's causal kernels"
    if not why_not("varlen", device, dtype, heads, compiled):
        return "varlen", "skips the keys out of the window"
    if not why_not("flex", device, dtype, heads, compiled):
        return "flex", "skips the keys out of the window; varlen cannot run here"
    return "sdpa", "reads a dense mask: neither varlen nor flex can run here"


def why_not(backend, device, dtype, heads, compiled):
    """Why a backend cannot train with such tensors, in words; None where it can."""
    n_head, n_kv_head, head_dim = heads
    if backend == "varlen":
        if device.type != "cuda" or _capability(device) < (8, 0):
            return "needs a CUDA device of compute capability 8.0 or more"
        if dtype not in (torch.bfloat16, torch.float16):
            return "works in bfloat16 and float16 alone"
        if head_dim % 8 or head_dim > 256:
            return f"takes heads of up to 256 channels, a multiple of 8, not {head_dim}"
        if n_head != n_kv_head:
            return "takes one key/value head for each query head"
    if backend == "flex":
        if device.type != "cuda":
            return f"has no backward pass on {device.type}"
        if not compiled:
            return "needs the compiler: leave --no-compile out"
        if head_dim < 16:
            return f"takes heads of 16 channels or more, not {head_dim}"
    return None


def plan_attention(backend, device, dtype, config, compiled):
    """Activate what `backend` (--attention) needs on this device; returns lines that say which layers run on what.

    config: a GPTConfig. Errors: UserError where the backend cannot train such a model here.
    """
    heads = config.n_head, config.n_kv_head, config.head_dim
    reason = why_not(backend, device, dtype, heads, compiled)
    if reason:
        raise UserError(f"--attention {backend} {reason}; --attention auto takes what runs here")
    layers = defaultdict(list)
    for layer, window in enumerate(config.windows):
        choice = (backend, "asked for") if backend != "auto" else choose_backend(
            device, dtype, heads, compiled, config.sequence_len, window)
        layers[choice].append(layer)
    flash = ""
    if any(name == "varlen" for name, _ in layers) and _capability(device)[0] == 9 \
            and importlib.util.find_spec("flash_attn_interface"):
        activate_flash_attention_impl("FA3")
        flash = " by FlashAttention 3"
    return [f"attention: {name}{flash if name == 'varlen' else ''} in {len(of)} of {config.n_layer} layers: {reason}"
            for (name, reason), of in layers.items()]


@torch.compiler.assume_constant_result
def _capability(device):
    return torch.cuda.get_device_capability(device)


# --- the backends ----------------------------------------------------------------------------------------------------

def _sdpa(q, k, v, window):
    query_len, key_len = q.size(1), k.size(1)
    sees_all = window >= key_len - 1
    mask, is_causal = None, False
    if sees_all and query_len == key_len:  # not an expression: of lengths that vary, the compiler makes a symbol
        is_causal = True
    elif not sees_all or query_len > 1:
        query = torch.arange(key_len - query_len, key_len, device=q.device)
        mask = _visible(query, torch.arange(key_len, device=q.device), window)
    arguments = {"attn_mask": mask, "is_causal": is_causal, "enable_gqa": q.size(2) != k.size(2)}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and not torch.compiler.is_compiling():  # a compiled model has the same shape in every step
        with sdpa_kernel(FOR_ANY_SHAPE):
            return F.scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **arguments).transpose(1, 2)


def _varlen(q, k, v, window):
    """The rows of a batch, end to end, are sequences of one length."""
    B, T = q.shape[:2]
    starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    left = -1 if window >= T - 1 else window
    out = varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), starts, starts, T, T, window_size=(left, 0))
    return out.unflatten(0, (B, T))


def _flex(q, k, v, window):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # slow to import

    def visible(batch, head, query, key):
        return (query >= key) & (query - key <= window)

    blocks = create_block_mask(visible, None, None, q.size(1), q.size(1), device=q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(*heads_first, block_mask=blocks, enable_gqa=q.size(2) != k.size(2)).transpose(1, 2)


def _blockwise(q, k, v, window):
    """Self-attention block of queries by block of queries, each with the keys that its queries can see alone."""
    B, T, H, D = q.shape
    k, v = (x.repeat_interleave(H // x.size(2), dim=2) if x.size(2) != H else x for x in (k, v))
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


BACKENDS = {"varlen": _varlen, "flex": _flex, "sdpa": _sdpa, "blockwise": _blockwise}


def _visible(query, key, window):
    """Boolean (queries, keys): causal, and no further to the left than the window."""
    distance = query.unsqueeze(1) - key
    return (distance >= 0) & (distance <= window)
