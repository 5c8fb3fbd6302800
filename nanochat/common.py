"""What every part shares: errors, paths, files, provenance, devices and progress."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import resource
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

# --- errors ------------------------------------------------------------

class UserError(ValueError):
    """Something the user can mend: the message says what is wrong and what to do.

    Our own invariants are asserted.
    """

    exit_code = 2


def warn(line):
    """One line on stderr, wherever that goes."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"warning: {line}", file=sys.stderr, flush=True)


def say(*values, **options):
    """Print at once. Where the output is gone (a pipe that closed, a full disk) a warning says so, and what follows
    goes nowhere: a program that works for hours does not die of its console."""
    try:
        print(*values, **{"flush": True, **options})
    except (OSError, ValueError) as error:
        warn(f"the output cannot be written ({error}); nothing more is printed")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the process's own from here on)


def _mend_streams():
    """Streams that were closed lead nowhere, lest a file opened later gets their number; an ASCII terminal shows what
    it can of other text."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))
        if number and hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _flush():
    """Write what the streams hold; where that fails, forget it: Python's end would change the exit code for it."""
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except (OSError, ValueError) as error:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (the process's own from here on)
            warn(f"the output could not all be written ({error})")


def command(main):
    """Wrap a script's `main(argv=None)`: a UserError, and what the machine refuses, become one line on stderr and an
    exit code."""

    @functools.wraps(main)
    def run(argv=None):
        _mend_streams()
        try:
            result = main(argv)
            _flush()
            return result
        except KeyboardInterrupt:
            line, exit_code = "interrupted; what was whole is kept", 130
        except UserError as error:
            line, exit_code = str(error), error.exit_code
        except (OSError, MemoryError, RuntimeError) as error:
            line, exit_code = _refused_by_the_machine(error), UserError.exit_code
            if line is None:
                raise
        rank = os.environ.get("RANK", "0")  # under torchrun every rank may say the same
        with contextlib.suppress(OSError):
            print("error: " if rank == "0" else f"error (rank {rank}): ", " ".join(line.split()), sep="",
                  file=sys.stderr)
        _flush()
        raise SystemExit(exit_code)

    return run


def _refused_by_the_machine(error):
    """In words: a file, memory, or another rank that is gone; None for a fault of the program. torch reports the last
    two as RuntimeErrors, known by their words."""
    said = str(error)
    if isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said:
        reason = (said.strip().splitlines() or ["no more is to be had"])[0][:200]
        return (f"out of memory ({reason}); lower --device-batch-size, --max-seq-len or --depth, or end what else runs "
                "here")
    if isinstance(error, OSError):
        return f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}; mend that, or name another"
    lost = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and any(word in said for word in lost):
        late = any(word in said.lower() for word in ("timed out", "timeout", "time-out"))
        which = "another rank did not come to a collective within its time limit" if late else "another rank is gone"
        return f"{which}: see what it said above; go on with --resume-from-step latest"
    return None


def print0(*values, **options):
    """Print on rank 0 alone, at once; see errors.say."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(*values, **options)


# --- paths ------------------------------------------------------------

NAME_LENGTH = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]*")


def check_name(what, name):
    """Return `name` if it can name a file or folder of the cache and lead nowhere else; `what` it names, for the error.

    Every run id, model tag and dataset id goes through here. Errors: UserError.
    """
    if not isinstance(name, str) or len(name) > NAME_LENGTH or not _NAME.fullmatch(name):
        shown = name if len(str(name)) <= 60 else f"{str(name)[:60]}..."
        raise UserError(f"{what} {shown!r} cannot name a folder: use letters, digits and . _ + = - (at most "
                        f"{NAME_LENGTH}, the first a letter, a digit or _)")
    return name


def base_dir():
    """The cache folder: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created when missing."""
    folder = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the cache folder {folder} cannot be made ({error.strerror}); set NANOCHAT_BASE_DIR "
                        "to a folder that you can write to") from None
    return folder


def runs_dir():
    """Where the runs' records are: <cache folder>/runs."""
    return base_dir() / "runs"


def checkpoints_dir():
    """Where the checkpoint folders are, one a tag: <cache folder>/base_checkpoints."""
    return base_dir() / "base_checkpoints"


