"""Generation with a key/value cache; decoding token by token equals one full forward pass."""

import math

import torch

from nanochat.common import UserError

# Softcapped logits divided by a lower temperature could overflow fp32. At this one, every draw is
# already the likeliest token.
MIN_TEMPERATURE = 1e-30


class KVCache:
    """Keys and values of every layer for B sequences of equal length, at most `capacity` tokens.

    Each forward pass calls `extend` once per layer, then adds its tokens to `length`.
    """

    def __init__(self, config, batch_rows, capacity, device, dtype):
        shape = (2, config.n_layer, batch_rows, capacity, config.n_kv_head, config.head_dim)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.previous_embedding = None  # (B, 1, n_embd), which the smear of the next token reads

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, T, Hkv, D); return all of them so far."""
        end = self.length + k.size(1)
        keys, values = self._store[:, layer]
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys[:, :end], values[:, :end]


@torch.inference_mode()
def stream(model, prompt_ids, max_new_tokens, *, temperature=1.0, top_k=None, seed=0, stop_ids=()):
    """Yield the token ids of a continuation of a prompt, up to the first stop token.

    Temperature 0 takes the likeliest token. Raise UserError if the prompt is empty, if prompt and
    new tokens exceed the rotary table, or if a number is out of range.
    """
    if not prompt_ids:
        raise UserError("the prompt is empty; it needs at least one token, for example BOS")
    capacity = len(prompt_ids) + max_new_tokens
    if max_new_tokens < 0 or capacity > model.cos.size(1):
        raise UserError(f"the prompt has {len(prompt_ids)} tokens and the model takes "
                        f"{model.cos.size(1)}: it cannot add {max_new_tokens}; ask for fewer")
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise UserError("temperature must be finite and at least 0, and top_k at least 1")
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model.config, 1, capacity, model.device, model.compute_dtype)
    ids = torch.tensor([prompt_ids], device=model.device)
    for _ in range(max_new_tokens):
        ids = sample_token(model(ids, kv_cache=cache)[:, -1], generator, temperature, top_k)
        token = ids.item()
        if token in stop_ids:
            return
        yield token


def sample_token(logits, generator, temperature=1.0, top_k=None):
    """Draw one token id per row (B, 1) from logits (B, V), among the `top_k` likeliest if given."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is None:
        probabilities = torch.softmax(logits / max(temperature, MIN_TEMPERATURE), dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)
    # topk keeps exactly k, also among equal logits
    logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)
    return ids.gather(-1, sample_token(logits, generator, temperature))


def whole_characters(token_ids, decode):
    """Yield the text of a stream of token ids in pieces that do not split a character.

    decode(ids) -> text, with bytes that are not UTF-8 as U+FFFD. The pieces add up to
    decode(all ids).
    """
    pending, shown, text = [], 0, ""
    for token in token_ids:
        pending.append(token)
        text = decode(pending)
        end = len(text) - text.endswith("\ufffd")  # it may be the beginning of a character
        if end > shown:
            yield text[shown:end]
            shown = end
        if end == len(text):
            pending, shown, text = [], 0, ""
    if text[shown:]:
        yield text[shown:]
