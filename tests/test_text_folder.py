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

from nanochat import text_folder
from nanochat.common import UserError
from nanochat.text_folder import (
    SEPARATORS,
    Samples,
    TextFolder,
    folder_documents,
    named_split,
    split_text,
)


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


def documents(folder, samples=None):
    found = folder_documents(TextFolder(folder), samples or Samples())
    return [(split, data.decode()) for split, data in found]


def texts(folder, samples=None):
    return [text for _, text in documents(folder, samples)]


def zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


STRINGS = pa.array(["one", None, "", "two"])
LINES = '{"text": "one"}\n\n{"text": null}\n"two"\n'
READ_AS_ONE_TWO = {
    "a.jsonl": LINES,
    "a.ndjson": LINES.replace("\n", "\r\n"),
    "old mac.jsonl": LINES.replace("\n", "\r"),
    "a.JSONL.GZ": gzip.compress(LINES.encode()),
    "two members.jsonl.gz": gzip.compress(LINES[:16].encode()) + gzip.compress(LINES[16:].encode()),
    "a.jsonl.bz2": bz2.compress(LINES.encode()),
    "a.jsonl.zst": zstd(LINES.encode()),
    "array.json": '[{"text": "one"}, {"text": null},\n {"text": "two", "id": [2]}]\n',
    "strings.json": '["one", "two"]',
    "lines.json": LINES,
    "pretty.json": json.dumps({"text": "one"}, indent=2) + json.dumps({"text": "two"}, indent=2),
    "array.json.gz": gzip.compress(b'["one", "two"]'),
    "separator.txt": "one\n<|endoftext|>\ntwo",
    "separators.md": "<|bos|>one<|endoftext|><|bos|>two<|endoftext|>\n",
    "row.jsonl": '{"text": "one<|endoftext|>two"}',
    "bom.txt": "one<|endoftext|>two".encode("utf-8-sig"),
    "utf-16.TXT": "one<|endoftext|>two".encode("utf-16"),
    "utf-16-be.txt": b"\xfe\xff" + "one<|endoftext|>two".encode("utf-16-be"),
    "utf-32.txt": "one<|endoftext|>two".encode("utf-32"),
    "utf-16.jsonl": LINES.encode("utf-16"),
    "crlf.txt": "one\r\n<|endoftext|>\r\ntwo",
    "a.txt.gz": gzip.compress(b"one<|endoftext|>two"),
    "a.parquet": STRINGS,
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
    assert documents(tmp_path) == [("train", "one"), ("train", "two")]


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
    "A paragraph\u2029" * 10_000,
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


def test_every_file_is_read_or_named(tmp_path):
    for name in ("a.txt", "B.TXT", "sub/c.md", "x.PDF", "y.pdf", "z.csv.gz", "Makefile",
                 ".git/a.txt", "a.parquet.gz", "sub/.DS_Store"):
        write(tmp_path / name, "x" * 1000)
    write(tmp_path / "info.json", '{"version": 1}')
    write(tmp_path / "other.parquet", b"")
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "other.parquet")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "link.txt").symlink_to("a.txt")
    (tmp_path / "linked").symlink_to("sub")
    os.mkfifo(tmp_path / "fifo.txt")
    folder = TextFolder(tmp_path)
    assert [file.name for file in folder.files] == [
        "B.TXT", "a.txt", "info.json", "other.parquet", "sub/c.md"]  # each file once
    samples = Samples()
    assert len(list(folder_documents(folder, samples))) == 3
    for problem, n_bytes in samples.textless:
        folder.leave_out(problem, n_bytes)
    [line] = folder.left_out_lines()
    for part in ("2 .pdf", "1 .csv.gz", "1 without suffix", "3 hidden", "1 .parquet.gz",
                 "2 broken link", "3 parent or cache folder", "1 special file",
                 "2 link to a file in the folder",
                 "1 .json without text",
                 "1 .parquet with no column `text` (its columns: content)", " MB, "):
        assert part in line, line
    assert 0.5 < int(re.search(r"(\d+)% of the folder", line)[1]) / 100 < 0.9


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