def checkpoint_steps(folder):
    """Steps of the complete checkpoints in `folder`, ascending: those that have a meta file."""
    names = [path.stem.removeprefix("meta_") for path in Path(folder).glob("meta_*.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def meta_path(folder, step):
    """The meta file of a checkpoint."""
    return Path(folder) / f"meta_{step:06d}.json"


def model_path(folder, step):
    """The weights' file of a checkpoint."""
    return Path(folder) / f"model_{step:06d}.pt"


def checkpoint_files(folder, step):
    """The files of a checkpoint: its meta, with which it is gone, then those of the others that are there."""
    others = [model_path(folder, step), *sorted(Path(folder).glob(f"optim_{step:06d}_rank*.pt"))]
    return [meta_path(folder, step), *(path for path in others if path.exists())]


def locks_dir():
    """Where running processes say what they write (files.RunLock): `run.<run_id>`, `checkpoints.<tag>`."""
    return base_dir() / "locks"


# --- files ------------------------------------------------------------

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


class RunLock:
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
    """Whether the process that an RunLock lock file names is alive: True, False (nobody has it), None (not to be seen
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


def write_checksums(folder, digests):
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


# --- provenance ------------------------------------------------------------

def utc_now():
    """Now in UTC, as records write it: 2026-01-31T23:59:59Z."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def git_commit():
    """(commit, dirty) of the checkout this package runs from; (None, None) outside one.

    Dirty: a tracked file differs, other than the ledgers and logs that experiments themselves write to.
    """
    def git(*words):
        done = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        code = (":(top)", ":(top,exclude)*.csv", ":(top,exclude)*.md")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no", "--", *code))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def versions():
    """Versions of Python and of the packages that decide the numbers."""
    packages = ("torch", "triton", "numpy", "nanochat")
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# --- machine ------------------------------------------------------------

# Dense bf16 FLOP/s by the vendors' datasheets; the first name contained in the device's wins.
_PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15), ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H800", 989e12), ("A100", 312e12),
    ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 5090", 209e12),
    ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)


def choose_device(kind=""):
    """torch.device for `kind` (cuda, mps, cpu; empty: the best there is). UserError when it is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind and kind not in there:
        raise UserError(f"--device-type {kind!r} is unknown; use cuda, mps, cpu, or leave it out")
    if kind and not there[kind]:
        raise UserError(f"--device-type {kind} asked for, but torch finds none here; leave it out to use what there is")
    kind = kind or next(name for name, present in there.items() if present)
    return torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)


def choose_compute_dtype(device):
    """(torch dtype of activations and matmuls, the reason in words).

    $NANOCHAT_DTYPE (bfloat16, float16, float32) wins. Otherwise bf16 where the hardware multiplies it
    natively: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX; fp32 elsewhere.
    """
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    asked = os.environ.get("NANOCHAT_DTYPE")
    if asked:
        if asked not in names:
            raise UserError(f"NANOCHAT_DTYPE={asked!r} is unknown; use one of {', '.join(names)}")
        return names[asked], f"NANOCHAT_DTYPE={asked}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native = major >= 8
        return (torch.bfloat16 if native else torch.float32,
                f"compute capability {major}.{minor} {'has' if native else 'has no'} native bf16")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        found = [name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if capabilities.get(key)]
        if found:
            return torch.bfloat16, f"this CPU multiplies bf16 natively ({found[0]})"
        return torch.float32, "this CPU has no native bf16 arithmetic"
    return torch.float32, f"no bf16 rule for {device.type}"


def device_name(device):
    """The device's name for records: the GPU's, or the CPU's model and core count."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model} x{os.cpu_count()}"


def peak_bf16_flops(name):
    """Dense bf16 FLOP/s of a GPU by its name, or None where the table has no entry."""
    return next((flops for part, flops in _PEAK_BF16_FLOPS if part in name), None)


def keep_freed_memory(device):
    """On a CPU, let glibc keep what is freed: mapping the same tens of megabytes anew every step cost 16 % of it.

    On CUDA, let the allocator's segments grow, so that freed pieces of other sizes fit; before any tensor is made.
    """
    if device.type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                mallopt(option, value)


