"""A tokenizer's files: our plain text, and upstream's pickle, read without running what it asks for.

A vocabulary is three things: ranks {token bytes: id}, special tokens {name: id} and the split pattern.
"""

import base64
import hashlib
import io
import json
import operator
import pickle

from nanochat.common import UserError, parse_json, read_limited

_HEADER = "nanochat tokenizer, version 1"
_MAX_BYTES = 1 << 30  # 2^24 tokens, the most there may be, are no longer
_MEND = "train the tokenizer again or copy the file again"


def vocabulary_id(ranks, special_tokens, pattern):
    """12 hex digits of a SHA-256 over everything that decides how a text is encoded."""
    return hashlib.sha256(_body(ranks, special_tokens, pattern).encode()).hexdigest()[:12]


def to_text(ranks, special_tokens, pattern):
    """Lines: header, id, pattern, special tokens, then base64 of each token and its id as tiktoken's files have it."""
    identity = vocabulary_id(ranks, special_tokens, pattern)
    return f"{_HEADER}\nid {identity}\n{_body(ranks, special_tokens, pattern)}"


def read_text_file(path):
    """(ranks, special tokens, pattern) of a file by `to_text`. Errors: UserError naming the line that is damaged."""
    ranks, special_tokens, pattern, identity = {}, {}, None, None
    number = 1
    try:
        lines = read_limited(path, _MAX_BYTES).decode().replace("\r\n", "\n").split("\n")
        if lines[0] != _HEADER:
            raise ValueError(f"the file does not begin with {_HEADER!r}")
        if lines.pop() != "":
            number = len(lines) + 1
            raise ValueError("the last line is cut off")
        for number, line in enumerate(lines[1:], start=2):  # noqa: B007 (the error names it)
            key, value = line.split(" ", 1)
            if key == "id":
                identity = value
            elif key == "pattern":
                pattern = _string(value)
            elif key == "special":
                name, token_id = value.rsplit(" ", 1)
                special_tokens[_string(name)] = int(token_id)
            else:
                ranks[base64.b64decode(key, validate=True)] = int(value)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {_MEND}") from None
    except ValueError as error:
        raise UserError(f"{path}, line {number}: damaged ({error}); {_MEND}") from None
    if pattern is None or identity != vocabulary_id(ranks, special_tokens, pattern):
        raise UserError(f"{path}: the content does not match the id in line 2; {_MEND}")
    return ranks, special_tokens, pattern


def read_pickle_file(path):
    """(ranks, special tokens, pattern) of upstream's tokenizer.pkl, a pickled tiktoken.Encoding.

    Errors: UserError when the pickle asks for anything but that one class, or is not what an Encoding saves.
    """
    try:
        unpickler = _EncodingUnpickler(io.BytesIO(read_limited(path, _MAX_BYTES)))
        found = unpickler.load()
    except _RefusedError as refused:
        raise UserError(f"{path} asks for {refused}, which no tokenizer needs and could run any program; refused: "
                        "use a file from a source you trust, or train a tokenizer") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); {_MEND}") from None
    state = getattr(found, "state", None) if isinstance(found, unpickler.Encoding) else None
    if not _is_encoding_state(state):
        raise UserError(f"{path} does not hold a tiktoken.Encoding with its ranks; {_MEND}")
    return state["mergeable_ranks"], state["special_tokens"], state["pat_str"]


class _RefusedError(Exception):
    pass


class _EncodingUnpickler(pickle.Unpickler):
    """Gives an inert stand-in for tiktoken.core.Encoding and refuses every other name the stream asks for."""

    def __init__(self, file):
        super().__init__(file)

        class Encoding:
            def __setstate__(self, state):
                self.state = state

        self.Encoding = Encoding  # a new one each time: what a stream does to it ends with it

    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise _RefusedError(f"{module}.{name}"[:200])
        return self.Encoding

    def persistent_load(self, pid):
        raise _RefusedError("an object outside the file")


def _body(ranks, special_tokens, pattern):
    by_id = operator.itemgetter(1)
    lines = [f"pattern {json.dumps(pattern)}"]
    lines += [f"special {json.dumps(name)} {i}" for name, i in sorted(special_tokens.items(), key=by_id)]
    lines += [f"{base64.b64encode(token).decode()} {i}" for token, i in sorted(ranks.items(), key=by_id)]
    return "\n".join(lines) + "\n"


def _string(literal):
    value = parse_json(literal.encode())
    if not isinstance(value, str):
        raise ValueError(f"{literal} is not a string")
    return value


def _is_encoding_state(state):
    if type(state) is not dict or set(state) != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        return False
    ranks, special_tokens = state["mergeable_ranks"], state["special_tokens"]
    return (type(state["pat_str"]) is str and type(ranks) is dict and type(special_tokens) is dict
            and all(type(token) is bytes and type(i) is int for token, i in ranks.items())
            and all(type(name) is str and type(i) is int for name, i in special_tokens.items()))
