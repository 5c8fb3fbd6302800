"""Where files are kept: the cache folder, what is directly in it, and the files of a checkpoint."""

import os
import re
from pathlib import Path

from nanochat.errors import UserError

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
    """Where running processes say what they write (files.Owned): `run.<run_id>`, `checkpoints.<tag>`."""
    return base_dir() / "locks"
