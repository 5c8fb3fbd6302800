"""Shared helpers: errors, paths, files, provenance, devices and progress.

torch is imported by the functions that need it, so that the data tools run without it.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import platform
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

# --- errors and output ---------------------------------------------------------------------------

class UserError(ValueError):
    """An error that the user can fix. The message says what is wrong and what to do."""

    exit_code = 2


def warn(message):
    """Print a warning on stderr. An error while printing is ignored."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


def say(*values, **options):
    """Print and flush. After an error discard further output, so that long work continues.

    A closed pipe (`| head`) causes no message; a full disk causes a warning.
    """
    try:
        print(*values, **{"flush": True, **options})
    except OSError as error:
        _discard_output()
        if not isinstance(error, BrokenPipeError):
            warn(f"cannot write the output ({error}); further output is discarded")


def print0(*values, **options):
    """Call `say` on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        say(*values, **options)


def _discard_output():
    """Send stdout to /dev/null, with the buffered output, which Python flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main):
    """Wrap a script's `main(argv=None)` so that errors of user or machine print one line."""

    @functools.wraps(main)
    def run(argv=None):
        _prepare_streams()
        try:
            try:
                return main(argv)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # for example `| head`: end as other Unix programs do
            _discard_output()
            raise SystemExit(128 + signal.SIGPIPE) from None
        except KeyboardInterrupt:
            message, exit_code = "interrupted; completed files were kept", 130
        except UserError as error:
            message, exit_code = str(error), error.exit_code
        except (OSError, MemoryError, RuntimeError) as error:
            message, exit_code = _machine_error(error), UserError.exit_code
            if message is None:
                raise
        rank = os.environ.get("RANK", "0")
        prefix = "error" if rank == "0" else f"error (rank {rank})"
        with contextlib.suppress(OSError):
            print(f"{prefix}: {' '.join(message.split())}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:  # at exit it would change the exit code
            _discard_output()
        raise SystemExit(exit_code)

    return run


def _prepare_streams():
    """Replace closed standard streams, and escape characters that a stream cannot encode."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the next file to be opened takes its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _machine_error(error):
    """Return a message for an error of a file, of memory or of another rank; else None.

    torch raises RuntimeErrors for memory and ranks; only their text tells them apart.
    """
    text = str(error)
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text):
        reason = (text.strip().splitlines() or ["no details"])[0][:200]
        return (f"out of memory ({reason}); lower --device-batch-size, --max-seq-len or --depth, "
                "or stop other programs on this machine")
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror or error}; correct this, or use another file"
    lost = re.search("Connection closed by peer|Connection reset by peer|gloo|NCCL|Broken pipe",
                     text)
    if lost and os.environ.get("WORLD_SIZE", "1") != "1":
        late = re.search("timed out|timeout|time-out", text.lower())
        what = ("another rank did not join a collective within --rank-timeout-minutes" if late
                else "another rank ended")
        return (f"{what}; see the messages of the other ranks, then resume with "
                "--resume-from-step latest")
    return None


# --- paths ---------------------------------------------------------------------------------------

# help of flags that several programs have
CACHE_HELP = "<cache>: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat if that is not set"
MODEL_TAG_HELP = ("name of a checkpoint folder in <cache>/base_checkpoints, or its absolute path "
                  f"({CACHE_HELP})")
NEWEST_HELP = f"{MODEL_TAG_HELP} (default: that of the newest checkpoint)"
STEP_HELP = "step of the checkpoint; latest: the newest (%(default)s)"
TOKENIZER_DIR_HELP = ("folder of the tokenizer (default: the one of the checkpoint, else "
                      "<cache>/tokenizer)")

NAME_LENGTH = 128  # characters
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


def check_name(what, name):
    """Return `name` if it can name a file or folder of the cache, else raise UserError.

    Every run id, model tag and dataset id passes this check. The error begins with `what`.
    """
    if isinstance(name, str) and len(name) <= NAME_LENGTH and _NAME.fullmatch(name):
        return name
    shown = name if len(str(name)) <= 60 else f"{str(name)[:60]}..."
    raise UserError(f"{what} {shown!r} cannot name a folder: use letters, digits and . _ + = - "
                    f"(at most {NAME_LENGTH}, the first a letter, a digit or _)")


def base_dir():
    """Return the cache folder, $NANOCHAT_BASE_DIR or ~/.cache/nanochat; create it if missing."""
    name = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such user's home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"the cache folder {name} cannot be created ({reason}); set "
                        "NANOCHAT_BASE_DIR to a folder that you can write to") from None
    return folder


def runs_dir():
    """Return the folder of the runs' records: <cache folder>/runs."""
    return base_dir() / "runs"


def checkpoints_dir():
    """Return the folder of the checkpoint folders, one per tag: <cache folder>/base_checkpoints."""
    return base_dir() / "base_checkpoints"


def locks_dir():
    """Return the folder of the RunLock files, `run.<run_id>` and `checkpoints.<tag>`."""
    return base_dir() / "locks"


def model_path(folder, step):
    """Return the path of a checkpoint's weights."""
    return Path(folder) / f"model_{step:06d}.pt"


# --- files ---------------------------------------------------------------------------------------

DIGESTS = "sha256.json"  # SHA-256 of the other files of its folder: {relative path: hex}


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; at the end flush it to disk and rename it to `path`.

    If the block fails, the old file stays and the temporary file is removed. A SIGKILL can leave
    a `*.tmp` file, but never an incomplete `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)  # permissions follow the umask, unlike those of mkstemp
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(flag, path):
    """Raise UserError if no file can be written at `path`; call it before long work."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=Path(path).absolute().parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}); give a file in a "
                        "folder that exists") from None


def write_text(path, text):
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path, value):
    """Write indented JSON atomically; keys keep their order."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=2) + b"\n")


def json_bytes(value, indent=None):
    """Return UTF-8 JSON. Raise ValueError for NaN and infinity.

    A lone surrogate (in Python, a file name that is not UTF-8) is written as its JSON escape.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode(errors="backslashreplace")


def parse_json(data):
    """Return the value of UTF-8 JSON bytes. Raise ValueError whatever the bytes are."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path, remedy):
    """Return the JSON object in a file. Raise UserError with the advice `remedy` at its end."""
    try:
        value = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy}")
    return value


def sha256_of(path, start=0):
    """Return the hex SHA-256 of a file's bytes from `start` on."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_once(path, start=0):
    """Return sha256_of, computed once per process while time, size and inode stay the same."""
    stat = os.stat(path)
    return _sha256_of_version(path, start, (stat.st_mtime_ns, stat.st_size, stat.st_ino))


@functools.cache
def _sha256_of_version(path, start, _version):
    return sha256_of(path, start)


def write_checksums(folder, digests):
    """Add {path within the folder: hex SHA-256} to the checksum file of a folder."""
    path = Path(folder) / DIGESTS
    write_json(path, {**_read_checksums(path), **digests})


def matches_checksum(path, folder=None):
    """Return whether a file has its SHA-256 of the checksum file, or has no entry there.

    folder: the folder of the checksum file, by default that of the file.
    """
    path = Path(path)
    folder = Path(folder or path.parent)
    expected = _read_checksums(folder / DIGESTS).get(path.relative_to(folder).as_posix())
    return expected is None or expected == sha256_once(path)


def _read_checksums(path):
    return read_json(path, "delete it to skip the check") if path.exists() else {}


# --- locks ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on `<path>.lock` across processes. A killed process frees it."""
    path = Path(path)
    lock = _acquire(path.with_name(f"{path.name}.lock"), timeout_sec=-1)
    try:
        yield
    finally:
        lock.release()


class RunLock:
    """A lock on a folder for the life of a process; the file `lock` names the owner.

    A killed process frees the lock. Raise UserError with the owner, its pid and its host if
    another process has the lock; `remedy` says what to do.
    """

    def __init__(self, folder, lock, owner, remedy):
        self.folder, self.path, self.remedy = folder, Path(lock), remedy
        self._entry = json_bytes({"owner": owner, "host": socket.gethostname(),
                                  "pid": os.getpid(), "key": secrets.token_hex(8)})
        try:
            self._lock = _acquire(self.path.with_name(f"{self.path.name}.lock"), timeout_sec=0)
        except Timeout:
            raise self._error() from None
        self.path.write_bytes(self._entry)

    def check(self):
        """Raise UserError if another process has taken the folder.

        This happens if lock files were deleted, or on a disk whose locks do not reach other hosts.
        """
        if not self._is_held():
            raise self._error()

    def release(self):
        if self._is_held():
            with contextlib.suppress(OSError):  # a full disk
                self.path.write_bytes(b"{}")
        self._lock.release()

    def _is_held(self):
        try:
            return self.path.read_bytes() == self._entry
        except OSError:
            return False

    def _error(self):
        try:
            entry = parse_json(self.path.read_bytes())
            owner = f"run {entry['owner']} (pid {entry['pid']} on {entry['host']})"
        except (OSError, ValueError, KeyError, TypeError):
            owner = "another process"
        return UserError(f"{self.folder} is being written by {owner}; {self.remedy}")


def is_owned(lock):
    """Return whether the owner in a RunLock file is alive; None if that cannot be known here."""
    try:
        entry = parse_json(Path(lock).read_bytes())
        if not entry or entry["host"] != socket.gethostname():
            return None if entry else False
        os.kill(entry["pid"], 0)  # sends no signal
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return True


def _acquire(path, timeout_sec):
    lock = FileLock(path, timeout=timeout_sec, thread_local=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        raise UserError(f"cannot write in {path.parent} ({error.strerror}); make it writable, or "
                        "set NANOCHAT_BASE_DIR to another folder") from None
    return lock


# --- provenance ----------------------------------------------------------------------------------

def utc_now():
    """Return the time in UTC as records have it: 2026-01-31T23:59:59Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_commit():
    """Return (commit, dirty) of the checkout of this package; (None, None) if it is in none.

    Dirty: a tracked file differs, other than the CSV and Markdown files that experiments write.
    """
    file = Path(__file__)

    def git(*words):
        done = subprocess.run(["git", "-C", file.parent, *words], capture_output=True, text=True,
                              check=True)
        return done.stdout.strip()

    try:
        # a package installed inside a user's own repository is not part of that repository
        git("ls-files", "--error-unmatch", "--", file.name)
        code = (":(top)", ":(top,exclude)*.csv", ":(top,exclude)*.md")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD"), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None


def versions():
    """Return the versions of Python and of the packages that determine the numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "nanochat"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- progress ------------------------------------------------------------------------------------

QUIET = "NANOCHAT_QUIET"  # environment variable, so that programs started by this one obey it too
QUIET_HELP = "print results and warnings only, no progress"
_SILENCE_SEC = 600.0  # a log without a line for this long gets one


def is_quiet():
    return bool(os.environ.get(QUIET))


def set_quiet(quiet=True):
    """Turn progress off, in this process and in the processes that it starts."""
    if quiet:
        os.environ[QUIET] = "1"


def progress(iterable=None, *, total=None, desc="", unit="it", unit_scale=False, shown=True):
    """Return a tqdm bar on a terminal, else a ProgressLog; shown=False: neither (other ranks)."""
    if is_quiet() or not shown:
        return tqdm(iterable, total=total, disable=True)
    options = {"total": total, "desc": desc, "unit": unit, "unit_scale": unit_scale}
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return ProgressLog(iterable, ncols=0, file=io.StringIO(), **options)


class TenPercentSteps:
    """Decide when a log gets a line: once per 10 % of the work, at least apart_sec apart."""

    def __init__(self, apart_sec=1.0):
        self.apart_sec, self._tenth, self._time = apart_sec, 0, time.monotonic()

    def is_due(self, n, total):
        """Return whether a line is due at n of total (None: unknown)."""
        tenth = int(10 * n / total) if total else 0
        waited_sec = time.monotonic() - self._time
        reached = tenth > self._tenth and waited_sec >= self.apart_sec
        if reached or waited_sec >= _SILENCE_SEC:
            self._tenth, self._time = tenth, time.monotonic()
            return True
        return False


class ProgressLog(tqdm):
    """A tqdm for logs: per 10 % one line on stderr with rate and remaining time, and no bar."""

    def __init__(self, *arguments, **options):
        self._steps = TenPercentSteps()
        super().__init__(*arguments, **options)

    def display(self, msg=None, pos=None):
        if self._steps.is_due(self.n, self.total):
            with contextlib.suppress(OSError, ValueError):
                print(str(self), file=sys.stderr, flush=True)
