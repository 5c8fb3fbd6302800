"""The report's figures: curves with a band for the seeds, bars, changes over depths; each with its text alternative."""

from dataclasses import dataclass

import numpy as np

from nanochat.experiments.canvas import INK, MUTED, hover, new_axes, short, styled, to_svg
from nanochat.experiments.paired import paired
from nanochat.target import BEFORE_THE_CLOCK

X_AXES = {"step": (0, "step", 1.0), "tokens": (1, "tokens, millions", 1e-6), "seconds": (2, "training time, s", 1.0)}
Y_LABELS = {"val_bpb": "val_bpb, bits per byte", "loss": "train loss, nats per token"}
_MAX_POINTS = 200
_STATIONS = 40  # places of a figure that say their values
_TABLE_ROWS = 12


@dataclass(frozen=True)
class Band:
    """Seeds of one candidate at the steps that all of them have: mean float64 [n, 4] as a Trial's curves, lowest and
    highest value float64 [n]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def has_width(self):
        return bool((self.high > self.low).any())


def bands(trials, value):
    """The Bands of a group's val_bpb or loss: one a depth, and one for what a seed has beyond the others' steps. Losses
    are smoothed over 2 % of the run."""
    by_depth = {}
    for trial in trials:
        curve = trial.val_curve if value == "val_bpb" else trial.loss_curve
        if len(curve):
            by_depth.setdefault(trial.row.depth, []).append(curve)
    smooth = _smooth if value == "loss" else np.asarray
    return [band for curves in by_depth.values() for band in _bands(curves, smooth)]


def _bands(curves, smooth):
    shared = sorted(set.intersection(*(set(curve[:, 0]) for curve in curves)))
    last = shared[-1] if shared else -np.inf
    if shared:
        alike = np.stack([smooth(curve[np.isin(curve[:, 0], shared)]) for curve in curves])
        yield Band(alike.mean(0), alike[:, :, 3].min(0), alike[:, :, 3].max(0))
    for rest in [smooth(curve[curve[:, 0] >= last]) for curve in curves if curve[-1, 0] > last]:
        yield Band(rest, rest[:, 3], rest[:, 3])


def curves(groups, value, x_axis):
    """`value` (val_bpb or loss) against step, tokens or seconds: a line for each group, the mean of its seeds, within a
    band from the lowest to the highest.

    groups: {label: trials}. What the first tenth of the run has above the frame is cut off. The dashed grey line is
    the target.
    """
    column, x_label, scale = X_AXES[x_axis]
    figure, axes = new_axes()
    shown, drawn = [], {}
    for colour, dash, label, trials in styled(groups):
        drawn[label] = bands(trials, value)
        for band in drawn[label]:
            line = band.mean
            axes.plot(line[:, column] * scale, line[:, 3], color=colour, ls=dash, lw=1.5,
                      marker="o" if value == "val_bpb" and len(line) <= 20 else None, ms=2.5)
            shown.append(line[line[:, 0] >= 0.1 * line[-1, 0], 3])
            if band.has_width:
                axes.fill_between(band.mean[:, column] * scale, band.low, band.high, color=colour, alpha=0.25, lw=0)
    targets = {t.row.target_metric_threshold for trials in groups.values() for t in trials
               if value == t.row.target_metric_name and t.row.target_metric_threshold is not None}
    for target in targets:
        axes.axhline(target, color=MUTED, lw=1, ls="--")
    _frame(axes, shown, targets)
    axes.set_xlim(left=0)
    axes.set(xlabel=x_label, ylabel=Y_LABELS[value])
    hover(axes, _stations(drawn, column, scale, x_label.partition(",")[0]))
    ends = [f"{label} {band.mean[-1, 3]:.4f}" for label, found in drawn.items() for band in found]
    return to_svg(figure, f"{value}-{x_axis}", f"{Y_LABELS[value]}, against {x_label}; last values: {', '.join(ends)}")


def curve_table(groups, value):
    """(headings, rows) of the same values at up to a dozen steps, as text: for those who do not see the curves."""
    drawn = {label: bands(trials, value) for label, trials in groups.items()}
    steps = sorted({step for found in drawn.values() for band in found for step in band.mean[:, 0]})
    return ["step", *drawn], [[f"{step:,.0f}", *(_said(found, step, step) or "·" for found in drawn.values())]
                              for step in _thinned(steps, _TABLE_ROWS)]


def _stations(drawn, column, scale, what):
    """(x, text) for `hover`: the values of every group near so many places along the axis."""
    xs = sorted({x for found in drawn.values() for band in found for x in band.mean[:, column] * scale})
    xs = _thinned(xs, _STATIONS)
    stations = []
    for at, x in enumerate(xs):
        start = (xs[at - 1] + x) / 2 if at else -np.inf
        end = (x + xs[at + 1]) / 2 if at + 1 < len(xs) else np.inf
        said = [f"{label}: {words}" for label, found in drawn.items()
                if (words := _said(found, start, end, column, scale))]
        stations.append((x, "\n".join([f"{what} {x:,.4g}" if x < 1000 else f"{what} {x:,.0f}", *said])))
    return stations


def _said(found, start, end, column=0, scale=1.0):
    """Mean and range of a group's bands where start <= x <= end, at the middle one of these points; "" without one."""
    words = []
    for band in found:
        x = band.mean[:, column] * scale
        inside = np.flatnonzero((x >= start) & (x <= end))
        if len(inside):
            at = inside[len(inside) // 2]
            spread = f" ({band.low[at]:.4f} to {band.high[at]:.4f})" if band.has_width else ""
            words.append(f"{band.mean[at, 3]:.4f}{spread}")
    return ", ".join(words)


def _thinned(values, n):
    """At most n of the values, evenly spread, the first and the last among them."""
    if len(values) <= n:
        return values
    return [values[round(at)] for at in np.linspace(0, len(values) - 1, n)]


def _frame(axes, shown, lines=()):
    """The vertical limits: all of `shown` (arrays) and the horizontal lines below it."""
    if shown:
        low, high = min(map(np.min, shown)), max(map(np.max, shown))
        low = min([low, *lines])
        edge = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)  # a single value has a scale that can be read, too
        axes.set_ylim(low - edge, high + edge)


