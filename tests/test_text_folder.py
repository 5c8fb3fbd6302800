"""Text files and JSON lines as documents; what is said of those that cannot be read."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.text_folder import cut_text, folder_documents, folder_key, list_text_files
from nanochat.errors import UserError


def test_files_are_found_in_subfolders_but_hidden_ones_left_out(tmp_path):
    for name in ("b.txt", "a/c.md", "a/d.jsonl", "e.jsonl.gz", ".hidden.txt", ".git/x.txt", "f.csv", "g.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in list_text_files(tmp_path)] == [
        "a/c.md", "a/d.jsonl", "b.txt", "e.jsonl.gz"]


@given(st.text(alphabet="ab\n", max_size=200), st.integers(1, 20))
def test_pieces_of_a_text_join_to_it_and_end_at_blank_lines(text, piece_chars):
    pieces = cut_text(text, piece_chars)
    assert "".join(pieces) == text
    assert all(len(piece) >= piece_chars and piece.endswith("\n\n") for piece in pieces[:-1])


def test_one_long_text_becomes_several_documents(tmp_path):
    (tmp_path / "input.txt").write_text("A line of a play.\n\n" * 10_000)
    found = list(folder_documents(tmp_path))
    assert len(found) > 5 and "".join(found) == "A line of a play.\n\n" * 10_000


def test_gzipped_lines_are_read_and_blank_lines_skipped(tmp_path):
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "ein Café"}\n\n  \n{"text": "two", "meta": null}\n')
    assert list(folder_documents(tmp_path)) == ["ein Café", "two"]


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_text('{"text": "line"}', encoding="utf-8-sig")
    assert list(folder_documents(tmp_path)) == ["text", "line"]


@pytest.mark.parametrize("line, message", [
    (b'{"text": "half', "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"content": "x"}', 'no string under "text"'),
    (b'{"text": null}', 'no string under "text"'),
    (b'["text"]', 'no string under "text"'),
    (b'{"text": "caf\xe9"}', "not UTF-8 at byte 13"),
])
def test_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {message}"):
        list(folder_documents(tmp_path))


def test_text_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("Käse".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 at byte 1"):
        list(folder_documents(tmp_path))


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"\x00" + data[1:],
                                    lambda data: data[:40] + bytes(20) + data[60:]])
def test_damaged_gzip_is_named(tmp_path, damage):
    lines = "".join(json.dumps({"text": f"document {i * i}"}) + "\n" for i in range(200))
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines.encode())))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        list(folder_documents(tmp_path))


def test_key_follows_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    key = folder_key(tmp_path)
    (tmp_path / "ignored.csv").write_text("x")
    assert folder_key(tmp_path) == key
    (tmp_path / "a.txt").write_text("two")
    changed = folder_key(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({key, changed, folder_key(tmp_path)}) == 3
