"""The report of an experiment or of chosen runs: one HTML page that works offline.

The numbers come from ledger.py and the verdicts from gates.py; report.html.jinja lays them out.
matplotlib draws the figures as SVG, which the page's style sheet inverts on a dark background.
"""

import base64
import io
import time
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup
from scipy import stats

from nanochat.common import UserError
from nanochat.experiments.gates import CONFIDENCE, RULES, excess_of, judge_all, quality_margin
from nanochat.experiments.ledger import (
    check_same_world,
    curves_of,
    experiment_table,
    runs_table,
    text_table,
)
from nanochat.experiments.profiles import BASELINE
from nanochat.runlog import find_run

X_AXES = {"step": "step", "tokens": "tokens", "train_time_sec": "training time, s"}
INK, MUTED, GRID = "#1c1f24", "#666c75", "#d4d2cd"
COLOURS = [
    "#5b6472", "#2a6fdb", "#d9601a", "#16896b", "#9a3fb5", "#b38600", "#c2347c", "#3a8fa3",
]
DASHES = [(1, 0), (6, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5)]  # lengths on and off, in line widths
FIGURE_STYLE = {
    "font.size": 8.5, "axes.formatter.useoffset": False, "axes.grid": True, "grid.color": GRID,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "xtick.major.size": 0, "ytick.major.size": 0,
}


# --- pages -------------------------------------------------------------

def experiment_page(experiment_name, runs_dir, miniseries=None, reload_sec=None):
    """Return the page of an experiment.

    miniseries: name of the experiment over depths that gate 4 judges by. reload_sec: the browser
    reloads the page after this time. Raise UserError for runs that cannot be compared.
    """
    table = experiment_table(experiment_name, runs_dir)
    series = experiment_table(miniseries, runs_dir) if miniseries else None
    candidates = set(table.candidate)
    can_judge = BASELINE in candidates and len(candidates) > 1 and table.depth.nunique() == 1
    verdicts = judge_all(table, series, runs_dir) if can_judge else []
    return _render(experiment_name, table, series, verdicts, reload_sec)


def runs_page(names, runs_dir, reload_sec=None):
    """Return the page of runs named by id or folder; runs that differ only in the seed are a group.

    Raise UserError for a missing run, two runs with one id, and runs that cannot be compared.
    """
    table = runs_table(find_run(name, runs_dir) for name in names)
    for run_id in table.run_id[table.run_id.duplicated()]:
        raise UserError(f"two of the runs have the id {run_id!r}; name one of them")
    groups = list(table.candidate.unique())
    others = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return _render(f"{groups[0]}{others}", table, None, [], reload_sec)


def _render(title, table, series, verdicts, reload_sec):
    """Return the page of a table of runs; series: runs over depths, None for those of the table."""
    every_run = pd.concat([table, series])
    check_same_world(every_run)
    styles = {
        name: {"color": COLOURS[at % len(COLOURS)], "linestyle": (0, DASHES[at % len(DASHES)])}
        for at, name in enumerate(every_run.candidate.unique())
    }
    sections = {
        "Overview": _time_figures(table, styles) + _quality_figures(table, styles),
        "Curves": _curve_figures(table, styles),
        "Depths": _depth_figures(table if series is None else series, styles),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined,
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja").render(
        title=title, reload_sec=reload_sec, written=time.strftime("%H:%M:%S"),
        facts=_facts_of(table), verdicts=verdicts, rules=RULES, styles=styles, axes=X_AXES,
        sections=sections, runs=text_table(table))


def _facts_of(table):
    """Return (name, value) pairs that describe the runs: number, target, dataset, device, ..."""
    n_running = (table.status == "running").sum()
    n_failed = (~table.ok).sum() - n_running
    thresholds = table.target_metric_threshold
    targets = table.target_metric_name + thresholds.map(" {:.5g}".format)
    named = {"target": targets.where(thresholds.notna(), "none"), "dataset": table.dataset_id,
             "device": table.device, "seeds": table.seed, "depths": table.depth,
             "commit": table.git_commit.str[:12]}
    return [("runs", f"{len(table)}, {n_running} running, {n_failed} failed"), *(
        (name, ", ".join(map(str, sorted(values.dropna().unique()))))
        for name, values in named.items())]


# --- figures: (caption, note, image, CSS class) -------------------------

def _time_figures(table, styles):
    """Return the figure of the time to target by candidate."""
    names, lines = list(table.candidate.unique()), []
    for at, name in enumerate(names):
        seconds = table.time_to_target_sec[table.candidate == name].dropna()
        lines.append((name, seconds.set_axis([at] * len(seconds)), 0))
        if len(seconds) > 1:
            half = stats.sem(seconds) * stats.t.ppf((1 + CONFIDENCE) / 2, len(seconds) - 1)
            ends = pd.Series([seconds.mean() - half, seconds.mean() + half], index=[at, at])
            lines.append((name, ends, 1.8))
    if table.time_to_target_sec.isna().all():
        return []
    image = _draw(lines, styles, "candidate", "time to target, s", names=names)
    note = f"points: seeds; line: {CONFIDENCE:.0%} interval of the mean"
    return [("Training time to target", note, image, "")]


