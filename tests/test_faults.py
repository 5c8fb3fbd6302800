"""Kills and full disks leave the old or the new file; files and names of strangers do no harm."""

import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import Malicious
from core_bundles import write_bundle
from corpus import GOLDEN_TOKENIZER
from full_disk import full_disk
from writers import WRITERS

from nanochat import core_eval
from nanochat.checkpoint import checkpoint_folder, load_model
from nanochat.common import UserError, check_name
from nanochat.config import TrainingConfig
from nanochat.runlog import RunLog
from nanochat.tokenizer import load_tokenizer

# --- kills and full disks ------------------------------------------------------------------------

CALLS_ON_DISK = (
    (torch, "save"), (pq, "write_table"), (os, "fsync"), (os, "replace"), (os, "rename"),
    (Path, "touch"), (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text"),
    (Path, "rename"))


def test_a_killed_writer_leaves_the_old_or_the_new_value(tmp_path):
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", folder / "writers.py", tmp_path], text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
        capture_output=True)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def full_disk_at_call(at_call, calls):
    """Let the at_call-th call that writes to the disk fail; `calls` gets an entry per call."""
    def failing(call):
        def counted(*arguments, **options):
            calls.append(call)
            return full_disk() if len(calls) == at_call else call(*arguments, **options)
        return counted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS_ON_DISK:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        yield


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_at_any_call_leaves_the_old_or_the_new_value(name, tmp_path):
    write, read = WRITERS[name]
    for at_call in range(1, 100):
        folder, calls, done = tmp_path / str(at_call), [], False
        folder.mkdir()
        write(folder, 1)
        with contextlib.suppress(UserError, OSError), full_disk_at_call(at_call, calls):
            write(folder, 2)
            done = True
        assert read(folder) in ((2,) if done else (1, 2))
        assert not list(folder.rglob("*.tmp"))
        if name != "ledger" or read(folder) == 1:
            write(folder, 2)
        assert read(folder) == 2
        if len(calls) < at_call:
            break
    assert at_call > 2, "no call failed"


# --- names ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "../x", "/etc/passwd", ".", "..", ".hidden", "a/b", "a\\b", "a\n", "a\0b", "x" * 300, "-x",
    "~", "a b", "ü", "\u202ex", "\udcff", "con:", "$(id)", "*", "", None, 7, ["a"]], ids=ascii)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    uses = [lambda: check_name("name", name), lambda: RunLog.create(tmp_path, name, {}),
            lambda: RunLog.resume(tmp_path, name, 1)]
    if isinstance(name, str) and name:  # an empty flag is its default
        uses += [lambda: TrainingConfig(model_tag=name), lambda: TrainingConfig(run_id=name)]
        if not name.startswith("/"):  # --model-tag of scripts.base_eval can be an absolute path
            uses += [lambda: checkpoint_folder(name)]
    before = sorted(tmp_path.rglob("*"))
    for use in uses:
        with pytest.raises(UserError, match="cannot name a folder") as refused:
            use()
        assert len(str(refused.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


# --- pickles -------------------------------------------------------------------------------------

def test_a_checkpoint_and_a_tokenizer_run_no_code(tmp_path):
    evil = Malicious(tmp_path / "ran")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": {}}))
    for write in (lambda path: torch.save({"w": evil}, path),
                  lambda path: path.write_bytes(pickle.dumps({"w": evil}, protocol=2))):
        write(tmp_path / "model_000001.pt")
        with pytest.raises(UserError, match=r"model_000001\.pt"):
            load_model(tmp_path, 1, torch.device("cpu"), torch.float32)
    shutil.copytree(GOLDEN_TOKENIZER, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(evil))
    with pytest.raises(UserError, match=r"tokenizer\.pkl"):
        load_tokenizer(tmp_path / "tokenizer")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # it works where it is allowed
    assert (tmp_path / "ran").exists()


# --- archives ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["../evil", "/evil", "eval_bundle/../../evil"])
def test_archive_entries_stay_within_the_bundle(tmp_path, monkeypatch, name):
    root, archive = write_bundle(tmp_path / "made"), tmp_path / "bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in filter(Path.is_file, root.rglob("*")):
            file.write(path, f"eval_bundle/{path.relative_to(root)}")
        file.writestr(name, "evil")
    monkeypatch.setattr("huggingface_hub.file_download.http_get",
                        lambda url, file: file.write(archive.read_bytes()))
    folder = core_eval.download_bundle("http://127.0.0.1/eval_bundle.zip")
    assert core_eval.read_bundle(folder)
    assert all(path.is_relative_to(folder) for path in tmp_path.rglob("evil"))
