"""The model: a decoder-only transformer with rotary attention, value embeddings, smear and backout.

Master weights are fp32; matmuls use copies in the compute dtype, in which embeddings are stored.
State-dict names are those of upstream nanochat. Lane C's kernels can replace `plain_*` functions.
"""

import itertools
import math
import zlib
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.attention import causal_attention
from nanochat.common import UserError
from nanochat.kernels.embedding import lookup
from nanochat.kernels.linear_cross_entropy import IGNORED, SOFTCAP, linear_cross_entropy
from nanochat.kernels.rms_norm import NORM_EPS, QK_SCALE, rope_qk_norm

VOCAB_MULTIPLE = 64
ROTARY_BASE = 100_000.0
ROTARY_LENGTH_FACTOR = 10  # decoding may be this many times as long as the training sequences
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
SHORT_WINDOW_MULTIPLE = 128
# Largest sizes of a model: larger ones are mistakes that would hang the program.
LARGEST = {"sequence_len": 1 << 24, "vocab_size": 1 << 30, "n_layer": 10_000, "n_head": 1 << 16,
           "n_kv_head": 1 << 16, "n_embd": 1 << 20}


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model; the field names are the keys of `model_config` in a checkpoint."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"

    def __post_init__(self):
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= largest:
                raise UserError(f"{name} {str(value)[:40]} is not an integer from 1 to {largest:,}")
        if self.n_embd % self.n_head or self.head_dim % 2:
            raise UserError(f"width {self.n_embd} is not {self.n_head} heads of an even size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} query heads cannot share {self.n_kv_head} key heads")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"--window-pattern {self.window_pattern!r} must be of S and L (full)")

    @classmethod
    def from_dict(cls, values):
        """Build from `model_config`; missing keys get the default, unknown ones raise UserError."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"model_config has unknown keys: {', '.join(sorted(unknown))}")
        return cls(**values)

    def to_dict(self):
        return asdict(self)

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_dim(self):
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def windows(self):
        """Return the number of tokens to the left that queries see, per layer (last: all)."""
        short = math.ceil(self.sequence_len / 4 / SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        sizes = {"L": self.sequence_len, "S": short}
        kinds = itertools.islice(itertools.cycle(self.window_pattern), self.n_layer - 1)
        return [*(sizes[kind] for kind in kinds), self.sequence_len]

    def has_value_embedding(self, layer):
        """Return True for every second layer, counted so that the last layer has one."""
        return layer % 2 == (self.n_layer - 1) % 2


def parameter_counts(config):
    """Return the number of parameters by kind, and their total, without building a model."""
    d, kv, vocab = config.n_embd, config.kv_dim, config.padded_vocab_size
    n_value = sum(config.has_value_embedding(layer) for layer in range(config.n_layer))
    blocks = config.n_layer * (2 * d * d + 2 * d * kv + 8 * d * d)
    gates = n_value * config.n_kv_head * VALUE_GATE_CHANNELS
    counts = {
        "wte": vocab * d,
        "value_embeds": n_value * vocab * kv,
        "lm_head": vocab * d,
        "transformer_matrices": blocks + gates,
        "scalars": 2 * config.n_layer + SMEAR_CHANNELS + 2,
    }
    return {**counts, "total": sum(counts.values())}


def scaling_params(config):
    """Return the parameters that scaling laws count: the matrices of the blocks and the head."""
    counts = parameter_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


def flops_per_token(config):
    """Return forward and backward FLOPs: 6 per matmul weight, 12 per attended token and channel."""
    matmul_weights = scaling_params(config) + SMEAR_CHANNELS
    attended = sum(min(window, config.sequence_len) for window in config.windows)
    return 6 * matmul_weights + 12 * config.n_head * config.head_dim * attended


# --- norms and loss in plain torch ----------------------------------------------------------------

def norm(x):
    """Apply RMSNorm without weight over the last dimension; eps is fp32's (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),))


def plain_rope_qk_norm(q, k, cos, sin):
    """Norm q, k (B, T, H, D), multiply by QK_SCALE, rotate by minus theta (arXiv:2104.09864).

    cos, sin (1, T, 1, D/2). In fp32, rounded once. A rotation keeps the norm, so this equals
    upstream's norm after the rotation, and the gradient needs only q and k themselves.
    """
    def one(x):
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        first, second = (exact * (QK_SCALE * rstd)).chunk(2, dim=-1)
        rotated = (first * cos + second * sin, second * cos - first * sin)
        return torch.cat(rotated, dim=-1).to(x.dtype)

    return one(q), one(k)


