"""Exponents of a text: beta of its token correlations, gamma of its next-token entropy.

||C(n)|| ~ n^-beta for the covariance of tokens at lag n, and H_n ~ n^-gamma for the entropy after n
tokens of context. The theory (arXiv:2602.07488) predicts a loss ~ P^-alpha for P training tokens,
with alpha = gamma / (2 beta).
"""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from nanochat.common import UserError, read_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.corpus import (
    OUTLIER_SHARE,
    bound_entropies,
    check_documents,
    estimate_lags,
    find_outliers,
    null_coefficient,
)
from nanochat.runlog import find_run

SCHEMA_VERSION = 1
DEFAULT_LAGS = (1, 2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64)
MIN_LAGS = 5
BREAKS = np.geomspace(2.5, 40.0, 241)  # candidate lags for a change of slope
MIN_DELTA_BIC = 10.0  # evidence that is needed for two slopes
LAW_ACCURACY = 0.05  # no power law of real text is more accurate; limits the weight of one point
CONVERGED_NATS = 0.02  # largest change of a converged loss when the training data double
MIN_CONTEXTS = 3
CONTEXT_EDGES = (1, 2, 3, 4, 5, 6, *(round(7 * 2 ** (k / 2)) for k in range(40)))  # of bins of n


def measure(corpus, lags=None, position_losses=()):
    """Return the measured part of stats.json as a dict of plain values.

    lags: None for DEFAULT_LAGS. position_losses: PositionLosses of trained models. Raise Refusal if
    the text gives no beta. If gamma is missing, its reason is recorded in `refusals`.
    """
    outliers = find_outliers(corpus)
    corpus = corpus.select(~outliers)
    check_documents(corpus, outliers.sum())
    longest = int(np.median(corpus.lengths)) // 10
    wanted = lags or DEFAULT_LAGS
    lags = [lag for lag in wanted if lag <= longest]
    if len(lags) < MIN_LAGS:
        raise Refusal(f"only {len(lags)} lags (need {MIN_LAGS}) up to {longest}, a tenth of the "
                      "median document length; give more --lags or longer documents")
    null = null_coefficient(corpus)
    estimates, replicates = estimate_lags(corpus, lags, null)
    beta, fits = measure_beta(estimates, replicates)
    bounds = bound_entropies(corpus)
    gamma, points = measure_gamma(position_losses, bounds)
    warnings = []
    if outliers.any():
        warnings.append(f"{outliers.sum()} outlier document(s) left out: one token makes up more "
                        f"than {OUTLIER_SHARE:.0%} of a long document")
    if len(lags) < len(wanted):
        warnings.append(f"lags end at {lags[-1]}: longer ones are above {longest}, a tenth of the "
                        "median document length")
    if beta.n_break is not None:
        warnings.append(f"correlations follow two regimes (break at n={beta.n_break:.1f}: "
                        f"{fits['op'].slope:.2f} -> {fits['op'].slope_after:.2f}); "
                        f"beta={beta.value:.2f} describes data sizes up to about "
                        f"{beta.max_data_tokens:.1e} tokens")
    return {
        "schema_version": SCHEMA_VERSION,
        "n_tokens": len(corpus.tokens),
        "n_documents": len(corpus.hashes),
        "n_outlier_documents": int(outliers.sum()),
        "null_coefficient": null,
        "lags": [{**asdict(estimate), "usable": estimate.usable} for estimate in estimates],
        "fits": {norm: asdict(law) for norm, law in fits.items()},
        "entropy": {"positions": points, "ngrams": bounds},
        "beta": asdict(beta),
        "gamma": asdict(gamma),
        "alpha_theory": asdict(alpha_of(gamma, beta)),
        "warnings": warnings,
        "refusals": [gamma.refusal] if gamma.refusal else [],
    }


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and 95 % interval.

    Without value and se it is an interval only; with all fields None it is unknown.
    """

    value: float | None = None
    se: float | None = None
    lo: float | None = None
    hi: float | None = None


def alpha_of(gamma, beta):
    """Return the Estimate gamma / (2 beta), in [gamma_lo / 2 beta_hi, gamma_hi / 2 beta_lo].

    It has a value and a standard error (delta method in logarithms) only if gamma has them.
    """
    if gamma.lo is None or beta.lo is None or beta.lo <= 0:
        return Estimate()
    value, se = None, None
    if gamma.value is not None:
        value = gamma.value / (2 * beta.value)
        se = value * math.hypot(gamma.se / gamma.value, beta.se / beta.value)
    return Estimate(value, se, gamma.lo / (2 * beta.hi), gamma.hi / (2 * beta.lo))


# --- power laws and beta -------------------------------------------------------------------------


@dataclass(frozen=True)
class PowerLaw:
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
    log_x, log_y = np.log(np.asarray(x, float)), np.log(y)
    n, errors = len(log_x), np.hypot(relative_se, LAW_ACCURACY)
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


def measure_slope(x, y, relative_se=0.0, replicates=(), other=None):
    """Return (value, standard error, lo, hi) of the slope of a power law, with its 95 % interval.

    replicates: resampled values of y. other: the same decay measured differently; the distance
    to its slope is part of the error. The scatter of few points is itself uncertain, hence
    Student's t.
    """
    law = fit_power_law(x, y, relative_se)
    slopes = [fit_power_law(x, row, relative_se).slope for row in replicates if (row > 0).all()]
    bootstrap = np.std(slopes, ddof=1) if len(slopes) > 1 else 0.0
    gap = 0.0 if other is None else fit_power_law(x, other, relative_se).slope - law.slope
    sampling = math.hypot(bootstrap, gap)
    half = math.hypot(student_t.ppf(0.975, len(x) - 2) * law.slope_se, 1.96 * sampling)
    return law.slope, math.hypot(law.slope_se, sampling), law.slope - half, law.slope + half


@dataclass(frozen=True, kw_only=True)
class Beta(Estimate):
    """Slope of the operator norm over the lags of `window`; `frobenius`: that of the other norm.

    max_data_tokens: data size at which the correlation at the last of these lags exceeds the
    noise. Larger data sizes see the slope after the break.
    """

    window: tuple
    n_lags: int
    frobenius: float | None
    n_break: float | None
    after_break: float | None
    max_data_tokens: float


def measure_beta(estimates, replicates):
    """Return (Beta, {norm: PowerLaw}) of the results of estimate_lags.

    Raise Refusal for fewer than MIN_LAGS lags above the noise or before the break, and where the
    correlations do not decay.
    """
    usable = [e for e in estimates if e.usable]
    if len(usable) < MIN_LAGS:
        raise Refusal(f"beta not reported: only {len(usable)} lags above noise (need {MIN_LAGS}); "
                      f"{_tokens_needed(estimates)}")
    law = fit_decay(*np.transpose([[e.lag, e.op, e.op_se / e.op] for e in usable]))
    fits = {"op": law}
    if all(e.frobenius for e in usable):
        points = [[e.lag, e.frobenius, e.frobenius_se / e.frobenius] for e in usable]
        fits["frobenius"] = fit_decay(*np.transpose(points))
    inside = [e for e in usable if law.n_break is None or e.lag <= law.n_break]
    if len(inside) < MIN_LAGS:
        raise Refusal(f"beta not reported: only {len(inside)} lags before the break at "
                      f"n={law.n_break:.1f} (need {MIN_LAGS}); give other --lags or more text")
    lags, op, errors = np.transpose([[e.lag, e.op, e.op_se / e.op] for e in inside])
    frobenius = [e.frobenius for e in inside] if all(e.frobenius for e in inside) else None
    chosen = replicates[:, [estimates.index(e) for e in inside]]
    value, se, lo, hi = measure_slope(lags, op, errors, chosen, frobenius)
    window = (inside[0].lag, inside[-1].lag)
    if lo <= 0:
        raise Refusal(f"beta not reported: {value:.2f} ± {se:.2f} over lags {window[0]} to "
                      f"{window[1]} is not clear of 0; give more text or other --lags")
    beta = Beta(
        value=value, se=se, lo=lo, hi=hi, window=window, n_lags=len(inside),
        frobenius=frobenius and fit_power_law(lags, frobenius, errors).slope,
        n_break=law.n_break, after_break=law.slope_after, max_data_tokens=inside[-1].data_tokens)
    return beta, fits


def _tokens_needed(estimates):
    """Return advice; noise falls with the root of the text's size."""
    factors = sorted((e.noise / max(e.op, 1e-30)) ** 2 for e in estimates)
    factor = factors[MIN_LAGS - 1]
    if not 0 < factor < 1000:
        return "much more text is needed, or this text has no correlations at these lags"
    return f"about {1.2 * factor * estimates[0].n_pairs:.1e} tokens needed"


