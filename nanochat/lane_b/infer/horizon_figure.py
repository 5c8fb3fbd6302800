"""The figure of an inference: the measured curves with the law's, and t*(H) with its band, D* and H*."""

import numpy as np

from nanochat.lane_b.figure import BLUE, INK, MUTED, ORANGE, TITLE, dress, new_figure, save
from nanochat.lane_b.infer.crossing import CONFIDENCE, by_horizon


def draw_inference(inference, setting, path):
    """Write the figure to `path` (its ending chooses the format). Errors: UserError without matplotlib."""
    figure = new_figure(figsize=(11.0, 4.8))
    curves, times = figure.subplots(1, 2)
    _draw_curves(curves, inference)
    _draw_times(times, inference)
    curves.set_title("Calibration runs and the law", **TITLE)
    chosen = inference.chosen
    ratio = setting.ratio(chosen.steps)
    times.set_title(f"H* {chosen.steps} steps (ratio {ratio:.3g}): target at {chosen.time:.0f}", **TITLE)
    for axes in (curves, times):
        dress(axes)
    save(figure, path)


def _draw_curves(axes, inference):
    law = inference.prediction.law
    for run in inference.runs:
        axes.plot(run.progress.steps, run.loss, "o", markersize=3, markerfacecolor="white", markeredgecolor=INK,
                  markeredgewidth=0.8)
    for group in by_horizon(inference.prediction.runs).values():
        axes.plot(group[0].progress.steps, law.at(group[0].progress), color=BLUE, linewidth=1.6)
    axes.axhline(inference.threshold, color=ORANGE, linewidth=1.1, label=f"threshold {inference.threshold:.4f}")
    late = np.concatenate([run.loss for run in inference.prediction.runs])
    first = min(run.progress.steps[0] for run in inference.prediction.runs)
    spread = late.max() - min(late.min(), inference.threshold)
    axes.set(xlabel="steps", ylabel="val_bpb (bits per byte)", xlim=(0.8 * first, None),
             ylim=(min(late.min(), inference.threshold) - 0.1 * spread, late.max() + 0.3 * spread))


def _draw_times(axes, inference):
    """t*(H) of the horizons that reach the threshold, and the line t = H on which D* lies."""
    shown = [horizon for horizon in inference.quickest.horizons if np.isfinite([horizon.time, horizon.hi]).all()]
    steps = [horizon.steps for horizon in shown]
    axes.fill_between(steps, [h.lo for h in shown], [h.hi for h in shown], color=BLUE, alpha=0.14, linewidth=0,
                      label=f"{CONFIDENCE:.0%} band")
    axes.plot(steps, [h.time for h in shown], color=BLUE, linewidth=1.8, label="steps to target, t*(H)")
    chosen, whole = inference.chosen, inference.quickest.whole
    ends = np.array([min(whole, steps[0]), steps[-1]])
    limits = axes.get_ylim()
    axes.plot(ends, ends, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), label="t = H")
    axes.plot(whole, whole, "s", color=MUTED, label=f"D* {whole:.0f}")
    axes.plot(chosen.steps, chosen.time, "o", markersize=9, color=ORANGE, markeredgecolor="white", zorder=5,
              label=f"H* {chosen.steps}")
    axes.set(xlabel="training horizon: steps of the whole schedule", ylabel="steps to target",
             ylim=(limits[0], max(limits[1], 1.1 * whole)))
