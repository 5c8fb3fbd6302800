"""The report of an experiment or of chosen runs: one HTML page that works offline.

The numbers come from table.py and the verdicts from gates.py; report.html.jinja lays them out.
matplotlib draws the figures as SVG, which the page's style sheet inverts on a dark background.
"""

import base64
import io
import shlex
import time
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup
from scipy import stats

from nanochat.common import UserError
from nanochat.experiments import table as tables
from nanochat.experiments.gates import RULES, judge_all, quality_margin
from nanochat.experiments.profiles import BASELINE
from nanochat.runlog import find_run, in_words, part_of
from nanochat.target import BEFORE_THE_CLOCK

X_AXES = {"step": "step", "tokens": "tokens, millions", "train_time_sec": "training time, s"}
COLUMNS = [  # heading, column of the table of runs, digits
    ("min val_bpb", "min_val_bpb", 5),
    ("standard error over documents", "final_val_bpb_se", 5),
    ("time to target, s", "time_to_target_sec", 1),
    ("tokens/s", "tok_per_sec_median", 0),
    ("step, ms", "dt_median_ms", 1),
    ("memory, MiB", "peak_memory_mib", 0),
    ("tokens", "total_tokens", 0),
]
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
CACHE = '"${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"/'  # the cache folder in a shell command


# --- pages -------------------------------------------------------------

def experiment_page(ledger, experiment_name, runs_dir, miniseries=None, reload_sec=None):
    """Return the page of an experiment.

    miniseries: name of the experiment over depths that gate 4 judges by. reload_sec: the browser
    reloads the page after this time. Raise UserError for runs that cannot be compared.
    """
    table = tables.experiment_table(ledger, experiment_name, runs_dir)
    series = tables.experiment_table(ledger, miniseries, runs_dir) if miniseries else None
    candidates = set(table.candidate)
    can_judge = BASELINE in candidates and len(candidates) > 1 and table.depth.nunique() == 1
    verdicts = judge_all(table, series, runs_dir) if can_judge else []
    return _render(experiment_name, table, series, verdicts, reload_sec)


def runs_page(names, runs_dir, reload_sec=None):
    """Return the page of runs named by id or folder; runs that differ only in the seed are a group.

    Raise UserError for a missing run, two runs with one id, and runs that cannot be compared.
    """
    table = tables.runs_table(find_run(name, runs_dir) for name in names)
    for run_id in table.run_id[table.run_id.duplicated()]:
        raise UserError(f"two of the runs have the id {run_id!r}; name one of them")
    groups = list(table.candidate.unique())
    others = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
    return _render(f"{groups[0]}{others}", table, None, [], reload_sec)


def _render(title, table, series, verdicts, reload_sec):
    """Return the page of a table of runs; series: runs over depths, None for those of the table."""
    every_run = pd.concat([table, series])
    tables.check_same_world(every_run)
    styles = {
        name: {"color": COLOURS[at % len(COLOURS)], "linestyle": (0, DASHES[at % len(DASHES)])}
        for at, name in enumerate(every_run.candidate.unique())
    }
    sections = {
        "Overview": _time_figures(table, styles) + _quality_figures(table, styles),
        "Curves": _curve_figures(table, styles),
        "Depths": _depth_figures(table if series is None else series, styles),
    }
    headings, rows = _rows_of(table)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined,
                                     autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.jinja").render(
        title=title, reload_sec=reload_sec, written=time.strftime("%H:%M:%S"),
        facts=_facts_of(table), verdicts=verdicts, rules=RULES, styles=styles, axes=X_AXES,
        sections=sections, headings=headings, rows=rows, versions=_versions_of(table),
        commands=_commands_of(table))


# --- tables and commands -----------------------------------------------

def _facts_of(table):
    """Return (name, value) pairs that describe the runs: number, target, dataset, device, ..."""
    n_running = (table.state == "running").sum()
    n_failed = (~table.ok).sum() - n_running
    counts = f"{len(table)}" + (f", {n_running} running" if n_running else "")
    thresholds = table.target_metric_threshold
    targets = table.target_metric_name + thresholds.map(" {:.5g}".format)
    named = {"target": targets.where(thresholds.notna(), "none"), "dataset": table.dataset_id,
             "device": table.device, "seeds": table.seed, "depths": table.depth}
    return [("runs", counts + (f", {n_failed} failed" if n_failed else "")), *(
        (name, ", ".join(map(str, sorted(values.dropna().unique()))))
        for name, values in named.items())]


