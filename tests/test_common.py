"""Errors as one line, atomic files, checksums, locks, provenance, devices and progress."""

import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

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
    check_output,
    command,
    git_commit,
    is_owned,
    matches_checksum,
    newest_in_words,
    progress,
    sha256_of,
    write_checksums,
    write_json,
    write_text,
)
from nanochat.device import choose_compute_dtype, choose_device, memory_bytes

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


def shell(code, words):
    """Run Python code with words of the shell after it, such as `| head -1`."""
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(textwrap.dedent(code))} {words}"
    return subprocess.run(["bash", "-c", line], capture_output=True, timeout=60)


# --- errors and output ---------------------------------------------------------------------------

@pytest.mark.parametrize(("error", "text", "exit_code"), [
    (UserError("no shards;\n  run\u2028x"), "error: no shards; run x", 2),
    (KeyboardInterrupt(), "interrupted", 130),
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


def test_a_closed_pipe_ends_a_program_quietly_and_a_training_run_not_at_all(tmp_path):
    code = """
        import sys
        from pathlib import Path
        from nanochat.common import command, print0
        def main(argv):
            for i in range(100_000):
                {print}("line", i)
            Path(sys.argv[1]).touch()
        command(main)()
    """
    done = shell(code.format(print="print"), "x | head -1; exit ${PIPESTATUS[0]}")
    assert (done.stdout, done.stderr, done.returncode) == (b"line 0\n", b"", 128 + signal.SIGPIPE)
    for words, stderr in (("| head -1", b""), ("> /dev/full", b"warning: cannot write the output")):
        done = shell(code.format(print="print0"), f"{tmp_path}/done {words}")
        assert done.stderr.startswith(stderr) and done.stderr.count(b"\n") == bool(stderr)
        (tmp_path / "done").unlink()


def test_an_ascii_terminal_shows_escapes_and_closed_streams_do_no_harm():
    code = r"""
        import sys
        from nanochat.common import command
        sys.stdout and sys.stdout.reconfigure(encoding='ascii')
        command(lambda argv: print('\xdf \u4e2d \udcff'))()
    """
    assert shell(code, "").stdout == b"\\xdf \\u4e2d \\udcff\n"
    assert shell(code, "<&- >&- 2>&-").returncode == 0


# --- paths and files -----------------------------------------------------------------------------

def test_importing_does_not_import_torch():
    code = "import sys, nanochat.common, nanochat.distributed; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = os.fsdecode(b"a:b \xff")
    for value, folder in (("", ".cache/nanochat"), ("~/x/y", "x/y"), (str(tmp_path / odd), odd)):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        assert common.base_dir() == tmp_path / folder and (tmp_path / folder).is_dir()
    (tmp_path / "file").write_text("")
    for value in (str(tmp_path / "file"), str(tmp_path / "file" / "x"), "~no-such-user/x"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
        with pytest.raises(UserError, match=r"cannot be created.*set NANOCHAT_BASE_DIR"):
            common.base_dir()


def test_the_newest_folders_are_named(base_dir):
    assert newest_in_words(base_dir / "missing") == "there is none yet"
    for at in range(7):
        (base_dir / f"d{at}").mkdir()
        os.utime(base_dir / f"d{at}", (at, at))
    (base_dir / "file").touch()
    assert newest_in_words(base_dir) == "there are d6, d5, d4, d3, d2, ... (newest first)"


@pytest.fixture
def old(tmp_path):
    """A file with the content `old`, alone in its folder."""
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "old")
    return path


@pytest.mark.parametrize("fault", [KeyboardInterrupt, "fsync", "replace"])
def test_the_old_file_stays_if_the_block_or_the_disk_fails(old, monkeypatch, fault):
    if isinstance(fault, str):
        monkeypatch.setattr(common.os, fault, full_disk)
    with pytest.raises((KeyboardInterrupt, OSError)), atomic_path(old) as temporary:
        temporary.write_text("half")
        if not isinstance(fault, str):
            raise fault
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]


def test_new_content_appears_with_permissions_of_the_umask(old):
    before = os.umask(0o027)
    try:
        write_text(old, "new")
    finally:
        os.umask(before)
    assert old.read_text() == "new" and stat.S_IMODE(old.stat().st_mode) == 0o640


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4))


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_json_comes_back_and_keeps_the_order_of_keys(tmp_path, value):
    odd = os.fsdecode(b"/data/r\xe9sum\xe9\\\xff")  # a file name that is not UTF-8
    write_json(tmp_path / "file.json", {"z": value, "a": odd})
    data = (tmp_path / "file.json").read_bytes()
    assert list(json.loads(data).items()) == [("z", value), ("a", odd)]
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan.json", {"x": [1, {"y": math.nan}]})


