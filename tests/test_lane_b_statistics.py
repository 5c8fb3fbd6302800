"""The exponents of a text, their refusals, and scripts.lane_b_stats."""

import json

import numpy as np
import pytest
from lane_b_sources import Copying, cut
from scipy import stats

from nanochat.dataset import open_dataset
from nanochat.lane_b import Refusal
from nanochat.lane_b.statistics import (
    DEFAULT_LAGS,
    fit_decay,
    fit_power_law,
    measure,
    measure_beta,
    measure_slope,
)
from nanochat.tokenizer import train_tokenizer
from scripts.lane_b_stats import main

LAGS = np.array(DEFAULT_LAGS)
# ||C(n)||_op of a corpus of books, 34 million tokens
BOOKS = np.array([9.51e-3, 5.20e-3, 2.35e-3, 1.246e-3, 8.5e-4, 6.21e-4, 5.88e-4, 5.92e-4, 5.49e-4,
                  5.02e-4, 4.80e-4, 4.48e-4, 4.12e-4])


# --- power laws


def test_a_power_law_equals_linear_regression_of_logarithms():
    law = fit_power_law(LAGS[:6], BOOKS[:6])
    peer = stats.linregress(np.log(LAGS[:6]), np.log(BOOKS[:6]))
    assert (law.slope, law.slope_se) == pytest.approx((-peer.slope, peer.stderr))
    assert law.log_intercept == pytest.approx(peer.intercept)


def test_books_have_two_regimes_with_a_break_near_six():
    law = fit_decay(LAGS, BOOKS)
    assert law.n_break == pytest.approx(6.4, abs=1)
    assert (law.slope, law.slope_after) == pytest.approx((1.58, 0.17), abs=0.05)
    assert 20 < fit_power_law(LAGS, BOOKS).bic - law.bic < 40


def test_a_single_law_is_seldom_taken_for_two():
    noise = 0.08 * np.random.default_rng(0).standard_normal((100, len(LAGS)))
    laws = [fit_decay(LAGS, LAGS ** -0.8 * np.exp(row), 0.08) for row in noise]
    assert sum(law.n_break is not None for law in laws) <= 1
    slightly_bent = LAGS ** -0.6 * np.exp(0.0025 * np.log(LAGS) ** 2)
    assert fit_decay(LAGS, slightly_bent, 1e-6).n_break is None
    assert fit_decay(LAGS[:4], BOOKS[:4]).n_break is None


def test_the_interval_of_a_slope_covers_it():
    rng = np.random.default_rng(1)
    covered = 0
    for noise in 0.1 * rng.standard_normal((200, 6)):
        slope = measure_slope(LAGS[:6], LAGS[:6] ** -1.2 * np.exp(noise))
        covered += slope["lo"] < 1.2 < slope["hi"]
    assert covered >= 0.9 * 200


def test_errors_of_a_slope_add_in_quadrature():
    y = LAGS ** -1.0
    own = fit_power_law(LAGS, y).slope_se
    replicates = y * LAGS ** np.array([[0.1], [-0.1], [0.1], [-0.1]])
    slope = measure_slope(LAGS, y, replicates=replicates)
    assert slope["se"] == pytest.approx(np.sqrt(own**2 + 0.1**2 * 4 / 3))


# --- beta and gamma


def estimates_of(law, relative_error=0.01):
    """Return estimates and replicates of a law of the operator norm."""
    estimates = []
    for lag in DEFAULT_LAGS:
        op = float(law(lag))
        estimates.append({"lag": lag, "n_pairs": 32_000_000, "op": op, "op_se": relative_error * op,
                          "frobenius": 1.2 * op,
                          "noise": 5 * relative_error * op, "usable": True})
    norms = np.array([estimate["op"] for estimate in estimates])
    noise = np.random.default_rng(0).standard_normal((100, len(norms)))
    return estimates, norms * (1 + relative_error * noise)


def two_regimes(n_break):
    return lambda n: 9.5e-3 * min(n, n_break) ** -1.6 * max(n / n_break, 1) ** -0.17


