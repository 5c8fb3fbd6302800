"""Text files and JSON lines as documents; what is said of those that cannot be read."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.bad_samples import BadSamples
from nanochat.common import UserError
from nanochat.dataset import open_dataset
from nanochat.text_folder import cut_text, folder_documents, folder_key, list_text_files


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


# --- bad samples

BAD_LINES = {b'{"text": "half': "not JSON", b'["text"]': 'no string under "text"', b'{"text": "caf\xe9"}': "not UTF-8",
             b'{"text": "\\u0000 \\u0000"}': "nothing but NUL", b'{"text": "' + b"x" * 5000 + b'"}': "longer than"}


@settings(deadline=None, max_examples=40)
@given(lines=st.lists(st.sampled_from([b'{"text": "fine"}', b"", *BAD_LINES]), min_size=1, max_size=60),
       share=st.sampled_from([0, 0.1, 0.5]), final_newline=st.booleans(), packed=st.booleans())
def test_bad_lines_are_counted_named_and_left_out_up_to_a_share(tmp_path_factory, lines, share, final_newline, packed):
    folder = tmp_path_factory.mktemp("text")
    data = b"\n".join(lines) + b"\n" * final_newline
    (folder / f"a.jsonl{'.gz' * packed}").write_bytes(gzip.compress(data) if packed else data)
    places = [(number, BAD_LINES[line]) for number, line in enumerate(lines, start=1) if line in BAD_LINES]
    n_good = lines.count(b'{"text": "fine"}')
    bad = BadSamples(share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.text_folder._MAX_SAMPLE_BYTES", 4096)
        if len(places) > share * (n_good + len(places)):
            with pytest.raises(UserError, match=f"of {n_good + len(places)} samples cannot be used") as refusal:
                list(folder_documents(folder, bad))
            for number, why in places[:3]:
                assert f"line {number}: {why}" in str(refusal.value)
        else:
            assert list(folder_documents(folder, bad)) == ["fine"] * n_good
    assert (bad.n_bad, bad.n_samples) == (len(places), n_good + len(places))


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"]))
def test_no_bytes_whatever_end_in_a_traceback(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("text")
    (folder / name).write_bytes(data)
    try:
        assert all(isinstance(text, str) for text in folder_documents(folder, BadSamples(0.9)))
    except UserError as error:
        assert name in str(error)


def test_a_folder_of_the_wrong_kind_is_refused_before_all_of_it_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n' * 100_000)
    bad = BadSamples(0.01)
    with pytest.raises(UserError, match="so far 100 of 100 samples cannot be used"):
        list(folder_documents(tmp_path, bad))
    assert bad.n_bad == 100


def test_rows_of_parquet_that_cannot_be_used_are_named(tmp_path):
    rows = [b"one", b"caf\xe9", None, b"\0\0", b"two"]
    column = pa.array(rows, pa.binary()).view(pa.string())  # not checked, as a careless writer would
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    bad = BadSamples(0.5)
    assert list(folder_documents(tmp_path, bad)) == ["one", "two"]
    assert bad.named == [f"{tmp_path / 'a.parquet'}, row 2: not UTF-8 at byte 3",
                         f"{tmp_path / 'a.parquet'}, row 4: nothing but NUL characters"]


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(400)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=100, compression="none", use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start:start + 40] = bytes(40)
    path.write_bytes(data)
    bad = BadSamples(0.3)
    assert list(folder_documents(tmp_path, bad)) == texts[:100] + texts[200:]
    assert bad.n_bad == 100 and "a.parquet, rows 101 to 200: damaged" in bad.named[0]


def test_what_was_left_out_is_warned_of_and_noted_in_the_manifest(tmp_path, base_dir, capsys):
    (tmp_path / "own").mkdir()
    lines = [json.dumps({"text": f"document {i}"}) for i in range(40)]
    (tmp_path / "own" / "a.jsonl").write_text("\n".join([*lines[:20], "{", *lines[20:]]))
    with pytest.raises(UserError, match=r"a\.jsonl, line 21: not JSON .*: 1 of 41 samples cannot be used"):
        open_dataset(tmp_path / "own")
    dataset = open_dataset(tmp_path / "own", skip_bad=0.05)
    assert "1 of 41 samples left out" in capsys.readouterr().err
    manifest = json.loads((dataset.shards[0].parent / "dataset.json").read_text())
    assert manifest["bad_samples"] == 1 and manifest["samples"] == 41 and "line 21" in manifest["bad_named"][0]
    assert open_dataset(tmp_path / "own") == dataset  # prepared once, by whoever said how


def test_key_follows_names_and_contents(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    key = folder_key(tmp_path)
    (tmp_path / "ignored.csv").write_text("x")
    assert folder_key(tmp_path) == key
    (tmp_path / "a.txt").write_text("two")
    changed = folder_key(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert len({key, changed, folder_key(tmp_path)}) == 3
