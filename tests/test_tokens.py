"""Token files: made once per shard and tokenizer, verified, made again if the text changed."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import common
from nanochat import dataset as dataset_module
from nanochat.common import UserError
from nanochat.dataset import Dataset, Download, open_dataset
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokens import TokenShard, token_shards, write_token_shard

TEXTS = ["one fish", "two <|bos|> fish", "", "rød fisk, blå fisk", "   ", "x" * 3000]
KEPT = [text for text in TEXTS if text.strip()]


def bytes_tokenizer(merges=()):
    ranks = {t: i for i, t in enumerate([*(bytes([byte]) for byte in range(256)), *merges])}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def make_dataset(folder, *shards):
    """A dataset of one parquet shard per list of texts; the last one validates."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"shard_{number:05d}.parquet" for number in range(len(shards))]
    for path, texts in zip(paths, shards, strict=True):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path)
    checksums = {path: common.sha256_of(path) for path in paths}
    return Dataset("tales-1", tuple(paths[:-1]), tuple(paths[-1:]), checksums)


def documents(shard, tokenizer):
    pieces = [shard.tokens[a:b] for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)]
    assert all(piece[0] == tokenizer.bos_id for piece in pieces)
    return [tokenizer.decode(piece[1:].tolist()) for piece in pieces]


def test_tokens_are_the_documents_of_each_split_each_after_bos(tmp_path):
    dataset = make_dataset(tmp_path / "d", TEXTS, ["more", "text"], ["held out"])
    tokenizer = bytes_tokenizer()
    train = token_shards(dataset, tokenizer)
    [val] = token_shards(dataset, tokenizer, "val")
    assert [documents(shard, tokenizer) for shard in train] == [KEPT, ["more", "text"]]
    assert documents(val, tokenizer) == ["held out"]
    assert train[0].tokens.dtype == np.uint16 and train[0].offsets.dtype == np.int64
    assert (train[0].n_docs, train[0].n_tokens) == (len(KEPT), len(train[0].tokens))
    assert train[0].bos_id == tokenizer.bos_id
    assert len(token_shards(dataset, tokenizer, max_shards=1)) == 1


@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=30))
def test_any_text_comes_back_in_order_through_small_groups(tmp_path, monkeypatch, texts):
    monkeypatch.setattr("nanochat.tokens.GROUP_DOCUMENTS", 3)
    kept = [text for text in texts if text and not text.isspace()]
    dataset = make_dataset(tmp_path / "d", [*texts, "end"], ["val"])
    tokenizer = bytes_tokenizer()
    [shard] = token_shards(dataset, tokenizer)
    assert documents(shard, tokenizer) == [*kept, "end"]


