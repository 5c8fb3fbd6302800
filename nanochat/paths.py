"""Where files are kept: the cache folder and what is directly in it."""

import os
from pathlib import Path

from nanochat.errors import UserError


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
