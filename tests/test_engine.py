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
    """A small fp64 model in which nothing is zero: smear, backout, gates, value embeddings, windows that bite."""
    draw = np.random.default_rng(seed)
    n_head, n_kv_head = [(4, 4), (4, 2), (3, 1)][seed % 3]
    config = GPTConfig(sequence_len=LENGTH, vocab_size=50, n_layer=2 + seed % 3, n_head=n_head, n_kv_head=n_kv_head,
                       n_embd=n_head * 8)
    model = GPT(config, torch.float64).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    for block, window in zip(model.transformer.h, draw.integers(0, LENGTH, config.n_layer), strict=True):
        block.attn.window = int(window)
    return model


def tokens(seed, rows=2, length=LENGTH):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def cached_hidden(model, ids, cuts):
    """The final residual of `ids`, fed in the pieces that end at `cuts`."""
    cache = KVCache(model.config, ids.size(0), ids.size(1), "cpu", model.compute_dtype)
    pieces = [model.hidden(piece, cache) for piece in torch.tensor_split(ids, cuts, dim=1) if piece.size(1)]
    assert cache.length == ids.size(1)
    return torch.cat(pieces, dim=1)


# --- the cache -------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("seed", range(6))
def test_decoding_token_by_token_equals_the_full_forward(seed):
    model, ids = random_model(seed), tokens(seed)
    full = model.hidden(ids)
    torch.testing.assert_close(cached_hidden(model, ids, list(range(1, LENGTH))), full, rtol=1e-9, atol=1e-10)
    cache = KVCache(model.config, 2, LENGTH, "cpu", model.compute_dtype)
    logits = [model(ids[:, i : i + 1], kv_cache=cache) for i in range(LENGTH)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.sets(st.integers(1, LENGTH - 1)).map(sorted))