def _quality_figures(table, styles):
    """Return the figure of val_bpb minus the baseline's, per seed and step."""
    excess = excess_of(table)
    if excess.empty:
        return []
    lines = [(name, values, 1.4) for (name, _), values in excess.items()]
    image = _draw(lines, styles, "step", "val_bpb minus the baseline's",
                  margin=quality_margin(table) or 0.0)
    return [("Quality", "same seed, same step; band: margin of gate 2", image, "")]


def _curve_figures(table, styles):
    """Return the figures of the curves against every x-axis."""
    val, loss = curves_of(table, "val", "val_bpb"), curves_of(table, "train", "loss")
    loss["value"] = loss.groupby("run_id").value.transform(
        lambda values: values.rolling(len(values) // 50 + 1, min_periods=1).mean())
    is_bpb = table.target_metric_name == "val_bpb"
    targets = [*table.target_metric_threshold[is_bpb].dropna().unique()]
    shown = [("val_bpb, bits per byte", val, targets), ("training loss, nats per token", loss, [])]
    return [(name, "", _draw(_seeds_and_means(curves, x), styles, X_AXES[x], name, targets=own),
             f"curve {x}") for x in X_AXES for name, curves, own in shown if len(curves)]


def _seeds_and_means(curves, x):
    """Return the lines of the seeds against `x`, and of their mean at the steps that all have."""
    lines = []
    for (candidate, _), group in curves.groupby(["candidate", "depth"], sort=False):
        runs = [run.set_index(x).value for _, run in group.groupby("run_id", sort=False)]
        lines += [(candidate, run, 0.6 if len(runs) > 1 else 1.5) for run in runs]
        steps = group.groupby("step")
        mean = steps[[x, "value"]].mean()[steps.size() == len(runs)]
        lines += [(candidate, mean.set_index(x).value, 1.8)] if len(runs) > 1 else []
    return lines


def _depth_figures(series, styles):
    """Return the figures against depth, as changes where there is a baseline."""
    figures = []
    for column, caption in (("min_val_bpb", "min val_bpb"), ("dt_median_ms", "step time in ms")):
        means = series[series.ok].pivot_table(index="depth", columns="candidate", values=column)
        if len(means) < 2:
            continue
        label, margin = caption, None
        if BASELINE in means and len(means.columns) > 1:
            means = 100 * (means.div(means[BASELINE], axis=0) - 1)
            label, margin = f"{caption}: change from the baseline, %", 0.0
        lines = [(name, values, 1.4) for name, values in means.items()]
        figures.append((caption, "", _draw(lines, styles, "depth", label, margin=margin), ""))
    return figures


def _draw(lines, styles, x_label, y_label, targets=(), margin=None, names=()):
    """Draw lines (candidate, values by x, width) and return the figure as an <img> element.

    targets: heights of dashed lines. margin: half the height of a grey band about 0; None: the
    values are no differences. names: of the x values 0, 1, ... Raise UserError without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib: pip install 'nanochat[report]'") from None
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5, 2.9), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none", xlabel=x_label, ylabel=y_label)
    axes.locator_params(nbins=6)  # the page's font may be wider than matplotlib's

    shown = [*targets] if margin is None else [-margin, margin]
    for candidate, values, width in lines:
        values = values.dropna()
        shown += [*values[values.index >= 0.1 * values.index.max()]]
        values = values[::-(len(values) // 200 + 1)]
        is_interval = names and width  # without a marker, since its ends are no seeds
        marker = "o" if len(values) <= 20 and not is_interval else ""
        axes.plot(values.index, values, lw=width, marker=marker, ms=3, **styles[candidate])
    for target in targets:
        axes.axhline(target, color=MUTED, lw=1, ls="--")
    if margin is not None:
        axes.axhline(0, color=MUTED, lw=1)
        axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, lw=0)
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    edge = max(0.05 * (high - low), 1e-3 * abs(high), 1e-3 * (low == high))
    axes.set_ylim(low - edge, high + edge)
    axes.xaxis.get_major_locator().set_params(integer=x_label in ("step", "depth"))
    if names:
        labels = [name[-26:].replace("$", r"\$") for name in names]  # no formulas
        axes.set_xticks(range(len(names)), labels, rotation=15 if len(names) > 3 else 0)
        axes.set_xlim(-0.5, len(names) - 0.5)

    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{y_label} {x_label}"}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{} against {}" src="data:image/svg+xml;base64,{}">').format(
        y_label, x_label, data)
