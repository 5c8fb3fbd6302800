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

from nanochat.common import UserError
from nanochat.dataset import Dataset
from nanochat.shard_writer import prepare_shards
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.tokens import HEADER_BYTES, TokenShard, token_shards, write_token_shard

TEXTS = ["one fish", "two <|bos|> fish", "", "rød fisk, blå fisk", "   ", "x" * 3000]
KEPT = [text for text in TEXTS if text.strip()]


def bytes_tokenizer(merges=()):
    ranks = {token: i for i, token in enumerate([*(bytes([byte]) for byte in range(256)), *merges])}
    return Tokenizer(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


def make_dataset(folder, *shards, dataset_id="tales-1"):
    folder.mkdir(exist_ok=True)
    paths = []
    for number, texts in enumerate(shards):
        paths.append(folder / f"shard_{number:05d}.parquet")
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), paths[-1])
    return Dataset("tales", dataset_id, tuple(paths))


def documents(shard, tokenizer):
    pieces = [shard.tokens[a:b] for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    assert all(piece[0] == tokenizer.bos_id for piece in pieces)
    return [tokenizer.decode(piece[1:].tolist()) for piece in pieces]


def test_tokens_are_the_documents_of_each_split_each_after_bos(tmp_path):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["more", "text"], ["held out"]), bytes_tokenizer()
    train = token_shards(dataset, tokenizer)
    assert [documents(shard, tokenizer) for shard in train] == [KEPT, ["more", "text"]]
    assert [documents(shard, tokenizer) for shard in token_shards(dataset, tokenizer, "val")] == [["held out"]]
    assert train[0].tokens.dtype == np.uint16 and train[0].offsets.dtype == np.int64
    assert (train[0].n_docs, train[0].n_tokens) == (len(KEPT), len(train[0].tokens))
    assert (train[0].vocab_size, train[0].bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40), min_size=1, max_size=30))
def test_any_text_comes_back_in_order_through_small_groups(tmp_path, monkeypatch, texts):
    monkeypatch.setattr("nanochat.tokens.GROUP_CHARACTERS", 16)
    kept = [text for text in texts if text and not text.isspace()]
    dataset = make_dataset(tmp_path / "d", [*texts, "end"], ["val"])
    tokenizer = bytes_tokenizer()
    assert documents(token_shards(dataset, tokenizer, num_threads=2)[0], tokenizer) == [*kept, "end"]


