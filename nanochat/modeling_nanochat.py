"""The model for Hugging Face's transformers, in one file that needs nothing of nanochat.

AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) loads an export with it.
"""

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


class NanochatConfig(PretrainedConfig):
    """Sizes; windows[i] is the number of tokens to its left that a query of layer i sees."""

    model_type = "nanochat_speedrun"

    def __init__(self, vocab_size=32768, hidden_size=768, num_hidden_layers=12,
                 num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=2048,
                 windows=None, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.windows = windows or [max_position_embeddings] * num_hidden_layers
        self.head_dim = hidden_size // num_attention_heads
        self.kv_dim = num_key_value_heads * self.head_dim
        super().__init__(**{"use_cache": False, "tie_word_embeddings": False, **kwargs})

    def has_value_embedding(self, layer):
        """Return True for every second layer, counted so that the last layer has one."""
        return (self.num_hidden_layers - 1 - layer) % 2 == 0


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotary(length, head_dim, x):
    """Return cos and sin (length, 1, head_dim/2) on x's device in x's dtype, computed in fp32."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=x.device)
    position = torch.arange(length, dtype=torch.float32, device=x.device)
    angle = torch.outer(position, ROTARY_BASE ** (-channel / head_dim)).unsqueeze(1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def norm_and_rotate(x, cos, sin):
    """Norm the heads of x (B, T, H, D), then rotate their halves by minus the position's angle."""
    first, second = (norm(x.float()) * QK_SCALE).chunk(2, dim=-1)
    rotated = (first * cos + second * sin, second * cos - first * sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


def attend(q, k, v, window):
    """Return causal attention of q (B, T, H, D) to k, v (B, T, Hkv, D), `window` tokens back."""
    position = torch.arange(q.size(1), device=q.device)
    distance = position.unsqueeze(1) - position
    visible = (distance >= 0) & (distance <= window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    enable_gqa = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, visible, enable_gqa=enable_gqa).transpose(1, 2)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


class Attention(nn.Module):
    """Causal attention with rotary positions, normed queries and keys, gated value embeddings."""

    def __init__(self, config, layer):
        super().__init__()
        width = config.hidden_size
        self.window, self.head_dim = config.windows[layer], config.head_dim
        self.c_q = linear(width, width)
        self.c_k = linear(width, config.kv_dim)
        self.c_v = linear(width, config.kv_dim)
        self.c_proj = linear(width, width)
        if config.has_value_embedding(layer):
            self.ve_gate = linear(VALUE_GATE_CHANNELS, config.num_key_value_heads)

    def forward(self, x, value_embedding, cos, sin):
        """x (B, T, width), value_embedding (B, T, kv_dim) or None."""
        q, k, v = (self.heads(projection(x)) for projection in (self.c_q, self.c_k, self.c_v))
        if value_embedding is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VALUE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * self.heads(value_embedding)
        q, k = (norm_and_rotate(x, cos, sin) for x in (q, k))
        return self.c_proj(attend(q, k, v, self.window).flatten(-2))

    def heads(self, channels):
        return channels.unflatten(-1, (-1, self.head_dim))


class Block(nn.Module):
    """Attention and MLP, each on the normed residual and added to it."""

    def __init__(self, config, layer):
        super().__init__()
        width = config.hidden_size
        self.attn = Attention(config, layer)
        self.mlp = nn.ModuleDict(
            {"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)})

    def forward(self, x, value_embedding, cos, sin):
        x = x + self.attn(norm(x), value_embedding, cos, sin)
        return x + self.mlp["c_proj"](F.relu(self.mlp["c_fc"](norm(x))).square())


class NanochatForCausalLM(PreTrainedModel, GenerationMixin):
    """Logits of the next token, without a key/value cache: generate() runs all tokens each time."""

    config_class = NanochatConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        n_layer, vocab, width = config.num_hidden_layers, config.vocab_size, config.hidden_size
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(vocab, width),
            "h": nn.ModuleList(Block(config, layer) for layer in range(n_layer))})
        self.value_embeds = nn.ModuleDict({
            str(layer): nn.Embedding(vocab, config.kv_dim)
            for layer in range(n_layer) if config.has_value_embedding(layer)})
        self.lm_head = linear(width, vocab)
        self.smear_gate = linear(SMEAR_CHANNELS, 1)
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer))
        self.x0_lambdas = nn.Parameter(torch.zeros(n_layer))
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """Return logits (B, T, vocab) in fp32, and with `labels` (-100 is ignored) the mean loss.

        attention_mask may only hide tokens at the end of a row, which causality hides anyway.
        """
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            raise ValueError("rows must be padded on the right: this model has no padding mask")
        logits = self.lm_head(self.hidden(input_ids)).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)

    def hidden(self, input_ids):
        """Return the final normed residual (B, T, width)."""
        x = norm(self.transformer["wte"](input_ids))
        gate = torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))
        x = torch.cat((x[:, :1], x[:, 1:] + self.smear_lambda * gate * x[:, :-1]), dim=1)
        x0, cos_sin = x, rotary(x.size(1), self.config.head_dim, x)
        for layer, block in enumerate(self.transformer["h"]):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            embedding = None
            if str(layer) in self.value_embeds:
                embedding = self.value_embeds[str(layer)](input_ids)
            x = block(x, embedding, *cos_sin)
            if layer == self.config.num_hidden_layers // 2:
                backout = x
        return norm(x - self.backout_lambda * backout)

    def get_input_embeddings(self):
        return self.transformer["wte"]
