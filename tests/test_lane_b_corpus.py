"""Counts of a text against sources whose correlations and entropies are known in closed form."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lane_b_sources import Copying, Markov, Renewal, cut

from nanochat.lane_b import corpus
from nanochat.lane_b.corpus import (
    Corpus,
    Covariance,
    Fold,
    bound_entropies,
    estimate_lags,
    read_corpus,
)
from nanochat.lane_b.statistics import fit_power_law

COPYING_LAGS = (2 ** np.arange(7)).tolist()
documents = st.lists(hnp.arrays(int, st.integers(3, 40), elements=st.integers(0, 6)),
                     min_size=1, max_size=12)


def estimate_lag(corpus, lag):
    return estimate_lags(corpus, [lag])[0][0]


def values(estimates, name):
    return np.array([estimate[name] for estimate in estimates])


@settings(deadline=None, max_examples=60)
@given(documents, st.integers(1, 45))
def test_counts_equal_counting_by_hand(arrays, lag):
    """Pairs never cross the end of a document."""
    expected = np.zeros((7, 7), int)
    for array in arrays:
        for left, right in zip(array, array[lag:], strict=False):
            expected[left, right] += 1
    fold = Fold(Corpus.of(arrays, 7), np.random.default_rng(0))
    assert (fold.count(lag).toarray() == expected).all()


def test_covariance_equals_dense_algebra():
    rng = np.random.default_rng(0)
    counts = Fold(Corpus.of(list(rng.integers(0, 30, (20, 200))), 30), rng).count(2)
    joint = counts.toarray() / counts.sum()
    dense = joint - np.outer(joint.sum(axis=1), joint.sum(axis=0))
    covariance = Covariance(counts)
    np.testing.assert_allclose(covariance.times(np.eye(30)), dense, atol=1e-15)
    u, s, v = covariance.top_singular(n_iterations=200)
    assert s == pytest.approx(np.linalg.norm(dense, 2), rel=1e-8)
    np.testing.assert_allclose(dense @ v, u * s, atol=1e-10)


@pytest.mark.parametrize("exponent, exact", [(0.9, 0.593), (1.5, 0.958)])
def test_exponent_of_a_copying_source(exponent, exact):
    source = Copying(exponent)
    norms = source.operator_norm(COPYING_LAGS)
    assert fit_power_law(COPYING_LAGS, norms).slope == pytest.approx(exact, abs=5e-4)
    corpus = cut(source.sample(4_000_000, seed=0), 2000, source.vocab_size)
    estimates, _ = estimate_lags(corpus, COPYING_LAGS)
    usable = values(estimates, "usable")
    assert usable.sum() >= 6  # noise hides the directions at lag 64 of a text this small
    lags, norms = np.array(COPYING_LAGS)[usable], norms[usable]
    op, op_se = values(estimates, "op")[usable], values(estimates, "op_se")[usable]
    assert (np.abs(op - norms) < 4 * op_se).all()
    frobenius = values(estimates, "frobenius")[usable]
    assert frobenius == pytest.approx(source.frobenius_norm(COPYING_LAGS)[usable], rel=0.1)
    slope = fit_power_law(lags, op, op_se / op).slope
    assert slope == pytest.approx(fit_power_law(lags, norms, op_se / op).slope, abs=0.03)


@pytest.mark.parametrize("lag", [1, 3])
def test_correlation_of_a_markov_chain(lag):
    source = Markov(40)
    estimate = estimate_lag(source.sample(3000, 400, seed=1), lag)
    exact = source.covariance(lag)
    assert abs(estimate["op"] - np.linalg.norm(exact, 2)) < 4 * estimate["op_se"]
    assert estimate["frobenius"] == pytest.approx(np.linalg.norm(exact), rel=0.05)


@pytest.mark.parametrize("lag", [1, 8, 64])
def test_correlation_of_a_capped_renewal_process(lag):
    source = Renewal(vocab_size=12, longest=64, decay=0.7)
    estimate = estimate_lag(cut(source.sample(2_000_000, seed=0), 1000, 12), lag)
    exact = abs(source.correlation(lag)[lag]) / 12
    assert abs(estimate["op"] - exact) < 4 * estimate["op_se"]


def test_standard_errors_are_the_spread_over_independent_texts():
    source = Copying(0.9, vocab_size=500)
    estimates = [estimate_lags(cut(source.sample(100_000, seed), 500, 500), [1])[0][0]
                 for seed in range(40)]
    spread = np.std(values(estimates, "op"), ddof=1)
    assert np.mean(values(estimates, "op_se")) == pytest.approx(spread, rel=0.25)


def test_norms_of_shuffled_text_are_zero_within_their_errors():
    source = Copying(0.9)
    tokens = np.random.default_rng(1).permutation(source.sample(500_000, seed=3))
    corpus = cut(tokens, 1000, source.vocab_size)
    estimate = estimate_lag(corpus, 1)
    assert abs(estimate["op"]) < 4 * estimate["op_se"] and not estimate["usable"]


def test_text_is_read_without_bos_up_to_max_tokens_in_complete_documents():
    arrays = np.random.default_rng(0).integers(0, 9, (100, 10))
    shards = [(np.insert(part, 0, 9, axis=1).ravel(), np.arange(0, 551, 11))
              for part in (arrays[:50], arrays[50:])]
    corpus = read_corpus(shards, 10, max_tokens=551)
    assert sorted(corpus.tokens.reshape(-1, 10).tolist()) == sorted(arrays[:56].tolist())


def test_bounds_hold_the_entropies_of_a_renewal_process_and_a_markov_chain():
    renewal, chain = Renewal(vocab_size=6, longest=16, decay=0.7), Markov(40)
    exact = [renewal.entropy(1), renewal.entropy(2)]
    for text, (one, two) in ((cut(renewal.sample(1_000_000, seed=1), 1000, 6), exact),
                             (chain.sample(2000, 500, seed=1), [chain.entropy()] * 2)):
        upper, lower = bound_entropies(text)
        assert -0.001 < upper - one < 0.02 and -0.001 < two - lower < 0.02  # sampling: 0.0003
    assert bound_entropies(Markov(9).sample(100, 100, seed=0)) is None


def test_the_upper_bound_is_the_cross_entropy_of_the_held_out_fold(monkeypatch):
    """Against counting in Python, on a text so small that many pairs and tokens are new."""
    monkeypatch.setattr(corpus, "MIN_NGRAM_TOKENS", 0)
    text = Corpus.of(list(np.random.default_rng(0).zipf(1.3, (90, 30)) % 50), 50)
    halves = {True: [], False: []}
    for start, stop, fold in zip(text.offsets, text.offsets[1:], text.hashes % 3, strict=False):
        halves[bool(fold == 2)] += pairwise(text.tokens[start:stop].tolist())
    pairs, single = Counter(halves[False]), Counter(right for _, right in halves[False])
    total, types = Counter(left for left, _ in halves[False]), Counter(left for left, _ in pairs)
    nats = 0
    for left, right in halves[True]:
        one = (single[right] + 1) / (len(halves[False]) + 50)
        seen = total[left] + types[left]
        nats -= np.log((pairs[left, right] + types[left] * one) / seen if seen else one)
    assert bound_entropies(text)[0] == pytest.approx(nats / len(halves[True]), rel=1e-9)
