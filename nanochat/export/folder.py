"""A folder that is written whole or not at all, and takes the place of nothing but what an earlier export wrote."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path

from nanochat.common import UserError, read_json, sha256_of, write_json

MANIFEST = "export.json"  # what was exported, and the SHA-256 of each file


@contextlib.contextmanager
def whole_folder(folder, about):
    """Yield an empty folder to be filled; on success it becomes `folder`, with a manifest of `about` (a dict).

    Whatever goes wrong in the block, `folder` stays as it was; a SIGKILL can leave a `.*.tmp` beside it, or between
    two renames, the earlier export as a `.*.old`. Errors: UserError where `folder` is there and not as an earlier
    export left it, or cannot be written.
    """
    folder = Path(folder).absolute()
    check_replaceable(folder)
    key = secrets.token_hex(8)
    temporary, replaced = (folder.with_name(f".{folder.name}.{key}.{suffix}") for suffix in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        digests = {path.relative_to(temporary).as_posix(): sha256_of(path) for path in _files(temporary)}
        write_json(temporary / MANIFEST, {**about, "files_sha256": digests})
        check_replaceable(folder)  # again: to write took its time
        if folder.exists():
            os.rename(folder, replaced)
        try:
            os.rename(temporary, folder)
        except OSError:
            if replaced.exists():
                os.rename(replaced, folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{folder} cannot be written ({reason}); make room there, or give another --to") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder):
    """UserError unless an export may be written as `folder`: it is not there, is empty, or is an export as written."""
    folder = Path(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"--to {folder} is not a folder; give a new one")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise UserError(f"--to {folder} holds files that no export wrote; give a new folder")
    digests = read_json(folder / MANIFEST, "give a new folder").get("files_sha256")
    digests = digests if isinstance(digests, dict) else {}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and (path.is_symlink() or digests.get(name) != sha256_of(path)):
            raise UserError(f"--to {folder} is an export, but {name} is not as it was written; give a new folder")


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
