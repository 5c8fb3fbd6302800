"""Datasets by name and by folder: ids, splits, conversion, and what is said when something is missing."""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset as dataset_module
from nanochat import shard_writer, stdlib_corpus
from nanochat.common import UserError
from nanochat.dataset import Download, main, open_dataset
from nanochat.shard_writer import prepare_shards
from nanochat.shards import read_documents


def parquet_folder(folder, n_shards=3):
    folder.mkdir(parents=True)
    for i in range(n_shards):
        pq.write_table(pa.table({"text": [f"document {i}.{j}" for j in range(40)]}), folder / f"shard_{i:05d}.parquet")
    return folder


def text_folder(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def documents(dataset):
    return [text for shard in dataset.shards for text in read_documents(shard)]


def test_last_shard_of_a_parquet_folder_is_validation(tmp_path):
    dataset = open_dataset(parquet_folder(tmp_path / "corpus"))
    assert [path.name for path in dataset.train_shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [path.name for path in dataset.val_shards] == ["shard_00002.parquet"]
    assert dataset.train_shards[0].parent == tmp_path / "corpus", "parquet is used where it lies"


def test_id_of_a_parquet_folder_is_the_same_wherever_it_lies(tmp_path):
    first = open_dataset(parquet_folder(tmp_path / "a" / "my corpus"))
    second = open_dataset(parquet_folder(tmp_path / "b" / "my corpus"))
    longer = open_dataset(parquet_folder(tmp_path / "c" / "my corpus", n_shards=4))
    assert first.dataset_id == second.dataset_id != longer.dataset_id
    assert first.dataset_id.startswith("my-corpus-")


def test_a_single_parquet_file_is_split_by_content_hash_as_other_text_is(tmp_path, base_dir):
    dataset = open_dataset(parquet_folder(tmp_path / "corpus", n_shards=1))
    assert dataset.shards[0].parent.parent == base_dir
    assert sorted(documents(dataset)) == sorted(f"document 0.{j}" for j in range(40))
    assert 1 <= len(list(read_documents(dataset.val_shards[0]))) <= 3
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents(dataset))
    (tmp_path / "again" / "corpus").mkdir(parents=True)
    (tmp_path / "again" / "corpus" / "a.jsonl").write_text(lines)
    assert open_dataset(tmp_path / "again" / "corpus").dataset_id == dataset.dataset_id


def test_a_folder_of_other_files_names_their_suffixes(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.parquet.* it holds no files"):
        open_dataset(parquet_folder(tmp_path / "empty", n_shards=0))
    for i in range(12):
        (tmp_path / f"chapter_{i}.rst").touch()
    (tmp_path / "Makefile").touch()
    with pytest.raises(UserError, match=r"\(12 \.rst, 1 without suffix\): rename or convert them"):
        open_dataset(tmp_path)


def test_a_training_shard_that_is_the_validation_shard_is_refused(tmp_path):
    folder = parquet_folder(tmp_path / "corpus")
    (folder / "zzz.parquet").write_bytes((folder / "shard_00001.parquet").read_bytes())
    with pytest.raises(UserError, match=r"shard_00001\.parquet and zzz\.parquet are the same"):
        open_dataset(folder)
    (folder / "zzz.parquet").unlink()
    assert len({path.stat().st_size for path in folder.iterdir()}) == 1
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    assert len(open_dataset(folder).shards) == 3, "of equal size and time, but other text"


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="known names are stdlib, climbmix, fineweb-edu"):
        open_dataset("climbmax")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="is a file, name its folder"):
        open_dataset(tmp_path / "a.txt")


def test_damaged_shard_is_named_when_the_dataset_is_opened(tmp_path):
    folder = parquet_folder(tmp_path / "corpus")
    path = folder / "shard_00001.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"shard_00001\.parquet is damaged"):
        open_dataset(folder)


@given(st.lists(st.text(max_size=60), min_size=2, max_size=30), st.booleans())
@settings(max_examples=60, deadline=None)
def test_jsonl_documents_are_kept_but_for_blank_ones_and_duplicates(texts, escape):
    expected = {text for text in texts if text.strip()}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", folder + "/cache")
        lines = "\n".join(json.dumps({"text": text, "id": 1}, ensure_ascii=escape) for text in texts)
        Path(folder, "corpus").mkdir()
        Path(folder, "corpus", "a.jsonl").write_text(lines, encoding="utf-8", newline="")
        if len(expected) < 2:
            with pytest.raises(UserError, match="fewer than 2 distinct documents"):
                open_dataset(folder + "/corpus")
            return
        dataset = open_dataset(folder + "/corpus")
        found = documents(dataset)
        assert len(found) == len(expected) and set(found) == expected
        assert len(dataset.train_shards) >= 1 and list(read_documents(dataset.val_shards[0]))