def excess(groups, baseline, margin):
    """val_bpb of each candidate's seed minus the baseline's at the same step, with gate 2's margin as a band."""
    figure, axes = new_axes()
    reference = {trial.row.seed: dict(trial.val_curve[:, [0, 3]]) for trial in groups[baseline]}
    shown, margins = [], [] if margin is None else [margin, -margin]
    for colour, dash, label, trials in styled(groups):
        for trial in trials if label != baseline else ():
            points = [(step, bpb - reference[trial.row.seed][step]) for step, _, _, bpb in trial.val_curve
                      if step > 0 and step in reference.get(trial.row.seed, {})]
            if points:
                steps, above = np.array(points).T
                axes.plot(steps, above, color=colour, ls=dash, lw=1.4, marker="o", ms=2.5)
                shown.append(above[steps >= 0.1 * steps[-1]])
    axes.axhline(0, color=MUTED, lw=1)
    if margin is not None:
        axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, lw=0)
    _frame(axes, shown and [*shown, np.array([0.0, *margins])])
    axes.set(xlabel="step", ylabel="val_bpb minus the baseline's")
    worst = f"; from {min(map(np.min, shown)):+.4f} to {max(map(np.max, shown)):+.4f}" if shown else ""
    return to_svg(figure, "excess", f"val_bpb minus the baseline's of the same seed, against step{worst}")


def time_bars(groups, confidence):
    """Mean time to target with its t interval; each seed a dot, hollow and with its own interval if extrapolated."""
    timed = {label: [t for t in trials if t.time_to_target_sec is not None] for label, trials in groups.items()}
    figure, axes = new_axes(height=0.9 + 0.5 * len(timed))
    largest = 0.0
    said = []
    for row, (colour, _, label, trials) in enumerate(styled(timed)):
        seconds = [trial.time_to_target_sec for trial in trials]
        if not any(seconds):
            axes.annotate(f"reached {BEFORE_THE_CLOCK}" if seconds else "no time to target", (0, row), (4, 0),
                          textcoords="offset points", va="center", fontsize=8)
            continue
        mean = paired(seconds, confidence)
        said.append(f"{label} {mean.mean:,.1f} s")
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
    axes.set_yticks(range(len(timed)), list(map(short, timed)))
    axes.set(xlim=(0, 1.3 * largest or 1.0), ylim=(len(timed) - 0.4, -0.6), xlabel="training time to target, s")
    return to_svg(figure, "time-to-target", f"Training time to target, means: {', '.join(said) or 'none'}")


def step_times(groups):
    """Distribution of the step times of each group: median, quartiles, 5th and 95th percentile."""
    figure, axes = new_axes(height=0.9 + 0.5 * len(groups))
    said = []
    for row, (colour, _, label, trials) in enumerate(styled(groups)):
        times_ms = np.concatenate([trial.step_times_ms for trial in trials] or [np.empty(0)])
        if len(times_ms):
            low, q1, median, q3, high = np.percentile(times_ms, [5, 25, 50, 75, 95])
            axes.plot([low, high], [row, row], color=colour, lw=1.4)
            axes.barh(row, q3 - q1, left=q1, height=0.5, color=colour, alpha=0.4, lw=0)
            axes.plot([median, median], [row - 0.25, row + 0.25], color=INK, lw=2)
            said.append(f"{label} {median:,.1f} ms")
            axes.annotate(f"{median:,.1f} ms", (median, row - 0.3), ha="center", va="bottom", fontsize=8, color=INK)
    axes.set_yticks(range(len(groups)), list(map(short, groups)))
    axes.set(ylim=(len(groups) - 0.4, -0.8), xlabel="step time, ms")
    return to_svg(figure, "step-times", f"Step times, medians: {', '.join(said)}")


def over_depths(groups, value_of, label, baseline=None):
    """A figure of the runs against depth, mean over seeds; with a baseline its change against that in percent."""
    figure, axes = new_axes()
    reference = dict(_by_depth(groups[baseline], value_of)) if baseline else {}
    said = []
    for colour, dash, name, trials in styled(groups):
        points = _by_depth(trials, value_of)
        if baseline:
            points = [(depth, 100 * (value / reference[depth] - 1)) for depth, value in points
                      if name != baseline and depth in reference]
        if points:
            axes.plot(*np.array(points).T, color=colour, ls=dash, lw=1.4, marker="o", ms=4)
            said += [f"{name} at depth {depth} {value:.4g}" for depth, value in points]
    if baseline:
        axes.axhline(0, color=MUTED, lw=1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="depth", ylabel=label)
    return to_svg(figure, "change-" + label.split()[0] if baseline else "miniseries", f"{label}: {', '.join(said)}")


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
