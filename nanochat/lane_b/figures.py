"""The figure of lane B, drawn by matplotlib without pyplot (no global state, no display)."""

import importlib.util
from pathlib import Path

import numpy as np

from nanochat.common import UserError, check_output

BLUE, ORANGE, GREY = "#2563a8", "#c2410c", "#6b7785"


def check_plot(path):
    """Raise UserError if a figure cannot be written to `path` (None: no figure)."""
    if not path:
        return
    check_output("--plot", path)
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot needs matplotlib: pip install 'nanochat[report]'")
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--plot {path}: give a name that ends with .png, .svg or .pdf")


def draw_inference(inference, path):
    """Draw the calibration with its law, and the forecast cost of depth x ratio with the answer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.8), dpi=120, layout="constrained")
    curves, costs = figure.subplots(1, 2)
    setup, named, forecast = inference.setup, inference.named, inference.forecast
    for curve in (curve.late() for curve in inference.curves):
        curves.plot(curve.steps, curve.loss, "o", markersize=3, color=GREY)
        curves.plot(curve.steps,
                    forecast.law.predict(curve.n_params, curve.multipliers, curve.steps),
                    color=BLUE)
    steps, loss, replicates = forecast.curves(setup.n_params(named.depth),
                                              setup.multipliers(named.horizon))
    lo, hi = np.quantile(replicates, [0.025, 0.975], axis=0)
    curves.fill_between(steps, lo, hi, color=ORANGE, alpha=0.2, linewidth=0)
    curves.plot(steps, loss, color=ORANGE, label=f"forecast of depth {named.depth} (95 %)")
    curves.axhline(inference.threshold, color=GREY, linestyle="--",
                   label=f"target {inference.threshold:g}")
    curves.set(xlabel="step", ylabel="val_bpb", xscale="log", title="Calibration and law")

    reached = [option for option in inference.options if np.isfinite(option.sec)]
    points = costs.scatter([o.ratio for o in reached], [o.depth for o in reached],
                           c=[o.sec for o in reached], s=60, marker="s", cmap="viridis_r")
    figure.colorbar(points, ax=costs, label="forecast seconds to the target")
    for option, marker, label in ((named, "o", "named"), (inference.default, "x", "baseline")):
        if option:
            costs.plot(option.ratio, option.depth, marker, color=ORANGE, markersize=11,
                       fillstyle="none", label=label)
    costs.set(xlabel="tokens per scaling parameter", ylabel="depth",
              yticks=sorted({option.depth for option in reached}),
              title=f"Named: depth {named.depth}, ratio {named.ratio:.3g}")
    for axes in (curves, costs):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path)
