"""Files that are either whole or not there: atomic writes, locks, content hashes, JSON with its errors' places."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import secrets
import socket
import tempfile
from pathlib import Path

from nanochat.errors import UserError

DIGESTS = "sha256.json"  # in a folder of files that were written or downloaded once: {path in it: hex SHA-256}


@contextlib.contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; on success flush it to disk and rename it into place.

    Whatever goes wrong in the block (a full disk, an exception), the old file stays and the
    temporary one is removed. A SIGKILL can leave a `*.tmp` behind, never half a `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch(exist_ok=False)  # permissions by the umask, which mkstemp would not follow
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(flag, path):
    """UserError now, not after the work, where no file can be written at `path`."""
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=Path(path).absolute().parent).close()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}); give a file in a folder that is "
                        "there") from None


def write_text(path, text):
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Write JSON atomically: indented, keys in the given order, NaN and infinity refused."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(json_bytes(value, indent=2) + b"\n")


def json_bytes(value, indent=None):
    """UTF-8 JSON; NaN and infinity refused. A lone surrogate (a file name that is not UTF-8) becomes its escape."""
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False).encode(errors="backslashreplace")


def parse_json(data):
    """The value that UTF-8 JSON (bytes) spells. Errors: ValueError in a few words, whatever the bytes are."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def open_binary(path):
    """A file to read bytes of. A FIFO in its place is empty: nobody waits for who might write to it."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read_limited(path, limit=1 << 26):
    """The bytes of a file that is small by its nature. Errors: OSError, where it is longer than `limit` too (a sparse
    or endless file in a small one's place would be read until memory ends)."""
    with open_binary(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"longer than {limit >> 20} MiB")
    return data


def read_json(path, remedy):
    """The JSON object in a file of at most 64 MiB. Errors: UserError that names file and line and ends with `remedy`,
    what to do."""
    try:
        value = parse_json(read_limited(path))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); {remedy}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg}); {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON that can be read ({error}); {remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line 1: not a JSON object; {remedy}")
    return value


@contextlib.contextmanager
def locked(path):
    """Hold an exclusive advisory lock on `<path>.lock`, across processes, for the block."""
    path = Path(path)
    with contextlib.ExitStack() as held:
        with _writing_in(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = held.enter_context(open(path.with_name(path.name + ".lock"), "a"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


class Owned:
    """A folder that one process writes for its life: the lock file `lock` names the owner, and the lock dies with it.

    The lock is the system's (flock): what a killed process leaves is a stale name, taken over in silence. owner: a
    name for the messages. Errors: UserError naming the owner, its host and pid when it is alive.
    """

    def __init__(self, folder, lock, owner, remedy):
        self.folder, self.path, self.remedy = folder, Path(lock), remedy
        self._entry = json_bytes({"owner": owner, "host": socket.gethostname(), "pid": os.getpid(),
                                  "key": secrets.token_hex(8)})
        with _writing_in(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115 (held until release())
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._file.close()
                raise self._refusal() from None
            self._file.truncate(0)
            self._file.write(self._entry)
            self._file.flush()

    def check(self):
        """Errors: UserError when another process owns the folder now (its lock file was removed, or is on a disk
        whose locks do not reach other machines)."""
        try:
            mine = self.path.read_bytes() == self._entry
        except OSError:
            mine = False
        if not mine:
            raise self._refusal()

    def release(self):
        """Let others have the folder. The file stays: to remove it would let two processes lock two files."""
        self._file.truncate(0)
        self._file.close()

    def _refusal(self):
        try:
            now = read_json(self.path, "")
            words = f"run {now.get('owner')} (pid {now.get('pid')} on {now.get('host')})"
        except UserError:
            words = "another process"
        return UserError(f"{self.folder} is being written by {words}; {self.remedy}")


def is_owned(lock):
    """Whether the process that an Owned lock file names is alive: True, False (nobody has it), None (not to be seen
    from here: another host, or no such file). Reads alone: to try the lock could refuse it to a run that starts."""
    try:
        entry = parse_json(Path(lock).read_bytes() or b"{}")
        host, pid = entry.get("host"), entry.get("pid")
    except (OSError, ValueError, AttributeError):
        return None
    if host != socket.gethostname() or type(pid) is not int:
        return None if host else False
    try:
        os.kill(pid, 0)  # asks whether it is there, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def sha256_of(path, start=0):
    """Hex SHA-256 of a file's bytes from `start` on. Threads hash side by side: nearly all of it is outside Python."""
    digest = hashlib.sha256()
    with open_binary(path) as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def note_digests(folder, digests):
    """Note the SHA-256 of files of a folder, {path within it: hex}, beside those noted before."""
    path = Path(folder) / DIGESTS
    write_json(path, {**(_noted(path) if path.exists() else {}), **digests})


def is_as_noted(path, folder=None):
    """Whether a file's bytes are those noted in `folder` (its own), or none are noted. All are read, once a process."""
    path = Path(path)
    notes = Path(folder or path.parent) / DIGESTS
    noted = _noted(notes).get(path.relative_to(notes.parent).as_posix()) if notes.exists() else None
    return noted is None or noted == sha256_once(path)


def _noted(path):
    return read_json(path, "delete it, and the files that it names are taken as they are")


def sha256_once(path, start=0):
    """The same, computed once a process for as long as the file's time, size and inode stay."""
    found = os.stat(path)
    return _sha256_of_version(path, start, (found.st_mtime_ns, found.st_size, found.st_ino))


@functools.cache
def _sha256_of_version(path, start, _version):
    return sha256_of(path, start)


@contextlib.contextmanager
def _writing_in(folder):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in {folder} ({error.strerror}); make it writable, or use another place (the "
                        "cache is where NANOCHAT_BASE_DIR says)") from None


def _fsync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
