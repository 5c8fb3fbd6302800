import hashlib
import json
import math
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import common as files
from nanochat.common import (
    UserError,
    atomic_path,
    check_output,
    json_bytes,
    locked,
    read_json,
    sha256_of,
    write_json,
    write_text,
)

FINITE_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20)


def python(code, *arguments, **options):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], text=True, **options)


def finished(process):
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return out


@pytest.fixture
def old(tmp_path):
    """A file with content, alone in its folder."""
    path = tmp_path / "folder" / "file.txt"
    path.parent.mkdir()
    path.write_text("old")
    return path


def assert_untouched(path):
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_new_content_appears_only_at_the_end_and_nothing_else_stays(old):
    with atomic_path(old) as temporary:
        temporary.write_text("new")
        assert old.read_text() == "old"
        assert temporary.parent == old.parent and temporary.name.endswith(".tmp") and temporary.name.startswith(".")
    assert old.read_text() == "new"
    assert list(old.parent.iterdir()) == [old]


def test_missing_folders_are_made(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "ü\n")
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == b"\xc3\xbc\n"


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), GeneratorExit()])
def test_old_file_stays_when_the_block_raises(old, error):
    with pytest.raises(type(error)), atomic_path(old) as temporary:
        temporary.write_text("half")
        raise error
    assert_untouched(old)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_old_file_stays_when_the_disk_refuses_at_the_end(old, monkeypatch, call):
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_text(old, "new")
    assert_untouched(old)


def test_old_file_stays_when_the_disk_is_full(old):
    out = finished(python("""
        import resource, signal, sys
        from nanochat.common import write_text
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        write_text(sys.argv[2], "x" * 5000)
        try:
            write_text(sys.argv[1], "x" * 5001)
        except OSError as error:
            print(type(error).__name__)
    """, old, old.with_name("fits").resolve(), stdout=subprocess.PIPE))
    assert out == "OSError\n"
    assert old.with_name("fits").read_text() == "x" * 5000
    old.with_name("fits").unlink()
    assert_untouched(old)


def test_target_that_is_a_folder_is_left_alone(tmp_path):
    (tmp_path / "target" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        write_text(tmp_path / "target", "new")
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["target"]
    assert (tmp_path / "target" / "inside").is_dir()


def test_block_that_loses_its_temporary_file_is_an_error(old):
    with pytest.raises(FileNotFoundError), atomic_path(old) as temporary:
        temporary.unlink()
    assert_untouched(old)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "new")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_umask_of_the_process_is_never_touched(tmp_path, monkeypatch):
    """It is shared by all threads: a loader's thread would create its files without one for a moment."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("umask changed"))
    write_text(tmp_path / "file", "new")


def test_writers_of_one_path_leave_one_whole_file(tmp_path):
    path = tmp_path / "folder" / "file"
    contents = [letter * 50_000 for letter in "abcd"]

    def write(content):
        for _ in range(10):
            write_text(path, content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in contents
    assert list(path.parent.iterdir()) == [path]


def test_process_killed_while_it_writes_leaves_the_old_or_the_new_file_whole(tmp_path):
    path = tmp_path / "file"
    wholes = {str(digit) * 300_000 for digit in range(10)}
    rng = random.Random(7)
    seen = set()
    path.write_text("0" * 300_000)
    for _ in range(8):
        process = python("""
            import sys
            from nanochat.common import atomic_path
            print("ready", flush=True)
            for n in range(10**9):
                with atomic_path(sys.argv[1]) as temporary, open(temporary, "w") as file:
                    for _ in range(30):
                        file.write(str(n % 10) * 10_000)
                        file.flush()
        """, path, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.08))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen.add(path.read_text())
    assert seen <= wholes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(FINITE_JSON)
def test_json_comes_back_and_keeps_the_order_of_keys(tmp_path, value):
    write_json(tmp_path / "file.json", {"z": value, "a": value})
    data = (tmp_path / "file.json").read_bytes()
    assert data.endswith(b"}\n")
    assert list(json.loads(data).items()) == [("z", value), ("a", value)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_finite_and_keeps_the_old_file(old, value):
    with pytest.raises(ValueError):
        write_json(old, {"x": [1, {"y": value}]})
    assert_untouched(old)


def test_json_holds_names_of_files_that_are_not_utf8():
    """Python gives such a name as lone surrogates; the backslash before it must not swallow the escape."""
    name = os.fsdecode(b"/data/r\xe9sum\xe9\\\xff")
    assert json.loads(json_bytes({"path": name})) == {"path": name}
    assert json_bytes("é") == '"é"'.encode()


def test_lock_keeps_processes_apart(tmp_path):
    counter = tmp_path / "folder" / "counter"
    workers = [python("""
        import sys
        from pathlib import Path
        from nanochat.common import locked
        path = Path(sys.argv[1])
        for _ in range(200):
            with locked(path):
                count = int(path.read_text()) if path.exists() else 0
                path.write_text(str(count + 1))
    """, counter) for _ in range(3)]
    for worker in workers:
        finished(worker)
    assert counter.read_text() == "600"


def test_lock_is_free_again_after_an_error_and_after_a_kill(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(RuntimeError), locked(path):
        raise RuntimeError
    holder = python("""
        import sys, time
        from nanochat.common import locked
        with locked(sys.argv[1]):
            print("held", flush=True)
            time.sleep(60)
    """, path, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    entered = threading.Event()

    def enter():
        with locked(path):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.1)  # excluded while the other process lives
    holder.kill()
    holder.communicate()
    assert entered.wait(10)
    waiting.join()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_is_that_of_the_whole_file(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    check_output("--out", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    said = r"--out .* cannot be written \(.*\); give a file in a folder that is there"
    for path in (tmp_path, tmp_path / "new" / "report.html", tmp_path / "file" / "report.html", "/proc/report.html"):
        with pytest.raises(UserError, match=said):
            check_output("--out", path)
    assert not (tmp_path / "new").exists()


def test_an_endless_file_in_place_of_a_small_one_is_refused(tmp_path):
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "sparse.json", "/dev/zero"):
        with pytest.raises(UserError, match=r"cannot read .* \(longer than 64 MiB\); remedy"):
            read_json(path, "remedy")
