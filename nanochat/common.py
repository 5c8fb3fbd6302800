"""Shared helpers: errors, paths, files, locks, provenance and progress. They do not need torch."""

import argparse
import contextlib
import difflib
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


def print0(*values, **options):
    """Print and flush on rank 0. After an error discard further output: long work continues."""
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(*values, flush=True, **options)
    except OSError as error:
        _discard_output()
        if not isinstance(error, BrokenPipeError):  # a closed pipe (`| head`) causes no message
            warn(f"cannot write the output ({error}); further output is discarded")


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
        reason = text.strip().partition("\n")[0][:200] or "no details"
        return (f"out of memory ({reason}); lower --device-batch-size, --max-seq-len or --depth, "
                "or stop other programs on this machine")
    if isinstance(error, OSError):
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror or error}; correct this, or use another file"
    is_of_ranks = re.search("Connection (closed|reset) by peer|gloo|NCCL|Broken pipe", text)
    if is_of_ranks and os.environ.get("WORLD_SIZE", "1") != "1":
        is_late = re.search("timed out|timeout|time-out", text.lower())
        what = ("did not join a collective within --rank-timeout-minutes" if is_late else "ended")
        return (f"another rank {what}; see the messages of the other ranks, then resume with "
                "--resume-from-step latest")
    return None


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in two lines and suggests a flag for a typo."""

    def __init__(self, prog, description=None):
        super().__init__(prog, description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            similar = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            advice = f"; did you mean {similar[0]}?" if similar else ""
            kind = "flag" if flag.startswith("-") else "argument"
            self.error(f"unknown {kind} {flag}{advice}")
        return values

    def error(self, message):
        self.exit(2, f"error: {message}\nrun with --help to see all flags\n")


# --- paths ---------------------------------------------------------------------------------------

# help of flags that several programs have
CACHE_HELP = "<cache>: $NANOCHAT_BASE_DIR, or ~/.cache/nanochat if that is not set"
MODEL_TAG_HELP = ("name of a checkpoint folder in <cache>/base_checkpoints, or its absolute path "
                  f"({CACHE_HELP})")
NEWEST_HELP = f"{MODEL_TAG_HELP} (default: the folder of the newest checkpoint)"
STEP_HELP = "step of the checkpoint; latest: the newest (%(default)s)"
TOKENIZER_DIR_HELP = ("folder of the tokenizer (default: the one of the checkpoint, else "
                      "<cache>/tokenizer)")

NAME_LENGTH = 128  # characters


def check_name(what, name):
    """Return `name` if it can name a file or folder of the cache, else raise UserError.

    Every run id, model tag and dataset id passes this check. The error begins with `what`.
    """
    pattern = rf"[A-Za-z0-9_][A-Za-z0-9._+=-]{{,{NAME_LENGTH - 1}}}"
    if isinstance(name, str) and re.fullmatch(pattern, name):
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


def newest_in_words(folder):
    """Return "there are a, b, ...": the newest five subfolders of a folder, for error messages."""
    folders = [path for path in Path(folder).glob("[!.]*") if path.is_dir()]
    folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    names = [path.name for path in folders[:5]] + ["..."] * (len(folders) > 5)
    return f"there are {', '.join(names)} (newest first)" if names else "there is none yet"


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
    """Raise UserError if no file can be written at `path`, before long work."""
    try:
        reason = "it is a folder" if Path(path).is_dir() else None
        tempfile.TemporaryFile(dir=Path(path).absolute().parent).close()
    except OSError as error:
        reason = error.strerror
    if reason:
        raise UserError(f"{flag} {path} cannot be written ({reason}); give a file in a folder that "
                        "exists")


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


def sha256_of(path):
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder, digests):
    """Add {path within the folder: hex SHA-256} to the checksum file of a folder."""
    write_json(Path(folder) / DIGESTS, {**_read_checksums(folder), **digests})


def matches_checksum(path, folder=None):
    """Return whether a file has its entry, or none, in the checksum file of a folder (its own)."""
    folder = Path(folder or Path(path).parent)
    expected = _read_checksums(folder).get(Path(path).relative_to(folder).as_posix())
    return expected is None or expected == sha256_of(path)


def _read_checksums(folder):
    path = Path(folder) / DIGESTS
    return read_json(path, "delete it to skip the check") if path.exists() else {}


# --- locks ---------------------------------------------------------------------------------------

@contextlib.contextmanager
def locked(path):
    """Hold an exclusive lock on `<path>.lock` across processes. A killed process frees it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


class RunLock:
    """A lock on a folder for the life of a process; the file `lock` names its owner.

    A killed process frees it. Raise UserError with the owner and `remedy` if it is taken.
    """

    def __init__(self, folder, lock, owner, remedy):
        self._lock = FileLock(f"{lock}.lock", thread_local=False)
        Path(lock).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is being written by {owner_in_words(lock)}; {remedy}") from None
        entry = {"owner": owner, "pid": os.getpid(), "host": socket.gethostname()}
        Path(lock).write_bytes(json_bytes(entry))

    def release(self):
        self._lock.release()


def owner_in_words(lock):
    """Return the owner that a RunLock's file names: run ID (pid N on HOST)."""
    owner = _owner_of(lock)
    return "run {owner} (pid {pid} on {host})".format(**owner) if owner else "another process"


def is_owned(lock):
    """Return whether the owner of a RunLock is alive; None if no owner of this host is known."""
    owner = _owner_of(lock)
    if not owner or owner["host"] != socket.gethostname():
        return None
    try:
        os.kill(owner["pid"], 0)  # sends no signal
    except OSError as error:
        return isinstance(error, PermissionError)  # it is a process of another user
    return True


def _owner_of(lock):
    """Return {"owner", "pid", "host"} of a RunLock's file, or None if it is missing or cut off."""
    try:
        return parse_json(Path(lock).read_bytes())
    except (OSError, ValueError):
        return None


# --- provenance ----------------------------------------------------------------------------------

def utc_now():
    """Return the time in UTC as records have it: 2026-01-31T23:59:59Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def git_commit():
    """Return (commit, dirty) of the checkout of this package; (None, None) if it is in none.

    Dirty: a tracked file differs, other than the CSV and Markdown files that experiments write.
    """
    file = Path(__file__)

    def git(*words):
        words = ["git", "-C", file.parent, *words]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

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
    found = dict.fromkeys(("torch", "triton", "numpy", "nanochat"))
    for name in found:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"python": platform.python_version(), **found}


# --- progress ------------------------------------------------------------------------------------

QUIET = "NANOCHAT_QUIET"  # environment variable, so that programs started by this one obey it too
QUIET_HELP = "print results and warnings only, no progress"
LOG_SEC = 60  # between two lines about progress in a log


def is_quiet():
    return bool(os.environ.get(QUIET))


def set_quiet(quiet):
    """Turn progress off, in this process and in the processes that it starts."""
    if quiet:
        os.environ[QUIET] = "1"


def progress(iterable=None, *, shown=True, **options):
    """Return a tqdm bar on a terminal, else a ProgressLog; shown=False: neither (other ranks)."""
    if is_quiet() or not shown:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, dynamic_ncols=True, **options)
    return ProgressLog(iterable, ncols=0, delay=1, mininterval=LOG_SEC, maxinterval=LOG_SEC,
                       file=io.StringIO(), **options)


class ProgressLog(tqdm):
    """A tqdm for logs: a line on stderr per minute and at the end, none for short work."""

    def display(self, msg=None, pos=None):
        with contextlib.suppress(OSError, ValueError):
            print(self, file=sys.stderr, flush=True)
