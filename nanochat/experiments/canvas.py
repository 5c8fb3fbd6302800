"""What the report's figures are drawn on: matplotlib axes, saved as inline SVG in the page's own colours and font.

Light and dark both fit, since colours are the page's CSS variables; a figure carries its alternative text.
"""

import html
import io
import re
from itertools import pairwise

from nanochat.common import UserError

# Stand-ins that matplotlib draws with; the page's variables take their place.
INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0500{number:02x}" for number in range(8)]
DASHES = [(), (6, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5)]  # points on and off, by series: curves that overlap stay apart
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PANEL: "--panel",
              **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)}}
_HOVER = "hover-"


def styled(groups):
    """(colour, matplotlib dash pattern, label, trials) of each group, in order."""
    return [(SERIES[at % len(SERIES)], (0, DASHES[at % len(DASHES)] or None), label, trials)
            for at, (label, trials) in enumerate(groups.items())]


def new_axes(height=2.9):
    """(figure, axes) of that height in inches, without a background. Errors: UserError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report's figures need matplotlib: pip install 'nanochat[report]'") from None
    with matplotlib.rc_context({"font.size": 9, "axes.formatter.useoffset": False}):
        figure = Figure(figsize=(4.3, height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GRID)
    axes.tick_params(colors=MUTED, labelcolor=INK, length=0, labelsize=8.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(MUTED)
        axis.labelpad = 7
        axis.get_major_locator().set_params(nbins=6)  # the page's font may be wider than the one that is measured here
    return figure, axes


def hover(axes, stations):
    """Make strips of the axes say their values under the pointer. stations: (x, text) by rising x."""
    (left, right), middles = axes.get_xlim(), [(a + b) / 2 for (a, _), (b, _) in pairwise(stations)]
    for (start, end), (_, text) in zip(pairwise([left, *middles, right]), stations, strict=True):
        axes.axvspan(start, end, color=INK, lw=0, zorder=9, gid=_HOVER + html.escape(text))


def short(name, length=26):
    """A name with its middle left out, for a label."""
    return name if len(name) <= length else f"{name[:length // 2 - 1]}…{name[-length // 2:]}"


def to_svg(figure, name, alt):
    """The figure as an <svg> element: text stays text, no metadata, ids of its own. alt: what it shows, in words."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):].replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(rf'<g id="{_HOVER}([^"]*)">',  # matplotlib has escaped once more what was escaped
                 lambda strip: f'<g class="hover"><title>{html.unescape(strip[1])}</title>', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # group names repeat from figure to figure; markers and clips do not
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda drawn: re.sub(r"(\.\d\d)\d+", r"\1", drawn[0]), svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
