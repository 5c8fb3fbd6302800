"""The model: a decoder-only transformer with rotary attention, value embeddings, smear and backout.

Master weights are fp32 and every matmul casts its weight to the activations' dtype, or uses a cast that is kept
(`GPT.keep_casts`); the embeddings are stored in the compute dtype. State-dict names are upstream nanochat's.
"""

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
from nanochat.kernels.linear_cross_entropy import SOFTCAP, linear_cross_entropy
from nanochat.kernels.rms_norm import rms_norm, rope_qk_norm
from nanochat.plain import plain_cross_entropy, plain_rms_norm, plain_rope_qk_norm

VOCAB_MULTIPLE = 64
ROTARY_BASE = 100_000.0
ROTARY_LENGTH_FACTOR = 10  # decoding may run this many times past the training length
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
SHORT_WINDOW_MULTIPLE = 128
LARGEST = {"sequence_len": 1 << 24, "vocab_size": 1 << 30, "n_layer": 10_000, "n_head": 1 << 16, "n_kv_head": 1 << 16,
           "n_embd": 1 << 20}  # of a GPTConfig: larger ones are mistakes that would hang


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model; the field names are the keys of a checkpoint's `model_config`."""

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
                raise UserError(f"a model with {name} {str(value)[:40]} cannot be: use a whole number from 1 to "
                                f"{largest:,}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"width {self.n_embd} cannot be split into {self.n_head} heads of an even size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"{self.n_head} query heads cannot share {self.n_kv_head} key/value heads evenly")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"--window-pattern {self.window_pattern!r} must be made of S (short) and L (full)")

    @classmethod
    def from_dict(cls, values):
        """From a checkpoint's `model_config`; keys that are not ours are an error, missing ones the default."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise UserError(f"model_config has keys this program does not know: {', '.join(sorted(unknown))}")
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
        """Tokens to the left that each layer's queries see, in layer order; the last layer sees all."""
        short = math.ceil(self.sequence_len / 4 / SHORT_WINDOW_MULTIPLE) * SHORT_WINDOW_MULTIPLE
        sizes = {"L": self.sequence_len, "S": short}
        pattern = [self.window_pattern[i % len(self.window_pattern)] for i in range(self.n_layer - 1)]
        return [sizes[kind] for kind in pattern] + [self.sequence_len]

    def has_value_embedding(self, layer):
        """Every second layer, counted so that the last has one."""
        return layer % 2 == (self.n_layer - 1) % 2


def parameter_counts(config):
    """Parameters by kind (wte, value_embeds, lm_head, transformer_matrices, scalars, total), without a model."""
    d, kv, vocab = config.n_embd, config.kv_dim, config.padded_vocab_size
    n_value = sum(config.has_value_embedding(i) for i in range(config.n_layer))
    counts = {
        "wte": vocab * d,
        "value_embeds": n_value * vocab * kv,
        "lm_head": vocab * d,
        "transformer_matrices": config.n_layer * (2 * d * d + 2 * d * kv + 8 * d * d)
        + n_value * config.n_kv_head * VALUE_GATE_CHANNELS,
        "scalars": 2 * config.n_layer + SMEAR_CHANNELS + 2,
    }
    return {**counts, "total": sum(counts.values())}


def scaling_params(config):
    """Parameters that scaling laws count: the blocks' matrices and the head."""
    counts = parameter_counts(config)
    return counts["transformer_matrices"] + counts["lm_head"]


def flops_per_token(config):
    """Forward and backward FLOPs per token: 6 per matmul weight, 12 per head channel and token attended to."""
    matmul_weights = scaling_params(config) + SMEAR_CHANNELS
    attended = sum(min(window, config.sequence_len) for window in config.windows)
    return 6 * matmul_weights + 12 * config.n_head * config.head_dim * attended


def fused_norm(x):
    """The norm in one kernel, where nothing compiles the model: a compiler fuses the plain norm with what surrounds
    it, and a kernel of our own would stand in its way."""
    return plain_rms_norm(x) if torch.compiler.is_compiling() else rms_norm(x)


