"""A user's folder: which files are read for which split, and which documents come of them."""

import bz2
import gzip
import json
import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.text_folder import SEPARATORS, TextFolder, named_split, split_text


def write(path, content):
    """Write a file of a folder: bytes, text, JSON lines (list), or parquet (a column `text`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Array):
        with open(path, "wb") as file:
            pq.write_table(pa.table({"text": content}), file)
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(value) + "\n" for value in content))
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def texts(folder):
    return [data.decode() for _, data in TextFolder(folder).documents()]


STRINGS = pa.array(["one", None, "", "two"])
LINES = '{"text": "one"}\n\n{"text": null}\n"two"\n'
READ_AS_ONE_TWO = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.replace("\n", "\r\n"),
    "old mac.jsonl": LINES.replace("\n", "\r"),
    "a.JSONL.GZ": gzip.compress(LINES.encode()),
    "two members.jsonl.gz": gzip.compress(LINES[:16].encode()) + gzip.compress(LINES[16:].encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.zst": pa.compress(LINES.encode(), "zstd", asbytes=True),
    "separator.txt": "one\n<|endoftext|>\ntwo",
    "separators.md": "<|bos|>one<|endoftext|><|bos|>two<|endoftext|>\n",
    "row.jsonl": '{"text": "one<|endoftext|>two"}',
    "bom.txt": "one<|endoftext|>two".encode("utf-8-sig"),
    "utf-16.TXT": "one<|endoftext|>two".encode("utf-16"),
    "utf-32.txt": "one<|endoftext|>two".encode("utf-32"),
    "utf-16.jsonl": LINES.encode("utf-16"),
    "crlf.txt": "one\r\n<|endoftext|>\r\ntwo",
    "a.txt.gz": gzip.compress(b"one<|endoftext|>two", mtime=0),
    "A.PARQUET": STRINGS.cast(pa.large_string()),
    "view.parquet": STRINGS.cast(pa.string_view()),
    "dictionary.parquet": STRINGS.dictionary_encode(),
    "binary.parquet": STRINGS.cast(pa.binary()),
    "separator.parquet": pa.array(["one<|endoftext|>two"]),
    "deep/lang=en/year=2024/a.parquet": STRINGS,
    "~tilde.jsonl": LINES,
    "co:lon://a.parquet": STRINGS,
    os.fsdecode(b"latin\xe9.parquet"): STRINGS,
}


@pytest.mark.parametrize("name", READ_AS_ONE_TWO)
def test_every_form_of_two_documents_is_read(tmp_path, name):
    write(tmp_path / name, READ_AS_ONE_TWO[name])
    assert list(TextFolder(tmp_path).documents()) == [("train", b"one"), ("train", b"two")]


@pytest.mark.parametrize("ends", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_line_ends_become_lf(tmp_path, ends, name):
    text = ends.join(["A line.", "", "Another.", "\u2028 and \u0085 are text", ""])
    content = {"a.txt": text, "a.jsonl": [{"text": text}], "a.parquet": pa.array([text])}[name]
    write(tmp_path / name, content)
    assert texts(tmp_path) == ["A line.\n\nAnother.\n\u2028 and \u0085 are text\n"]


@pytest.mark.parametrize("text", [
    "A line of a play.\n\n" * 5000,
    "One line per document, without blank lines.\n" * 3000,
    "One long line of sentences without a line end. " * 3000,
    "words without any end of a sentence " * 3000,
    "一句话。" * 20_000,
    "x" * 100_000,
])
@pytest.mark.parametrize("name", ["a.txt", "a.parquet"])
def test_a_long_text_becomes_documents_of_a_few_percent_cut_at_the_best_place(tmp_path, text, name):
    write(tmp_path / name, pa.array([text]) if name == "a.parquet" else text)
    found = texts(tmp_path)
    assert "".join(found) == text
    assert max(map(len, found)) <= 0.1 * len(text)
    ends = {re.sub(r".*?(\W?)(\s*)\Z", r"\1\2", piece, flags=re.S)[-2:] for piece in found[:-1]}
    assert len(ends) == 1, ends


@given(st.lists(st.sampled_from([*SEPARATORS[:3], "<|", "a", "b c", "\n", "\n\n", ". ", "|>"]),
                max_size=60), st.integers(1, 7), st.integers(5, 40))
@settings(max_examples=300)
def test_documents_join_to_the_text_without_separators(parts, block_chars, piece_chars):
    text = "".join(parts)
    blocks = [text[i:i + block_chars] for i in range(0, len(text), block_chars)]
    found = list(split_text(blocks, piece_chars))
    separator = re.compile("|".join(map(re.escape, SEPARATORS)))
    if not separator.search(text):
        assert "".join(found) == text
    bare = separator.sub("", text)
    if separator.search(bare) is None:  # removing a separator did not make another
        assert "".join(found).replace("\n", "") == bare.replace("\n", "")
    assert not any(separator.search(document) for document in found)
    assert all(len(document) <= 2 * piece_chars + 64 for document in found)
    assert list(split_text([text], piece_chars)) == found or not text or "<|" in text


@pytest.mark.parametrize("name, split", [
    ("train", "train"), ("TRAIN-00000-of-00003", "train"), ("training_2", "train"),
    ("wiki.valid", "validation"), ("validation-00000-of-00001", "validation"),
    ("data/val/part-0", "validation"), ("dev", "validation"), ("Eval", "validation"),
    ("TinyStories-valid", "validation"), ("split=test/part-3", "test"), ("test/a.b", "test"),
    ("c4-train.00001-of-01024", "train"), ("my_test/train", "train"), ("train/test_1", "test"),
    ("the_dev_guide", ""), ("contest", ""), ("evaluate", ""), ("a", ""), ("latest/news", ""),
])
def test_split_is_the_first_or_last_word_of_a_name(name, split):
    assert named_split(name) == split


def test_every_file_is_read_or_named(tmp_path, base_dir):
    for name in ("a.txt", "B.TXT", "sub/c.md", "x.PDF", "y.pdf", "z.json", "Makefile",
                 ".git/a.txt", "a.parquet.gz", "sub/.DS_Store"):
        write(tmp_path / name, "x")
    write(base_dir / "base_data_x" / "shard_00000.parquet", STRINGS)
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.mkfifo(tmp_path / "fifo.txt")
    folder = TextFolder(tmp_path)
    assert [file.name for file in folder.files] == ["B.TXT", "a.txt", "sub/c.md"]
    assert folder.left_out == {
        ".pdf": 2, ".json": 1, "without suffix": 1, "hidden": 2, ".gz": 1, "cache folder": 1,
        "broken link": 2, "link to a folder": 1, "link to a file in the folder": 1,
        "special file": 1}
    assert folder.account()[-1].startswith("left out: 2 hidden, 2 .pdf, 2 broken link, 1 ")


NAMES = st.text("ab.~ :é\udce9", min_size=1, max_size=6).filter(lambda name: name.strip("."))
SUFFIXES = st.sampled_from(["", ".txt", ".TXT", ".json", ".jsonl.gz", ".xyz", ".gz"])


@given(st.dictionaries(NAMES, SUFFIXES, max_size=8))
@settings(max_examples=50, deadline=None)
def test_counts_of_read_and_named_files_are_those_of_the_folder(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("files")
    for stem, suffix in names.items():
        (folder / (stem + suffix)).write_bytes(b"")
    found = TextFolder(folder)
    assert len(found.files) + sum(found.left_out.values()) == len(list(folder.iterdir()))


@pytest.mark.parametrize("line", [
    b'{"text": "half', b"[" * 100_000, b'{"content": "x"}', b'["text"]', b'{"text": "caf\xe9"}',
    b'{"text": "\\u0000 \\u0000"}'], ids=range(6))
def test_an_unusable_line_is_refused_by_its_number(tmp_path, line):
    write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n" + b'{"text": "good"}\n')
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl, line 3 \(.*\); repair"):
        texts(tmp_path)


@pytest.mark.parametrize("name, content", [
    ("a.txt", ("Text.\n\n" * 500 + "Käse.\n\n").encode("latin-1")),
    ("a.txt", "Text.\n\n".encode("utf-16-le") * 500),
    ("a.txt", ("Text.\n\n" * 500).encode("utf-16")[:-1]),
    ("a.jsonl.gz", gzip.compress(json.dumps({"text": "document"}).encode() * 99, mtime=0)[:-20]),
    ("a.jsonl.gz", b"\x00" + gzip.compress(b"\n", mtime=0)),
    ("a.parquet", b"no parquet"),
    ("a.parquet", b""),
])
def test_a_damaged_file_or_one_in_another_encoding_is_named(tmp_path, name, content):
    write(tmp_path / name, content)
    with pytest.raises(UserError, match=rf"cannot read .*{name}.*; repair or remove it"):
        texts(tmp_path)


def test_a_parquet_file_without_a_column_of_text_is_named(tmp_path):
    pq.write_table(pa.table({"content": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1 \(it has no column `text`, but cont"):
        texts(tmp_path)


@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"]))
@settings(deadline=None, max_examples=100)
def test_any_bytes_give_text_or_one_error(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("text")
    (folder / name).write_bytes(data)
    try:
        assert all(text.strip() for text in texts(folder))
    except UserError as error:
        assert name in str(error)
