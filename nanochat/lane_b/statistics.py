"""Exponents of a text: beta of its token correlations, gamma of its next-token entropy.

||C(n)|| ~ n^-beta for the covariance of tokens at lag n, and H_n ~ n^-gamma for the entropy after n
tokens of context. The theory (arXiv:2602.07488) predicts a loss ~ P^-alpha for P training tokens,
with alpha = gamma / (2 beta). Counting only bounds H_n, hence gamma and alpha are intervals.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import t as student_t

from nanochat.lane_b import Refusal
from nanochat.lane_b.corpus import bound_entropies, estimate_lags

DEFAULT_LAGS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64)
MIN_DOCUMENTS, MIN_LAGS = 30, 5
BREAKS = np.geomspace(2.5, 40.0, 241)  # candidate lags for a change of slope
MIN_DELTA_BIC = 10.0  # evidence that is needed for two slopes
LAW_ACCURACY = 0.05  # no power law of real text is more accurate; limits the weight of one point


def measure(corpus, wanted=DEFAULT_LAGS):
    """Return the measured part of stats.json as a dict. Raise Refusal if the text gives no beta."""
    n_different = len(np.unique(corpus.hashes))
    if n_different < MIN_DOCUMENTS:
        raise Refusal(f"only {n_different} different documents (need {MIN_DOCUMENTS} to resample); "
                      "give more text or split it at its chapters")
    longest = int(np.median(corpus.lengths)) // 10
    lags = [lag for lag in wanted if lag <= longest]
    if len(lags) < MIN_LAGS:
        raise Refusal(f"only {len(lags)} lags (need {MIN_LAGS}) up to {longest}, a tenth of the "
                      "median document length; give longer documents")
    estimates, replicates = estimate_lags(corpus, lags)
    beta = measure_beta(estimates, replicates)
    gamma = alpha = {"lo": None, "hi": None}
    if bounds := bound_entropies(corpus):
        upper, lower = bounds
        gamma = {"lo": 0.0, "hi": math.log2(upper / lower)}  # H_2 is at most H_1
        alpha = {"lo": 0.0, "hi": gamma["hi"] / (2 * beta["lo"])}
    warnings = []
    if len(lags) < len(wanted):
        warnings.append(f"lags end at {lags[-1]}: longer ones are above {longest}, a tenth of the "
                        "median document length")
    if beta["n_break"] is not None:
        warnings.append(f"correlations follow two regimes: beta is the slope up to the break at "
                        f"n={beta['n_break']:.1f}, {beta['after_break']:.2f} the slope after it")
    return {
        "schema_version": 2, "n_tokens": len(corpus.tokens), "n_documents": len(corpus.hashes),
        "lags": estimates, "beta": beta, "gamma": gamma, "alpha_theory": alpha,
        "warnings": warnings}


class PowerLaw(NamedTuple):
    """y = exp(log_intercept) x^-slope, and beyond n_break (if not None) with slope_after."""

    slope: float
    slope_se: float
    log_intercept: float
    bic: float
    n_break: float | None = None
    slope_after: float | None = None


def fit_power_law(x, y, relative_se=0.0, n_break=None):
    """Return the PowerLaw through x, y > 0 by least squares in logarithms.

    The errors of y are relative_se and LAW_ACCURACY. Scatter above them widens slope_se; scatter
    below them is no evidence for a break.
    """
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    n, errors = len(log_x), np.hypot(np.asarray(relative_se), LAW_ACCURACY)
    columns = [-log_x, np.ones(n)]
    if n_break is not None:
        beyond = np.maximum(log_x - np.log(n_break), 0)
        columns = [beyond - log_x, np.ones(n), -beyond]
    design = np.column_stack(columns)
    weighted = (design.T / errors).T
    coefficients = np.linalg.lstsq(weighted, log_y / errors, rcond=None)[0]
    residuals = log_y - design @ coefficients
    chi_squared = float(np.sum((residuals / errors) ** 2))
    variance = np.linalg.inv(weighted.T @ weighted)[0, 0] * max(1.0, chi_squared / max(n - 2, 1))
    n_parameters = 3 if n_break is None else 5  # the scale of the errors is one
    scale = max(1.0, chi_squared / n)
    bic = n * math.log(scale) + chi_squared / scale + n_parameters * math.log(n)
    slope, log_intercept, *after = map(float, coefficients)
    return PowerLaw(slope, math.sqrt(variance), log_intercept, bic, n_break, *after)


def fit_decay(x, y, relative_se=0.0):
    """Return the PowerLaw with one slope, or the best one with a break if BIC prefers it."""
    x = np.asarray(x)
    single = fit_power_law(x, y, relative_se)
    laws = [fit_power_law(x, y, relative_se, n_break) for n_break in BREAKS.tolist()
            if (x <= n_break).sum() >= 3 and (x > n_break).sum() >= 2]
    broken = min(laws, key=lambda law: law.bic, default=single)
    return broken if single.bic - broken.bic > MIN_DELTA_BIC else single


def measure_slope(x, y, relative_se=0.0, replicates=()):
    """Return the slope of a power law: a dict with value, se, lo and hi (95 %).

    replicates: resampled values of y. The scatter of few points is itself uncertain, hence
    Student's t.
    """
    law = fit_power_law(x, y, relative_se)
    slopes = [fit_power_law(x, row, relative_se).slope for row in replicates if (row > 0).all()]
    sampling = np.std(slopes, ddof=1) if len(slopes) > 1 else 0.0
    half = math.hypot(student_t.ppf(0.975, len(x) - 2) * law.slope_se, 1.96 * sampling)
    return {"value": law.slope, "se": math.hypot(law.slope_se, sampling),
            "lo": law.slope - half, "hi": law.slope + half}


def measure_beta(estimates, replicates):
    """Return beta from the results of estimate_lags: the slope over the lags of `window`.

    It is that of the operator norm; `frobenius` is the slope of the Frobenius norm. The window ends
    at a break, if there is one. Raise Refusal for fewer than MIN_LAGS lags above the noise or
    before the break, and where the correlations do not decay.
    """
    table = pd.DataFrame(estimates)
    usable = table[table.usable]
    if len(usable) < MIN_LAGS:
        # the noise falls with the root of the text's size
        factor = sorted((table.noise / table.op.clip(lower=1e-30)) ** 2)[MIN_LAGS - 1]
        advice = f"about {1.2 * factor * table.n_pairs[0]:.1e} tokens needed"
        if factor > 1000:
            advice = "much more text is needed, or this text has no correlations at these lags"
        raise Refusal(f"beta not reported: only {len(usable)} lags above noise (need {MIN_LAGS}); "
                      f"{advice}")
    law = fit_decay(usable.lag, usable.op, usable.op_se / usable.op)
    inside = usable[usable.lag <= (law.n_break or math.inf)]
    if len(inside) < MIN_LAGS:
        raise Refusal(f"beta not reported: only {len(inside)} lags before the break at "
                      f"n={law.n_break:.1f} (need {MIN_LAGS}); give more text")
    slope = measure_slope(inside.lag, inside.op, inside.op_se / inside.op,
                          replicates[:, inside.index])
    window = [int(inside.lag.iloc[0]), int(inside.lag.iloc[-1])]
    if slope["lo"] <= 0:
        raise Refusal(f"beta not reported: {slope['value']:.2f} ± {slope['se']:.2f} over lags "
                      f"{window[0]} to {window[1]} is not clear of 0; give more text")
    other = None
    if inside.frobenius.notna().all():
        other = fit_power_law(inside.lag, inside.frobenius.astype(float)).slope
    return slope | {"frobenius": other, "window": window, "n_break": law.n_break,
                    "after_break": law.slope_after}


def describe(document):
    """Return the summary of stats.json for the console."""
    lags = pd.DataFrame(document["lags"])[["lag", "op", "op_se", "frobenius", "usable"]]
    lines = [f"{document['n_tokens']:,} tokens in {document['n_documents']:,} documents of "
             f"{document['dataset_id']}, tokenizer {document['tokenizer_id']}",
             lags.to_string(index=False, float_format="{:.3e}".format),
             "beta: {value:.3f} ± {se:.3f} (95 %: {lo:.3f} to {hi:.3f})".format(**document["beta"])]
    if (frobenius := document["beta"]["frobenius"]) is not None:
        lines.append(f"beta of the Frobenius norm: {frobenius:.3f}")
    for name in ("gamma", "alpha_theory"):
        bound = document[name]["hi"]
        lines.append(f"{name}: not bounded, too little text" if bound is None else
                     f"{name}: at most {bound:.3f}")
    return "\n".join([*lines, *(f"note: {line}" for line in document["warnings"])])
