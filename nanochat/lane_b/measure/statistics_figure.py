"""The figure of a corpus's statistics: decay of correlation and of entropy, with fits, windows and error bars."""

import numpy as np

from nanochat.lane_b.figure import BLUE, MUTED, ORANGE, TITLE, dress, label_axis, new_figure, save
from nanochat.lane_b.measure.fit import NORMAL_95

OPERATOR, FROBENIUS, WHOLE, HALF = BLUE, ORANGE, BLUE, "#8fb4d9"


def draw_statistics(statistics, path):
    """Write the figure to `path` (its ending chooses the format). Errors: UserError without matplotlib."""
    figure = new_figure(figsize=(12.0, 5.2))
    figure.get_layout_engine().set(w_pad=0.12, wspace=0.04)
    correlation, entropy = figure.subplots(1, 2)
    _draw_correlation(correlation, statistics)
    _draw_entropy(entropy, statistics)
    for axes in (correlation, entropy):
        if axes.has_data():
            _label(axes)
            dress(axes)
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "too little text", ha="center", va="center", color=MUTED, transform=axes.transAxes)
    save(figure, path)


def _draw_correlation(axes, statistics):
    beta, estimates = statistics.beta, statistics.estimates
    nulls = np.array([statistics.null_coefficient / np.sqrt(e.n_pairs) for e in estimates])
    lags = np.array([e.lag for e in estimates])
    usable = np.array([e.is_usable(null) for e, null in zip(estimates, nulls, strict=True)])
    axes.axvspan(beta.window[0] / 1.12, beta.window[1] * 1.03, color=OPERATOR, alpha=0.07, linewidth=0,
                 label=r"lags that give $\beta$")
    for value, error, decay, color, marker, label in (
            ("frobenius", "frobenius_se", beta.frobenius, FROBENIUS, "s", "Frobenius norm"),
            ("op", "op_se", beta.op, OPERATOR, "o", "operator norm")):
        y, y_se = (np.array([getattr(e, name) for e in estimates], float) for name in (value, error))
        for mask, face in ((usable, color), (~usable & (y > 0), "white")):
            axes.errorbar(lags[mask], y[mask], NORMAL_95 * y_se[mask], fmt=marker, color=color, markerfacecolor=face,
                          markersize=6, elinewidth=1.2, capsize=2.5, zorder=3,
                          label=f"{label} (95 %)" if face == color else None)
        if decay:
            law = decay.broken if decay.n_break is not None else decay.single
            x = np.geomspace(lags[usable].min(), lags[usable].max(), 200)
            axes.plot(x, law(x), color=color, linewidth=1.6, alpha=0.85)
    if not usable.all():
        axes.plot([], [], "o", color=MUTED, markerfacecolor="white", label="hollow: not clear of noise")
    axes.plot(lags, [e.plug_in for e in estimates], "_", color=MUTED, markersize=9, label="plug-in operator norm")
    axes.plot(lags, nulls, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), label="shuffled text")
    _annotate_slopes(axes, beta, lags.max())
    axes.set(xscale="log", yscale="log", xlabel="lag n (tokens)", ylabel="‖C(n)‖")
    axes.set_title(rf"$\beta$ = {beta.slope.value:.2f} ± {beta.slope.se:.2f}"
                   f" from lags {beta.window[0]} to {beta.window[1]}", **TITLE)


def _annotate_slopes(axes, beta, last_lag):
    broken = beta.op.broken
    if beta.op.n_break is None:
        return
    axes.axvline(broken.n_break, color=MUTED, linewidth=1.0, linestyle=(0, (1, 2)))
    axes.annotate(f"break at n = {broken.n_break:.1f}", (broken.n_break, 0.12), xycoords=axes.get_xaxis_transform(),
                  xytext=(6, 0), textcoords="offset points", color=MUTED, fontsize=9)
    middle = np.sqrt(broken.n_break * last_lag)
    for n, slope in ((np.sqrt(broken.n_break), broken.slope_before), (middle, broken.slope_after)):
        axes.annotate(f"n$^{{-{slope:.2f}}}$", (n, float(broken(n))), xytext=(-6, -20), textcoords="offset points",
                      ha="right" if n < broken.n_break else "center", color=OPERATOR, fontsize=11)


