"""The figure of an inference: metric against horizon with the calibration, its band, the threshold, the crossing."""

import numpy as np

from nanochat.lane_b.figure import BLUE as CURVE
from nanochat.lane_b.figure import INK, MUTED, TITLE, dress, label_axis, new_figure, save
from nanochat.lane_b.figure import ORANGE as TARGET
from nanochat.lane_b.infer.calibration import CONFIDENCE


def draw_inference(inference, path):
    """Write the figure to `path` (its ending chooses the format). Errors: UserError without matplotlib."""
    figure = new_figure(figsize=(8.0, 5.0))
    axes = figure.add_subplot()
    tokens = _range(inference)
    _draw_curve(axes, inference, tokens)
    _draw_points(axes, inference.points)
    _draw_target(axes, inference, tokens)
    ratios = _scale(axes, inference, tokens)
    axes.set_title(_headline(inference), **TITLE)
    dress(axes)
    for axis, form in ((axes.xaxis, "k, M"), (ratios.xaxis, "{x:g}")):
        label_axis(axis, form, subs=(1, 2, 5))
    save(figure, path)


def _range(inference):
    """Horizons from below the shortest calibration run to above the target, as far as it can be shown."""
    shown = [point.tokens for point in inference.points]
    if inference.target_tokens is not None:
        ends = (inference.target_tokens.value, inference.target_tokens.hi)
        shown += [min(end, 30 * max(shown)) for end in ends if end is not None]
    return np.geomspace(min(shown) / 1.4, max(shown) * 1.6, 200)


def _draw_curve(axes, inference, tokens):
    fit = inference.calibration
    metric = fit.curve.metric_at(tokens)
    if fit.resampled is not None:
        tail = (1 - CONFIDENCE) / 2
        lo, hi = np.quantile(fit.resampled.metric_at(tokens), [tail, 1 - tail], axis=0)
        axes.fill_between(tokens, lo, hi, color=CURVE, alpha=0.14, linewidth=0, label=f"{CONFIDENCE:.0%} band")
    curve = fit.curve
    axes.plot(tokens, metric, color=CURVE, linewidth=1.8,
              label=rf"{curve.asymptote:.3f} + A·D$^{{-{curve.alpha:.3f}}}$, $\alpha$ of the {inference.alpha_source}")
    if curve.asymptote > metric[-1] - 1.5 * (metric[0] - metric[-1]):  # far below, it would flatten the rest
        axes.axhline(curve.asymptote, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)))
        axes.annotate(r"$L_\infty$" + f" {curve.asymptote:.3f}", (tokens[0], curve.asymptote), xytext=(2, 3),
                      textcoords="offset points", color=MUTED, fontsize=9)


def _draw_points(axes, points):
    axes.plot([point.tokens for point in points], [point.metric.value for point in points], "o", markersize=6,
              markerfacecolor="white", markeredgecolor=INK, markeredgewidth=1.3, zorder=4,
              label="ends of complete schedules")


def _draw_target(axes, inference, tokens):
    threshold, target = inference.threshold.value, inference.target_tokens
    axes.axhline(threshold, color=TARGET, linewidth=1.1)
    axes.annotate(f"threshold {threshold:.4f}", (tokens[0], threshold), xytext=(2, -4), textcoords="offset points",
                  va="top", color=TARGET, fontsize=9)
    if target is None or target.value > tokens[-1]:
        return
    if target.lo is not None:
        axes.axvspan(target.lo, min(target.hi, tokens[-1]), color=TARGET, alpha=0.09, linewidth=0)
    axes.plot([target.value] * 2, [0, threshold], color=TARGET, linewidth=1.1, linestyle=(0, (4, 3)))
    axes.plot(target.value, threshold, "o", markersize=9, color=TARGET, markeredgecolor="white", zorder=5)


def _scale(axes, inference, tokens):
    """Ranges and names of the axes; returns the second axis, in tokens per scaling parameter."""
    params = inference.n_scaling_params
    metrics = [point.metric.value for point in inference.points] + [inference.threshold.value]
    spread = max(metrics) - min(metrics)
    low, high = min(metrics) - 0.18 * spread, max(metrics) + 0.25 * spread
    asymptote = inference.calibration.curve.asymptote
    if asymptote > min(metrics) - 0.6 * spread:
        low = min(low, asymptote - 0.08 * spread)
    axes.set(xscale="log", xlim=(tokens[0], tokens[-1]), ylim=(low, high),
             xlabel="training horizon: tokens of the whole schedule", ylabel="val_bpb at its end (bits per byte)")
    ratios = axes.secondary_xaxis("top", functions=(lambda t: t / params, lambda r: r * params))
    ratios.set_xlabel("tokens per scaling parameter", color=MUTED, fontsize=9)
    ratios.tick_params(which="both", colors=MUTED, labelsize=8)
    for spine in ratios.spines.values():
        spine.set_visible(False)
    return ratios


def _headline(inference):
    if inference.target_tokens is None:
        return "the threshold is below the curve's asymptote: no horizon reaches it"
    ratio = inference.ratio
    between = ""
    if ratio.lo is not None:
        between = f" ({ratio.lo:.3g} to {'no bound' if np.isinf(ratio.hi) else f'{ratio.hi:.3g}'})"
    horizon = inference.target_tokens.value / 1e6
    return f"Horizon {horizon:.4g}M tokens: ratio {ratio.value:.3g}{between}, {inference.state}"
