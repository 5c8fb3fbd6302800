"""tokenizer.json gives our ids in Hugging Face's `tokenizers`, which the extra hf installs."""

import json

import pytest
from corpus import golden_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.export import tokenizer_json
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the extra hf is not installed")


def exported(tokenizer):
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(*tokenizer.vocabulary)))


GOLDEN, EXPORTED = golden_tokenizer(), exported(golden_tokenizer())
ODD = ("<|bos|>", "<|assistant_end|>", "'S", "'ſ", "12345", "\r\n\r\n", "\t", " ", "   ", "\u0085",
       "\u00a0", "\u2028", "\0", "\ufeff", "e\u0301", "👩‍👩‍👧", "漢字", "ﬃ", "İ", "the dog", " and",
       "'ll", "don't", "...\n", "\U000e0001", "𝟘", "Ⅷ")
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=12)), max_size=8).map("".join)
BYTES = {bytes([i]): i for i in range(256)}


@settings(max_examples=1000, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 255), max_size=30))
@example(" ".join(ODD), [])
@example("a" * 3000 + " " * 3000, [])
def test_ids_are_equal_and_decode_to_the_same_text(text, bytes_not_utf8):
    ids = GOLDEN.encode(text)
    assert EXPORTED.encode(text).ids == ids
    assert EXPORTED.decode(ids) == text
    assert EXPORTED.decode(bytes_not_utf8) == GOLDEN.decode(bytes_not_utf8)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=40),
       st.lists(st.text("abc ", max_size=20), min_size=1, max_size=20))
def test_ids_are_equal_for_any_vocabulary_of_merges(merges, texts):
    tokens = [b"a", b"b", b"c", b" "]
    for left, right in merges:
        tokens.append(tokens[left % len(tokens)] + tokens[right % len(tokens)])
    tokens = dict.fromkeys([*tokens[:4], *BYTES, *tokens])
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    tokenizer = Tokenizer(ranks, special, SPLIT_PATTERN)
    other = exported(tokenizer)
    for text in texts:
        assert other.encode(text).ids == tokenizer.encode(text)


def test_special_tokens_have_their_ids_and_no_text_makes_them():
    assert {name: EXPORTED.token_to_id(name) for name in SPECIAL_TOKENS} == GOLDEN.vocabulary[1]
    assert EXPORTED.get_vocab_size() == GOLDEN.vocab_size
    with pytest.raises(UserError, match="spelling of a special one"):
        tokenizer_json({**BYTES, b"<|bos|>": 256}, {"<|bos|>": 257}, SPLIT_PATTERN)
