"""Statistics as stats.json and the few lines on the screen say them."""

import numpy as np

from nanochat.lane_b.measure.beta import data_tokens

VERSION = 1


def statistics_document(statistics):
    """The measured part of stats.json: plain values, unrounded, None where not known."""
    null, beta, positions, ngrams = (
        statistics.null_coefficient, statistics.beta, statistics.positions, statistics.ngrams)
    return {
        "n_tokens": statistics.corpus.n_tokens, "n_documents": statistics.corpus.n_documents,
        "n_outlier_documents": statistics.n_outlier_documents,
        "median_document_tokens": float(np.median(statistics.corpus.lengths)),
        "null_coefficient": null,
        "lags": [_lag(estimate, null) for estimate in statistics.estimates],
        "fits": {"op": _decay(beta.op), "frobenius": beta.frobenius and _decay(beta.frobenius)},
        "n_break": beta.op.n_break, "delta_bic": beta.op.delta_bic, "beta": _beta(beta),
        "entropy": {
            "position_losses": positions and {
                **{name: getattr(positions, name) for name in ("tokens", "tokens_half", "n_runs", "n_runs_half")},
                "points": [{**vars(point), "converged": point.is_converged} for point in positions.points],
                "law": positions.law and dict(vars(positions.law))},
            "ngram": ngrams and {"data_tokens": list(ngrams.data_tokens), "lo": ngrams.lo, "hi": ngrams.hi,
                                 "contexts": [dict(vars(curve)) for curve in ngrams.curves]}},
        "gamma": dict(vars(statistics.gamma)), "alpha_theory": dict(vars(statistics.alpha)),
        "warnings": list(statistics.warnings),
        "refusals": [statistics.gamma.refusal] if statistics.gamma.refusal else []}


def _lag(estimate, null):
    null_here = null / estimate.n_pairs ** 0.5
    names = ("lag", "n_pairs", "op", "op_se", "frobenius", "frobenius_se", "plug_in")
    return {**{name: getattr(estimate, name) for name in names}, "null": null_here,
            "usable": estimate.is_usable(null_here), "data_tokens": data_tokens(estimate.op, null)}


def _decay(decay):
    return {"single": dict(vars(decay.single)), "broken": decay.broken and dict(vars(decay.broken)),
            "delta_bic": decay.delta_bic}


def _beta(beta):
    slope = beta.slope
    return {"value": slope.value, "se": slope.se, "lo": slope.interval[0], "hi": slope.interval[1], "source": "op",
            "window": list(beta.window), "n_lags": beta.n_lags, "log_intercept": beta.law.log_intercept,
            "se_jackknife": slope.se_jackknife, "se_bootstrap": slope.se_bootstrap, "op_frobenius_gap": slope.gap,
            "beta_frobenius": beta.frobenius_slope,
            "beta_after_break": beta.op.broken.slope_after if beta.op.n_break is not None else None,
            "min_data_tokens": beta.min_data_tokens, "max_data_tokens": beta.max_data_tokens, "regime": beta.regime}


def describe(document):
    """The summary on the screen: sizes, the table of lags, β, γ, α, and everything warned of or refused."""
    beta, gamma, alpha = (document[name] for name in ("beta", "gamma", "alpha_theory"))
    lines = [
        f"{document['dataset_id']}, {document['split']}, tokenizer {document['tokenizer_id']}: "
        f"{document['n_tokens']:,} tokens in {document['n_documents']:,} documents, "
        f"{document['bytes_per_token']:.2f} bytes a token",
        "  lag     ‖C‖_op ± se            ‖C‖_F ± se             plug-in    null"]
    for lag in document["lags"]:
        frobenius = "       (lost in noise)"
        if lag["frobenius"] is not None:
            frobenius = f"{lag['frobenius']:.3e} ± {lag['frobenius_se']:.1e}"
        lines.append(f"{lag['lag']:5d}   {lag['op']:10.3e} ± {lag['op_se']:.1e}   {frobenius:>21}   "
                     f"{lag['plug_in']:.3e}  {lag['null']:.1e}{'' if lag['usable'] else '  (below noise)'}")
    lines.append(f"beta   {beta['value']:.3f} ± {beta['se']:.3f} (95 %: {beta['lo']:.2f} to {beta['hi']:.2f}), "
                 f"lags {beta['window'][0]} to {beta['window'][1]}")
    if gamma["value"] is not None:
        lines.append(f"gamma  {gamma['value']:.3f} ± {gamma['se']:.3f} (95 %: {gamma['lo']:.3f} to {gamma['hi']:.3f}), "
                     f"n from {gamma['window'][0]:.0f} to {gamma['window'][1]:.0f}")
        lines.append(f"alpha  {alpha['value']:.3f} (between {alpha['lo']:.3f} and {alpha['hi']:.3f})")
    elif gamma["source"]:
        lines.append(f"gamma  between {gamma['lo']:.3f} and {gamma['hi']:.3f}: a bracket, no value")
        lines.append(f"alpha  between {alpha['lo']:.3f} and {alpha['hi']:.3f}, no value")
    lines += [f"note: {line}" for line in (*document["warnings"], *document["refusals"])]
    return "\n".join(lines)
