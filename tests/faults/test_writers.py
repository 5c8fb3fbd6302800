"""A disk that fills up or fails at any moment of any writer: one error, the old file or the new one, nothing torn."""

import contextlib
import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from writers import ONCE, WRITERS

from nanochat.common import UserError

CALLS_ON_DISK = ((torch, "save"), (pq, "write_table"), (os, "fsync"), (os, "replace"), (os, "rename"), (Path, "touch"),
                 (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text"), (Path, "rename"))


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
    if name not in ONCE or read(folder) == 1:
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


@pytest.mark.parametrize(("seed", "n_kills"), [(0, 3), pytest.param(None, 30, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_and_several_at_once(tmp_path, seed, n_kills):
    folder = Path(__file__).parent
    seed = time.time_ns() if seed is None else seed
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder.parent), *sys.path])}
    done = subprocess.run([sys.executable, "-W", "ignore", folder / "kills.py", tmp_path, str(seed), str(n_kills)],
                          env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