# --- gamma ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PositionLosses:
    """Mean nats per token by the number of tokens since BOS, of a model trained on `tokens` tokens.

    nats, counts: (positions,); index n is the loss with n tokens of context.
    """

    name: str
    tokens: int
    nats: np.ndarray
    counts: np.ndarray
    dataset_id: str | None = None
    tokenizer_id: str | None = None
    model_config: dict | None = None


def read_position_losses(name, runs_dir):
    """Return the PositionLosses of a run (its id or folder), or of a JSON file with one event.

    Raise UserError if there is no valid event, and Refusal if a loss is not a positive number.
    """
    if Path(name).is_file():
        event = read_json(name, "give a run's position_losses event")
    else:
        run = find_run(name, runs_dir)
        name, event = run.run_id, {**run.config, **(run.of("position_losses") or [{}])[-1]}
    try:
        counts = np.array(event["counts_by_position"], np.int64)
        nats = np.array(event["nats_by_position"], float)
        tokens = int(event["tokens"])
        is_valid = tokens > 0 and nats.shape == counts.shape == (len(nats),) and min(counts) >= 0
        ids = [event.get(key) for key in ("dataset_id", "tokenizer_id", "model_config")]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{name} has no valid position_losses event; give a run that was trained "
                        "with --position-losses")
    invalid = np.flatnonzero((counts > 0) & ~((nats > 0) & (nats < math.inf)))
    if len(invalid):
        raise Refusal(f"{name}: the loss with {invalid[0]} tokens of context is "
                      f"{nats[invalid[0]]}; leave out this run, it diverged")
    return PositionLosses(name, tokens, np.where(counts > 0, nats, 0.0), counts, *ids)