def test_prefill_in_any_pieces_equals_prefill_at_once(seed, cuts):
    model, ids = random_model(seed), tokens(seed + 100)
    torch.testing.assert_close(cached_hidden(model, ids, cuts), model.hidden(ids), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_every_part_that_looks_back_is_in_these_tests():
    """Without smear, with full windows, without value embeddings the models above give something else."""
    ids = tokens(0)

    def differs(change):
        model = GPT(random_model(1).config, torch.float64)
        model.load_state_dict(random_model(1).state_dict())
        for block, original in zip(model.transformer.h, random_model(1).transformer.h, strict=True):
            block.attn.window = original.attn.window
        change(model)
        return (model.hidden(ids) - random_model(1).hidden(ids)).abs().max() > 1e-2

    assert not differs(lambda model: None)
    assert differs(lambda model: model.smear_lambda.zero_())
    assert differs(lambda model: model.backout_lambda.zero_())
    assert differs(lambda model: [embedding.weight.zero_() for embedding in model.value_embeds.values()])
    assert differs(lambda model: [setattr(block.attn, "window", LENGTH) for block in model.transformer.h])


@torch.no_grad()
def test_cache_that_is_full_is_caught_before_it_is_written():
    model = random_model(0)
    cache = KVCache(model.config, 2, 4, "cpu", model.compute_dtype)
    model(tokens(0, length=3), kv_cache=cache)
    with pytest.raises(AssertionError, match="full"):
        model(tokens(0, length=2), kv_cache=cache)


# --- generation ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def generate_without_cache(model, prompt, n_new, n_samples, seed, **sampling):
    """The whole sequence through the model again for every token."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt] * n_samples)
    for _ in range(n_new):
        ids = torch.cat((ids, sample_token(model(ids)[:, -1], generator, **sampling)), dim=1)
    return ids[:, len(prompt):].tolist()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}])
@pytest.mark.parametrize("seed", range(3))
def test_generation_equals_generation_without_a_cache(seed, sampling):
    model, prompt = random_model(seed), tokens(seed, 1, 5)[0].tolist()
    expected = generate_without_cache(model, prompt, 12, 3, seed, **sampling)
    assert generate(model, prompt, 12, n_samples=3, seed=seed, **sampling) == expected


def test_samples_differ_among_themselves_and_by_seed_and_come_again_with_it():
    model = random_model(0)
    first = generate(model, [1], 15, n_samples=4, seed=1)
    assert len(first) == 4 and all(len(sample) == 15 for sample in first)
    assert len({tuple(sample) for sample in first}) == 4
    assert generate(model, [1], 15, n_samples=4, seed=1) == first
    assert generate(model, [1], 15, n_samples=4, seed=2) != first


def test_likeliest_tokens_are_the_same_in_every_sample_and_for_every_seed():
    a, b = generate(random_model(0), [1, 2], 8, n_samples=2, temperature=0)
    assert a == b == generate(random_model(0), [1, 2], 8, temperature=0, seed=9)[0]


def test_samples_end_before_their_first_stop_token_and_the_others_go_on():
    model, stops = random_model(1), {3, 7, 30}
    free = generate(model, [1], 19, n_samples=8, seed=5)
    stopped = generate(model, [1], 19, n_samples=8, seed=5, stop_ids=stops)
    ends = [next((i for i, token in enumerate(sample) if token in stops), len(sample)) for sample in free]
    assert stopped == [sample[:end] for sample, end in zip(free, ends, strict=True)]
    assert len(set(ends)) > 2 and max(ends) == 19  # the case is one of several ends, and of none


def test_generation_stops_computing_once_every_sample_has_ended(monkeypatch):
    model = random_model(0)
    [first, *_] = generate(model, [1], 2, temperature=0)[0]
    calls = []
    forward = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *arguments: calls.append(1) or forward(*arguments))
    assert generate(model, [1], 15, n_samples=2, temperature=0, stop_ids=(first,)) == [[], []]
    assert len(calls) == 1


def test_no_new_tokens_asked_for_none_made():
    assert generate(random_model(0), [1], 0, n_samples=2) == [[], []]


def test_generation_may_fill_the_rotary_table_and_no_more():
    model = random_model(0)
    table = 10 * LENGTH
    prompt = tokens(0, 1, table - 2)[0].tolist()
    assert len(generate(model, prompt, 2)[0]) == 2
    with pytest.raises(UserError, match=f"{table + 1} together, the model takes {table}"):
        generate(model, prompt, 3)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompt_ids": []}, "prompt is empty"), ({"temperature": -0.1}, "temperature"), ({"top_k": 0}, "top_k"),
])
def test_what_cannot_be_sampled_is_a_user_error(arguments, message):
    with pytest.raises(UserError, match=message):
        generate(random_model(0), **{"prompt_ids": [1], "max_new_tokens": 5, **arguments})


# --- one token -------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0, 1.0, 2.5])
N_DRAWS = 20_000


def p_value(probabilities, logits=LOGITS, seed=0, **sampling):
    """Chi-square of N_DRAWS sampled tokens against `probabilities`."""
    draws = sample_token(logits.expand(N_DRAWS, -1), torch.Generator().manual_seed(seed), **sampling)
    assert draws.shape == (N_DRAWS, 1) and draws.dtype == torch.int64
    counts = torch.bincount(draws[:, 0], minlength=len(logits)).numpy()
    assert counts[probabilities == 0].sum() == 0
    expected = N_DRAWS * probabilities[probabilities > 0]
    return stats.chisquare(counts[probabilities > 0], expected).pvalue


def softmax(logits, temperature=1.0, keep=None):
    weights = np.exp(logits.double().numpy() / temperature)
    if keep is not None:
        weights[np.argsort(weights)[:-keep]] = 0
    return weights / weights.sum()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, None), (1.0, 3), (0.7, 5), (1.0, 8),
                                                    (1.0, 100)])
def test_tokens_are_drawn_from_the_softmax(temperature, top_k):
    expected = softmax(LOGITS, temperature, top_k)
    assert p_value(expected, temperature=temperature, top_k=top_k) > 1e-3
    assert p_value(softmax(LOGITS, 1.3 * temperature, top_k), temperature=temperature, top_k=top_k) < 1e-4  # has power


@pytest.mark.parametrize("top_k", [None, 3])
def test_temperature_0_takes_the_likeliest(top_k):
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, None, 0, top_k), logits.argmax(dim=1, keepdim=True))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=2, max_size=12), st.integers(1, 14), st.integers(0, 99))
def test_top_k_is_k_tokens_also_among_equal_logits(logits, top_k, seed):
    logits = torch.tensor(logits, dtype=torch.float32)
    drawn = sample_token(logits.expand(2000, -1), torch.Generator().manual_seed(seed), 3.0, top_k).unique()
    assert len(drawn) <= top_k
    threshold = logits.sort(descending=True).values[: top_k][-1]
    assert (logits[drawn] >= threshold).all()


def test_rows_are_drawn_from_their_own_logits():
    logits = torch.full((4, 6), -1e4)
    logits[torch.arange(4), torch.tensor([5, 0, 3, 2])] = 0.0
    for top_k in (None, 2):
        assert sample_token(logits, torch.Generator().manual_seed(0), 1.0, top_k)[:, 0].tolist() == [5, 0, 3, 2]


def test_logits_at_the_softcap_do_not_overflow_at_a_low_temperature():
    logits = torch.tensor([[15.0, -15.0, 14.0]])
    assert sample_token(logits, torch.Generator().manual_seed(0), temperature=1e-3).item() == 0


# --- streams ---------------------------------------------------------------------------------------------------------

def test_a_stream_yields_each_step_as_it_is_made_and_none_after_a_stop_token():
    model = random_model(0)
    whole = generate(model, [1], 12, n_samples=3, seed=2)
    stops = (whole[0][4], whole[1][7])
    steps = list(stream(model, [1], 12, n_samples=3, seed=2, stop_ids=stops))
    for row, tokens_of_row in enumerate(zip(*steps, strict=True)):
        end = next((i for i, token in enumerate(whole[row]) if token in stops), 12)
        assert list(tokens_of_row) == [*whole[row][:end], *[None] * (len(steps) - end)][:len(steps)]


UTF8 = st.lists(st.one_of(st.text(max_size=6).map(str.encode), st.binary(max_size=4)), max_size=8).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(UTF8, st.sets(st.integers(1, 40)).map(sorted))
def test_pieces_of_a_text_are_whole_characters_and_together_the_text(data, cuts):
    tokens = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    decoder, certain = codecs.getincrementaldecoder("utf-8")("replace"), []
    for token in tokens:
        certain.append(decoder.decode(token))
    text, taken = "", []
    tokens_taken = (taken.append(token) or token for token in tokens)
    for piece in whole_characters(tokens_taken, lambda ids: b"".join(ids).decode(errors="replace")):
        text += piece
        if len(taken) < len(tokens):  # nothing is held back but what may still become another character
            assert text.rstrip("\ufffd") == "".join(certain[:len(taken)]).rstrip("\ufffd")
    assert text == data.decode(errors="replace")


def test_a_character_in_three_tokens_is_shown_once_it_is_whole():
    euro = "€".encode()
    assert list(whole_characters([b"a", euro[:1], euro[1:2], euro[2:], b"b", euro[:2]],
                                 lambda ids: b"".join(ids).decode(errors="replace"))) == ["a", "€", "b", "\ufffd"]
