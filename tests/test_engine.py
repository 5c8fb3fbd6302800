"""Generation: the cache against the full forward pass, and the distribution of sampled tokens."""

import codecs
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nanochat.common import UserError
from nanochat.engine import KVCache, sample_token, stream, whole_characters
from nanochat.gpt import GPT, GPTConfig

LENGTH = 20


@cache
def random_model(seed):
    """A small fp64 model without zeros: smear, backout, gates, value embeddings, short windows."""
    n_head, n_kv_head = [(4, 4), (4, 2), (3, 1)][seed % 3]
    config = GPTConfig(LENGTH, 50, 2 + seed % 3, n_head, n_kv_head, n_head * 8)
    model = GPT(config, torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    windows = np.random.default_rng(seed).integers(0, LENGTH, config.n_layer)
    for block, window in zip(model.transformer.h, windows, strict=True):
        block.attn.window = int(window)
    return model


def tokens(seed, rows=2, length=LENGTH):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the cache ------------------------------------------------------------------------------------

@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.one_of(
    st.just(list(range(1, LENGTH))), st.sets(st.integers(1, LENGTH - 1)).map(sorted)))
def test_any_pieces_with_a_cache_equal_one_full_forward_pass(seed, cuts):
    """Including token by token."""
    model, ids = random_model(seed), tokens(seed + 100)
    cache = KVCache(model.config, 2, LENGTH, "cpu", model.compute_dtype)
    pieces = [model.hidden(piece, cache) for piece in torch.tensor_split(ids, cuts, dim=1)]
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat(pieces, dim=1), model.hidden(ids), rtol=1e-9, atol=1e-10)


# --- generation -----------------------------------------------------------------------------------

def generate(*arguments, **sampling):
    return list(stream(*arguments, **sampling))


@pytest.mark.parametrize("sampling", [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}])
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_generation_equals_generation_without_a_cache(seed, sampling):
    model, prompt = random_model(seed), tokens(seed, 1, 5)[0].tolist()
    generator, ids = torch.Generator().manual_seed(seed), torch.tensor([prompt])
    for _ in range(12):
        new = sample_token(model(ids)[:, -1], generator, **sampling)
        ids = torch.cat((ids, new), dim=1)
    assert generate(model, prompt, 12, seed=seed, **sampling) == ids[0, 5:].tolist()
    assert sampling["temperature"] == 0 or generate(
        model, prompt, 12, seed=seed + 9, **sampling) != ids[0, 5:].tolist()


def test_a_sample_ends_before_its_first_stop_token():
    model, stops = random_model(1), {3, 7, 30}
    ends = []
    for seed in range(20):
        free = generate(model, [1], 19, temperature=3.0, seed=seed)
        ends.append(next((i for i, token in enumerate(free) if token in stops), 19))
        ended = generate(model, [1], 19, temperature=3.0, seed=seed, stop_ids=stops)
        assert ended == free[: ends[-1]]
    assert len(set(ends)) > 2 and max(ends) == 19  # several ends, and a sample without one


def test_generation_may_fill_the_rotary_table_but_not_exceed_it():
    model, table = random_model(0), 10 * LENGTH
    prompt = tokens(0, 1, table - 2)[0].tolist()
    assert len(generate(model, prompt, 2)) == 2
    with pytest.raises(UserError, match=f"{table - 2} tokens and the model takes {table}"):
        generate(model, prompt, 3)


@pytest.mark.parametrize("arguments", [
    {"prompt_ids": []}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0},
    {"max_new_tokens": -1}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(UserError):
        generate(random_model(0), **{"prompt_ids": [1], "max_new_tokens": 5, **arguments})


# --- one token ------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 2.5])
N_DRAWS = 20_000


def p_value(probabilities, **sampling):
    """Return the chi-square p-value of sampled tokens against `probabilities`."""
    draws = sample_token(LOGITS.expand(N_DRAWS, -1), torch.Generator().manual_seed(0), **sampling)
    assert draws.shape == (N_DRAWS, 1) and draws.dtype == torch.int64
    counts = torch.bincount(draws[:, 0], minlength=len(LOGITS)).numpy()
    possible = probabilities > 0
    assert not counts[~possible].any()
    return stats.chisquare(counts[possible], N_DRAWS * probabilities[possible]).pvalue


def softmax(temperature, keep):
    weights = np.exp(LOGITS.double().numpy() / temperature)
    if keep is not None:
        weights[np.argsort(weights)[:-keep]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(("temperature", "top_k"), [
    (1.0, None), (0.5, None), (2.0, None), (1.0, 3), (0.7, 5), (1.0, 100)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    sampling = {"temperature": temperature, "top_k": top_k}
    assert p_value(softmax(temperature, top_k), **sampling) > 1e-3
    assert p_value(softmax(1.3 * temperature, top_k), **sampling) < 1e-4  # the test has power


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-38, 1e-30, 1e-10])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature, top_k):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)).clamp(-15, 15)
    logits[0, :2] = torch.tensor([15.0, 15.0]).nextafter(torch.tensor([0.0, 99.0]))
    drawn = sample_token(logits, torch.Generator().manual_seed(0), temperature, top_k)
    assert torch.equal(drawn, logits.argmax(dim=1, keepdim=True))


# --- text of a stream -----------------------------------------------------------------------------

BYTES = st.lists(st.one_of(st.text(max_size=6).map(str.encode), st.binary(max_size=4)), max_size=8)


def decode(parts):
    return b"".join(parts).decode(errors="replace")


@settings(max_examples=200, deadline=None)
@given(BYTES.map(b"".join), st.sets(st.integers(1, 40)).map(sorted))
def test_pieces_split_no_character_and_add_up_to_the_text(data, cuts):
    tokens = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    certain = [decoder.decode(token) for token in tokens]
    text, taken = "", []
    for piece in whole_characters((taken.append(token) or token for token in tokens), decode):
        text += piece
        if len(taken) < len(tokens):  # only bytes that may become a character are held back
            assert text.rstrip("\ufffd") == "".join(certain[: len(taken)]).rstrip("\ufffd")
    assert text == decode([data])