def check_comparable(losses, dataset_id, tokenizer_id):
    """Raise Refusal unless the losses are of different runs of one model on the text measured."""
    model = next((loss.model_config for loss in losses if loss.model_config), None)
    for i, loss in enumerate(losses):
        if loss.name in [other.name for other in losses[:i]]:
            raise Refusal(f"{loss.name} is given more than once; give each run once")
        for name, wanted in (("dataset_id", dataset_id), ("tokenizer_id", tokenizer_id),
                             ("model_config", model)):
            value = getattr(loss, name)
            if None not in (value, wanted) and value != wanted:
                raise Refusal(f"the position losses of {loss.name} have {name} {value}, not "
                              f"{wanted}; give runs of one model on the text that is measured")


@dataclass(frozen=True)
class Gamma(Estimate):
    """Exponent of the entropy; an interval without a value where only n-grams bound it."""

    source: str | None = None
    window: tuple | None = None
    refusal: str | None = None


def measure_gamma(losses, bounds):
    """Return (Gamma, points): from PositionLosses that converged, otherwise from bound_entropies.

    A point has the context length n, nats of the models trained on the most tokens P, nats_half of
    those trained on P/2. Gamma is the slope up to the first n at which the two differ.
    """
    points, reason = entropies_by_position(losses) if losses else ([], "no position losses")
    window = points
    for i, point in reversed(list(enumerate(points))):
        fall = point["nats_half"] - point["nats"]
        if abs(fall) >= CONVERGED_NATS:
            window = points[:i]
            reason = (f"H_n at n={point['n']:.0f} still changes by {-fall:.3f} nats per data "
                      f"doubling (limit {CONVERGED_NATS})")
    if len(window) >= MIN_CONTEXTS:
        n, nats, half, count = (np.array([point[name] for point in window])
                                for name in ("n", "nats", "nats_half", "count"))
        # The loss of a token scatters by about its mean: 1 / sqrt(count) is the relative error.
        value, se, lo, hi = measure_slope(n, nats, count**-0.5, other=half)
        if lo > 0:
            return Gamma(value, se, lo, hi, "position_losses", (n[0], n[-1])), points
        reason = f"losses do not clearly fall with the context ({value:.3f} ± {se:.3f})"
    refusal = f"gamma not reported: {reason}"
    way_out = "give --position-losses of longer runs" if losses else "give --position-losses"
    if not bounds:
        return Gamma(refusal=f"{refusal}; too little text for n-grams; {way_out}"), points
    one, two = bounds
    lo, hi = max(0.0, math.log2(one["lo"] / two["hi"])), math.log2(one["hi"] / two["lo"])
    refusal += f"; bracket from n=1,2: {lo:.3f}-{hi:.3f}; {way_out}"
    return Gamma(None, None, lo, hi, "ngram_bracket", (1, 2), refusal), points


