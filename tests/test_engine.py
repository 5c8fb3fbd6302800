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
from nanochat.engine import KVCache, generate, sample_token, stream, whole_characters
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


@torch.no_grad()
def test_a_full_cache_is_not_written():
    model = random_model(0)
    cache = KVCache(model.config, 2, 4, "cpu", model.compute_dtype)
    model(tokens(0, length=3), kv_cache=cache)
    with pytest.raises(AssertionError, match="full"):
        model(tokens(0, length=2), kv_cache=cache)


# --- generation -----------------------------------------------------------------------------------

@torch.no_grad()
def generate_without_cache(model, prompt, n_new, n_samples, seed, **sampling):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt] * n_samples)
    for _ in range(n_new):
        new = sample_token(model(ids)[:, -1], generator, **sampling)
        ids = torch.cat((ids, new), dim=1)
    return ids[:, len(prompt):].tolist()


@pytest.mark.parametrize("sampling", [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}])
@pytest.mark.parametrize("seed", range(3))
def test_generation_equals_generation_without_a_cache(seed, sampling):
    model, prompt = random_model(seed), tokens(seed, 1, 5)[0].tolist()
    expected = generate_without_cache(model, prompt, 12, 3, seed, **sampling)
    assert generate(model, prompt, 12, n_samples=3, seed=seed, **sampling) == expected


def test_samples_differ_and_depend_only_on_the_seed():
    model = random_model(0)
    first = generate(model, [1], 15, n_samples=4, seed=1)
    assert len({tuple(sample) for sample in first}) == 4
    assert generate(model, [1], 15, n_samples=4, seed=1) == first
    assert generate(model, [1], 15, n_samples=4, seed=2) != first


def test_samples_end_before_their_first_stop_token():
    model, stops = random_model(1), {3, 7, 30}
    free = generate(model, [1], 19, n_samples=8, seed=5)
    ends = [next((i for i, token in enumerate(sample) if token in stops), 19) for sample in free]
    assert len(set(ends)) > 2 and max(ends) == 19  # several ends, and a sample without one
    expected = [sample[:end] for sample, end in zip(free, ends, strict=True)]
    assert generate(model, [1], 19, n_samples=8, seed=5, stop_ids=stops) == expected
    steps = stream(model, [1], 19, n_samples=8, seed=5, stop_ids=stops)
    for row, streamed in enumerate(zip(*steps, strict=True)):
        assert list(streamed) == [*expected[row], *[None] * (19 - ends[row])]


def test_generation_stops_computing_when_every_sample_has_ended(monkeypatch):
    model = random_model(0)
    [first, *_] = generate(model, [1], 2, temperature=0)[0]
    calls, forward = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: calls.append(1) or forward(*args))
    assert generate(model, [1], 15, n_samples=2, temperature=0, stop_ids=(first,)) == [[], []]
    assert len(calls) == 1


def test_generation_may_fill_the_rotary_table_but_not_exceed_it():
    model, table = random_model(0), 10 * LENGTH
    prompt = tokens(0, 1, table - 2)[0].tolist()
    assert len(generate(model, prompt, 2)[0]) == 2
    with pytest.raises(UserError, match=f"{table + 1} tokens, but the model takes {table}"):
        generate(model, prompt, 3)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompt_ids": []}, "prompt is empty"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": 0}, "top_k"),
    ({"n_samples": 0}, "0 samples"),
])
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
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
    assert generate(random_model(0), [1], 9, temperature=temperature, top_k=top_k) == generate(
        random_model(0), [1], 9, temperature=0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=2, max_size=12), st.integers(1, 14),
       st.integers(0, 99))
def test_top_k_keeps_k_tokens_also_among_equal_logits(logits, top_k, seed):
    logits = torch.tensor(logits, dtype=torch.float32)
    rows = logits.expand(2000, -1)
    drawn = sample_token(rows, torch.Generator().manual_seed(seed), 3.0, top_k).unique()
    assert len(drawn) <= top_k
    threshold = logits.sort(descending=True).values[:top_k][-1]
    assert (logits[drawn] >= threshold).all()


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


def test_a_character_in_three_tokens_is_shown_once_it_is_complete():
    euro = "€".encode()
    tokens = [b"a", euro[:1], euro[1:2], euro[2:], b"b", euro[:2]]
    assert list(whole_characters(tokens, decode)) == ["a", "€", "b", "\ufffd"]
