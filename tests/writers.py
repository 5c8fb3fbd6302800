"""The writers whose files must survive a kill: write the value 1, then 2; read which one is there.

As a program, python tests/writers.py FOLDER, it kills the writers before every call that touches
the disk. It is a process of its own because it forks.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus import golden_tokenizer
from tqdm import tqdm

from nanochat.checkpoint import (
    find_checkpoint,
    load_model_state,
    load_optimizer_state,
    read_meta,
    remove_old,
    save_checkpoint,
    set_aside,
)
from nanochat.dataset import open_dataset
from nanochat.experiments.ledger import append_row, read_rows
from nanochat.runlog import RunLog, read_run
from nanochat.tokens import TokenShard, token_shards

DISK_CALLS = {"open", "fsync", "replace", "rename", "unlink", "mkdir", "write", "close", "flush",
              "truncate", "write_record", "write_end_of_file"}


@dataclass(frozen=True)
class Row:
    run_id: str
    notes: str


def write_checkpoint(folder, value):
    """As the training program does: the folder is cleared of torn files, old steps are removed."""
    set_aside(folder, after=9)
    tensor = torch.full((99,), float(value))
    save_checkpoint(folder, value, {"w": tensor}, {"m": tensor}, {"model_config": {"v": value}})
    remove_old(folder, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"meta_{value:06d}.json", f"model_{value:06d}.pt", f"optim_{value:06d}_rank0.pt"]


def read_checkpoint(folder):
    step = find_checkpoint(folder)
    meta = read_meta(folder, step)
    weights = load_model_state(folder, step, meta, "cpu")["w"]
    moments = load_optimizer_state(folder, step, meta, "cpu")["m"]
    assert {meta["model_config"]["v"], *weights.tolist(), *moments.tolist()} == {step}
    return step


def write_record(folder, value):
    log = RunLog.create(folder, "r", {}) if value == 1 else RunLog.resume(folder, "r", 1)
    try:
        log.event("train", step=value, text="x" * 500)
        log.before_checkpoint()
        log.finish(status="ok")
    finally:
        log.close()


def read_record(folder):
    return max(event["step"] for event in read_run(folder / "r").of("train"))


def write_ledger(folder, value):
    append_row(folder / "ledger.csv", Row(f"run-{value}", "note " * 99))


def read_ledger(folder):
    return len(read_rows(folder / "ledger.csv", Row))


def write_token_cache(folder, value):
    """Tokenise one split, then the other."""
    dataset = folder / "text"
    if not dataset.exists():
        dataset.mkdir()
        for i in range(3):
            texts = [f"text {j} of {i} " * 99 for j in range(9)]
            pq.write_table(pa.table({"text": texts}), dataset / f"{i}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "cache"))
        split = "val" if value == 1 else "train"
        token_shards(open_dataset(dataset), golden_tokenizer(), split)


def read_token_cache(folder):
    """Every file is valid; value 2 has a file of each split."""
    shards = [TokenShard(path) for path in (folder / "cache" / "tokens").rglob("*.bin")]
    return 2 if len(shards) > 1 else 1


WRITERS = {
    "checkpoint": (write_checkpoint, read_checkpoint),
    "record": (write_record, read_record),
    "ledger": (write_ledger, read_ledger),
    "token cache": (write_token_cache, read_token_cache),
}


def write_and_die(write, folder, at_call):
    """Write 2 in a forked process that dies before its at_call-th disk call; return its status."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1]
    left = at_call

    def count(_frame, event, function):
        nonlocal left
        if event == "c_call" and function.__name__ in DISK_CALLS:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.setprofile(count)
        write(folder, 2)
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill_at_disk_calls(name, folder):
    """After a kill the value is the old or the new one, and the next writer succeeds."""
    write, read = WRITERS[name]
    status, at_call = 1, 0
    while status:
        at_call += 1
        here = folder / f"{name} {at_call}"
        here.mkdir(parents=True)
        write(here, 1)
        status = write_and_die(write, here, at_call)
        assert status in (0, signal.SIGKILL), (name, at_call, status)
        assert read(here) in ((1, 2) if status else (2,)), (name, at_call)
        if name != "ledger" or read(here) == 1:  # the ledger refuses a row that it has
            write(here, 2)
        assert read(here) == 2, (name, at_call)
    assert at_call > 9, (name, at_call)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread before a fork
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, also by killed ones
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for writer_name in WRITERS:
            kill_at_disk_calls(writer_name, Path(sys.argv[1]))
