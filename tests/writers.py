"""The writers whose files must survive a kill: write the value 1, then 2; read which one is there.

As a program it kills the writers: python tests/writers.py FOLDER SEED KILLS. It is a process of
its own because it forks; it asserts after every kill.
"""

import contextlib
import os
import random
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

from nanochat.checkpoint import find_checkpoint, load_model_state, read_meta, save_checkpoint
from nanochat.dataset import open_dataset
from nanochat.experiments.ledger import append_row, read_rows
from nanochat.runlog import RunLog, read_run
from nanochat.tokens import TokenShard, token_shards


@dataclass(frozen=True)
class Row:
    run_id: str
    notes: str


def write_checkpoint(folder, value):
    weights = {"w": torch.full((99,), float(value))}
    save_checkpoint(folder, value, weights, {"state": {}}, {"model_config": {}})


def read_checkpoint(folder):
    step = find_checkpoint(folder)
    weights = load_model_state(folder, step, read_meta(folder, step), "cpu")["w"]
    assert set(weights.tolist()) == {step}
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


def child(function, *arguments):
    """Fork a process that calls function(*arguments); return its process id."""
    process = os.fork()
    if process:
        return process
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def write_and_die(write, folder, at_call, pipe):
    """Write 2 and die at that function call, or send the number of calls through the pipe."""
    left = at_call

    def count(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    write(folder, 2)
    sys.setprofile(None)
    os.write(pipe, str(at_call - left).encode())


def kill_at_random_calls(name, folder, source, n_kills):
    """After a kill the value is the old or the new one, and the next writer succeeds."""
    write, read = WRITERS[name]
    n_calls, n_killed = 1 << 60, 0
    for i in range(n_kills + 1):  # the first process is not killed: it counts the calls
        here = folder / f"{name} {i}"
        here.mkdir(parents=True)
        write(here, 1)
        reader, writer = os.pipe()
        at_call = source.randint(1, n_calls) if i else n_calls
        process = child(write_and_die, write, here, at_call, writer)
        os.close(writer)
        with open(reader) as pipe:
            counted = pipe.read()
        _, status = os.waitpid(process, 0)
        if i == 0:
            n_calls = int(counted)
        n_killed += os.WIFSIGNALED(status)
        after = read(here)
        assert after == 2 if status == 0 else after in (1, 2), (name, i, status, after)
        if name != "ledger" or after == 1:  # the ledger refuses a row that it has
            write(here, 2)
        assert read(here) == 2, (name, i)
    assert n_killed > 0.6 * n_kills, (name, n_killed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread before a fork
    tqdm.set_lock(threading.RLock())  # its own is shared by forked processes, also by killed ones
    random_source = random.Random(int(sys.argv[2]))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        for writer_name in WRITERS:
            kill_at_random_calls(writer_name, Path(sys.argv[1]), random_source, int(sys.argv[3]))
