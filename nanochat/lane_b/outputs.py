"""What lane B's scripts write: whether they can, found out before the work, and the figures' class."""

import os
from pathlib import Path

from nanochat.errors import UserError


def figure_class():
    """matplotlib's Figure, without pyplot: no global state, no display. Errors: UserError where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'nanochat[report]'") from None
    return Figure


def check_outputs(output_json, plot):
    """Errors: UserError now, not after the work, for what cannot be written or drawn (`plot`: None for no figure)."""
    for flag, path in (("--output-json", output_json), ("--plot", plot)):
        folder = Path(path or ".").resolve().parent
        if path and (Path(path).is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK))):
            raise UserError(f"{flag} {path} cannot be written; give a file in a folder that is there")
    if plot and Path(plot).suffix[1:].lower() not in figure_class()().canvas.get_supported_filetypes():
        raise UserError(f"--plot {plot} is no kind of figure; give a name that ends with .png, .svg or .pdf")
