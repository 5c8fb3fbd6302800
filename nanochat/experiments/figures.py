"""The report's figures: matplotlib drawings as inline SVG whose colours are the page's CSS variables."""

import io
import re
from itertools import cycle

import numpy as np

from nanochat.errors import UserError
from nanochat.experiments.paired import paired
from nanochat.target import BEFORE_THE_CLOCK

# Stand-ins that matplotlib draws with; the page's variables take their place, so that light and dark both fit.
INK, MUTED, GRID, PANEL = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0500{number:02x}" for number in range(8)]
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PANEL: "--panel",
              **{colour: f"--series-{number}" for number, colour in enumerate(SERIES)}}
X_AXES = {"step": (0, "step", 1.0), "tokens": (1, "tokens, millions", 1e-6), "seconds": (2, "training time, s", 1.0)}
_MAX_POINTS = 200


def curves(groups, value, x_axis):
    """One line a run of `value` (val_bpb or loss) against step, tokens or seconds, coloured by group.

    groups: {label: trials}. What the first tenth of the run has above the frame is cut off; losses are
    smoothed over 2 % of the run. The dashed line is the target.
    """
    column, x_label, scale = X_AXES[x_axis]
    figure, axes = _figure()
    shown = []
    for colour, trials in zip(cycle(SERIES), groups.values(), strict=False):
        for trial in trials:
            curve = trial.val_curve if value == "val_bpb" else _smooth(trial.loss_curve)
            if len(curve):
                axes.plot(curve[:, column] * scale, curve[:, 3], color=colour, lw=1.4, alpha=0.85,
                          marker="o" if value == "val_bpb" and len(curve) <= 20 else None, ms=2.5)
                shown.append(curve[curve[:, 0] >= 0.1 * curve[-1, 0], 3])
    targets = {t.row.target_metric_threshold for trials in groups.values() for t in trials
               if value == t.row.target_metric_name and t.row.target_metric_threshold is not None}
    for target in targets:
        axes.axhline(target, color=MUTED, lw=1, ls="--")
    if shown:
        low, high = min(map(np.min, shown)), max(map(np.max, shown))
        low = min([low, *targets])
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9)
    axes.set_xlim(left=0)
    y_label = "val_bpb, bits per byte" if value == "val_bpb" else "train loss, nats per token"
    axes.set(xlabel=x_label, ylabel=y_label)
    return _svg(figure, f"{value}-{x_axis}")


def excess(groups, baseline, margin):
    """val_bpb of each candidate's seed minus the baseline's at the same step, with gate 2's margin as a band."""
    figure, axes = _figure()
    reference = {trial.row.seed: dict(trial.val_curve[:, [0, 3]]) for trial in groups[baseline]}
    for colour, (label, trials) in zip(cycle(SERIES), groups.items(), strict=False):
        for trial in trials if label != baseline else ():
            points = [(step, bpb - reference[trial.row.seed][step]) for step, _, _, bpb in trial.val_curve
                      if step > 0 and step in reference.get(trial.row.seed, {})]
            if points:
                axes.plot(*np.array(points).T, color=colour, lw=1.4, marker="o", ms=2.5)
    axes.axhline(0, color=MUTED, lw=1)
    if margin is not None:
        axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, lw=0)
    axes.set(xlabel="step", ylabel="val_bpb minus the baseline's")
    return _svg(figure, "excess")