def peak_memory_mib(device):
    """Peak memory of this process: the allocator's on CUDA, the resident set's elsewhere; MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# --- progress ------------------------------------------------------------

QUIET = "NANOCHAT_QUIET"  # in the environment, so that the programs that one starts are quiet, too
STAGE = "NANOCHAT_STAGE"  # in the environment of a program that another runs as one of its stages, and goes on after
QUIET_HELP = "no progress: say what is made, and what is wrong"
APART_SEC = 1.0  # lines of short work are at least so far apart: most of it needs none
SILENCE_SEC = 600.0  # after so long a line says that the work goes on


def progress(iterable=None, *, total=None, desc="", unit="it", unit_scale=False, shown=True):
    """A tqdm bar, or what takes its place in a log (the same methods), around `iterable` or moved by update().

    shown False: nothing is shown, as on ranks above 0."""
    if is_quiet() or not shown:
        return tqdm(iterable, total=total, disable=True)
    if sys.stderr.isatty():
        return Bar(iterable, total=total, desc=desc, unit=unit, unit_scale=unit_scale, mininterval=0.5)
    return _Lines(iterable, total, desc, unit, unit_scale)


def is_quiet():
    return bool(os.environ.get(QUIET))


def set_quiet(asked=True):
    """From here on nothing of this process and of those that it starts shows progress, where that is asked for."""
    if asked:
        os.environ[QUIET] = "1"


def print_next_command(module, *words):
    """Name the next useful command, as a shell takes it; not in a stage, after which there is another program's own."""
    if not os.environ.get(STAGE):
        print0(f"next: {shlex.join(['python', '-m', module, *map(str, words)])}")


class Bar(tqdm):
    """A bar whose terminal may go away. tqdm would keep its lock for ever then, and other threads wait for it."""

    def display(self, *arguments, **options):
        return self._drawn(super().display, *arguments, **options)

    def clear(self, nolock=False):
        with contextlib.nullcontext() if nolock else self._lock:
            self._drawn(super().clear, nolock=True)

    def close(self):
        self._drawn(super().close)

    def _drawn(self, draw, *arguments, **options):
        try:
            return draw(*arguments, **options)
        except (OSError, ValueError):
            self.disable = True  # as in a log that nobody reads
            return None


class TenPercentSteps:
    """When it is time for a line: at every tenth of the work, at least apart_sec after the last, and after
    SILENCE_SEC."""

    def __init__(self, apart_sec=APART_SEC):
        self.apart_sec, self._tenth, self._at = apart_sec, 0, time.monotonic()

    def is_due(self, n, total):
        """Whether to say that n of total (None: not known) are done; a tenth is due once."""
        now, tenth = time.monotonic(), 10 * n // total if total else 0
        waited = now - self._at
        if waited < SILENCE_SEC and (tenth <= self._tenth or waited < self.apart_sec):
            return False
        self._tenth, self._at = tenth, now
        return True


class _Lines:
    """As a bar, for a log."""

    disable = False

    def __init__(self, iterable, total, desc, unit, unit_scale):
        if total is None and hasattr(iterable, "__len__"):
            total = len(iterable)
        self.iterable, self.total, self.desc, self.unit, self.unit_scale = iterable, total, desc, unit, unit_scale
        self.n, self._began, self._tenths = 0, time.monotonic(), TenPercentSteps()

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def update(self, n=1):
        self.n += n
        if self._tenths.is_due(self.n, self.total):
            with contextlib.suppress(OSError, ValueError):
                print(self._line(), file=sys.stderr, flush=True)

    def set_description(self, desc):
        self.desc = desc

    def refresh(self):
        """A log has nothing to draw anew."""

    close = refresh

    def _line(self):
        done, total = (tqdm.format_sizeof(n) if self.unit_scale else f"{n:,}" for n in (self.n, self.total or 0))
        if not self.total:
            return f"{self.desc}: {done} {self.unit}"
        left = (time.monotonic() - self._began) * max(0, self.total - self.n) / max(1, self.n)
        return (f"{self.desc}: {self.n / self.total:.0%} ({done}/{total} {self.unit}), about "
                f"{tqdm.format_interval(left)} left")
