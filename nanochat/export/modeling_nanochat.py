"""The model for Hugging Face's transformers, in one file that needs nothing of nanochat: exports carry a copy.

Load it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

ROTARY_BASE = 100_000.0
QK_SCALE = 1.2
SOFTCAP = 15.0
SMEAR_CHANNELS = 24
VALUE_GATE_CHANNELS = 12
BLOCKWISE_MAX_LENGTH, BLOCK_QUERIES = 512, 128  # on a CPU


class NanochatConfig(PretrainedConfig):
    """Sizes; windows[i]: how many tokens before its own a query of layer i sees."""

    model_type = "nanochat_speedrun"

    def __init__(self, vocab_size=32768, hidden_size=768, num_hidden_layers=12, num_attention_heads=6,
                 num_key_value_heads=6, max_position_embeddings=2048, windows=None, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.windows = windows or [max_position_embeddings] * num_hidden_layers
        super().__init__(**{"use_cache": False, "tie_word_embeddings": False, **kwargs})

    @property
    def head_dim(self):
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def has_value_embedding(self, layer):
        """Every second layer, counted so that the last has one."""
        return (self.num_hidden_layers - 1 - layer) % 2 == 0


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary(length, head_dim, device, dtype):
    """cos and sin (length, 1, head_dim/2), computed in fp32."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency).unsqueeze(1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, cos, sin):
    """The halves of each head of x (B, T, H, D), turned by minus the position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def attend(q, k, v, window):
    """Causal attention of q (B, T, H, D) to k, v (B, T, Hkv, D), each query to `window` tokens before it and its own.

    Sums are taken in nanochat's order, so that logits agree with its own to the last digits.
    """
    T, n_head = q.shape[1:3]
    sees_all = window >= T - 1
    position = torch.arange(T, device=q.device)
    distance = position.unsqueeze(1) - position
    visible = (distance >= 0) & (distance <= window)
    if q.device.type == "cpu" and T <= BLOCKWISE_MAX_LENGTH and q.size(2) == k.size(2):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        blocks = []
        for start in range(0, T, BLOCK_QUERIES):
            rows = slice(start, min(start + BLOCK_QUERIES, T))
            columns = slice(max(0, start - window), rows.stop)
            scores = (q[:, rows] @ k[:, columns].mT).float() / math.sqrt(q.size(-1))
            weights = torch.softmax(scores.masked_fill(~visible[rows, columns], -math.inf), dim=-1)
            blocks.append(weights.to(v.dtype) @ v[:, columns])
        return torch.cat(blocks, dim=1).unflatten(0, (-1, n_head)).transpose(1, 2)
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=None if sees_all else visible, is_causal=sees_all,
        enable_gqa=q.size(2) != k.size(2)).transpose(1, 2)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


class Attention(nn.Module):
    """Causal attention within the layer's window; rotary positions, normed queries and keys, gated value embeddings."""

    def __init__(self, config, layer):
        super().__init__()
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.window, self.head_dim = config.windows[layer], config.head_dim
        self.c_q, self.c_k, self.c_v = linear(width, width), linear(width, kv_width), linear(width, kv_width)
        self.c_proj = linear(width, width)
        if config.has_value_embedding(layer):
            self.ve_gate = linear(VALUE_GATE_CHANNELS, config.num_key_value_heads)

    def forward(self, x, value_embedding, cos, sin):
        """x (B, T, width), value_embedding (B, T, kv width) or None."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embedding.unflatten(-1, (-1, self.head_dim))
        q, k = (norm(rotate(heads, cos, sin)) * QK_SCALE for heads in (q, k))
        return self.c_proj(attend(q, k, v, self.window).flatten(-2))


class MLP(nn.Module):
    """Four times as wide inside, relu squared."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = linear(config.hidden_size, 4 * config.hidden_size)
        self.c_proj = linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """Attention, then MLP, each on the normed residual and added to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, value_embedding, cos, sin):
        x = x + self.attn(norm(x), value_embedding, cos, sin)
        return x + self.mlp(norm(x))


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token. There is no key/value cache: generate() runs the whole sequence for every token."""

    config_class = NanochatConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        n_layer, width = config.num_hidden_layers, config.hidden_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, width),
            "h": nn.ModuleList(Block(config, layer) for layer in range(n_layer)),
        })
        self.value_embeds = nn.ModuleDict({
            str(layer): nn.Embedding(config.vocab_size, config.num_key_value_heads * config.head_dim)
            for layer in range(n_layer) if config.has_value_embedding(layer)
        })
        self.lm_head = linear(width, config.vocab_size)
        self.smear_gate = linear(SMEAR_CHANNELS, 1)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(n_layer)), nn.Parameter(torch.zeros(n_layer))
        self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """Logits (B, T, vocab) in fp32, and with `labels` (B, T; -100 is ignored) the mean loss of the next token.

        attention_mask may hide tokens at the end of a row alone, where causality hides them already.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("rows must be padded on the right: this model has no mask for tokens before others")
        logits = self.lm_head(self.hidden(input_ids)).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def hidden(self, input_ids):
        """The final normed residual (B, T, width)."""
        x = norm(self.transformer["wte"](input_ids))
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        x = torch.cat((x[:, :1], x[:, 1:] + self.smear_lambda * gate * x[:, :-1]), dim=1)
        x0, cos_sin = x, rotary(x.size(1), self.config.head_dim, x.device, x.dtype)
        for layer, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            embedding = self.value_embeds[str(layer)](input_ids) if str(layer) in self.value_embeds else None
            x = block(x, embedding, *cos_sin)
            if layer == self.config.num_hidden_layers // 2:
                backout = x
        return norm(x - self.backout_lambda * backout)

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):
        """The whole sequence, each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head