def time_bars(groups, confidence):
    """Mean time to target with its t interval; each seed a dot, hollow and with its own interval if extrapolated."""
    timed = {label: [t for t in trials if t.time_to_target_sec is not None] for label, trials in groups.items()}
    figure, axes = _figure(height=0.9 + 0.5 * len(timed))
    largest = 0.0
    for row, (colour, (_, trials)) in enumerate(zip(cycle(SERIES), timed.items(), strict=False)):
        seconds = [trial.time_to_target_sec for trial in trials]
        if not any(seconds):
            axes.annotate(f"reached {BEFORE_THE_CLOCK}" if seconds else "no time to target", (0, row), (4, 0),
                          textcoords="offset points", va="center", fontsize=8)
            continue
        mean = paired(seconds, confidence)
        axes.barh(row, mean.mean, height=0.56, color=colour, alpha=0.35, lw=0)
        if mean.lo is not None:
            axes.plot([max(0.0, mean.lo), mean.hi], [row, row], color=INK, lw=1.6)
        for offset, trial in zip(np.linspace(-0.16, 0.16, len(trials)), trials, strict=True):
            fill = "none" if trial.is_extrapolated else colour
            axes.plot(trial.time_to_target_sec, row + offset, "o", ms=5, mfc=fill, mec=colour)
            low, high = (trial.summary.get(f"time_to_target_extrapolated_{end}_sec") for end in ("lo", "hi"))
            if trial.is_extrapolated and low is not None:
                axes.plot([low, high or 10 * low], [row + offset] * 2, color=colour, lw=1)
        largest = max(largest, *seconds)
    axes.set_yticks(range(len(timed)), list(timed))
    axes.set(xlim=(0, 1.3 * largest or 1.0), ylim=(len(timed) - 0.4, -0.6), xlabel="training time to target, s")
    return _svg(figure, "time-to-target")


def step_times(groups):
    """Distribution of the step times of each group: median, quartiles, 5th and 95th percentile."""
    figure, axes = _figure(height=0.9 + 0.5 * len(groups))
    for row, (colour, trials) in enumerate(zip(cycle(SERIES), groups.values(), strict=False)):
        times_ms = np.concatenate([trial.step_times_ms for trial in trials] or [np.empty(0)])
        if len(times_ms):
            low, q1, median, q3, high = np.percentile(times_ms, [5, 25, 50, 75, 95])
            axes.plot([low, high], [row, row], color=colour, lw=1.4)
            axes.barh(row, q3 - q1, left=q1, height=0.5, color=colour, alpha=0.4, lw=0)
            axes.plot([median, median], [row - 0.25, row + 0.25], color=INK, lw=2)
            axes.annotate(f"{median:,.1f} ms", (median, row - 0.3), ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(ylim=(len(groups) - 0.4, -0.8), xlabel="step time, ms")
    return _svg(figure, "step-times")


def over_depths(groups, value_of, label, baseline=None):
    """A figure of the runs against depth, mean over seeds; with a baseline its change against that in percent."""
    figure, axes = _figure()
    reference = dict(_by_depth(groups[baseline], value_of)) if baseline else {}
    for colour, (name, trials) in zip(cycle(SERIES), groups.items(), strict=False):
        points = _by_depth(trials, value_of)
        if baseline:
            points = [(depth, 100 * (value / reference[depth] - 1)) for depth, value in points
                      if name != baseline and depth in reference]
        if points:
            axes.plot(*np.array(points).T, color=colour, lw=1.4, marker="o", ms=4)
    if baseline:
        axes.axhline(0, color=MUTED, lw=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="depth", ylabel=label)
    return _svg(figure, "change-" + label.split()[0] if baseline else "miniseries")


def _by_depth(trials, value_of):
    depths = sorted({t.row.depth for t in trials if t.ok and value_of(t) is not None})
    return [(depth, float(np.mean([value_of(t) for t in trials if t.ok and t.row.depth == depth
                                   and value_of(t) is not None]))) for depth in depths]


def _smooth(curve):
    """A running mean over 2 % of the run, thinned to at most _MAX_POINTS."""
    window = max(1, len(curve) // 50)
    if window > 1:
        means = np.convolve(curve[:, 3], np.full(window, 1 / window), "valid")
        curve = np.column_stack([curve[window - 1:, :3], means])
    return curve[::max(1, len(curve) // _MAX_POINTS)]


def _figure(height=2.9):
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report's figures need matplotlib: pip install 'nanochat[report]'") from None
    with matplotlib.rc_context({"font.size": 9}):
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
    return figure, axes


def _svg(figure, name):
    """The figure as an <svg> element: text stays text, no metadata, ids of its own."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg"):]
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # group names repeat from figure to figure; markers and clips do not
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda drawn: re.sub(r"(\.\d\d)\d+", r"\1", drawn[0]), svg)
    return re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