class Linear(nn.Linear):
    """A bias-free matmul whose fp32 master weight is cast to the activations' dtype, unless a `cast` is kept of it; in
    training by `fp8`, if any."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.cast = None
        self.fp8 = None  # an Fp8Weight with --fp8

    def weight_in(self, dtype):
        return self.weight.to(dtype) if self.cast is None else self.cast

    def forward(self, x):
        if self.fp8 is not None and torch.is_grad_enabled():
            return self.fp8(x, self.weight if self.cast is None else self.cast)
        return F.linear(x, self.weight_in(x.dtype))


class Attention(nn.Module):
    """Causal attention of one layer: rotary positions, QK-norm, value embeddings by gate, its window."""

    def __init__(self, config, layer, fused, backend):
        super().__init__()
        self.qk_norm = rope_qk_norm if fused else plain_rope_qk_norm
        self.backend = backend
        self.layer, self.window, self.head_dim = layer, config.windows[layer], config.head_dim
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.ve_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if config.has_value_embedding(layer) else None

    def forward(self, x, value_embedding, cos_sin, kv_cache):
        """x (B, T, n_embd), already normed; value_embedding (B, T, kv_dim) or None."""
        q, k, v = (self._heads(projection(x)) for projection in (self.c_q, self.c_k, self.c_v))
        if self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * self._heads(value_embedding)
        q, k = self.qk_norm(q, k, *cos_sin)
        if kv_cache is not None:
            k, v = kv_cache.extend(self.layer, k, v)
        return self.c_proj(causal_attention(q, k, v, self.window, self.backend).flatten(-2))

    def _heads(self, channels):
        return channels.unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """Four times as wide inside, relu squared."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual and added to it."""

    def __init__(self, config, layer, fused, attention):
        super().__init__()
        self.norm = fused_norm if fused else plain_rms_norm
        self.attn = Attention(config, layer, fused, attention)
        self.mlp = MLP(config)

    def forward(self, x, value_embedding, cos_sin, kv_cache):
        x = x + self.attn(self.norm(x), value_embedding, cos_sin, kv_cache)
        return x + self.mlp(self.norm(x))


def initial_values(config):
    """{pattern of names: (initialiser, its two arguments)}; every parameter matches exactly one.

    normal_ takes mean and standard deviation, uniform_ its bounds, evenly_ the first and the last value.
    """
    bound = math.sqrt(3 / config.n_embd)  # the standard deviation is width^-1/2
    return {
        "transformer.wte.weight": (nn.init.normal_, 0.0, 0.8),
        "lm_head.weight": (nn.init.normal_, 0.0, 0.001),
        "value_embeds.*": (nn.init.uniform_, -bound, bound),
        "*.c_[qkv].weight": (nn.init.uniform_, -bound, bound),
        "*.c_fc.weight": (nn.init.uniform_, -0.4 * bound, 0.4 * bound),
        "*.c_proj.weight": (evenly_, 0.0, 0.0),
        "*_gate.weight": (nn.init.uniform_, 0.0, 0.02),  # smear_gate and the layers' ve_gate
        "smear_lambda": (evenly_, 0.0, 0.0),
        "backout_lambda": (evenly_, 0.2, 0.2),
        "resid_lambdas": (evenly_, 1.15, 1.05),
        "x0_lambdas": (evenly_, 0.20, 0.05),
    }


def evenly_(tensor, first, last, generator=None):
    """Fill in place with evenly spaced values; nothing is drawn."""
    return tensor.copy_(torch.linspace(first, last, tensor.numel()).view_as(tensor))