def entropies_by_position(losses):
    """Return (points: means over bins of n weighted by counts, reason if they are too few)."""
    largest = max(loss.tokens for loss in losses)
    full = [loss for loss in losses if loss.tokens > 0.95 * largest]
    half = [loss for loss in losses if 0.45 * largest <= loss.tokens <= 0.55 * largest]
    if not half:
        return [], ("position losses of models trained on P and P/2 tokens are needed; add a run "
                    f"on about {largest // 2:,} tokens")
    points, longest = [], min(len(loss.nats) for loss in full + half)
    for low, high in pairwise(CONTEXT_EDGES):
        n = np.arange(low, min(high, longest))
        counts, half_counts = (sum(loss.counts[n] for loss in runs) for runs in (full, half))
        if not counts.sum() or not half_counts.sum():
            break
        total, half_total = (sum(loss.counts[n] @ loss.nats[n] for loss in runs)
                             for runs in (full, half))
        points.append({"n": float(n @ counts / counts.sum()), "count": int(counts.sum()),
                       "nats": float(total / counts.sum()),
                       "nats_half": float(half_total / half_counts.sum())})
    return points, f"only {len(points)} context lengths (need {MIN_CONTEXTS})"


def describe(document):
    """Return the summary of stats.json for the console."""
    lines = [f"{document['n_tokens']:,} tokens in {document['n_documents']:,} documents of "
             f"{document['dataset_id']}, tokenizer {document['tokenizer_id']}",
             "  lag    ||C||_op ± SE          ||C||_F ± SE"]
    for lag in document["lags"]:
        frobenius = "lost in noise"
        if lag["frobenius"]:
            frobenius = f"{lag['frobenius']:.3e} ± {lag['frobenius_se']:.1e}"
        lines.append(f"{lag['lag']:5d}    {lag['op']:.3e} ± {lag['op_se']:.1e}    {frobenius}"
                     f"{'' if lag['usable'] else '    (below noise)'}")
    for name in ("beta", "gamma", "alpha_theory"):
        estimate = document[name]
        if estimate["value"] is not None:
            lines.append("{}: {value:.3f} ± {se:.3f} (95 %: {lo:.3f} to {hi:.3f})".format(
                name, **estimate))
        elif estimate["lo"] is not None:
            lines.append("{}: between {lo:.3f} and {hi:.3f}".format(name, **estimate))
    lines += [f"note: {line}" for line in (*document["warnings"], *document["refusals"])]
    return "\n".join(lines)