def test_books_like_correlations_use_the_lags_before_the_break():
    estimates, replicates = estimates_of(two_regimes(6.4))
    beta = measure_beta(estimates, replicates)
    assert beta["value"] == pytest.approx(1.6, abs=0.05) and beta["window"] == [1, 6]
    assert beta["lo"] < 1.6 < beta["hi"]
    assert (beta["n_break"], beta["after_break"]) == pytest.approx((6.4, 0.17), rel=0.1)
    beta = measure_beta(*estimates_of(lambda n: 9e-3 * n ** -0.8))
    assert beta["window"] == [1, 64] and beta["n_break"] is None
    assert beta["value"] == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("law, words", [
    (two_regimes(3.6), r"only 3 lags before the break at n=3\.\d \(need 5\)"),
    (lambda n: 5e-3 * np.exp(0.3 * np.sin(n)), "is not clear of 0"),
])
def test_beta_is_refused_without_enough_lags_that_decay(law, words):
    with pytest.raises(Refusal, match=words):
        measure_beta(*estimates_of(law))


def copying_text(n_tokens, document_tokens=1000):
    return cut(Copying(0.9, vocab_size=500).sample(n_tokens, 0), document_tokens, 500)


def test_too_little_text_says_how_much_is_needed():
    lags = [1, 2, 3, 4, 5]
    with pytest.raises(Refusal, match=r"only \d lags above noise \(need 5\); about") as refusal:
        measure(copying_text(30_000), lags)
    needed = float(str(refusal.value).split("about ")[1].split()[0])
    assert measure(copying_text(int(1.5 * needed)), lags)["beta"]["window"] == [1, 5]


def test_text_without_correlations_is_refused():
    text = np.random.default_rng(0).integers(0, 300, 100_000)
    with pytest.raises(Refusal, match=r"no correlations at these lags|tokens needed"):
        measure(cut(text, 500, 300))


def test_lags_longer_than_a_tenth_of_the_documents_are_left_out():
    result = measure(copying_text(300_000, 200))
    assert [lag["lag"] for lag in result["lags"]] == [1, 2, 3, 4, 5, 6, 8, 11, 16]
    assert result["warnings"][0].startswith("lags end at 16")
    with pytest.raises(Refusal, match=r"only 4 lags \(need 5\) up to 4"):
        measure(copying_text(100_000, 40))


# --- the program


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder of text (words that repeat what is near, cut into pages) and its tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    ranks = Copying(1.2, q=0.9, vocab_size=300).sample(120_000, seed=0)
    written = " ".join(f"{rank * 7919 % 9999:x}" for rank in ranks.tolist())
    pages = [written[start:start + 2500] for start in range(0, len(written), 2500)]
    (folder / "text").mkdir()
    lines = [json.dumps({"text": page}) + "\n" for page in pages]
    (folder / "text" / "pages.jsonl").write_text("".join(lines))
    train_tokenizer(pages, 400).save(folder / "tokenizer")
    return folder


def arguments(text, tmp_path, *more):
    return ["--dataset", str(text / "text"), "--tokenizer-dir", str(text / "tokenizer"),
            "--out", str(tmp_path / "stats.json"), *map(str, more)]


def test_a_text_becomes_a_file(text, tmp_path, capsys):
    main(arguments(text, tmp_path))
    document = json.loads((tmp_path / "stats.json").read_text())
    beta, gamma, alpha = (document[name] for name in ("beta", "gamma", "alpha_theory"))
    assert document["dataset_id"] == open_dataset(str(text / "text")).dataset_id
    assert 0 < beta["lo"] < beta["value"] < beta["hi"]
    assert 0 == gamma["lo"] < gamma["hi"] and alpha["lo"] == 0
    assert alpha["hi"] == pytest.approx(gamma["hi"] / (2 * beta["lo"]))
    assert f"beta: {beta['value']:.3f}" in capsys.readouterr().out


def test_a_refused_text_exits_with_3_and_writes_nothing(text, tmp_path, refusal):
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "a.jsonl").write_text('{"text": "one text"}\n{"text": "validation"}\n')
    few = arguments(text, tmp_path, "--dataset", tmp_path / "few")
    assert "different documents" in refusal(main, few, exit_code=3)
    assert not (tmp_path / "stats.json").exists()


@pytest.mark.parametrize("more", [["--max-tokens", "0"], ["--out", "missing/stats.json"]])
def test_invalid_flags_exit_with_2(text, tmp_path, more, refusal):
    assert more[0] in refusal(main, arguments(text, tmp_path, *more))
