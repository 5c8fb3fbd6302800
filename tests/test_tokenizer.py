"""Encoding, decoding, training, saving and loading; pickles that ask for more than a tokenizer."""

import itertools
import json
import os
import pickle
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanochat import tokenizer as tokenizer_module
from nanochat.common import UserError
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)

GOLDEN = Path(__file__).parent / "golden" / "tokenizer_1024"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
golden = load_tokenizer(GOLDEN)
GOLDEN_PICKLE = (GOLDEN / "tokenizer.pkl").read_bytes()
BYTES = {bytes([i]): i for i in range(256)}
bytes_only = Tokenizer(BYTES, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})

any_text = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "\n", "\r\n", "\n\n", " ", "  ", "\t",
                              "'s", "'LL", "word", "12345", "é", "🤖", "漢字", "\u200b", "\u00a0",
                              "...", "\x00"]), max_size=25).map("".join))


@pytest.mark.parametrize("case", EXPECTED["encoded"], ids=range(len(EXPECTED["encoded"])))
def test_golden_texts_encode_as_upstream_encodes_them(case):
    assert golden.encode(case["text"]) == case["ids"]
    assert golden.decode(case["ids"]) == case["text"]


def test_golden_vocabulary():
    assert golden.tokenizer_id == "31ac57a5743e", "records and caches of tokens name it"
    assert golden.vocab_size == EXPECTED["vocab_size"]
    assert golden.bos_id == EXPECTED["bos"]
    assert [golden.bos_id, *golden.encode("abc")] == EXPECTED["with_bos"]
    assert {golden.decode([i]): i for i in range(1015, 1024)} == EXPECTED["special"]


@given(any_text)
@example("\n")
@example("<|bos|>")
@settings(deadline=None)
def test_decoding_what_was_encoded_gives_the_text(text):
    for tokenizer in (golden, bytes_only):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.bos_id for i in ids), "no special token comes out of text"
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(st.lists(any_text, max_size=8).map("".join), st.integers(4, 30))
@settings(deadline=None)
def test_long_text_in_parts_has_the_same_tokens_where_words_end(text, part_chars):
    whole = golden.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "_PART_CHARS", part_chars)
        parts = list(tokenizer_module._parts(text))
        assert "".join(parts) == text and all(len(part) <= part_chars for part in parts)
        assert golden.decode(golden.encode(text)) == text
        cut_at_words = all(after[0] == " " and not before[-1].isspace()
                           for before, after in itertools.pairwise(parts))
        if cut_at_words:
            assert golden.encode(text) == whole


@pytest.mark.parametrize("text", [" " * 1_200_000, "a" * 1_000_000, " \t" * 600_000])
def test_a_million_equal_characters_neither_fail_nor_take_long(text):
    assert golden.decode(golden.encode(text)) == text  # tiktoken alone panics on the first
    assert train_tokenizer([text + "word word word"], 270).vocab_size == 270


def test_trained_tokenizer_agrees_with_a_textbook_bpe():
    text = "low low low low lower lower newest newest newest widest widest"
    trained = train_tokenizer([text], 265 + 6)
    ours = [trained.decode([i]) for i in range(256, 262)]
    words = [list(word) for word in (" " + text).split(" ")[1:]]
    words = [words[0], *([" ", *word] for word in words[1:])]
    for merged in ours:
        pairs = {}
        for word in words:
            for pair in itertools.pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        assert merged in {a + b for (a, b), count in pairs.items() if count == max(pairs.values())}
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] + word[i + 1] == merged:
                    word[i:i + 2] = [merged]
                i += 1