def plain_cross_entropy(logits, targets, vocab_size, reduction="mean"):
    """Return the fp32 cross-entropy (mean or none) of logits (..., Vpad) after the softcap.

    targets (...) int64: -1 is ignored, another target out of range gives NaN. This form compiles to
    one pass over the columns forward and one backward: the softcap stands in for the maximum.
    int64 column numbers would halve the vector width.
    """
    def below_cap(x):  # softcap * (tanh(x / softcap) - 1)
        return 2 * SOFTCAP * (torch.sigmoid(2 / SOFTCAP * x) - 1)

    shape, targets = targets.shape, targets.reshape(-1)
    logits = logits.reshape(-1, logits.size(-1)).float()
    column = torch.arange(logits.size(-1), device=logits.device, dtype=torch.int32)
    is_target = column == targets.int().unsqueeze(-1)
    capped = below_cap(logits)
    partition = torch.exp(capped)
    if logits.is_cuda or vocab_size < logits.size(-1):
        partition = partition.masked_fill(column >= vocab_size, 0.0)
    if logits.is_cuda:  # with this form and the mask, the gradient is written over the logits
        target_logit = torch.where(is_target, capped, 0.0).sum(dim=-1)
    else:  # on a CPU the form above would store `capped`
        target_logit = below_cap(torch.where(is_target, logits, 0.0).sum(dim=-1))
    losses = partition.sum(dim=-1).log() - target_logit
    losses = torch.where((targets >= 0) & (targets < vocab_size), losses, torch.nan)
    losses = torch.where(targets == IGNORED, 0.0, losses)
    if reduction == "none":
        return losses.view(shape)
    return losses.sum() / (targets != IGNORED).sum()


# --- the model ------------------------------------------------------------------------------------

class Linear(nn.Linear):
    """A matmul without bias whose fp32 weight is cast to the dtype of the activations.

    cast: a cached copy of the weight in that dtype. fp8: the Fp8Weight that multiplies in training.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.cast = None
        self.fp8 = None

    def forward(self, x):
        weight = self.weight if self.cast is None else self.cast
        if self.fp8 is not None and torch.is_grad_enabled():
            return self.fp8(x, weight)
        return F.linear(x, weight.to(x.dtype))


class Attention(nn.Module):
    """Causal attention of a layer: rotary positions, QK-norm, gated value embeddings, a window."""

    def __init__(self, config, layer, backend, fused):
        super().__init__()
        self.layer, self.backend = layer, backend
        self.qk_norm = rope_qk_norm if fused else plain_rope_qk_norm
        self.window, self.head_dim = config.windows[layer], config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        has_gate = config.has_value_embedding(layer)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if has_gate else None

    def forward(self, x, value_embedding, cos_sin, kv_cache):
        """x (B, T, n_embd), already normed; value_embedding (B, T, kv_dim) or None."""
        heads = (-1, self.head_dim)
        q, k, v = (c(x).unflatten(-1, heads) for c in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.unflatten(-1, heads)
        q, k = self.qk_norm(q, k, *cos_sin)
        if kv_cache is not None:
            k, v = kv_cache.extend(self.layer, k, v)
        return self.c_proj(causal_attention(q, k, v, self.window, self.backend).flatten(-2))


class MLP(nn.Module):
    """Two matmuls around relu squared; four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention, then MLP; each is applied to the normed residual and added to it."""

    def __init__(self, config, layer, backend, fused):
        super().__init__()
        self.attn = Attention(config, layer, backend, fused)
        self.mlp = MLP(config)

    def forward(self, x, value_embedding, cos_sin, kv_cache):
        x = x + self.attn(norm(x), value_embedding, cos_sin, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """The model: build it, then call `init_weights` or load a state dict.

    compute_dtype: of activations and embeddings. attention: a backend of nanochat.attention.
    fused_rmsnorm (of q and k), chunked_ce: use lane C's kernels; results change by rounding only.
    """

    def __init__(self, config, compute_dtype=torch.float32, *, attention="auto",
                 fused_rmsnorm=False, chunked_ce=False):
        super().__init__()
        self.config, self.compute_dtype, self.chunked_ce = config, compute_dtype, chunked_ce
        vocab, d, layers = config.padded_vocab_size, config.n_embd, range(config.n_layer)
        # the range of fp16 is too small for the optimizer state of an embedding
        embedding_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab, d, dtype=embedding_dtype),
            "h": nn.ModuleList(Block(config, i, attention, fused_rmsnorm) for i in layers)})
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(vocab, config.kv_dim, dtype=embedding_dtype)
            for i in layers if config.has_value_embedding(i)})
        self.lm_head = Linear(d, vocab)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        n_positions = ROTARY_LENGTH_FACTOR * config.sequence_len
        cos, sin = rotary_table(n_positions, config.head_dim, compute_dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self):
        return self.resid_lambdas.device

    @torch.no_grad()
    def init_weights(self, seed):
        """Draw every parameter from its own CPU generator, seeded by `seed` and its name."""
        table = initial_values(self.config).items()
        for name, parameter in self.named_parameters():
            [(fill, low, high)] = [row for pattern, row in table if fnmatchcase(name, pattern)]
            seed_of_name = zlib.crc32(f"{seed} {name}".encode())  # the generator uses only 32 bits
            generator = torch.Generator().manual_seed(seed_of_name)
            parameter.copy_(fill(torch.empty(parameter.shape), low, high, generator=generator))

    def keep_casts(self):
        """Cache a compute-dtype copy of every Linear weight; return {weight: copy} (empty in fp32).

        The copies receive the gradients. Code that changes a weight must update its copy.
        """
        if self.compute_dtype == torch.float32:
            return {}
        casts = {}
        for module in self.modules():
            if isinstance(module, Linear):
                module.cast = module.weight.detach().to(self.compute_dtype).requires_grad_()
                casts[module.weight] = module.cast
        return casts

    def forward(self, idx, targets=None, loss_reduction="mean", kv_cache=None):
        """Return fp32 logits (B, T, vocab), or with targets (B, T; -1 is ignored) the loss in nats.

        idx (B, T): token ids, which continue the sequences of a kv_cache. loss_reduction: mean (a
        scalar) or none (B, T).
        """
        x, vocab_size = self.hidden(idx, kv_cache), self.config.vocab_size
        if targets is None:
            logits = self.lm_head(x)[..., :vocab_size].float()
            return SOFTCAP * torch.tanh(logits / SOFTCAP)
        if not self.chunked_ce:
            return plain_cross_entropy(self.lm_head(x), targets, vocab_size, loss_reduction)
        head = self.lm_head.weight if self.lm_head.cast is None else self.lm_head.cast
        kind = "triton" if x.is_cuda else "torch"
        return linear_cross_entropy(x, head, targets, vocab_size, loss_reduction, kind)

    def hidden(self, idx, kv_cache=None):
        """Return the input of the head: the final normed residual (B, T, n_embd)."""
        T = idx.size(1)
        start = 0 if kv_cache is None else kv_cache.length
        assert start + T <= self.cos.size(1), "sequence longer than the rotary table"
        cos_sin = self.cos[:, start : start + T], self.sin[:, start : start + T]
        look_up = lookup(idx, self.config.padded_vocab_size)
        x = norm(look_up(self.transformer.wte.weight).to(self.compute_dtype))
        x = self._smear(x, kv_cache)
        x0, backout = x, None
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            value_embedding = None
            if self.config.has_value_embedding(i):
                value_embedding = look_up(self.value_embeds[str(i)].weight).to(x.dtype)
            x = block(x, value_embedding, cos_sin, kv_cache)
            if i == self.config.n_layer // 2:
                backout = x
        if kv_cache is not None:
            kv_cache.length += T
        if backout is not None:
            x = x - self.backout_lambda.to(x.dtype) * backout
        return norm(x)

    def _smear(self, x, kv_cache):
        """Add the previous token's embedding to each position, through a gate of that position."""
        previous = x[:, :-1]
        if kv_cache is not None:
            if kv_cache.previous_embedding is not None:
                previous = torch.cat((kv_cache.previous_embedding, previous), dim=1)
            kv_cache.previous_embedding = x[:, -1:]
        first = x.size(1) - previous.size(1)  # 1 if no token precedes the first position, else 0
        gate = torch.sigmoid(self.smear_gate(x[:, first:, :SMEAR_CHANNELS]))
        smeared = x[:, first:] + self.smear_lambda.to(x.dtype) * gate * previous
        return torch.cat((x[:, :first], smeared), dim=1)


