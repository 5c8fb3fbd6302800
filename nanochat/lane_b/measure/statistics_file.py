"""Statistics as stats.json and the few lines on the screen say them."""

import numpy as np

from nanochat.lane_b.measure.beta import data_tokens

VERSION = 1


def statistics_document(statistics):
    """The measured part of stats.json: plain values, unrounded, None where not known."""
    null = statistics.null_coefficient
    return {
        "n_tokens": statistics.documents.n_tokens, "n_documents": statistics.documents.n_documents,
        "n_outlier_documents": statistics.n_outlier_documents,
        "median_document_tokens": float(np.median(statistics.documents.lengths)),
        "null_coefficient": null,
        "lags": [_lag_json(estimate, null) for estimate in statistics.estimates],
        "fits": {"op": _decay_json(statistics.beta.op),
                 "frobenius": statistics.beta.frobenius and _decay_json(statistics.beta.frobenius)},
        "n_break": statistics.beta.op.n_break, "delta_bic": statistics.beta.op.delta_bic,
        "beta": _beta_json(statistics.beta),
        "entropy": {"position_losses": statistics.positions and _positions_json(statistics.positions),
                    "ngram": statistics.ngrams and _ngrams_json(statistics.ngrams)},
        "gamma": dict(vars(statistics.gamma)),
        "alpha_theory": dict(vars(statistics.alpha)),
        "warnings": list(statistics.warnings),
        "refusals": [statistics.gamma.refusal] if statistics.gamma.refusal else []}


def _lag_json(estimate, null):
    null_here = null / estimate.n_pairs ** 0.5
    return {"lag": estimate.lag, "n_pairs": estimate.n_pairs, "op": estimate.op, "op_se": estimate.op_se,
            "frobenius": estimate.frobenius, "frobenius_se": estimate.frobenius_se, "plug_in": estimate.plug_in,
            "null": null_here, "usable": estimate.is_usable(null_here), "data_tokens": data_tokens(estimate.op, null)}


def _decay_json(decay):
    return {"single": dict(vars(decay.single)), "broken": decay.broken and dict(vars(decay.broken)),
            "delta_bic": decay.delta_bic}


def _beta_json(beta):
    slope = beta.slope
    return {"value": slope.value, "se": slope.se, "lo": slope.lo, "hi": slope.hi, "source": "op",
            "window": list(beta.window), "n_lags": beta.n_lags, "log_intercept": beta.law.log_intercept,
            "se_jackknife": slope.se_jackknife, "se_bootstrap": slope.se_bootstrap, "op_frobenius_gap": slope.gap,
            "beta_frobenius": beta.frobenius_slope,
            "beta_after_break": beta.op.broken.slope_after if beta.op.n_break is not None else None,
            "min_data_tokens": beta.min_data_tokens, "max_data_tokens": beta.max_data_tokens, "regime": beta.regime}


def _positions_json(positions):
    return {"tokens": positions.tokens, "tokens_half": positions.tokens_half, "n_runs": positions.n_runs,
            "n_runs_half": positions.n_runs_half,
            "points": [{"n": p.n, "nats": p.nats, "nats_half": p.nats_half, "count": p.count,
                        "converged": p.is_converged} for p in positions.points],
            "law": positions.law and dict(vars(positions.law))}


def _ngrams_json(bracket):
    return {"data_tokens": list(bracket.data_tokens), "lo": bracket.lo, "hi": bracket.hi,
            "contexts": [{"n": curve.context, "cross_entropies": list(curve.cross_entropies), "se": curve.se,
                          "extrapolated": curve.extrapolated, "amplitude": curve.amplitude,
                          "exponent": curve.exponent} for curve in bracket.curves]}


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