def _draw_entropy(axes, statistics):
    gamma = statistics.gamma
    if statistics.positions and statistics.positions.points:
        _draw_positions(axes, statistics.positions)
    elif statistics.ngrams:
        _draw_ngrams(axes, statistics.ngrams)
    if gamma.source == "position_losses":
        title = (rf"$\gamma$ = {gamma.value:.3f} ± {gamma.se:.3f}"
                 f" from contexts of {gamma.window[0]:.0f} to {gamma.window[1]:.0f} tokens")
    elif gamma.source:
        title = rf"$\gamma$ between {gamma.lo:.2f} and {gamma.hi:.2f}: a bracket, no value"
    else:
        title = r"$\gamma$ not reported"
    axes.set_title(title, **TITLE)


def _draw_positions(axes, positions):
    n, nats, half, counts = (np.array([getattr(p, name) for p in positions.points], float)
                             for name in ("n", "nats", "nats_half", "count"))
    if positions.slope:
        ends = positions.window[0].n, positions.window[-1].n
        axes.axvspan(ends[0] / 1.12, ends[1] * 1.06, color=WHOLE, alpha=0.07, linewidth=0,
                     label=r"contexts that give $\gamma$")
        x = np.geomspace(*ends, 100)
        axes.plot(x, positions.law(x), color=WHOLE, linewidth=1.6, label=rf"n$^{{-{positions.law.slope:.3f}}}$")
    axes.plot(n, half, "o", color=HALF, markersize=5, label=f"model of {_tokens(positions.tokens_half)} tokens")
    axes.errorbar(n, nats, NORMAL_95 * nats / np.sqrt(counts), fmt="o", color=WHOLE, markersize=6, elinewidth=1.2,
                  capsize=2.5, label=f"model of {_tokens(positions.tokens)} tokens (95 %)")
    axes.set(xscale="log", yscale="log", xlabel="context n (tokens since BOS)", ylabel="loss (nats a token)")


def _draw_ngrams(axes, bracket):
    tokens = np.array(bracket.data_tokens, float)
    for curve, color, marker in zip(bracket.curves, (FROBENIUS, OPERATOR), "so", strict=True):
        ahead = np.geomspace(tokens[-4], tokens[-1] * 64, 100)
        law = curve.extrapolated + curve.amplitude * (ahead / tokens[-1]) ** -curve.exponent
        axes.plot(ahead, law, color=color, linewidth=1.4, linestyle=(0, (4, 3)), alpha=0.85)
        axes.plot(tokens, curve.cross_entropies, marker, color=color, markersize=6,
                  label=f"context of {curve.n} token{'s' * (curve.n > 1)}")
        if not bracket.is_bounded:
            continue
        axes.axhspan(curve.lo, curve.hi, color=color, alpha=0.10, linewidth=0)
        axes.annotate(f"{curve.lo:.2f} < $H_{curve.n}$ < {curve.hi:.2f}", (tokens[0], curve.lo),
                      xytext=(0, 4), textcoords="offset points", color=color, fontsize=9)
    axes.set(xscale="log", xlabel="text the n-gram model has seen (tokens)",
             ylabel="held-out cross-entropy (nats a token)")


def _label(axes):
    large = axes.get_xlim()[1] > 1e4
    label_axis(axes.xaxis, "k, M" if large else "{x:g}", base=10 if large else 2, numticks=20)
    if axes.get_yscale() == "log" and axes.get_ylim()[1] > 0.1:
        label_axis(axes.yaxis, "{x:g}", subs=(1, 1.5, 2, 3, 4, 5, 6, 8))


def _tokens(number):
    return f"{number / 1e6:.3g}M" if number >= 1e6 else f"{number / 1e3:.3g}k"
