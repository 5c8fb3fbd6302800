"""Reading parquet shards, and what is said of shards that cannot be read."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.shards import (
    list_shards,
    open_shard,
    read_documents,
    row_count,
    sample_documents,
    shard_fingerprint,
)


def shard(path, texts, column="text", **options):
    pq.write_table(pa.table({column: texts}), path, **options)
    return path


def test_documents_come_in_order_without_null_and_blank_ones(tmp_path):
    path = shard(tmp_path / "a.parquet", ["one", "", None, " \n", "two\n"], row_group_size=2)
    assert list(read_documents(path)) == ["one", "two\n"]


def test_large_string_and_further_columns_are_read(tmp_path):
    table = pa.table({"id": [1, 2], "text": pa.array(["a", "b"], pa.large_string())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(read_documents(tmp_path / "a.parquet")) == ["a", "b"]


def test_hidden_files_are_no_shards(tmp_path):
    for name in (".a.parquet", "b.parquet", "a.parquet", "c.parquet.part"):
        (tmp_path / name).touch()
    assert [path.name for path in list_shards(tmp_path)] == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("keep", [0, 3, 100, -1, -200])
def test_truncated_shard_is_named(tmp_path, keep):
    path = shard(tmp_path / "shard_00003.parquet", [f"document {i}" for i in range(1000)])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"shard_00003\.parquet is damaged or not parquet"):
        list(read_documents(path))


def test_damage_inside_the_pages_is_named_when_they_are_read(tmp_path):
    path = shard(tmp_path / "a.parquet", [f"document {i}" for i in range(1000)], compression="zstd")
    data = bytearray(path.read_bytes())
    data[10:400] = bytes(390)
    path.write_bytes(data)
    open_shard(path).close()  # the footer is whole
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(read_documents(path))


def test_bytes_that_are_not_utf8_are_damage(tmp_path):
    offsets = pa.array([0, 2], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        list(read_documents(tmp_path / "a.parquet"))


def test_missing_text_column_names_those_there(tmp_path):
    path = shard(tmp_path / "a.parquet", ["a"], column="content")
    with pytest.raises(UserError, match=r"a\.parquet has no column `text` \(its columns: content\)"):
        open_shard(path)


def test_text_column_of_another_type_is_refused(tmp_path):
    path = shard(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(UserError, match="column `text` is of type int64, not string"):
        open_shard(path)


def test_shard_of_blank_documents_only_is_refused(tmp_path):
    path = shard(tmp_path / "a.parquet", pa.array(["", None, "\n"], pa.string()))
    with pytest.raises(UserError, match=r"a\.parquet holds no document with text"):
        list(read_documents(path))


def test_fingerprint_follows_content_and_name_but_not_the_folder(tmp_path):
    (tmp_path / "other").mkdir()
    texts = [f"document {i}" for i in range(50)]
    original = shard_fingerprint(shard(tmp_path / "a.parquet", texts))
    assert shard_fingerprint(shard(tmp_path / "other" / "a.parquet", texts)) == original
    assert shard_fingerprint(shard(tmp_path / "b.parquet", texts)) != original
    assert shard_fingerprint(shard(tmp_path / "a.parquet", [*texts[:-1], "another text"])) != original


def test_sample_stops_at_the_character_limit_and_cuts_long_documents(tmp_path):
    shards = [shard(tmp_path / "a.parquet", ["aaaa", "bbbbbbbb"]), shard(tmp_path / "b.parquet", ["cc", "dd"])]
    assert list(sample_documents(shards, max_chars=9, doc_cap=5)) == ["aaaa", "bbbbb"]
    assert list(sample_documents(shards, max_chars=13)) == ["aaaa", "bbbbbbbb", "cc"]
    assert list(sample_documents(shards, max_chars=10**9)) == ["aaaa", "bbbbbbbb", "cc", "dd"]


def test_rows_are_counted_with_the_blank_ones(tmp_path):
    assert row_count(shard(tmp_path / "a.parquet", ["one", "", None, "two"], row_group_size=2)) == 4