def test_the_cache_inside_the_folder_is_not_read(tmp_path, base_dir):
    write(tmp_path / "a.txt", "one")
    write(base_dir / "base_data_x" / "shard_00000.parquet", STRINGS)
    assert texts(tmp_path) == ["one"]


BAD_LINES = {
    b'{"text": "half': "not JSON",
    b"[" * 100_000: "not JSON (nested too deeply)",
    b'{"content": "x"}': 'no string under "text"',
    b'["text"]': 'no string under "text"',
    b'{"text": "caf\xe9"}': "not UTF-8",
    b'{"text": "\\u0000 \\u0000"}': "NUL characters",
    b'{"text": "' + b"x" * 200_000 + b'"}': "not JSON (longer than",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_unusable_lines_are_named_and_left_out_up_to_a_share(tmp_path, monkeypatch, line):
    monkeypatch.setattr(text_folder, "_MAX_SAMPLE_CHARS", 150_000)
    write(tmp_path / "a.jsonl", b'{"text": "fine"}\n\n' + line + b"\n" + b'{"text": "good"}\n')
    samples = Samples(share=0.4)
    assert texts(tmp_path, samples) == ["fine", "good"]
    assert (samples.n, samples.n_bad) == (3, 1)
    with pytest.raises(UserError, match=r"1 of 3 samples are unusable: .*line 3: ") as error:
        texts(tmp_path)
    assert BAD_LINES[line] in str(error.value)


def test_a_text_in_another_encoding_is_refused_and_one_bad_document_is_not(tmp_path):
    write(tmp_path / "a.txt", ("Käse.\n\n" * 5000).encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        texts(tmp_path)
    write(tmp_path / "a.txt", "Text.\n\n".encode("utf-16-le") * 5000)
    with pytest.raises(UserError, match=r"NUL characters: .*UTF-16"):
        texts(tmp_path)
    cheese = "Käse.\n\n".encode() * 5000
    write(tmp_path / "a.txt", cheese + b"\xe9\n\n" + cheese)
    samples = Samples(share=0.02)
    assert 0.95 < len("".join(texts(tmp_path, samples))) / 70_000 < 1 and samples.n_bad == 1


def test_a_folder_of_the_wrong_kind_is_refused_early(tmp_path):
    write(tmp_path / "a.jsonl", '{"content": "x"}\n' * 10_000)
    samples = Samples(0.01)
    with pytest.raises(UserError, match="100 of 100 samples are unusable"):
        texts(tmp_path, samples)


@pytest.mark.parametrize("name, damage", [
    ("a.jsonl.gz", lambda data: data[:-20]),
    ("a.jsonl.gz", lambda data: b"\x00" + data[1:]),
    ("a.jsonl.gz", lambda data: data[:40] + bytes(20) + data[60:]),
    ("a.json", lambda data: b"[" + data[:-20]),
    ("a.txt", lambda data: data.decode().encode("utf-16")[:-1]),
    ("a.parquet", lambda data: data),
])
def test_a_damaged_file_is_named(tmp_path, name, damage):
    data = "".join(json.dumps({"text": f"document {i * i}"}) + "\n" for i in range(200)).encode()
    (tmp_path / name).write_bytes(damage(gzip.compress(data) if name.endswith("gz") else data))
    with pytest.raises(UserError, match=rf"{name} is damaged or unreadable"):
        texts(tmp_path)


@given(st.binary(max_size=300),
       st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.parquet"]))
@settings(deadline=None, max_examples=100)
def test_any_bytes_give_text_or_one_error(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("text")
    (folder / name).write_bytes(data)
    try:
        assert all(text.strip() for text in texts(folder, Samples(0.9)))
    except UserError as error:
        assert name in str(error)


def test_a_large_array_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(text_folder, "_BLOCK_CHARS", 50)
    values = [f"document {i} with \"quotes\", [brackets] and \\ " * (i % 9) for i in range(300)]
    write(tmp_path / "a.json", json.dumps(values, indent=1))
    assert texts(tmp_path) == [value for value in values if value]
