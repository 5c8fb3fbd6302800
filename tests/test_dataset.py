"""Datasets by name and by folder: splits, ids, what is printed, changes, damage and refusals."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset as dataset_module
from nanochat import stdlib_corpus
from nanochat.common import UserError
from nanochat.dataset import (
    Download,
    main,
    open_dataset,
    prepare_shards,
    read_documents,
)


def write_parquet(path, texts, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        pq.write_table(pa.table({"text": texts}), file, **options)
    return path


def write_lines(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def split(dataset, name):
    shards = dataset.train_shards if name == "train" else dataset.val_shards
    return [text for shard in shards for text in read_documents(shard)]


def numbered(prefix, n):
    return [f"{prefix} document {i} " + "and some more text " * (i % 7) for i in range(n)]


# --- splits of a folder

def test_without_named_splits_a_twentieth_of_the_text_validates(tmp_path, capsys):
    for i in range(3):
        write_parquet(tmp_path / "own" / f"shard_{i:05d}.parquet", numbered(i, 200))
    dataset = open_dataset(tmp_path / "own")
    train, val = split(dataset, "train"), split(dataset, "val")
    assert sorted(train + val) == sorted(text for i in range(3) for text in numbered(i, 200))
    assert 0.05 <= sum(map(len, val)) / sum(map(len, train + val)) < 0.06
    assert {text.split()[0] for text in val} == {"0", "1", "2"}, "not only one file's"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("3 files, 0.0 MB, 600 documents")
    assert lines[1] == "training: shard_00000.parquet, shard_00001.parquet, shard_00002.parquet"
    assert lines[2] == "validation: 5% of the training text, chosen by hash"


@pytest.mark.parametrize("files, n_train, n_val", [
    ({"train-00000-of-00002.jsonl": "a", "train-00001-of-00002.jsonl": "b", "dev.jsonl": "c"},
     80, 40),
    ({"Train/x.jsonl": "a", "VALID/x.jsonl": "b", "test/x.jsonl": "c"}, 40, 40),
    ({"w.jsonl": "a", "split=val/x.jsonl": "b", "eval_2.jsonl": "c"}, 40, 80),
    ({"train.jsonl": "a", "test.jsonl": "b"}, 37, 3),
    ({"train.jsonl": "a", "b.jsonl": "b"}, 75, 5),
])
def test_named_splits_are_respected_and_printed(tmp_path, capsys, files, n_train, n_val):
    for name, prefix in files.items():
        write_lines(tmp_path / "own" / name, [f"{prefix} {i}" + "-" * 80 for i in range(40)])
    dataset = open_dataset(tmp_path / "own")
    train, val = split(dataset, "train"), split(dataset, "val")
    assert (len(train), len(val)) == (n_train, n_val) and not set(train) & set(val)
    lines = capsys.readouterr().out.splitlines()
    for name, prefix in files.items():
        [line] = [line for line in lines if name in line]
        used = {text[0] for text in {"t": train, "v": val}[line[0]]}
        assert (prefix in used) == (not line.startswith("test, not used: "))


@pytest.mark.parametrize("names, message", [
    (["dev.txt", "test.txt"], "no text to train on; validation: dev.txt; test, not used: test.txt"),
    (["a.pdf", "b.PDF"], r"no text to train on; left out: 2 \.pdf"),
    ([], "no text to train on; no files"),
    (["train.txt", "validation.md"], "has 1 training and 0 validation documents"),
])
def test_a_folder_without_text_for_training_is_refused(tmp_path, names, message):
    (tmp_path / "own").mkdir()
    for name in names:
        (tmp_path / "own" / name).write_text("  " if name.endswith(".md") else "some text")
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "own")


def test_training_documents_of_other_splits_are_left_out_and_repetitions_are_kept(tmp_path, capsys):
    train = numbered("t", 50)
    write_lines(tmp_path / "own" / "train.jsonl", train + train[:20] + train[:10] + ["held\r\nout"])
    write_lines(tmp_path / "own" / "test.jsonl", train[45:])
    write_parquet(tmp_path / "own" / "valid.parquet", ["held\nout", *train[40:45]])
    dataset = open_dataset(tmp_path / "own")
    assert sorted(split(dataset, "train")) == sorted(train[:40] + train[:20] + train[:10])
    assert sorted(split(dataset, "val")) == sorted(["held\nout", *train[40:45]])
    out = capsys.readouterr().out
    assert "6 training documents left out, because validation has them too\n" in out
    assert "5 training documents left out, because test has them too\n" in out
    assert "30 training documents are repetitions and are kept\n" in out
    open_dataset(tmp_path / "own")
    assert capsys.readouterr().out == out, "it is printed whenever the folder is used"


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=30),
                min_size=1, max_size=30), st.lists(st.integers(0, 2), min_size=30, max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_validation_document_is_trained_on(tmp_path_factory, texts, splits):
    folder = tmp_path_factory.mktemp("property")
    pairs = list(zip(texts, splits, strict=False))
    by_split = [[text for text, at in pairs if at == i] for i in range(3)]
    for name, found in zip(("train", "valid", "test"), by_split, strict=True):
        if found:
            write_lines(folder / "own" / f"{name}.jsonl", found)
    train, val, test = ([t.removeprefix("\ufeff") for t in found] for found in by_split)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "cache"))
        distinct = {text for text in train if text.strip()} - {*val, *test}
        if len(distinct) < (1 if val else 2) or (val and not "".join(val).strip()):
            with pytest.raises(UserError, match=r"no text to train on|at least one of each"):
                open_dataset(folder / "own")
            return
        dataset = open_dataset(folder / "own")
        found_train, found_val = split(dataset, "train"), split(dataset, "val")
    assert not set(found_train) & (set(found_val) | set(test))
    if val:
        assert set(found_val) == {text for text in val if text.strip()}
    kept = [text for text in train if text.strip() and text not in {*found_val, *test}]
    assert sorted(found_train) == sorted(kept)


@pytest.mark.parametrize("texts", [["a" * 500, "b" * 600, "c" * 700], ["x"] * 100 + ["y"]])
def test_few_documents_validate_on_the_smallest(tmp_path, texts):
    write_lines(tmp_path / "own" / "a.jsonl", texts)
    dataset = open_dataset(tmp_path / "own")
    assert split(dataset, "val") == [min(texts, key=lambda text: len(text) * texts.count(text))]


# --- ids, changes, the cache

def test_id_follows_the_documents_and_not_their_files(tmp_path):
    texts = numbered("x", 50)
    write_lines(tmp_path / "1" / "my corpus" / "a.jsonl", texts)
    write_parquet(tmp_path / "2" / "my corpus" / "b.parquet", texts[::-1])
    write_lines(tmp_path / "3" / "my corpus" / "a.jsonl", [*texts, texts[0]])
    ids = [open_dataset(tmp_path / name / "my corpus").dataset_id for name in "123"]
    assert ids[0] == ids[1] != ids[2] and ids[0].startswith("my-corpus-")


def test_a_failed_conversion_leaves_nothing(tmp_path, base_dir, monkeypatch):
    write_lines(tmp_path / "own" / "a.jsonl", numbered("x", 5))
    with monkeypatch.context() as patch:
        patch.setattr(dataset_module.pq, "write_table", full_disk)
        with pytest.raises(OSError, match="No space left on device"):
            open_dataset(tmp_path / "own")
    assert [path for path in base_dir.iterdir() if path.is_dir()] == []
    ready = open_dataset(tmp_path / "own").train_shards[0].parent
    left = ready.with_name(f".{ready.name}.tmp")
    ready.rename(left)  # as a killed process leaves it
    (left / "shard_00099.parquet").write_bytes(b"half")
    assert len(open_dataset(tmp_path / "own").train_shards) == 1 and not left.exists()


def test_processes_that_start_together_share_one_conversion(tmp_path):
    calls = []

    def documents():
        calls.append(1)
        time.sleep(0.05)
        yield from [("train", b"one document"), ("train", b"another")]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: prepare_shards(tmp_path / "d", "x", documents()), range(4)))
    assert len(calls) == 1 and len(list((tmp_path / "d").glob("*.parquet"))) == 2


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "dataset.json").write_text('{"dataset_id": "x", "sha'),
    lambda folder: (folder / "dataset.json").write_text("{}"),
    lambda folder: (folder / "shard_00000.parquet").unlink(),
])
def test_a_damaged_prepared_folder_is_one_line(tmp_path, damage):
    write_lines(tmp_path / "own" / "a.jsonl", numbered("x", 5))
    damage(open_dataset(tmp_path / "own").train_shards[0].parent)
    with pytest.raises(UserError, match=r"delete .*; it will be prepared again"):
        open_dataset(tmp_path / "own")


# --- shards

def prepared(folder, texts):
    prepare_shards(folder, "x", (("train", text.encode()) for text in texts), distinct=True)
    manifest = json.loads((folder / "dataset.json").read_text())
    return manifest["dataset_id"], [list(read_documents(folder / n)) for n in manifest["shards"]]


def test_order_and_shards_depend_on_the_set_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "_SHARD_MIN_BYTES", 300)
    texts = [f"{i} " * (1 + i % 7) for i in range(400)]
    dataset_id, shards = prepared(tmp_path / "one", texts)
    assert prepared(tmp_path / "two", texts[::-1]) == (dataset_id, shards)
    assert prepared(tmp_path / "three", texts + texts[:50])[0] == dataset_id
    assert sorted(text for shard in shards for text in shard) == sorted(texts)
    *train, val = [sum(map(len, shard)) for shard in shards]
    assert 0.05 <= val / (val + sum(train)) < 0.06
    assert len(train) > 5 and min(train) > 0.8 * max(train)


def test_documents_of_a_shard_come_in_order_without_null_and_blank_ones(tmp_path):
    texts = ["one", "", None, " \n", "two\n"]
    for number, column in enumerate((pa.array(texts), pa.array(texts, pa.large_string()))):
        path = write_parquet(tmp_path / f"a:{number}.parquet", column, row_group_size=2)
        assert list(read_documents(path)) == ["one", "two\n"]


def damaged_pages(path):
    data = bytearray(path.read_bytes())
    data[10:400] = bytes(390)
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, path.stat().st_size - 1),
    damaged_pages,
    lambda path: write_parquet(path, pa.array([1])),
    lambda path: write_parquet(path, pa.array(["", None])),
    lambda path: write_parquet(path, pa.array([b"\xff"])),
    lambda path: pq.write_table(pa.table({"b": ["a"]}), path),
])
def test_a_shard_that_cannot_be_read_is_named(tmp_path, damage):
    path = write_parquet(tmp_path / "shard_00003.parquet", numbered("x", 1000))
    damage(path)
    with pytest.raises(UserError, match=r"cannot read .*shard_00003\.parquet \(.*\); repair"):
        list(read_documents(path))


# --- named datasets and the command

def test_stdlib_is_prepared_once_with_version_and_content_in_its_id(base_dir):
    dataset = open_dataset("stdlib")
    version = ".".join(map(str, sys.version_info[:3]))
    assert dataset.dataset_id.startswith(f"stdlib-{version}-")
    found = split(dataset, "train") + split(dataset, "val")
    assert len(found) == len(set(found)) and len(dataset.train_shards) >= 2
    assert 5e6 < sum(map(len, found)) <= stdlib_corpus.CORPUS_CHARS
    assert open_dataset("stdlib") == dataset and str(base_dir) not in "".join(found)


@pytest.mark.parametrize("arguments, message", [
    ([], "needs shard_00004.parquet, the validation shard of climbmix"),
    (["-n", "5"], "has 1 to 4 training shards"),
    (["-n", "2", "-w", "0"], "-w"),
    (["--dataset", "stdlib", "-n", "2"], "-n is only for the downloads climbmix and fineweb-edu"),
    (["--dataset", "nowhere"], "give a folder of text or one of stdlib, climbmix, fineweb-edu"),
    (["--dataset", "~nobody/x"], "is not a folder"),
    (["--dataset", "x" * 5000], "is not a folder"),
    (["--dataset", __file__], "is not a folder"),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(monkeypatch, arguments, message, refusal):
    monkeypatch.setitem(dataset_module.DOWNLOADS, "climbmix", Download("owner/repository", 4))
    assert message in refusal(main, arguments)


@pytest.mark.parametrize("name", ["corpus", "~corpus", "cor:pus", b"caf\xe9", "..corpus"])
def test_module_runs_as_a_command_on_folders_of_any_name(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    folder.mkdir()
    (folder / os.fsdecode(b"fil\xe9: ~.txt")).write_text("<|endoftext|>".join(numbered("x", 50)))
    run = subprocess.run([sys.executable, "-m", "nanochat.dataset", "--dataset", folder.name],
                         capture_output=True, timeout=60, cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert run.returncode == 0, run.stderr
    assert b"1 files, 0.0 MB, 50 documents" in run.stdout
    assert b"1 training and 1 validation shards" in run.stdout
