"""What lane B's scripts write: whether they can, found out before the work, and the figures' class."""

from pathlib import Path

from nanochat.errors import UserError
from nanochat.files import check_output


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
        if path:
            check_output(flag, path)
    if plot and Path(plot).suffix[1:].lower() not in figure_class()().canvas.get_supported_filetypes():
        raise UserError(f"--plot {plot} is no kind of figure; give a name that ends with .png, .svg or .pdf")