@given(st.lists(st.text(min_size=1, max_size=40).filter(lambda text: text.strip() and text[0] != "\ufeff"),
                min_size=2, max_size=8, unique=True))
@settings(max_examples=30, deadline=None)
def test_text_files_become_one_document_each(texts):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", folder + "/cache")
        Path(folder, "corpus", "sub").mkdir(parents=True)
        for i, text in enumerate(texts):
            name = ("sub/" if i % 2 else "") + f"{i}" + (".md" if i % 3 else ".txt")
            Path(folder, "corpus", name).write_bytes(text.encode())
        assert sorted(documents(open_dataset(folder + "/corpus"))) == sorted(texts)


def test_converted_folder_is_kept_until_the_content_changes(tmp_path, base_dir):
    folder = text_folder(tmp_path / "corpus", a="first text", b="second text")
    first = open_dataset(folder)
    written = first.shards[0].stat().st_mtime_ns
    os.utime(folder / "a.txt")
    again = open_dataset(folder)
    assert again == first and again.shards[0].stat().st_mtime_ns == written
    moved = open_dataset(text_folder(tmp_path / "elsewhere" / "corpus", b="first text", a="second text"))
    assert moved.dataset_id == first.dataset_id, "the id follows the documents, not the files' names"
    text_folder(folder, a="another text")
    assert open_dataset(folder).dataset_id != first.dataset_id


def test_conversion_that_fails_leaves_nothing(tmp_path, base_dir):
    folder = text_folder(tmp_path / "corpus", a="first text", b="second text")
    (folder / "c.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: not JSON"):
        open_dataset(folder)
    assert [path.name for path in base_dir.iterdir() if path.is_dir()] == []
    (folder / "c.jsonl").write_text('{"text": "fine"}\n')
    assert len(documents(open_dataset(folder))) == 3


def test_full_disk_while_converting_is_one_line_and_leaves_nothing(tmp_path, base_dir, monkeypatch):
    monkeypatch.setattr(shard_writer.pq, "write_table", full_disk)
    with pytest.raises(UserError, match=r"cannot prepare .*No space left on device"):
        open_dataset(text_folder(tmp_path / "corpus", a="first text", b="second text"))
    assert [path.name for path in base_dir.iterdir() if path.is_dir()] == []


def test_processes_that_ask_at_once_share_one_conversion(tmp_path):
    calls = []

    def texts():
        calls.append(1)
        time.sleep(0.05)
        return iter(["one document", "another"])

    with ThreadPoolExecutor(4) as pool:  # flock keeps threads apart as it does processes
        list(pool.map(lambda _: prepare_shards(tmp_path / "shards", "x", texts, 20), range(4)))
    assert len(calls) == 1 and len(list((tmp_path / "shards").glob("*.parquet"))) == 2


def test_what_a_killed_conversion_left_is_cleared_away(tmp_path, base_dir):
    folder = text_folder(tmp_path / "corpus", a="first text", b="second text")
    ready = open_dataset(folder).shards[0].parent
    left = ready.with_name(f".{ready.name}.tmp")
    ready.rename(left)
    (left / "shard_00099.parquet").write_bytes(b"half")
    assert len(documents(open_dataset(folder))) == 2
    assert not left.exists()


def test_prepared_folder_with_a_shard_removed_is_refused(tmp_path):
    folder = text_folder(tmp_path / "corpus", **{f"t{i}": f"text {i} " * 3 for i in range(5)})
    dataset = open_dataset(folder)
    (dataset.shards[0].parent / "shard_00007.parquet").write_bytes(dataset.shards[0].read_bytes())
    with pytest.raises(UserError, match="names other shards than there are; delete"):
        open_dataset(folder)


@pytest.mark.parametrize(("manifest", "message"), [
    ('{"dataset_id": "x", "sha', "not JSON"), ("", "not JSON"), ("[]", "not a JSON object"), ("{}", "other shards"),
    ({"dataset_id": "../x"}, "cannot name"), ({"dataset_id": ".."}, "cannot name"),
    ({"dataset_id": "a/b"}, "cannot name"), ({"dataset_id": None}, "cannot name"), ({}, "cannot name"),
])
def test_a_damaged_manifest_is_one_line_that_names_it(tmp_path, manifest, message):
    dataset = open_dataset(text_folder(tmp_path / "corpus", a="first text", b="second text"))
    if isinstance(manifest, dict):
        manifest = json.dumps({"shards": [path.name for path in dataset.shards], **manifest})
    (dataset.shards[0].parent / "dataset.json").write_text(manifest)
    with pytest.raises(UserError, match=rf"dataset\.json.*{message}.*delete"):
        open_dataset(tmp_path / "corpus")


