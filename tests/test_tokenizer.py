"""Encoding, decoding, training, saving and loading; pickles that ask for more than a tokenizer."""

import base64
import builtins
import itertools
import json
import os
import pickle
import random
import shutil
import string
from pathlib import Path

import numpy as np
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
    read_pickle_file,
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


@given(any_text)
@settings(deadline=None)
def test_byte_lengths_of_tokens_add_up_to_the_text(text):
    assert golden.token_bytes()[golden.encode(text)].sum() == len(text.encode())


def test_token_bytes_count_bytes_and_special_tokens_have_none():
    ranks = {token: i for i, token in enumerate([*BYTES, "é".encode()])}
    tokenizer = Tokenizer(ranks, {name: 257 + i for i, name in enumerate(SPECIAL_TOKENS)})
    assert tokenizer.encode("é") == [256] and tokenizer.token_bytes()[256] == 2
    lengths = golden.token_bytes()
    assert lengths.shape == (1024,) and lengths.dtype == np.int32
    assert (lengths[1015:] == 0).all() and (lengths[:1015] > 0).all()


def test_half_a_character_decodes_to_the_replacement_character():
    assert bytes_only.decode([0xC3]) == "\ufffd"
    with pytest.raises(KeyError):
        golden.decode([1024])


def test_lone_surrogate_is_encoded_as_the_replacement_character():
    assert golden.decode(golden.encode("a\ud800b")) == "a\ufffdb"


@given(st.lists(any_text, max_size=8), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_batch_in_threads_equals_one_by_one(texts, num_threads):
    one_by_one = [golden.encode(text) for text in texts]
    assert golden.encode_batch(texts, num_threads=num_threads) == one_by_one


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


def test_ordinary_long_text_is_never_cut_inside_a_word():
    rng = random.Random(0)
    words = ("".join(rng.choices(string.ascii_letters, k=rng.randint(1, 9)))
             for _ in range(100_000))
    text = "".join(word + rng.choice([" ", " ", ", ", ".\n", "  "]) for word in words)
    assert len(text) > 5 * tokenizer_module._PART_CHARS
    ranks, _, pattern = golden.vocabulary
    reference = tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks,
                                  special_tokens={})
    assert golden.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("text", [" " * 1_200_000, "a" * 1_000_000, " \t" * 600_000])
def test_a_million_equal_characters_neither_fail_nor_take_long(text):
    assert golden.decode(golden.encode(text)) == text  # tiktoken alone panics on the first
    assert train_tokenizer([text + "word word word"], 270).vocab_size == 270