def _rows_of(table):
    """Return the headings and (name, state, CSS class, cells) per group of seeds and per run."""
    columns = [column for column in COLUMNS if table[column[1]].notna().any()]
    rows = []
    for (candidate, depth), group in table.groupby(["candidate", "depth"], sort=False):
        if len(group) > 1:
            means = ["" if name == "final_val_bpb_se" else _mean_sd(group[name][group.ok], digits)
                     for _, name, digits in columns]
            state = f"mean ± sd of {group.ok.sum()}"
            rows.append((f"{candidate}, depth {depth}", state, "mean", means))
        for at, run in group.iterrows():
            kind = "" if run.ok or run.state == "running" else "failed"
            cells = [_mean_sd(group[name][[at]], digits) for _, name, digits in columns]
            rows.append((run.run_id, _state_of(run), kind, cells))
    return [heading for heading, _, _ in columns], rows


def _state_of(run):
    """Return how a run ended or how far it is, and where it was resumed."""
    words = [run.status]
    if run.state == "running":
        words = [f"running, step {run.steps:,.0f} of {run.num_iterations:,.0f}"]
    if run.is_extrapolated:
        words.append("target not reached: time extrapolated")
    for event in run.record.of("resume") if run.record else ():
        words.append(f"resumed at step {event['step']}")
        words += [in_words([change]) for change in event.get("changed") or ()]
    return "; ".join(words)


def _mean_sd(values, digits):
    """Return the mean ± standard deviation as text."""
    values = values.dropna()
    if values.empty:
        return "·"
    if values.name == "time_to_target_sec" and (values == 0).all():
        return BEFORE_THE_CLOCK
    sd = f" ± {values.std():,.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():,.{digits}f}{sd}"


def _versions_of(table):
    """Return the commits and the package versions that occur among the runs, as text."""
    words = {f"commit {commit[:12]}" for commit in table.git_commit if commit}
    for config in (record.config for record in table.record if record):
        words |= {"uncommitted changes"} if config.get("git_dirty") else set()
        words |= {f"{name} {version}" for name, version in part_of(config, "versions").items()}
    return ", ".join(sorted(words))


def _commands_of(table):
    """Return the shell commands of the runs. The cache folder becomes that of the reader."""
    lines = []
    if table.device.str.contains(tables.INTERPRETED).any():
        lines.append("export TRITON_INTERPRET=1")
    for record in table.record.dropna():
        cache = f"{record.folder.resolve().parent.parent}/"
        words = ["python -m scripts.base_train"]
        for name, value in part_of(record.config, "flags").items():
            flag, path = f"--{name.replace('_', '-')}", str(value).removeprefix(cache)
            if value is True:
                words.append(flag)
            elif value is not None and value is not False and value != "":
                own_cache = CACHE if path != str(value) else ""
                words.append(f"{flag}={own_cache}{shlex.quote(path)}")
        lines.append(" ".join(words))
    return lines


# --- curves ------------------------------------------------------------

def _curves_of(table, kind, value):
    """Return the curves of all runs in one table; tokens in millions."""
    curves = pd.concat([
        tables.curve(run.record, kind, value).assign(
            run_id=run.run_id, candidate=run.candidate, depth=run.depth, seed=run.seed)
        for run in table.itertuples()
    ], ignore_index=True)
    return curves.assign(tokens=curves.tokens / 1e6)


def _curve_figures(table, styles):
    """Return (caption, note, figure, CSS class) of the curves against every x-axis."""
    val, loss = _curves_of(table, "val", "val_bpb"), _curves_of(table, "train", "loss")
    loss["value"] = loss.groupby("run_id").value.transform(
        lambda values: values.rolling(len(values) // 50 + 1, min_periods=1).mean())
    is_bpb = table.target_metric_name == "val_bpb"
    targets = [*table.target_metric_threshold[is_bpb].dropna().unique()]
    shown = [("val_bpb, bits per byte", val, targets), ("training loss, nats per token", loss, [])]
    return [(name, "", _curves_figure(curves, styles, name, x, lines), f"curve {x}")
            for x in X_AXES for name, curves, lines in shown if len(curves)]


def _curves_figure(curves, styles, name, x, targets):
    """Draw the curves of the seeds against `x`, and their mean at the steps that all have."""
    lines = []
    for (candidate, _), group in curves.groupby(["candidate", "depth"], sort=False):
        runs = [run.set_index(x).value for _, run in group.groupby("run_id", sort=False)]
        lines += [(candidate, run, 0.6 if len(runs) > 1 else 1.5) for run in runs]
        steps = group.groupby("step")
        mean = steps[[x, "value"]].mean()[steps.size() == len(runs)]
        lines += [(candidate, mean.set_index(x).value, 1.8)] if len(runs) > 1 else []
    return _lines_figure(lines, styles, X_AXES[x], name, targets)


# --- other figures -----------------------------------------------------

def _time_figures(table, styles):
    """Return [(caption, note, figure)] of the time to target: means, intervals and seeds."""
    note = "bar: mean; line: 95 % interval; dots: seeds, hollow if extrapolated"
    is_tried = table.candidate != BASELINE
    if is_tried.any() and table.horizon_only[is_tried].all():
        table = tables.on_one_clock(table)
        note += "; steps at the median step time of all runs"
    if table.time_to_target_sec.isna().all():
        return []
    names = table.candidate.unique()
    figure, axes = _new_axes("training time to target, s", height=0.9 + 0.5 * len(names))
    for row, name in enumerate(names):
        own = table[(table.candidate == name) & table.time_to_target_sec.notna()]
        seconds, colour = own.time_to_target_sec, styles[name]["color"]
        axes.barh(row, seconds.mean(), height=0.56, color=colour, alpha=0.35)
        if len(own) > 1:
            half = stats.sem(seconds) * stats.t.ppf(0.975, len(own) - 1)
            axes.errorbar(seconds.mean(), row, xerr=half, ecolor=INK, elinewidth=1.6)
        faces = ["none" if is_hollow else colour for is_hollow in own.is_extrapolated]
        axes.scatter(seconds, [row] * len(own), 26, facecolors=faces, edgecolors=colour, zorder=3)
    short = [name if len(name) <= 26 else f"{name[:12]}…{name[-13:]}" for name in names]
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in short])  # no formulas
    axes.set(xlim=(0, None), ylim=(len(names) - 0.4, -0.6))
    return [("Training time to target", note, _to_image(figure, "training time to target"))]