def prepared(folder, texts):
    prepare_shards(folder, "x", lambda: iter(texts), sum(map(len, texts)))
    manifest = json.loads((folder / "dataset.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.json", "sha256.json", *manifest["shards"]]
    return manifest["dataset_id"], [list(read_documents(folder / name)) for name in manifest["shards"]]


def flat(shards):
    """Documents in the order they were written: validation first."""
    return [text for shard in (shards[-1], *shards[:-1]) for text in shard]


def test_order_and_split_depend_on_the_set_of_documents_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_SHARD_MIN_BYTES", 300)
    texts = [f"{i} " * (1 + i % 7) for i in range(400)]
    dataset_id, shards = prepared(tmp_path / "one", texts)
    monkeypatch.setattr(shard_writer, "_BUCKET_BYTES", 500)  # sorted in several files now
    assert prepared(tmp_path / "two", texts[::-1]) == (dataset_id, shards)
    with_duplicates = prepared(tmp_path / "three", texts + texts[:50])
    assert with_duplicates[0] == dataset_id
    assert flat(with_duplicates[1]) == flat(shards) != texts
    assert sorted(flat(shards)) == sorted(texts)


def test_validation_is_a_twentieth_and_training_shards_are_even(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "_SHARD_MIN_BYTES", 300)
    texts = [f"{i} " * (1 + i % 7) for i in range(400)]
    _, shards = prepared(tmp_path / "one", texts)
    *train, val = [sum(map(len, shard)) for shard in shards]
    assert 0.05 <= val / (val + sum(train)) < 0.06
    assert len(train) > 5 and min(train) > 0.8 * max(train)


def test_many_duplicates_of_two_documents_still_make_two_shards(tmp_path):
    _, shards = prepared(tmp_path / "one", ["one document"] * 100 + ["another"])
    assert sorted(map(len, shards)) == [1, 1]


def test_stdlib_is_prepared_once_with_version_and_content_in_its_id(base_dir):
    dataset = open_dataset("stdlib")
    version = ".".join(map(str, sys.version_info[:3]))
    assert dataset.dataset_id.startswith(f"stdlib-{version}-")
    assert len(dataset.train_shards) >= 2
    found = documents(dataset)
    assert 5e6 < sum(map(len, found)) <= stdlib_corpus.CORPUS_CHARS
    assert open_dataset("stdlib") == dataset
    assert str(base_dir) not in "".join(found) and not any("site-packages" in path.name for path in dataset.shards)


@pytest.fixture
def two_shard_download(monkeypatch):
    monkeypatch.setitem(dataset_module.DOWNLOADS, "climbmix", Download("owner/repository", 4))


def test_dataset_not_downloaded_names_the_command(two_shard_download, base_dir):
    with pytest.raises(UserError, match=r"run: python -m nanochat\.dataset --dataset climbmix -n 8"):
        open_dataset("climbmix")
    parquet_folder(base_dir / "base_data_climbmix", 3)
    with pytest.raises(UserError, match=r"lacks shard_00004\.parquet, the validation shard of climbmix"):
        open_dataset("climbmix")


def test_download_command_fetches_training_shards_and_the_last(two_shard_download, base_dir, monkeypatch, capsys):
    fetched = []

    def fetch(*args):
        fetched.append(args)
        parquet_folder(base_dir / "base_data_climbmix", 5)

    monkeypatch.setattr(dataset_module, "fetch_shards", fetch)
    main(["-n", "2", "-w", "3"])
    names = ["shard_00000.parquet", "shard_00001.parquet", "shard_00004.parquet"]
    assert fetched == [("owner/repository", names, base_dir / "base_data_climbmix", 3)]
    assert "4 training shards and 1 validation shard" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ([], "say how many training shards of climbmix"),
    (["-n", "0"], "has 1 to 4 training shards"),
    (["-n", "5"], "has 1 to 4 training shards"),
    (["-n", "2", "-w", "0"], "at least one worker"),
    (["--dataset", "stdlib", "-n", "2"], "-n is for downloads"),
    (["--dataset", "nowhere"], "known names are"),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(two_shard_download, arguments, message, refusal):
    error = refusal(main, arguments)
    assert message in error and error.count("\n") == 1


def test_module_runs_as_a_command(tmp_path):
    folder = text_folder(tmp_path / "corpus", a="first text", b="second text")
    run = subprocess.run([sys.executable, "-m", "nanochat.dataset", "--dataset", str(folder)],
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("corpus-") and "1 training shards and 1 validation shard" in run.stdout
