"""A disk that fills up or fails at any moment of any writer: one error, the old file or the new one, nothing torn."""

import contextlib
import errno
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from corpus import golden_tokenizer

from nanochat.data.shard_writer import prepare_shards
from nanochat.data.sources import _open_shards
from nanochat.data.tokenizer import load_tokenizer, train_tokenizer
from nanochat.data.tokens import TokenShard, write_token_shard
from nanochat.errors import UserError
from nanochat.export.folder import check_replaceable, whole_folder
from nanochat.files import note_digests, write_text
from nanochat.lane_b.infer.record import LaneBRecord, append_record, read_records
from nanochat.runlog import RunLog, read_run
from nanochat.training.checkpoint import find_checkpoint, load_model_state, read_meta, save_checkpoint

CALLS_ON_DISK = ((torch, "save"), (pq, "write_table"), (os, "fsync"), (os, "replace"), (os, "rename"), (Path, "touch"),
                 (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text"), (Path, "rename"))


def append(folder, value):
    empty = dict.fromkeys(LaneBRecord.__dataclass_fields__)
    append_record(folder / "l.csv", LaneBRecord(**{
        **empty, "timestamp_utc": "t", "git_commit": "c", "run_id": f"run-{value}", "dataset_id": "d",
        "target_metric_name": "val_bpb", "lane_b_decision": "inferred", "status": "ok",
        "notes": "alpha_source=x " * 99}))


def write_tokens(folder, value):
    write_token_shard(folder / "s.bin", [([500], np.full(500, value, np.uint16))], {"vocab_size": 300, "bos_id": value})


def write_checkpoint(folder, value):
    save_checkpoint(folder, value, {"w": torch.full((99,), float(value))}, {"state": {}}, {"model_config": {}})


def read_checkpoint(folder):
    step = find_checkpoint(folder)
    values = set(load_model_state(folder, step, read_meta(folder, step), "cpu")["w"].tolist())
    assert values == {step}
    return step


def prepare(folder, value):
    prepare_shards(folder / f"d{value}", "d", lambda: (f"text {i} of {value} " * 9 for i in range(20)), 3000)


def read_prepared(folder):
    return max(int(path.name[1:]) for path in folder.glob("d[12]") if _open_shards("d", path))


def save_tokenizer(folder, value):
    (golden_tokenizer() if value == 1 else train_tokenizer(["abc abd abe"] * 9, 266)).save(folder / "t")


def read_tokenizer(folder):
    return {1024: 1, 266: 2}[load_tokenizer(folder / "t").vocab_size]


def log(folder, value):
    writer = RunLog.create(folder, "r", {}) if value == 1 else RunLog.resume(folder, "r", 1)
    try:
        writer.event("train", step=value, text="x" * 500)
        writer.before_checkpoint()
        writer.finish(status="ok")
    finally:
        writer.close()


def read_log(folder):
    return max(event["step"] for event in read_run(folder / "r").of("train"))


def export(folder, value):
    with whole_folder(folder / "e", {"value": value}) as new:
        write_text(new / "a" / "b", str(value) * 5000)


def read_export(folder):
    check_replaceable(folder / "e")  # all of it is as it was written
    return int((folder / "e" / "a" / "b").read_text()[0])


WRITERS = {  # name -> (write the value 1, then 2; read which is there)
    "ledger": (append, lambda folder: len(read_records(folder / "l.csv"))),
    "tokens": (write_tokens, lambda folder: int(TokenShard(folder / "s.bin").tokens[0])),
    "checkpoint": (write_checkpoint, read_checkpoint),
    "prepared shards": (prepare, read_prepared),
    "tokenizer": (save_tokenizer, read_tokenizer),
    "record": (log, read_log),
    "report": (lambda folder, value: write_text(folder / "r.html", str(value) * 5000),
               lambda folder: int((folder / "r.html").read_text()[0])),
    "digests": (lambda folder, value: note_digests(folder, {"name": str(value) * 64}),
                lambda folder: int((folder / "sha256.json").read_text().split('"')[3][0])),
    "export": (export, read_export),
}


def check(name, folder, fault):
    """Write 2 under the fault; then 1 or 2 can be read, nothing torn is left, and the next try succeeds."""
    write, read = WRITERS[name]
    done = False
    with contextlib.suppress(UserError, OSError), fault:
        write(folder, 2)
        done = True
    try:
        assert read(folder) in ((2,) if done else (1, 2))
    except UserError as error:  # three files: those that were written say that they do not belong together
        assert name == "tokenizer" and "different tokenizers" in str(error)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    if name != "ledger" or read(folder) == 1:  # it has each row once
        write(folder, 2)
    assert read(folder) == 2


@contextlib.contextmanager
def full_disk(n_bytes):
    """No file grows beyond `n_bytes`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def failing_call(at_call, number, calls):
    """The at_call-th call that touches the disk fails; `calls` gets an entry for each."""
    def failing(call):
        def counted(*arguments, **options):
            calls.append(call)
            if len(calls) == at_call:
                raise OSError(number, os.strerror(number))
            return call(*arguments, **options)
        return counted

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS_ON_DISK:
            patch.setattr(owner, name, failing(getattr(owner, name)))
        yield


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk(name, tmp_path, share):
    WRITERS[name][0](tmp_path, 1)
    largest = max(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    check(name, tmp_path, full_disk(int(share * largest)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fails_at_any_call(name, tmp_path, number):
    for at_call in range(1, 100):
        folder, calls = tmp_path / str(at_call), []
        folder.mkdir()
        WRITERS[name][0](folder, 1)
        check(name, folder, failing_call(at_call, number, calls))
        if len(calls) < at_call:
            break
    assert at_call > 2, "no call was made to fail"


def test_the_readers_here_tell_the_values_apart(tmp_path):
    for name, (write, read) in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        for value in (1, 2):
            write(folder, value)
            assert read(folder) == value, name