@pytest.mark.parametrize("vocab_size, message", [
    (264, r"not possible: choose 265 \(256 bytes and special tokens\) to 16777216"),
    (5000, "too large for this text, whose pairs make 269 tokens at most"),
])
def test_impossible_vocabulary_sizes_are_refused(vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(["abc abd", "abc"], vocab_size)


@given(st.lists(any_text, min_size=1, max_size=5))
@settings(deadline=None, max_examples=8)
def test_saved_and_loaded_tokenizer_encodes_the_same(tmp_path_factory, texts):
    trained = train_tokenizer([*texts, "some more words to merge, words to merge"], 275)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    loaded = load_tokenizer(folder)
    assert loaded.vocabulary == trained.vocabulary
    assert [loaded.encode(text) for text in texts] == [trained.encode(text) for text in texts]


def test_upstream_reads_what_we_save(tmp_path):
    golden.save(tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode_single_token("<|bos|>") == golden.bos_id
    for case in EXPECTED["encoded"]:
        assert encoding.encode_ordinary(case["text"]) == case["ids"]
    token_bytes = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert token_bytes.dtype == torch.int32
    assert token_bytes.tolist() == golden.token_bytes().tolist()


def test_id_depends_on_everything_that_decides_the_tokens():
    ranks = BYTES | {b"ab": 256, b"cd": 257}
    special = {name: 258 + i for i, name in enumerate(SPECIAL_TOKENS)}
    swapped = ranks | {b"ab": 257, b"cd": 256}
    renamed = {name.replace("user", "person"): i for name, i in special.items()}
    ids = [Tokenizer(*parts).tokenizer_id for parts in (
        (ranks, special), (swapped, special), (ranks, renamed), (ranks, special, r"\s+|\S+"))]
    assert len(set(ids)) == 4
    assert Tokenizer(dict(reversed(ranks.items())), special, SPLIT_PATTERN).tokenizer_id == ids[0]


@pytest.mark.parametrize("ranks, special, pattern", [
    (BYTES | {b"ab": 300}, {"<|bos|>": 256}, SPLIT_PATTERN),
    (BYTES | {b"ab": 256}, {"<|bos|>": 256}, SPLIT_PATTERN),
    ({token: i for token, i in BYTES.items() if i < 255}, {"<|bos|>": 255}, SPLIT_PATTERN),
    (BYTES, {"<|eos|>": 256}, SPLIT_PATTERN),
    (BYTES, {"<|bos|>": 256}, "("),
    (BYTES, {"<|bos|>": 256}, r"\w+"),
    (BYTES, {1: 256}, SPLIT_PATTERN),
    (BYTES, {"<|bos|>": "256"}, SPLIT_PATTERN),
    (BYTES, ["<|bos|>"], SPLIT_PATTERN),
])
def test_what_makes_no_vocabulary_is_refused(ranks, special, pattern):
    with pytest.raises(ValueError, match=r"token|pattern|regex|[Pp]ars"):
        Tokenizer(ranks, special, pattern)


def test_folder_without_a_tokenizer_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"there is no .*python -m scripts\.tok_train"):
        load_tokenizer(tmp_path / "nowhere")


# --- files and pickles that are damaged or hostile

class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


MALICIOUS = {
    "os.system": pickle.dumps(Calls(os.system, "touch pwned")),
    "os.system, protocol 0": pickle.dumps(Calls(os.system, "touch pwned"), 0),
    "builtins.getattr": pickle.dumps(Calls(getattr, "x", "upper")),
    "inside the ranks": pickle.dumps({"mergeable_ranks": {b"a": Calls(os.system, "touch pwned")}}),
    "dotted name through the class":
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x18Encoding.__init__.__globals__\x93.",
    "another class of tiktoken":
        b"\x80\x04\x8c\x0dtiktoken.load\x8c\x09read_file\x93\x8c\x05/etc/\x85R.",
    "old-style instance": b"(S'touch pwned'\nios\nsystem\n.",
    "extension registry": b"\x80\x02\x82\x01.",
    "object outside the file": b"Pfile\n.",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_pickle_that_asks_for_anything_else_is_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.pkl").write_bytes(MALICIOUS[name])
    with pytest.raises(UserError, match=r"cannot read tokenizer\.pkl") as error:
        load_tokenizer(".")
    assert not Path("pwned").exists()
    if name == "os.system":
        assert "it asks for posix.system" in str(error.value)


ENCODING = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"


@pytest.mark.parametrize("stream", [
    b"", b"\x80\x04", GOLDEN_PICKLE[:5000], b"not a pickle at all",
    pickle.dumps({"mergeable_ranks": {}}), pickle.dumps("text"), pickle.dumps(None),
    ENCODING + b".",  # the class itself
    ENCODING + b")\x81.",  # an instance without a state
    ENCODING + b")R}b.",  # built from an empty state
    ENCODING + b"}b.",  # state set on the class
    ENCODING + b")\x81\x8c\x04gpt2b.",  # a name, which tiktoken would download
    ENCODING + b")\x81}(\x8c\x04name\x8c\x01x\x8c\x07pat_str\x8c\x01.\x8c\x0fmergeable_ranks}"
    b"\x8c\x0especial_tokens}(K\x01K\x02uub.",  # a special token that is a number
])
def test_pickle_without_an_encoding_is_refused(tmp_path, stream):
    (tmp_path / "tokenizer.pkl").write_bytes(stream)
    with pytest.raises(UserError, match=r"tokenizer\.pkl"):
        load_tokenizer(tmp_path)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_a_damaged_file_gives_the_tokenizer_or_one_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    bytes_only.save(folder)
    path = folder / "tokenizer.pkl"
    stream = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(stream[:data.draw(st.integers(len(stream) // 2, len(stream)))])
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        assert str(path) in str(error)
        return
    if f"nanochat-{bytes_only.tokenizer_id}".encode() in stream:
        assert tokenizer.tokenizer_id == bytes_only.tokenizer_id
    assert tokenizer.decode(tokenizer.encode("any text")) == "any text"
