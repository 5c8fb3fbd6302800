"""Errors as one line, atomic files, checksums, locks, provenance, devices and progress."""

import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat import common
from nanochat.common import (
    QUIET,
    RunLock,
    UserError,
    atomic_path,
    base_dir,
    check_output,
    command,
    git_commit,
    is_owned,
    json_bytes,
    locked,
    matches_checksum,
    print0,
    progress,
    set_quiet,
    sha256_of,
    write_checksums,
    write_json,
    write_text,
)
from nanochat.device import (
    choose_compute_dtype,
    choose_device,
    device_name,
    peak_bf16_flops,
    peak_memory_mib,
)

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def python(code, *arguments, **options):
    words = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(words, text=True, stdout=subprocess.PIPE, **options)


def finished(process):
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out


def shell(code, words):
    """Run Python code with words of the shell after it, such as `| head -1`."""
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(textwrap.dedent(code))} {words}"
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)


# --- errors and output ---------------------------------------------------------------------------

class Refusal(UserError):
    exit_code = 3


@pytest.mark.parametrize(("error", "text", "exit_code"), [
    (UserError("no shards;\n  run\u2028x"), "error: no shards; run x", 2),
    (Refusal("no shards"), "error: no shards", 3), (KeyboardInterrupt(), "interrupted", 130),
    (PermissionError(13, "Permission denied", "/x"), "/x: Permission denied", 2),
    (OSError(28, "No space left on device"), "error: No space left on device", 2),
    (MemoryError(), "out of memory (no details); lower --device-batch-size", 2),
    (RuntimeError("CUDA out of memory. Tried 2 GiB\nmore"), "Tried 2 GiB); lower", 2),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower --device", 2)],
    ids=lambda value: type(value).__name__)
def test_errors_of_the_user_and_the_machine_are_one_line(refusal, error, text, exit_code):
    @command
    def main(argv=None):
        raise error

    printed = refusal(main, exit_code=exit_code)
    assert text in printed and printed.count("\n") == 1


def test_other_errors_pass_through_and_results_too():
    main = command(lambda argv: (argv, 1 // len(argv)))
    assert main(["--flag"]) == (["--flag"], 1)
    with pytest.raises(ZeroDivisionError):
        main([])


def test_a_rank_names_itself_and_a_lost_rank(refusal, monkeypatch):
    def failing(text):
        @command
        def main(argv=None):
            raise RuntimeError(text)
        return main

    closed = "[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1234"
    with pytest.raises(RuntimeError):
        failing(closed)()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert refusal(failing(closed)).startswith("error (rank 3): another rank ended")
    late = "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3600000ms for recv"
    assert "did not join a collective within --rank-timeout-minutes" in refusal(failing(late))


def test_a_closed_pipe_ends_a_program_quietly():
    code = """
        from nanochat.common import command
        command(lambda argv: [print("line", i) for i in range(100_000)])()
    """
    done = shell(code, "| head -1; exit ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr, done.returncode) == (b"line 0\n", b"", 128 + signal.SIGPIPE)


def test_training_continues_without_its_console(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from nanochat.common import command, print0
        def main(argv):
            for i in range(100_000):
                print0("line", i)
            Path(sys.argv[1]).touch()
        command(main)()
    """
    for words, stderr in (("| head -1", b""), ("> /dev/full", b"warning: cannot write the output")):
        done = shell(code, f"{tmp_path}/done {words}")
        assert (tmp_path / "done").exists() and done.stderr.startswith(stderr)
        assert done.stderr.count(b"\n") == (1 if stderr else 0)
        (tmp_path / "done").unlink()


def test_an_ascii_terminal_shows_escapes_and_closed_streams_do_no_harm():
    code = r"""
        from nanochat.common import command
        command(lambda argv: print('\xdf \u4e2d \udcff'))()
    """
    done = shell(code, "")
    assert done.stdout == "ß 中 \\udcff\n".encode()
    ascii_code = "import sys\nsys.stdout.reconfigure(encoding='ascii')" + textwrap.dedent(code)
    assert shell(ascii_code, "").stdout == b"\\xdf \\u4e2d \\udcff\n"
    assert shell(code, "<&- >&- 2>&-").returncode == 0


def test_only_rank_0_prints(capsys, monkeypatch):
    print0("a", "b", sep="-")
    monkeypatch.setenv("RANK", "1")
    print0("nothing")
    assert capsys.readouterr().out == "a-b\n"


# --- paths ---------------------------------------------------------------------------------------

def test_importing_does_not_import_torch():
    finished(python("import sys, nanochat.common, nanochat.distributed; "
                    "sys.exit('torch' in sys.modules)"))


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = os.fsdecode(b"a:b \xff")
    for value, folder in (("", ".cache/nanochat"), ("~/x/y", "x/y"), (str(tmp_path / odd), odd)):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        assert base_dir() == tmp_path / folder and base_dir().is_dir()
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "x"), "~no-such-user/x"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        with pytest.raises(UserError, match=r"cannot be created.*set NANOCHAT_BASE_DIR"):
            base_dir()


# --- files ---------------------------------------------------------------------------------------

@pytest.fixture
def old(tmp_path):
    """A file with the content `old`, alone in its folder."""
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "old")
    return path


def assert_unchanged(path):
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_new_content_appears_at_the_end_with_permissions_of_the_umask(old):
    before = os.umask(0o027)
    try:
        with atomic_path(old) as temporary:
            temporary.write_text("new")
            assert old.read_text() == "old"
    finally:
        os.umask(before)
    assert old.read_text() == "new" and list(old.parent.iterdir()) == [old]
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


@pytest.mark.parametrize("fault", [KeyboardInterrupt, "fsync", "replace"])
def test_the_old_file_stays_if_the_block_or_the_disk_fails(old, monkeypatch, fault):
    if isinstance(fault, str):
        monkeypatch.setattr(common.os, fault, full_disk)
    with pytest.raises((KeyboardInterrupt, OSError)), atomic_path(old) as temporary:
        temporary.write_text("half")
        if not isinstance(fault, str):
            raise fault
    assert_unchanged(old)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_json_comes_back_and_keeps_the_order_of_keys(tmp_path, value):
    write_json(tmp_path / "file.json", {"z": value, "a": value})
    data = (tmp_path / "file.json").read_bytes()
    assert list(json.loads(data).items()) == [("z", value), ("a", value)]


def test_json_refuses_nan_and_holds_file_names_that_are_not_utf8(old):
    with pytest.raises(ValueError):
        write_json(old, {"x": [1, {"y": math.nan}]})
    assert_unchanged(old)
    name = os.fsdecode(b"/data/r\xe9sum\xe9\\\xff")
    assert json.loads(json_bytes({"path": name})) == {"path": name}


def test_an_output_that_cannot_be_written_is_refused(old):
    check_output("--out", old.with_name("report.html"))
    assert_unchanged(old)
    for path in (old.parent, old.parent / "new" / "x", old / "x", "/proc/report.html"):
        with pytest.raises(UserError, match=r"--out .* cannot be written"):
            check_output("--out", path)


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_checksums_notice_any_change(tmp_path, size):
    data = random.Random(size).randbytes(size)
    path = tmp_path / "part" / "file"
    path.parent.mkdir()
    path.write_bytes(data)
    assert sha256_of(path) == hashlib.sha256(data).hexdigest()
    assert matches_checksum(path, tmp_path)  # none is known
    write_checksums(tmp_path, {"part/file": sha256_of(path)})
    write_checksums(tmp_path, {"other": "0"})
    assert matches_checksum(path, tmp_path)
    path.write_bytes(data + b"x")
    assert not matches_checksum(path, tmp_path)


# --- locks ---------------------------------------------------------------------------------------

def test_a_lock_keeps_processes_apart(tmp_path):
    counter = tmp_path / "folder" / "counter"
    workers = [python("""
        import sys
        from pathlib import Path
        from nanochat.common import locked
        path = Path(sys.argv[1])
        for _ in range(100):
            with locked(path):
                count = int(path.read_text()) if path.exists() else 0
                path.write_text(str(count + 1))
    """, counter) for _ in range(3)]
    for worker in workers:
        finished(worker)
    assert counter.read_text() == "300"


def test_a_run_lock_names_its_owner_and_is_free_after_a_kill(tmp_path):
    arguments = (tmp_path / "run", tmp_path / "locks" / "run.r", "r", "choose another --run-id")
    holder = python("""
        import sys, time
        from nanochat.common import RunLock
        lock = RunLock(*sys.argv[1:])
        print("held", flush=True)
        time.sleep(60)
    """, *arguments)
    assert holder.stdout.readline() == "held\n"
    pattern = rf"is being written by run r \(pid {holder.pid} on .*\); choose another --run-id"
    with pytest.raises(UserError, match=pattern):
        RunLock(*arguments)
    assert is_owned(arguments[1]) is True
    holder.kill()
    holder.communicate()
    assert is_owned(arguments[1]) is False

    lock = RunLock(*arguments)
    lock.check()
    shutil.rmtree(tmp_path / "locks")
    other = RunLock(*arguments)
    with pytest.raises(UserError, match=f"pid {os.getpid()}"):
        lock.check()
    lock.release()
    other.check()
    other.release()
    assert is_owned(arguments[1]) is False and is_owned(tmp_path / "none") is None


def test_a_lock_in_a_folder_that_cannot_be_written_is_an_error(old):
    with pytest.raises(UserError, match=r"cannot write in .*NANOCHAT_BASE_DIR"), locked(old / "x"):
        pass


# --- provenance ----------------------------------------------------------------------------------

def repository(folder):
    """Create a git repository with one commit; return a function that runs git in it."""
    def git(*words):
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", folder, *options, *words], check=True, text=True,
                              capture_output=True).stdout.strip()

    folder.mkdir()
    git("init", "--quiet")
    (folder / "code.py").write_text("")
    (folder / "ledger.csv").write_text("header\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    return git


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_not_of_a_repository_around_it(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    git = repository(folder)
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(common, "__file__", str(folder / "code.py"))
    (folder / "notes.txt").write_text("untracked")
    (folder / "ledger.csv").write_text("header\na run's row\n")
    assert git_commit() == (commit, False)
    (folder / "code.py").write_text("changed")
    assert git_commit() == (commit, True)

    package = folder / ".venv" / "site-packages"  # a wheel installed in a user's own repository
    package.mkdir(parents=True)
    (package / "common.py").write_text("")
    monkeypatch.setattr(common, "__file__", str(package / "common.py"))
    assert git_commit() == (None, None)
    monkeypatch.setattr(common, "__file__", str(tmp_path / "nowhere" / "common.py"))
    assert git_commit() == (None, None)


# --- devices -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("available", "kind", "chosen"), [
    ("", "", CPU), ("mps", "", MPS), ("mps", "cpu", CPU), ("cuda", "cpu", CPU),
    ("cuda", "", torch.device("cuda", 3)), ("cuda mps", "mps", MPS),
    ("", "cuda", "cuda is not available"), ("", "tpu", "use cuda, mps, cpu")])
def test_the_device_is_the_one_asked_for_or_the_best(monkeypatch, available, kind, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in available)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in available)
    monkeypatch.setenv("LOCAL_RANK", "3")
    if isinstance(chosen, str):
        with pytest.raises(UserError, match=chosen):
            choose_device(kind)
    else:
        assert choose_device(kind) == chosen


@pytest.mark.parametrize(("device", "hardware", "dtype"), [
    (CPU, {"amx_bf16": True}, torch.bfloat16), (CPU, {"avx512_bf16": True}, torch.bfloat16),
    (CPU, {"amx_bf16": False, "avx512_f": True}, torch.float32), (MPS, None, torch.float32),
    (CUDA, (7, 5), torch.float32), (CUDA, (8, 0), torch.bfloat16), (CUDA, (10, 0), torch.bfloat16)])
def test_the_dtype_is_bf16_where_it_is_native(monkeypatch, device, hardware, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware)
    assert choose_compute_dtype(device)[0] == dtype
    monkeypatch.setenv("NANOCHAT_DTYPE", "float16")
    assert choose_compute_dtype(device) == (torch.float16, "NANOCHAT_DTYPE=float16")
    monkeypatch.setenv("NANOCHAT_DTYPE", "bf16")
    with pytest.raises(UserError, match="use one of bfloat16, float16, float32"):
        choose_compute_dtype(device)


def test_this_cpu_is_described():
    assert device_name(CPU).endswith(f" x{os.cpu_count()}") and "\n" not in device_name(CPU)
    assert 50 < peak_memory_mib(CPU) < 100_000


@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200 NVL", 835e12),
    ("NVIDIA GH200 480GB", 989e12), ("NVIDIA L40S", 362e12), ("NVIDIA H20", None), ("", None)])
def test_peak_flops_follow_the_name(name, flops):
    assert peak_bf16_flops(name) == flops


# --- progress ------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """A function that advances time.monotonic of nanochat.common by some seconds."""
    now = [1000.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.delenv(QUIET, raising=False)

    def advance(sec):
        now[0] += sec
    return advance


def slow_items(n, clock, sec):
    for item in range(n):
        clock(sec)
        yield item


@pytest.mark.parametrize(("n", "total", "sec", "lines"), [
    (200, 200, 1.0, [f"reading: {10 * i:3}% {20 * i}/200" for i in range(1, 11)]),
    (1000, 1000, 0.0005, []), (3, 1000, 600.0, [f"reading:   0% {i}/1000" for i in (1, 2, 3)])])
def test_a_log_gets_a_line_per_10_percent_with_rate_and_remaining_time(
        clock, capsys, n, total, sec, lines):
    bar = progress(slow_items(n, clock, sec), total=total, desc="reading", unit="doc")
    bar.mininterval = bar.miniters = 0
    assert list(bar) == list(range(n))
    printed = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in printed] == lines
    assert all(line.endswith("doc/s]") for line in printed)


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_programs_and_other_ranks_show_no_progress(clock, capsys, monkeypatch, quiet):
    monkeypatch.setenv(QUIET, "")
    set_quiet(quiet)
    assert list(progress(slow_items(50, clock, 1.0), total=50, shown=quiet)) == list(range(50))
    assert capsys.readouterr() == ("", "")