def test_an_output_that_cannot_be_written_is_refused(old):
    check_output("--out", old.with_name("report.html"))
    assert old.read_text() == "old" and list(old.parent.iterdir()) == [old]
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

def test_a_run_lock_names_its_owner_and_is_free_after_a_kill(tmp_path):
    arguments = (tmp_path / "run", tmp_path / "locks" / "run.r", "r", "choose another --run-id")
    code = "import sys, time; from nanochat.common import RunLock\n" \
        "lock = RunLock(*sys.argv[1:]); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, *arguments], text=True,
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    pattern = rf"is being written by run r \(pid {holder.pid} on .*\); choose another --run-id"
    with pytest.raises(UserError, match=pattern):
        RunLock(*arguments)
    assert is_owned(arguments[1]) is True
    holder.kill()
    holder.communicate()
    assert is_owned(arguments[1]) is False and is_owned(tmp_path / "none") is None

    RunLock(*arguments).release()


# --- provenance ----------------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_package_not_of_a_repository_around_it(tmp_path, monkeypatch):
    def git(*words):
        options = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", tmp_path, *options, *words], check=True, text=True,
                              capture_output=True).stdout.strip()

    package = tmp_path / ".venv" / "common.py"  # a wheel installed in a user's own repository
    package.parent.mkdir()
    for name in ("code.py", "ledger.csv", package):
        (tmp_path / name).write_text("header\n")
    git("init", "--quiet")
    git("add", "code.py", "ledger.csv")
    git("commit", "--quiet", "-m", "one")
    (tmp_path / "ledger.csv").write_text("header\na run's row\n")
    monkeypatch.setattr(common, "__file__", str(tmp_path / "code.py"))
    assert git_commit() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "code.py").write_text("changed")
    assert git_commit() == (git("rev-parse", "HEAD"), True)
    monkeypatch.setattr(common, "__file__", str(package))
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
    assert choose_compute_dtype(device)[0] == torch.float16
    monkeypatch.setenv("NANOCHAT_DTYPE", "bf16")
    with pytest.raises(UserError, match="use one of bfloat16, float16, float32"):
        choose_compute_dtype(device)


def test_the_memory_of_a_cpu_is_that_of_the_machine():
    [kib] = re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory_bytes(CPU) == 1024 * int(kib)


# --- progress ------------------------------------------------------------------------------------

def test_a_log_gets_lines_about_long_work_only(capsys, monkeypatch):
    monkeypatch.delenv(QUIET, raising=False)
    assert list(progress(range(9), total=9, desc="reading")) == list(range(9))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(common, "LOG_SEC", 0)
    bar = progress(range(9), total=9, desc="reading", unit="doc")
    bar.delay = bar.mininterval = 0
    assert list(bar) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert "reading: 100%" in lines[-1] and "9/9" in lines[-1] and "doc/s" in lines[-1]


@pytest.mark.parametrize("quiet", ["1", ""])
def test_quiet_programs_and_other_ranks_show_no_progress(capsys, monkeypatch, quiet):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv(QUIET, quiet)
    assert list(progress(range(50), total=50, shown=bool(quiet))) == list(range(50))
    assert capsys.readouterr() == ("", "")
