"""Figures of lane B, drawn by matplotlib without pyplot (no global state, no display)."""

from pathlib import Path

import numpy as np

from nanochat.common import UserError, check_output

INK, MUTED, GRID, BLUE, ORANGE = "#1f2933", "#6b7785", "#e6e9ed", "#2563a8", "#c2410c"
TITLE = {"loc": "left", "color": INK, "fontsize": 12, "fontweight": "bold", "pad": 12}


def new_figure(**size):
    """Return an empty matplotlib Figure. Raise UserError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'nanochat[report]'") from None
    return Figure(dpi=120, layout="constrained", **size)


def check_plot(path):
    """Raise UserError if a figure cannot be written to `path` (None: no figure)."""
    if path:
        check_output("--plot", path)
        if Path(path).suffix[1:].lower() not in new_figure().canvas.get_supported_filetypes():
            raise UserError(f"--plot {path} has no known file type; give a name that ends with "
                            ".png, .svg or .pdf")


def save(figure, path):
    """Write the figure to `path`; the suffix chooses the format."""
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {error}") from None


def dress(axes):
    """Draw a grid and a legend; remove the frame and the tick marks."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(which="both", length=0, colors=INK, labelsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")


def set_log2_ticks(axes):
    """Label powers of two on a logarithmic x axis."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_statistics(document, path):
    """Draw stats.json: norms of the covariance by lag, entropies by context length."""
    from matplotlib.ticker import StrMethodFormatter

    figure = new_figure(figsize=(11.0, 4.8))
    correlations, entropies = figure.subplots(1, 2)
    _draw_correlations(correlations, document)
    _draw_entropies(entropies, document)
    for axes in (correlations, entropies):
        axes.set(xscale="log", yscale="log")
        set_log2_ticks(axes)
        dress(axes)
    entropies.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    save(figure, path)


def _draw_correlations(axes, document):
    beta = document["beta"]
    axes.axvspan(*beta["window"], color=BLUE, alpha=0.07, linewidth=0, label="lags that give beta")
    for norm, color, name in (("op", BLUE, "operator"), ("frobenius", ORANGE, "Frobenius")):
        lags = [lag for lag in document["lags"] if lag["usable"] and lag[norm]]
        n = [lag["lag"] for lag in lags]
        errors = [1.96 * lag[f"{norm}_se"] for lag in lags]
        axes.errorbar(n, [lag[norm] for lag in lags], errors, fmt="o", color=color, capsize=2.5,
                      label=f"{name} norm (95 %)")
        if law := document["fits"].get(norm):
            x = np.geomspace(n[0], n[-1], 200)
            n_break = law["n_break"] or np.inf
            before = np.minimum(x, n_break) ** -law["slope"]
            after = np.maximum(x / n_break, 1) ** -(law["slope_after"] or 0.0)
            slopes = f"{law['slope']:.2f}"
            if law["n_break"]:
                slopes += f", {law['slope_after']:.2f} beyond n = {n_break:.1f}"
            axes.plot(x, np.exp(law["log_intercept"]) * before * after, color=color,
                      label=f"slope {slopes}")
    axes.plot([lag["lag"] for lag in document["lags"]], [lag["noise"] for lag in document["lags"]],
              color=MUTED, linestyle="--", label="least usable operator norm")
    axes.set(xlabel="lag n (tokens)", ylabel="‖C(n)‖")
    axes.set_title(f"beta = {beta['value']:.2f} ± {beta['se']:.2f}", **TITLE)


def _draw_entropies(axes, document):
    gamma, points = document["gamma"], document["entropy"]["positions"]
    for name, color, tokens in (("nats_half", MUTED, "P/2"), ("nats", BLUE, "P")):
        if points:
            axes.plot([point["n"] for point in points], [point[name] for point in points], "o",
                      color=color, label=f"loss by position, trained on {tokens} tokens")
    for bound in document["entropy"]["ngrams"]:
        axes.plot([bound["n"]] * 2, [bound["lo"], bound["hi"]], "_-", color=ORANGE,
                  label="bounds from n-grams" if bound["n"] == 1 else None)
    title = "gamma not reported"
    if gamma["value"] is not None:
        axes.axvspan(*gamma["window"], color=BLUE, alpha=0.07, linewidth=0,
                     label="contexts that give gamma")
        title = f"gamma = {gamma['value']:.3f} ± {gamma['se']:.3f}"
    elif gamma["lo"] is not None:
        title = f"gamma between {gamma['lo']:.2f} and {gamma['hi']:.2f}"
    axes.set(xlabel="context n (tokens)", ylabel="entropy of the next token (nats)")
    axes.set_title(title, **TITLE)


def draw_inference(inference, path):
    """Draw the calibration with its law, and the forecast cost of depth x ratio with the answer."""
    figure = new_figure(figsize=(11.0, 4.8))
    curves, costs = figure.subplots(1, 2)
    law = inference.forecast.law
    for curve in inference.curves:
        late = curve.late()
        curves.plot(late.steps, late.loss, "o", markersize=3, color=MUTED)
        curves.plot(late.steps, law.predict(curve.n_params, curve.multipliers, late.steps),
                    color=BLUE)
        curves.plot(curve.steps[-1], curve.loss[-1], "o", markersize=6, color=INK)
    named = inference.named
    multipliers = inference.setup.multipliers(named.horizon)
    steps, loss, replicates = inference.forecast.curves(
        inference.setup.n_params(named.depth), multipliers)
    lo, hi = np.quantile(replicates, [0.025, 0.975], axis=0)
    curves.fill_between(steps, lo, hi, color=ORANGE, alpha=0.2, linewidth=0)
    curves.plot(steps, loss, color=ORANGE, label=f"forecast of depth {named.depth} (95 %)")
    curves.axhline(inference.threshold, color=INK, linewidth=0.8, linestyle="--",
                   label=f"target {inference.threshold:g}")
    curves.set(xlabel="step", ylabel="val_bpb", xscale="log")
    set_log2_ticks(curves)
    curves.set_title("Calibration runs and the law", **TITLE)

    reached = [option for option in inference.options if np.isfinite(option.sec)]
    points = costs.scatter([o.ratio for o in reached], [o.depth for o in reached],
                           c=[o.sec for o in reached], s=60, marker="s", cmap="viridis_r")
    figure.colorbar(points, ax=costs, label="forecast seconds to the target")
    costs.plot(named.ratio, named.depth, "o", markersize=11, markerfacecolor="none",
               markeredgecolor=ORANGE, markeredgewidth=2.5, label="named")
    if inference.default:
        costs.plot(inference.default.ratio, inference.default.depth, "x", color=INK,
                   markersize=9, label="default ratio")
    costs.set(xlabel="tokens per scaling parameter", ylabel="depth",
              yticks=sorted({option.depth for option in inference.options}),
              ylim=(min(o.depth for o in reached) - 0.7, max(o.depth for o in reached) + 1.2))
    costs.set_title(f"Named: depth {named.depth}, ratio {named.ratio:.3g}", **TITLE)
    for axes in (curves, costs):
        dress(axes)
    save(figure, path)
