"""Fetch parquet shards of a Hugging Face dataset repository: in parallel, checked before they get their names."""

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nanochat.common import UserError, locked, progress, sha256_of, write_checksums
from nanochat.shards import open_shard


def fetch_shards(repo, names, folder, num_workers=4):
    """Fetch files of a repository into a folder, those already there left alone. $HF_ENDPOINT names another host.

    Errors: UserError when a file cannot be had, once those under way have ended; what came whole is kept.
    """
    with locked(folder):
        staging = folder / ".download"
        staging.mkdir(parents=True, exist_ok=True)
        missing = [name for name in names if not (folder / name).exists()]
        with ThreadPoolExecutor(num_workers) as pool:
            fetches = [pool.submit(_fetch, repo, name, staging) for name in missing]
            try:
                for fetch in progress(as_completed(fetches), desc=repo, total=len(missing), unit="shard"):
                    path, digest = fetch.result()
                    write_checksums(folder, {path.name: digest})
                    path.rename(folder / path.name)
            finally:
                pool.shutdown(cancel_futures=True)
        shutil.rmtree(staging)


def _fetch(repo, name, folder):
    """(path, hex SHA-256) of the file fetched; the hub gives the SHA-256 of large files as their etag."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    where = {"repo_type": "dataset", "endpoint": os.environ.get("HF_ENDPOINT")}
    try:
        path = Path(hf_hub_download(repo, name, local_dir=folder, **where))
        digest, etag = sha256_of(path), get_hf_file_metadata(hf_hub_url(repo, name, **where)).etag or ""
        if re.fullmatch("[0-9a-f]{64}", etag) and digest != etag:
            path.unlink()
            raise ValueError("its bytes are not those of the host's SHA-256")
    except Exception as error:  # the library's own, its HTTP client's, OSError
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise UserError(f"could not download {name} of {repo} ({reason}); run the same command again: the shards "
                        "that came are kept") from None
    try:
        open_shard(path).close()
    except UserError:
        path.unlink()
        raise UserError(f"could not download {name} of {repo}: what came is not a parquet file with a string column "
                        "`text`; try again later, or see whether a login page answers in the host's place") from None
    return path, digest
