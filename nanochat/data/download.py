"""Fetch parquet shards over HTTP: in parallel, resumed where they stopped, retried, checked before they are named."""

import concurrent.futures
import errno
import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from nanochat.data.shards import open_shard
from nanochat.errors import UserError
from nanochat.files import locked

ATTEMPTS = 6
_FIRST_WAIT_SEC = 1.0  # doubled after every failure
_TIMEOUT_SEC = 30
_BLOCK_BYTES = 1 << 20
_GONE = (400, 401, 403, 404, 410)  # asking again will not help


def hub_url(repo, filename):
    """URL of a file of a Hugging Face dataset repository; $HF_ENDPOINT replaces the host."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, filename, repo_type="dataset", endpoint=os.environ.get("HF_ENDPOINT"))


def fetch_shards(targets, num_workers=4):
    """Fetch {path: url}, those already there left alone. What is under way is in `<path>.part`, kept on failure.

    Errors: UserError when a file cannot be had; run again, and it goes on where it stopped.
    """
    folders = sorted({Path(path).parent for path in targets})
    assert len(folders) == 1, "one folder at a time, as one lock guards it"
    with locked(folders[0]):
        folders[0].mkdir(parents=True, exist_ok=True)
        missing = {Path(path): url for path, url in targets.items() if not Path(path).exists()}
        if missing:
            _fetch_all(missing, num_workers)


def _fetch_all(targets, num_workers):
    stop = threading.Event()
    with _Progress(len(targets)) as progress, concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        fetches = [pool.submit(_fetch, url, path, progress, stop) for path, url in targets.items()]
        try:
            for fetch in concurrent.futures.as_completed(fetches):
                fetch.result()
        finally:  # a failure or Ctrl-C ends the others at their next block
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch(url, path, progress, stop):
    part = path.with_name(path.name + ".part")
    failures, reason = 0, None
    while failures < ATTEMPTS:
        if failures and stop.wait(_FIRST_WAIT_SEC * 2 ** (failures - 1)):
            return
        had = _size(part)
        try:
            if not _continue(url, part, progress, stop):
                return
            open_shard(part).close()
        except UserError:  # the whole file came and is no shard: begin anew
            part.unlink()
            reason = "what came is not a parquet file with a string column `text`"
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code}"
            if error.code in _GONE:
                break
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            if getattr(error, "errno", None) == errno.ENOSPC:
                break
        else:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            part.rename(path)
            return
        failures = 1 if _size(part) > had else failures + 1  # a line that drops but moves is not given up
    raise UserError(f"could not download {url}: {reason or 'no answer'}; run the same command again, "
                    "it continues where it stopped")


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _continue(url, part, progress, stop):
    """Append to `part` what it lacks; True when it is complete, False when told to stop. Errors: OSError."""
    have = _size(part)
    headers = {"User-Agent": "nanochat", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SEC)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing after `have`: complete, or longer than the file is now
            total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
            if total == str(have):
                return True
            part.unlink()
            raise OSError("what was there of the file does not fit it") from None
        raise
    with response:
        if response.status != 206:
            have = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        progress.starts(part, have, total)
        with open(part, "r+b" if part.exists() else "wb") as file:
            file.truncate(have)
            file.seek(have)
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                progress.grows(part, len(block))
                if stop.is_set():
                    return False
            size = file.tell()
    if total is not None and size != total:
        raise OSError(f"{size} bytes came instead of {total}")
    return True


class _Progress:
    """A bar in bytes; the total is extrapolated from the files whose size is known so far."""

    def __init__(self, n_files):
        self._n_files, self._sizes, self._done, self._lock = n_files, {}, {}, threading.Lock()
        self._bar = tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=f"{n_files} shards")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def starts(self, key, have, total):
        with self._lock:
            self._done[key] = have
            if total is not None:
                self._sizes[key] = total
                self._bar.total = sum(self._sizes.values()) * self._n_files // len(self._sizes)
            self._show()

    def grows(self, key, n_bytes):
        with self._lock:
            self._done[key] += n_bytes
            self._show()

    def _show(self):
        self._bar.update(sum(self._done.values()) - self._bar.n)