def test_training_is_reproducible_and_merges_the_frequent_pairs():
    texts = ["the cat and the hat and the bat " * 20, "then there they were " * 10]
    first, second = train_tokenizer(texts, 280), train_tokenizer(iter(texts), 280)
    assert first.tokenizer_id == second.tokenizer_id and first.vocab_size == 280
    assert first.bos_id == 271
    assert len(first.encode(" the")) == 1


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
    (264, r"too small: choose 265 \(256 bytes and special tokens\) to 16777216"),
    (5000, "too large for this text, whose pairs make 269 tokens at most"),
])
def test_impossible_vocabulary_sizes_are_refused(vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(["abc abd", "abc"], vocab_size)


def test_vocabulary_without_merges_is_possible():
    assert train_tokenizer(["any text"], 265).encode("hé") == [104, 0xC3, 0xA9]


@given(st.lists(any_text, min_size=1, max_size=5))
@settings(deadline=None, max_examples=8)
def test_saved_and_loaded_tokenizer_encodes_the_same(tmp_path_factory, texts):
    trained = train_tokenizer([*texts, "some more words to merge, words to merge"], 275)
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    for missing in (None, "tokenizer.pkl", "vocabulary.json"):
        shutil.copytree(folder, folder / "copy", dirs_exist_ok=True)
        if missing:
            (folder / "copy" / missing).unlink()
        loaded = load_tokenizer(folder / "copy")
        assert loaded.vocabulary == trained.vocabulary
        assert loaded.encode_batch(texts) == trained.encode_batch(texts)
        shutil.rmtree(folder / "copy")


def test_upstream_reads_what_we_save(tmp_path):
    golden.save(tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode_single_token("<|bos|>") == golden.bos_id
    for case in EXPECTED["encoded"]:
        assert encoding.encode_ordinary(case["text"]) == case["ids"]
    lines = (tmp_path / "tokenizer.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(i) for token, i in map(str.split, lines)}
    assert ranks == encoding._mergeable_ranks, "tiktoken's own file format"
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


@pytest.mark.parametrize("ranks, special, pattern, message", [
    (BYTES | {b"ab": 300}, {"<|bos|>": 256}, SPLIT_PATTERN, "without a gap"),
    (BYTES | {b"ab": 256}, {"<|bos|>": 256}, SPLIT_PATTERN, "without a gap"),
    ({token: i for token, i in BYTES.items() if i < 255}, {"<|bos|>": 255}, SPLIT_PATTERN,
     "1 of the 256 single bytes have no token"),
    (BYTES | {b"": 256}, {"<|bos|>": 257}, SPLIT_PATTERN, "has no bytes"),
    (BYTES, {"<|eos|>": 256}, SPLIT_PATTERN, r"no token <\|bos\|>"),
    (BYTES, {"<|bos|>": 256}, "(", "not a regular expression"),
    (BYTES, {"<|bos|>": 256}, r"\w+", "leaves out text"),
    (BYTES, {1: 256}, SPLIT_PATTERN, "not a vocabulary"),
    (BYTES, {"<|bos|>": "256"}, SPLIT_PATTERN, "not a vocabulary"),
    (BYTES, ["<|bos|>"], SPLIT_PATTERN, "not a vocabulary"),
])
def test_what_makes_no_vocabulary_is_refused(ranks, special, pattern, message):
    with pytest.raises(UserError, match=message):
        Tokenizer(ranks, special, pattern)


def test_folder_without_a_tokenizer_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer .*python -m scripts\.tok_train"):
        load_tokenizer(tmp_path / "nowhere")


def test_two_different_tokenizers_in_one_folder_are_refused(tmp_path):
    golden.save(tmp_path)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(bytes_only._encoding))
    with pytest.raises(UserError, match="different tokenizers"):
        load_tokenizer(tmp_path)


# --- files and pickles that are damaged or hostile

class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


PWNED = "open('pwned', 'w')"
MALICIOUS = {
    "os.system": pickle.dumps(Calls(os.system, "touch pwned")),
    "os.system, protocol 0": pickle.dumps(Calls(os.system, "touch pwned"), 0),
    "builtins.eval": pickle.dumps(Calls(builtins.eval, PWNED)),
    "builtins.getattr": pickle.dumps(Calls(getattr, "x", "upper")),
    "inside the ranks": pickle.dumps({"mergeable_ranks": {b"a": Calls(eval, PWNED)}}),
    "before the encoding": pickle.dumps(Calls(eval, PWNED))[:-1] + b"0" + GOLDEN_PICKLE[2:],
    "stack global":
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R.",
    "dotted name through the class":
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x18Encoding.__init__.__globals__\x93.",
    "another class of tiktoken":
        b"\x80\x04\x8c\x0dtiktoken.load\x8c\x09read_file\x93\x8c\x05/etc/\x85R.",
    "old-style instance": b"(S'touch pwned'\nios\nsystem\n.",
    "old-style object": b"(cos\nsystem\nS'touch pwned'\no.",
    "extension registry": b"\x80\x02\x82\x01.",
    "object outside the file": b"Pfile\n.",
    "object outside the file, binary": b"\x80\x02K\x01Q.",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_pickle_that_asks_for_anything_else_is_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.pkl").write_bytes(MALICIOUS[name])
    with pytest.raises(UserError, match=r"tokenizer\.pkl (was refused: it asks for|is damaged)"):
        load_tokenizer(".")
    assert not Path("pwned").exists()


def test_refusal_names_what_was_asked_for(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(MALICIOUS["os.system"])
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        read_pickle_file(tmp_path / "tokenizer.pkl")


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
def test_a_damaged_file_gives_a_tokenizer_or_one_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    bytes_only.save(folder)
    kept = data.draw(st.sampled_from(["tokenizer.pkl", "tokenizer.tiktoken", "vocabulary.json"]))
    stream = bytearray((folder / kept).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    (folder / kept).write_bytes(stream[:data.draw(st.integers(0, len(stream)))])
    if kept == "tokenizer.pkl":
        (folder / "vocabulary.json").unlink()
    else:
        (folder / "tokenizer.pkl").unlink()
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        assert str(folder) in str(error)
        return
    assert tokenizer.decode(tokenizer.encode("any text")) == "any text"
