"""What lane B's figures share: matplotlib without pyplot (no global state, no display), colours, dressed axes."""

from pathlib import Path

from nanochat.common import UserError, check_output

INK, MUTED, GRID, BLUE, ORANGE = "#1f2933", "#6b7785", "#e6e9ed", "#2563a8", "#c2410c"
TITLE = {"loc": "left", "color": INK, "fontsize": 12, "fontweight": "bold", "pad": 12}


def new_figure(**size):
    """An empty matplotlib Figure. Errors: UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'nanochat[report]'") from None
    return Figure(dpi=120, layout="constrained", **size)


def check_plot(path):
    """Errors: UserError now, not after the work, for a figure that cannot be drawn or written (None: no figure)."""
    if path:
        check_output("--plot", path)
        if Path(path).suffix[1:].lower() not in new_figure().canvas.get_supported_filetypes():
            raise UserError(f"--plot {path} is no kind of figure; give a name that ends with .png, .svg or .pdf")


def save(figure, path):
    """Write the figure to `path`; its ending chooses the format."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None


def label_axis(axis, formatter, **ticks):
    """Major ticks of a logarithmic axis at `ticks` (LogLocator's arguments), written by `formatter`; no minor ones."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(**ticks))
    axis.set_major_formatter(EngFormatter(sep="") if formatter == "k, M" else StrMethodFormatter(formatter))
    axis.set_minor_formatter(NullFormatter())


def dress(axes):
    """Grid, colours and legend; no frame, no tick marks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