class GPT(nn.Module):
    """The model: build it, then `init_weights` or load a state dict.

    compute_dtype is the dtype of activations and embeddings. fused_rmsnorm and chunked_ce choose lane C's
    kernels, attention one of `attention.BACKENDS`; they change neither the parameters nor, up to rounding, the results.
    """

    def __init__(self, config, compute_dtype=torch.float32, *, attention="auto", fused_rmsnorm=False, chunked_ce=False):
        super().__init__()
        self.config, self.compute_dtype, self.chunked_ce = config, compute_dtype, chunked_ce
        self.norm = fused_norm if fused_rmsnorm else plain_rms_norm
        vocab, d = config.padded_vocab_size, config.n_embd
        # fp16's range is too small for an embedding's optimizer state: those stay fp32
        embedding_dtype = torch.float32 if compute_dtype == torch.float16 else compute_dtype
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab, d, dtype=embedding_dtype),
            "h": nn.ModuleList(Block(config, i, fused_rmsnorm, attention) for i in range(config.n_layer)),
        })
        self.value_embeds = nn.ModuleDict({
            str(i): nn.Embedding(vocab, config.kv_dim, dtype=embedding_dtype)
            for i in range(config.n_layer) if config.has_value_embedding(i)
        })
        self.lm_head = Linear(d, vocab)
        self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        cos, sin = rotary_table(ROTARY_LENGTH_FACTOR * config.sequence_len, config.head_dim, compute_dtype)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def device(self):
        return self.resid_lambdas.device

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every parameter. Each draws from a CPU generator of its own, seeded by `seed` and its name,
        so the values are the same on every device and for every number of ranks."""
        table = initial_values(self.config)
        for name, parameter in self.named_parameters():
            [(fill, low, high)] = [row for pattern, row in table.items() if fnmatchcase(name, pattern)]
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))  # it heeds 32 bits only
            parameter.copy_(fill(torch.empty(parameter.shape), low, high, generator=generator))

    def keep_casts(self):
        """Give each Linear a copy of its weight in the compute dtype, used in its place from now on, so that no step
        casts weights or their gradients. Returns {weight: copy}; in fp32 none is needed.

        Gradients arrive at the copies, and whoever changes a weight writes its copy too: MuonAdamW does both.
        """
        if self.compute_dtype == torch.float32:
            return {}
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        for linear in linears:
            linear.cast = linear.weight.detach().to(self.compute_dtype).requires_grad_()
        return {linear.weight: linear.cast for linear in linears}

    def forward(self, idx, targets=None, loss_reduction="mean", kv_cache=None):
        """Logits (B, T, vocab) in fp32, or with `targets` (B, T; -1 is ignored) the loss in nats.

        idx (B, T) integer token ids. loss_reduction: mean, sum (scalars) or none (B, T). With a `kv_cache`
        idx continues what the cache holds and the cache is extended.
        """
        x = self.hidden(idx, kv_cache)
        if targets is None:
            logits = self.lm_head(x)[..., : self.config.vocab_size].float()
            return SOFTCAP * torch.tanh(logits / SOFTCAP)
        return self.loss(x, targets, loss_reduction)

    def hidden(self, idx, kv_cache=None):
        """The final normed residual (B, T, n_embd) that the head multiplies."""
        T = idx.size(1)
        start = 0 if kv_cache is None else kv_cache.length
        assert start + T <= self.cos.size(1), "sequence longer than the rotary table"
        cos_sin = self.cos[:, start : start + T], self.sin[:, start : start + T]
        look_up = lookup(idx, self.config.padded_vocab_size)
        x = self._smear(self.norm(look_up(self.transformer.wte.weight).to(self.compute_dtype)), kv_cache)
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
            kv_cache.advance(T)
        if backout is not None:
            x = x - self.backout_lambda.to(x.dtype) * backout
        return self.norm(x)

    def loss(self, x, targets, reduction):
        """Cross-entropy in nats of the head's softcapped logits; the padded columns never count."""
        kind = targets, self.config.vocab_size, SOFTCAP, reduction
        if self.chunked_ce:
            implementation = "triton" if x.is_cuda else "torch"
            return linear_cross_entropy(x, self.lm_head.weight_in(x.dtype), *kind, implementation=implementation)
        return plain_cross_entropy(self.lm_head(x), *kind)

    def _smear(self, x, kv_cache):
        """Mix the previous token's embedding into each position, by a gate of the position's own channels."""
        previous = x[:, :-1]
        if kv_cache is not None:
            if kv_cache.previous_embedding is not None:
                previous = torch.cat((kv_cache.previous_embedding, previous), dim=1)
            kv_cache.previous_embedding = x[:, -1:]
        first = x.size(1) - previous.size(1)  # 1 where the first position has nothing before it, else 0
        gate = torch.sigmoid(self.smear_gate(x[:, first:, :SMEAR_CHANNELS]))
        smeared = x[:, first:] + self.smear_lambda.to(x.dtype) * gate * previous
        return torch.cat((x[:, :first], smeared), dim=1)


def rotary_table(length, head_dim, dtype):
    """cos and sin, each (1, length, 1, head_dim/2), of position * base^(-2i/head_dim)."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[None, :, None, :]
    return angle.cos().to(dtype), angle.sin().to(dtype)