def initial_values(config):
    """Return {name pattern: (initialiser, two arguments)}; every parameter matches one pattern.

    The arguments: mean and standard deviation (normal_), bounds (uniform_), first and last value.
    """
    bound = math.sqrt(3 / config.n_embd)  # gives a standard deviation of n_embd^-1/2
    return {
        "transformer.wte.weight": (nn.init.normal_, 0.0, 0.8),
        "lm_head.weight": (nn.init.normal_, 0.0, 0.001),
        "value_embeds.*": (nn.init.uniform_, -bound, bound),
        "*.c_[qkv].weight": (nn.init.uniform_, -bound, bound),
        "*.c_fc.weight": (nn.init.uniform_, -0.4 * bound, 0.4 * bound),
        "*.c_proj.weight": (evenly_, 0.0, 0.0),
        "*_gate.weight": (nn.init.uniform_, 0.0, 0.02),  # smear_gate, and ve_gate of the layers
        "smear_lambda": (evenly_, 0.0, 0.0),
        "backout_lambda": (evenly_, 0.2, 0.2),
        "resid_lambdas": (evenly_, 1.15, 1.05),
        "x0_lambdas": (evenly_, 0.20, 0.05),
    }


def evenly_(tensor, first, last, generator=None):
    """Fill a tensor in place with evenly spaced values."""
    return tensor.copy_(torch.linspace(first, last, tensor.numel()).view_as(tensor))


def rotary_table(length, head_dim, dtype):
    """Return cos and sin, each (1, length, 1, head_dim/2), of position * base^(-2i/head_dim)."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequency = ROTARY_BASE ** (-channel / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[None, :, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)
