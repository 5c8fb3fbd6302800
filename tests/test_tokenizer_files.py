"""The text form line by line, and pickles that ask for more than a tokenizer needs."""

import builtins
import os
import pickle
import pickletools
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer_files import read_pickle_file, read_text_file, to_text, vocabulary_id

GOLDEN = Path(__file__).parent / "golden" / "tokenizer_1024" / "tokenizer.pkl"
VOCABULARY = ({bytes([i]): i for i in range(256)} | {b"ab": 256}, {"<|bos|>": 257, "<|x y\u2028|>": 258}, "\\s+|\"é\n")


@given(st.dictionaries(st.binary(max_size=5), st.integers(0, 9999)),
       st.dictionaries(st.text(), st.integers(0, 9999)), st.text())
@settings(deadline=None)
def test_text_form_round_trips_any_vocabulary(tmp_path_factory, ranks, special, pattern):
    path = tmp_path_factory.getbasetemp() / "round_trip.txt"
    path.write_text(to_text(ranks, special, pattern), encoding="utf-8")
    assert read_text_file(path) == (ranks, special, pattern)


@pytest.mark.parametrize("line, replacement, message", [
    (1, "something else", "line 1: damaged .the file does not begin with"),
    (3, "pattern 'x'", "line 3: damaged"),
    (3, "pattern 7", "line 3: damaged .7 is not a string"),
    (4, 'special "<|bos|>" many', "line 4: damaged"),
    (7, "A*== 3", "line 7: damaged"),
    (9, "AQ==", "line 9: damaged"),
    (9, "", "line 9: damaged"),
    (8, "AQ== 77", "does not match the id in line 2"),
    (2, "id 000000000000", "does not match the id in line 2"),
])
def test_damaged_line_is_named(tmp_path, line, replacement, message):
    lines = to_text(*VOCABULARY).split("\n")
    lines[line - 1] = replacement
    (tmp_path / "tokenizer.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=rf"tokenizer\.txt(, |: the content ){message}"):
        read_text_file(tmp_path / "tokenizer.txt")


def test_no_cut_goes_unnoticed(tmp_path):
    text = to_text(*VOCABULARY)
    for length in range(0, len(text), 7):
        (tmp_path / "tokenizer.txt").write_text(text[:length])
        with pytest.raises(UserError, match=r"tokenizer\.txt"):
            read_text_file(tmp_path / "tokenizer.txt")


def test_bytes_that_are_no_text_are_damage(tmp_path):
    (tmp_path / "tokenizer.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"tokenizer\.txt, line 1: damaged"):
        read_text_file(tmp_path / "tokenizer.txt")


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_encoding_is_read_as_tiktoken_pickles_it(tmp_path, protocol):
    original = pickle.loads(GOLDEN.read_bytes())
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(original, protocol))
    ranks, special, pattern = read_pickle_file(tmp_path / "tokenizer.pkl")
    assert (ranks, special, pattern) == (original._mergeable_ranks, original._special_tokens, original._pat_str)
    assert vocabulary_id(ranks, special, pattern) == vocabulary_id(*read_pickle_file(GOLDEN))


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
    "before the encoding": pickle.dumps(Calls(eval, PWNED))[:-1] + b"0" + GOLDEN.read_bytes()[2:],
    "stack global built on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch pwned\x85R.",
    "dotted name through the class": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x18Encoding.__init__.__globals__\x93.",
    "another class of tiktoken": b"\x80\x04\x8c\x0dtiktoken.load\x8c\x09read_file\x93\x8c\x05/etc/\x85R.",
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
    with pytest.raises(UserError, match=r"tokenizer\.pkl (asks for .* refused|.*damaged)|damaged"):
        read_pickle_file(Path("tokenizer.pkl"))
    assert not Path("pwned").exists()


def test_refusal_names_what_was_asked_for(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(MALICIOUS["os.system"])
    with pytest.raises(UserError, match=r"asks for posix\.system"):
        read_pickle_file(tmp_path / "tokenizer.pkl")


ENCODING = b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93"


@pytest.mark.parametrize("stream", [
    b"", b"\x80\x04", GOLDEN.read_bytes()[:5000], b"not a pickle at all",
    pickle.dumps({"mergeable_ranks": {}}), pickle.dumps("text"), pickle.dumps(None),
    ENCODING + b".",  # the class itself
    ENCODING + b")\x81.",  # an instance without a state
    ENCODING + b")R}b.",  # built from an empty state
    ENCODING + b"}b.",  # state set on the class
    ENCODING + b")\x81\x8c\x04gpt2b.",  # an encoding that tiktoken would fetch from the network by its name
    ENCODING + b")\x81}(\x8c\x04name\x8c\x01x\x8c\x07pat_str\x8c\x01.\x8c\x0fmergeable_ranks}\x8c\x0especial_tokens"
    b"}(K\x01K\x02uub.",  # a special token that is a number
])
def test_pickle_without_an_encoding_is_refused(tmp_path, stream):
    (tmp_path / "tokenizer.pkl").write_bytes(stream)
    with pytest.raises(UserError, match=r"tokenizer\.pkl(: damaged| does not hold)"):
        read_pickle_file(tmp_path / "tokenizer.pkl")


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_damaged_pickle_never_raises_anything_but_a_user_error(tmp_path_factory, data):
    stream = bytearray(pickle.dumps(tiktoken.Encoding(
        "x", pat_str=VOCABULARY[2].replace("é\n", ""), mergeable_ranks=VOCABULARY[0], special_tokens=VOCABULARY[1])))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(stream)
    try:
        ranks, special, pattern = read_pickle_file(path)
    except UserError:
        return
    assert type(pattern) is str
    assert {*map(type, ranks)} <= {bytes} and {*map(type, special)} <= {str}


def test_golden_pickle_needs_one_class_only():
    strings = [argument for opcode, argument, _ in pickletools.genops(GOLDEN.read_bytes())]
    names = [opcode.name for opcode, _, _ in pickletools.genops(GOLDEN.read_bytes())]
    assert names.count("STACK_GLOBAL") == 1 and not {"GLOBAL", "REDUCE", "INST", "OBJ"} & set(names)
    assert "tiktoken.core" in strings