def test_a_cached_shard_is_not_encoded_again(tmp_path, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    token_shards(dataset, tokenizer)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    assert token_shards(dataset, tokenizer)[0].n_docs == len(KEPT)


def test_max_shards_leaves_the_others_alone(tmp_path, base_dir):
    dataset = make_dataset(tmp_path / "d", ["a"], ["b"], ["val"])
    assert len(token_shards(dataset, bytes_tokenizer(), max_shards=1)) == 1
    assert [path.name for path in base_dir.rglob("*.bin")] == ["shard_00000.bin"]


def damage_truncated(path):
    os.truncate(path, path.stat().st_size - 1)


def damage_emptied(path):
    path.write_bytes(b"")


def damage_header(path):
    path.write_bytes(b"{" * HEADER_BYTES + path.read_bytes()[HEADER_BYTES:])


def damage_header_of_another_kind(path):
    path.write_bytes(b"[1]".ljust(HEADER_BYTES) + path.read_bytes()[HEADER_BYTES:])


def damage_counts(path):
    path.write_bytes(path.read_bytes().replace(b'"n_docs": 4', b'"n_docs":-4'))


def damage_low_bit(path):
    """A token that is one all the same."""
    data = bytearray(path.read_bytes())
    data[HEADER_BYTES + 2] ^= 1
    path.write_bytes(data)


def damage_tokenizer_id(path):
    path.write_bytes(path.read_bytes().replace(b'"tokenizer_id": "', b'"tokenizer_id": "0'))


def damage_offsets(path):
    path.write_bytes(path.read_bytes()[:-16] + bytes(16))


@pytest.mark.parametrize("damage", [damage_truncated, damage_emptied, damage_header, damage_header_of_another_kind,
                                    damage_counts, damage_offsets, damage_low_bit,
                                    damage_tokenizer_id])
def test_a_damaged_cache_is_named_and_made_again(tmp_path, capsys, damage):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    path = token_shards(dataset, tokenizer)[0].path
    damage(path)
    with pytest.raises(UserError, match="damaged"):
        TokenShard(path)
    capsys.readouterr()
    assert documents(token_shards(dataset, tokenizer)[0], tokenizer) == KEPT
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and str(path) in printed and "damaged" in printed


def test_bytes_are_read_once_a_process(tmp_path, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    token_shards(dataset, tokenizer)
    monkeypatch.setattr("nanochat.common.sha256_of", lambda *_: pytest.fail("hashed again"))
    token_shards(dataset, tokenizer)


def test_prepared_text_that_was_damaged_is_named_before_it_is_encoded(tmp_path):
    """One bit of a page: it may decode to other text without any error."""
    prepare_shards(tmp_path / "d", "d", lambda: ["abc " * 500, "xyz " * 500], 4000)
    shards = tuple(sorted((tmp_path / "d").glob("*.parquet")))
    data = bytearray(shards[0].read_bytes())
    data[60] ^= 1
    shards[0].write_bytes(data)
    with pytest.raises(UserError, match=r"shard_00000\.parquet is damaged .*differ from those noted in sha256\.json"):
        token_shards(Dataset("d", "d-1", shards), bytes_tokenizer())


def test_another_text_under_the_same_name_is_encoded_anew(tmp_path):
    tokenizer = bytes_tokenizer()
    for texts in (["one text"], ["two text"], ["quite another text"], ["quite another tent"]):
        dataset = make_dataset(tmp_path / "d", texts, ["val"])
        assert documents(token_shards(dataset, tokenizer)[0], tokenizer) == texts


def test_prepared_shards_of_equal_size_but_other_text_are_kept_apart(tmp_path):
    tokenizer = bytes_tokenizer()
    for text in ("abc", "xyz"):
        prepare_shards(tmp_path / text / "d", "d", lambda text=text: [text, text.upper()], 6)
        shards = tuple(sorted((tmp_path / text / "d").glob("*.parquet")))
        [train], [val] = (token_shards(Dataset("d", "d-1", shards), tokenizer, split) for split in ("train", "val"))
        assert {*documents(train, tokenizer), *documents(val, tokenizer)} == {text, text.upper()}


def test_a_download_that_grew_keeps_what_is_encoded(tmp_path, monkeypatch):
    tokenizer, encoded, encode = bytes_tokenizer(), [], Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: encoded.append(text) or encode(self, text))
    grown = make_dataset(tmp_path / "d", ["a"], ["b"], ["c"], ["val"], dataset_id="tales-2")
    token_shards(Dataset("tales", "tales-1", (*grown.shards[:2], grown.shards[3])), tokenizer)
    assert [documents(shard, tokenizer) for shard in token_shards(grown, tokenizer)] == [["a"], ["b"], ["c"]]
    assert sorted(encoded) == ["a", "b", "c"]


def kept_by_dataset(dataset, tokenizer, base_dir):
    """Encode the training shard and put it where earlier versions kept it; its path there."""
    [shard] = token_shards(dataset, tokenizer)
    path = base_dir / "tokens" / dataset.dataset_id / tokenizer.tokenizer_id / shard.path.name
    path.parent.mkdir(parents=True)
    return shard.path.rename(path)


def test_tokens_kept_by_dataset_are_read_where_they_lie(tmp_path, base_dir, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    path = kept_by_dataset(dataset, tokenizer, base_dir)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("encoded again"))
    [shard] = token_shards(dataset, tokenizer)
    assert shard.path == path and documents(shard, tokenizer) == KEPT
    assert [found for found in base_dir.rglob("*.bin")] == [path]


def forget_source(path):
    path.write_bytes(path.read_bytes().replace(b'"source_bytes"', b'"another_name"'))


@pytest.mark.parametrize("spoil", [damage_truncated, damage_header, forget_source])
def test_tokens_kept_by_dataset_that_do_not_fit_are_left_alone_and_made_again(tmp_path, base_dir, spoil):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    path = kept_by_dataset(dataset, tokenizer, base_dir)
    spoil(path)
    spoiled = path.read_bytes()
    [shard] = token_shards(dataset, tokenizer)
    assert shard.path != path and documents(shard, tokenizer) == KEPT and path.read_bytes() == spoiled


def test_another_tokenizer_has_its_own_cache(tmp_path):
    dataset, tokenizer = make_dataset(tmp_path / "d", ["abab"], ["val"]), bytes_tokenizer()
    merged = bytes_tokenizer(merges=[b"ab"])
    assert token_shards(dataset, tokenizer)[0].n_tokens == 5
    assert token_shards(dataset, merged)[0].n_tokens == 3
    assert token_shards(dataset, tokenizer)[0].n_tokens == 5


def test_a_failure_half_way_leaves_nothing(tmp_path, base_dir, monkeypatch):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    monkeypatch.setattr("nanochat.tokens.GROUP_CHARACTERS", 1)
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encode(text) if "fish" in text else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        token_shards(dataset, tokenizer)
    assert [path.name for path in base_dir.rglob("*") if path.is_file()] == ["shard_00000.bin.lock"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    path = token_shards(dataset, tokenizer)[0].path
    path.rename(path.with_name(".shard_00000.bin.abcd.tmp"))
    token_shards(dataset, tokenizer)
    assert sorted(found.name for found in path.parent.iterdir()) == ["shard_00000.bin", "shard_00000.bin.lock"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, base_dir):
    dataset, tokenizer = make_dataset(tmp_path / "d", TEXTS, ["val"]), bytes_tokenizer()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*make room"):
            token_shards(dataset, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(base_dir.rglob("*.bin")) and not list(base_dir.rglob("*.tmp"))


def test_a_shard_that_is_no_parquet_is_refused(tmp_path, base_dir):
    dataset = make_dataset(tmp_path / "d", TEXTS, ["val"])
    dataset.shards[0].write_bytes(b"not parquet")
    with pytest.raises(UserError, match="damaged or not parquet"):
        token_shards(dataset, bytes_tokenizer())
    assert not list(base_dir.rglob("*.bin"))


def test_ids_beyond_16_bits_are_kept_in_32(tmp_path):
    tokens = np.array([7, 65_536, 69_999, 7], np.uint32)
    write_token_shard(tmp_path / "s.bin", [([3, 1], tokens)], {"vocab_size": 70_000, "bos_id": 7})
    shard = TokenShard(tmp_path / "s.bin")
    assert shard.tokens.dtype == np.uint32 and shard.tokens.tolist() == tokens.tolist()
    assert shard.offsets.tolist() == [0, 3, 4]


def test_ranks_share_the_shards_and_all_see_them_all(tmp_path, base_dir):
    dataset = make_dataset(tmp_path / "d", *[[f"shard {i}", "x" * 50_000] for i in range(6)], ["val"])
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from nanochat import tokens
        from nanochat.dataset import Dataset
        from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

        tokenizer = Tokenizer({bytes([i]): i for i in range(256)}, {n: 256 + i for i, n in enumerate(SPECIAL_TOKENS)})
        write, made = tokens.write_token_shard, []
        def slow_write(path, groups, header):
            time.sleep(0.6)  # half of them take more than a second, and so a line
            made.append(path.stem)
            write(path, groups, header)
        tokens.write_token_shard = slow_write
        shards = tokens.token_shards(Dataset("d", "d-1", tuple(map(Path, sys.argv[1:]))), tokenizer)
        print(*made, [shard.n_tokens for shard in shards], sep=";")
    """))
    ranks = [subprocess.Popen([sys.executable, script, *dataset.shards], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent),
                                              "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"})
             for rank in range(2)]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    made = [output.strip().split(";")[:-1] for output, _ in outputs]
    assert sorted(made[0] + made[1]) == [f"shard_{i:05d}" for i in range(6)]  # each of them once
    assert {output.strip().split(";")[-1] for output, _ in outputs} == {str([8 + 50_001] * 6)}
    assert "tokenising train" in outputs[0][1] and "tokenising" not in outputs[1][1]