def _quality_figures(table, styles):
    """Return [(caption, note, figure)] of val_bpb minus the baseline's, per seed and step."""
    val, keys = _curves_of(table, "val", "val_bpb"), ["depth", "seed", "step"]
    val = val[val.step > 0]
    baseline = val[val.candidate == BASELINE][[*keys, "value"]]
    both = val[val.candidate != BASELINE].merge(baseline, on=keys, suffixes=("", "_of_baseline"))
    if both.empty:
        return []
    both["excess"] = both.value - both.value_of_baseline
    excess = both.pivot(index="step", columns=["candidate", "run_id"], values="excess")
    margin = quality_margin(table) or 0.0
    lines = [(name, values, 1.4) for (name, _), values in excess.items()]
    figure = _lines_figure(lines, styles, "step", "val_bpb minus the baseline's", margin=margin)
    return [("Quality", "same seed, same step; band: margin of gate 2", figure)]


def _depth_figures(series, styles):
    """Return (caption, note, figure) against depth, as changes where there is a baseline."""
    figures = []
    for column, caption in (("min_val_bpb", "min val_bpb"), ("dt_median_ms", "step time in ms")):
        means = series[series.ok].pivot_table(index="depth", columns="candidate", values=column)
        if len(means) < 2:
            continue
        label, note, margin = caption, "", None
        if BASELINE in means and len(means.columns) > 1:
            means = 100 * (means.div(means[BASELINE], axis=0) - 1)
            label, note, margin = f"{caption}: change, %", "change from the baseline", 0.0
        lines = [(name, values, 1.4) for name, values in means.items()]
        figure = _lines_figure(lines, styles, "depth", label, margin=margin)
        figures.append((caption, note, figure))
    return figures


def _lines_figure(lines, styles, x_label, y_label, targets=(), margin=None):
    """Draw lines (candidate, values by x, width).

    targets: heights of dashed lines. margin: half the height of a grey band about 0; None: the
    values are no differences.
    """
    figure, axes = _new_axes(x_label, y_label)
    shown = [*targets] if margin is None else [-margin, margin]
    for candidate, values, width in lines:
        values = values.dropna()
        shown += [*values[values.index >= 0.1 * values.index.max()]]
        values = values[::-(len(values) // 200 + 1)]
        axes.plot(values.index, values, lw=width, marker="o" if len(values) <= 20 else "", ms=2.5,
                  **styles[candidate])
    for target in targets:
        axes.axhline(target, color=MUTED, lw=1, ls="--")
    if margin is not None:
        axes.axhline(0, color=MUTED, lw=1)
        axes.axhspan(-margin, margin, color=MUTED, alpha=0.15, lw=0)
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    edge = max(0.05 * (high - low), 1e-3 * abs(high), 1e-3 * (low == high))
    axes.set_ylim(low - edge, high + edge)
    axes.xaxis.get_major_locator().set_params(integer=x_label in ("step", "depth"))
    return _to_image(figure, f"{y_label} against {x_label}")


def _new_axes(x_label, y_label="", height=2.9):
    """Return (figure, axes) of that height in inches. Raise UserError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib: pip install 'nanochat[report]'") from None
    with matplotlib.rc_context(FIGURE_STYLE):
        figure = Figure(figsize=(5, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none", xlabel=x_label, ylabel=y_label)
    axes.locator_params(nbins=6)  # the page's font may be wider than matplotlib's
    return figure, axes


def _to_image(figure, alt):
    """Return the figure as an <img> element that contains an SVG."""
    import matplotlib

    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(buffer, format="svg", metadata=metadata)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alt, data)
