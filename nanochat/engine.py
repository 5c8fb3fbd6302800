"""Generation with a key/value cache; decoding token by token equals the full forward."""

import math

import torch

from nanochat.common import UserError


class KVCache:
    """Keys and values of every layer for B sequences of at most `capacity` tokens, all of one length.

    `extend` is called once a layer with (B, T, Hkv, D), `advance` once a forward.
    """

    def __init__(self, config, batch_rows, capacity, device, dtype):
        shape = (2, config.n_layer, batch_rows, capacity, config.n_kv_head, config.head_dim)
        self._store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.previous_embedding = None  # (B, 1, n_embd): what the smear of the next token needs

    def extend(self, layer, k, v):
        """Store this layer's new keys and values; return all of them so far, each (B, length + T, Hkv, D)."""
        end = self.length + k.size(1)
        assert end <= self._store.size(3), "the cache is full"
        for store, new in zip(self._store[:, layer], (k, v), strict=True):
            store[:, self.length : end] = new
        return self._store[0, layer, :, :end], self._store[1, layer, :, :end]

    def advance(self, n_tokens):
        self.length += n_tokens


def generate(model, prompt_ids, max_new_tokens, *, n_samples=1, **sampling):
    """Sample continuations of one prompt; returns n_samples lists of new token ids, stop tokens left out.

    sampling, errors: as `stream` has them.
    """
    outputs = [[] for _ in range(n_samples)]
    for tokens in stream(model, prompt_ids, max_new_tokens, n_samples=n_samples, **sampling):
        for output, token in zip(outputs, tokens, strict=True):
            if token is not None:
                output.append(token)
    return outputs


@torch.inference_mode()
def stream(model, prompt_ids, max_new_tokens, *, n_samples=1, temperature=1.0, top_k=None, seed=0, stop_ids=()):
    """Yield the next token id of each of n_samples continuations of one prompt, step by step; None from a stop token
    on. It ends when all have stopped, at the latest after max_new_tokens.

    temperature 0 takes the likeliest token. Errors: UserError for an empty prompt or one that, with
    the new tokens, is longer than the model's rotary table.
    """
    capacity = len(prompt_ids) + max_new_tokens
    if not prompt_ids:
        raise UserError("the prompt is empty: it must hold at least one token (the BOS token, say)")
    if max_new_tokens < 0 or n_samples < 1:
        raise UserError(f"{n_samples} samples of {max_new_tokens} new tokens cannot be; ask for at least 1 sample")
    if capacity > model.cos.size(1):
        raise UserError(f"prompt and new tokens are {capacity} together, the model takes {model.cos.size(1)}; "
                        "ask for fewer")
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise UserError("temperature must be at least 0 and top_k at least 1")
    generator = torch.Generator(model.device).manual_seed(seed)
    cache = KVCache(model.config, n_samples, capacity, model.device, model.compute_dtype)
    ids, done = torch.tensor([prompt_ids] * n_samples, device=model.device), [False] * n_samples
    for _ in range(max_new_tokens):
        ids = sample_token(model(ids, kv_cache=cache)[:, -1], generator, temperature, top_k)
        tokens = ids[:, 0].tolist()
        done = [stopped or token in stop_ids for stopped, token in zip(done, tokens, strict=True)]
        if all(done):
            return
        yield [None if stopped else token for stopped, token in zip(done, tokens, strict=True)]


def whole_characters(token_ids, decode):
    """The text of a stream of token ids in pieces, each as soon as it is certain: none ends within a character.

    decode(ids) -> text, bytes that are not UTF-8 as U+FFFD. Together the pieces are decode(all ids).
    """
    pending, shown, text = [], 0, ""
    for token in token_ids:
        pending.append(token)
        text = decode(pending)
        end = len(text) - text.endswith("\ufffd")  # the last one alone may be a character's first bytes
        if end > shown:
            yield text[shown:end]
            shown = end
        if end == len(text):
            pending, shown, text = [], 0, ""
    if text[shown:]:
        yield text[shown:]


def sample_token(logits, generator, temperature=1.0, top_k=None):
    """One token id per row (B, 1) from logits (B, V), among the `top_k` likeliest when given."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is None:
        return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
    logits, ids = logits.topk(min(top_k, logits.size(-1)), dim=-1)  # exactly k, also among equal logits
    return ids.gather(-1, sample_token(logits, generator, temperature))
