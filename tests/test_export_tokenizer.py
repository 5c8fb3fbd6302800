"""tokenizer.json gives the ids of ours: read by Hugging Face's own `tokenizers`, where that is installed."""

import json

import pytest
from corpus import golden_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.export.hf_tokenizer import byte_characters, tokenizer_json
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")


def theirs(tokenizer):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(*tokenizer.vocabulary)))


GOLDEN, GOLDEN_THEIRS = golden_tokenizer(), theirs(golden_tokenizer())
ODD = ("<|bos|>", "<|assistant_end|>", "'S", "'ſ", "12345", "\r\n\r\n", "\t", " ", "   ", "\u0085", "\u00a0", "\u2028",
       "\0", "\ufeff", "e\u0301", "👩‍👩‍👧", "漢字", "ﬃ", "İ", "the dog", " and", "'ll", "don't", "...\n",
       "\U000e0001", "𝟘", "Ⅷ")
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=12)), max_size=8).map("".join)


def check_ids_and_back(text):
    ids = GOLDEN.encode(text)
    assert GOLDEN_THEIRS.encode(text).ids == ids
    assert GOLDEN_THEIRS.decode(ids) == text


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
@example(" ".join(ODD))
@example("a" * 3000 + " " * 3000)
def test_ids_are_equal(text):
    check_ids_and_back(text)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(TEXTS)
def test_ids_are_equal_on_ten_thousand_texts(text):
    check_ids_and_back(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_bytes_that_are_no_text_are_decoded_alike(ids):
    assert GOLDEN_THEIRS.decode(ids) == GOLDEN.decode(ids)


MERGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40)


def of_merges(merges):
    """A vocabulary of bytes and of tokens that are made of two others, a few letters most of them."""
    letters = [b"a", b"b", b"c", b" "]
    tokens = [*letters, *(bytes([i]) for i in range(256) if bytes([i]) not in letters)]
    made = list(letters)
    for left, right in merges:
        token = made[left % len(made)] + made[right % len(made)]
        if token not in made:
            made.append(token)
    tokens += made[len(letters):]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}, SPLIT_PATTERN)


@settings(max_examples=300, deadline=None)
@given(MERGES, st.lists(st.text("abc ", max_size=20), min_size=1, max_size=20))
def test_ids_are_equal_for_any_vocabulary_of_merges(merges, texts):
    tokenizer = of_merges(merges)
    other = theirs(tokenizer)
    for text in texts:
        assert other.encode(text).ids == tokenizer.encode(text)


def test_a_token_that_no_merge_makes_is_found_where_it_is_a_whole_piece():
    ranks = {**{bytes([i]): i for i in range(256)}, b"abcd": 256}
    tokenizer = Tokenizer(ranks, {"<|bos|>": 257})
    assert tokenizer.encode("abcd") == [256] and theirs(tokenizer).encode("abcd").ids == [256]


def test_special_tokens_have_their_ids_and_no_text_makes_them():
    assert {name: GOLDEN_THEIRS.token_to_id(name) for name in SPECIAL_TOKENS} == GOLDEN.vocabulary[1]
    assert GOLDEN_THEIRS.get_vocab_size() == GOLDEN.vocab_size
    assert GOLDEN.bos_id not in GOLDEN_THEIRS.encode("<|bos|>").ids


def test_the_byte_characters_are_those_of_the_library():
    assert sorted(byte_characters()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def test_a_token_that_spells_a_special_one_is_refused():
    ranks = {**{bytes([i]): i for i in range(256)}, b"<|bos|>": 256}
    with pytest.raises(UserError, match="--format upstream"):
        tokenizer_json(ranks, {"<|bos|>": 257}, SPLIT_PATTERN)