def test_a_prepared_read_only_cache_is_enough(tmp_path, base_dir, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    token_shards(dataset, tokenizer)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    monkeypatch.setattr("nanochat.tokens.locked", lambda *_: pytest.fail("a lock was taken"))
    before = {path: path.stat().st_mtime_ns for path in base_dir.rglob("*")}
    os.utime(dataset.train_shards[0], (1, 1))  # a copy of the cache has other times
    [shard] = token_shards(dataset, tokenizer)
    assert documents(shard, tokenizer) == KEPT
    assert {path: path.stat().st_mtime_ns for path in base_dir.rglob("*")} == before


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_made_again(tmp_path, capsys, data):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    path = token_shards(dataset, tokenizer)[0].path
    original = path.read_bytes()
    damaged = bytearray(original)
    damaged[data.draw(st.integers(0, len(original) - 1))] ^= data.draw(st.sampled_from([0, 1, 128]))
    damaged = damaged[:data.draw(st.sampled_from([0, 100, len(original) // 2, len(original)]))]
    path.unlink()  # another process may have mapped it
    path.write_bytes(damaged)
    try:
        assert documents(TokenShard(path), tokenizer) == KEPT  # the damage is in unused bytes
    except UserError as error:
        assert str(path) in str(error)
        capsys.readouterr()
        assert documents(token_shards(dataset, tokenizer)[0], tokenizer) == KEPT
        assert capsys.readouterr().out.count("\n") == 1


def test_a_folder_changed_in_place_is_tokenised_again(tmp_path):
    tokenizer = bytes_tokenizer()
    path = tmp_path / "own" / "a.txt"
    path.parent.mkdir()
    for word in ("one", "two", "six"):
        path.write_text("<|endoftext|>".join(f"{word} {i}" for i in range(30)))
        os.utime(path, (1e9, 1e9))
        dataset = open_dataset(path.parent)
        found = [*token_shards(dataset, tokenizer), *token_shards(dataset, tokenizer, "val")]
        assert {text[:3] for shard in found for text in documents(shard, tokenizer)} == {word}


def test_a_downloaded_shard_changed_in_place_never_gives_old_tokens(base_dir, monkeypatch):
    monkeypatch.setitem(dataset_module.DOWNLOADS, "climbmix", Download("owner/repository", 1))
    folder, tokenizer = base_dir / "base_data_climbmix", bytes_tokenizer()
    make_dataset(folder, ["one text"], ["val"])
    first = open_dataset("climbmix")
    token_shards(first, tokenizer)
    path = folder / "shard_00000.parquet"
    pq.write_table(pa.table({"text": ["two text"]}), path)
    with pytest.raises(UserError, match=r"shard_00000\.parquet \(its SHA-256 is not"):
        token_shards(open_dataset("climbmix"), tokenizer)
    (folder / "sha256.json").unlink()  # the change is meant
    second = open_dataset("climbmix")
    assert second.dataset_id != first.dataset_id
    assert documents(token_shards(second, tokenizer)[0], tokenizer) == ["two text"]


def test_a_download_that_grew_keeps_its_tokens(tmp_path, monkeypatch):
    tokenizer, encoded, encode = bytes_tokenizer(), [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, t: encoded.append(t) or encode(self, t))
    grown = make_dataset(tmp_path / "d", ["a"], ["b"], ["c"], ["val"])
    smaller = Dataset("tales-0", grown.train_shards[:2], grown.val_shards, grown.checksums)
    token_shards(smaller, tokenizer)
    found = [documents(shard, tokenizer) for shard in token_shards(grown, tokenizer)]
    assert found == [["a"], ["b"], ["c"]] and sorted(encoded) == ["a", "b", "c"]


def test_a_failure_half_way_leaves_no_file(tmp_path, base_dir, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    monkeypatch.setattr("nanochat.tokens.GROUP_DOCUMENTS", 1)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t: encode(t) if "fish" in t else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_shards(dataset, tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            token_shards(dataset, bytes_tokenizer())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = [path for path in base_dir.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert left == []
    [shard] = token_shards(dataset, bytes_tokenizer())
    shard.path.rename(shard.path.with_name(f".{shard.path.name}.abcd.tmp"))  # a killed process's
    token_shards(dataset, bytes_tokenizer())
    assert not list(base_dir.rglob(".*.tmp"))


def test_ids_above_16_bits_are_stored_in_32(tmp_path):
    tokens = np.array([7, 65_536, 69_999, 7], np.uint32)
    write_token_shard(tmp_path / "s.bin", [([3, 1], tokens)], {"vocab_size": 70_000, "bos_id": 7})
    shard = TokenShard(tmp_path / "s.bin")
    assert shard.tokens.dtype == np.uint32 and shard.tokens.tolist() == tokens.tolist()
    assert shard.offsets.tolist() == [0, 3, 4]


RANK = """
    import sys, time
    from nanochat import tokens
    from nanochat.dataset import open_dataset
    from nanochat.tokenizer import load_tokenizer

    write, made = tokens.write_token_shard, []
    def slow_write(path, groups, header):
        time.sleep(0.2)
        made.append(path.stem)
        write(path, groups, header)
    tokens.write_token_shard = slow_write
    dataset, tokenizer = open_dataset(sys.argv[1]), load_tokenizer(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    shards = tokens.token_shards(dataset, tokenizer)
    print(*made, sum(shard.n_docs for shard in shards), sep=";")
"""


def test_ranks_share_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_SHARD_MIN_BYTES", 20_000)
    (tmp_path / "own").mkdir()
    text = "<|endoftext|>".join(f"text {i} " + "x" * 1000 for i in range(120))
    (tmp_path / "own" / "a.txt").write_text(text)
    n_shards = len(open_dataset(tmp_path / "own").train_shards)
    bytes_tokenizer().save(tmp_path / "tokenizer")
    ranks = [subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK), tmp_path / "own", tmp_path / "tokenizer"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "RANK": str(rank),
             "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "1"}) for rank in range(2)]
    for rank in ranks:
        assert any(line == "ready\n" for line in rank.stdout)
    outputs = [rank.communicate("\n", timeout=60)[0].splitlines()[-1].split(";") for rank in ranks]
    (*made, n_docs), (*made_by_other, n_docs_other) = outputs
    assert sorted(made + made_by_other) == [f"shard_{i:05d}" for i in range(n_shards)]
    assert n_shards >= 5 and n_docs == n_docs_other
