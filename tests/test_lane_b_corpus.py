"""Counts of a text against sources whose correlations and entropies are known in closed form."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lane_b_sources import Copying, Markov, Renewal, cut

from nanochat.lane_b.corpus import (
    Corpus,
    Covariance,
    Fold,
    bound_entropies,
    estimate_lags,
    find_outliers,
    null_coefficient,
    read_corpus,
    witten_bell,
)
from nanochat.lane_b.statistics import fit_power_law

COPYING_LAGS = (2 ** np.arange(7)).tolist()
documents = st.lists(hnp.arrays(int, st.integers(3, 40), elements=st.integers(0, 6)),
                     min_size=1, max_size=12)


def estimate_lag(corpus, lag):
    return estimate_lags(corpus, [lag], null_coefficient(corpus))[0][0]


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
    counts = [Fold(Corpus.of(list(rng.integers(0, 30, (20, 200))), 30), rng).count(2)
              for _ in range(2)]
    a, b = map(Covariance, counts)
    joints = [n.toarray() / n.sum() for n in counts]
    dense_a, dense_b = (n - np.outer(n.sum(axis=1), n.sum(axis=0)) for n in joints)
    np.testing.assert_allclose(a.times(np.eye(30)), dense_a, atol=1e-15)
    assert a.inner(b) == pytest.approx((dense_a * dense_b).sum(), rel=1e-10)
    u, s, v = a.top_singular(3, n_iterations=200)
    np.testing.assert_allclose(s, np.linalg.svd(dense_a)[1][:3], rtol=1e-8)
    np.testing.assert_allclose(dense_a @ v, u * s, atol=1e-10)


@pytest.mark.parametrize("exponent, exact", [(0.9, 0.593), (1.5, 0.958)])
def test_exponent_of_a_copying_source(exponent, exact):
    source = Copying(exponent)
    norms = source.operator_norm(COPYING_LAGS)
    assert fit_power_law(COPYING_LAGS, norms).slope == pytest.approx(exact, abs=5e-4)
    corpus = cut(source.sample(4_000_000, seed=0), 2000, source.vocab_size)
    estimates, _ = estimate_lags(corpus, COPYING_LAGS, null_coefficient(corpus))
    frobenius, error = values(estimates, "frobenius"), values(estimates, "frobenius_se")
    assert (np.abs(frobenius - source.frobenius_norm(COPYING_LAGS)) < 4 * error).all()
    assert fit_power_law(COPYING_LAGS, frobenius).slope == pytest.approx(exact, abs=0.03)
    usable = values(estimates, "usable")
    assert usable.sum() >= 6  # noise hides the directions at lag 64 of a text this small
    lags, norms = np.array(COPYING_LAGS)[usable], norms[usable]
    op, op_se = values(estimates, "op")[usable], values(estimates, "op_se")[usable]
    assert (np.abs(op - norms) < 4 * op_se).all()
    slope = fit_power_law(lags, op, op_se / op).slope
    assert slope == pytest.approx(fit_power_law(lags, norms, op_se / op).slope, abs=0.03)


@pytest.mark.parametrize("lag", [1, 3])
def test_correlation_of_a_markov_chain(lag):
    source = Markov(40)
    estimate = estimate_lag(source.sample(3000, 400, seed=1), lag)
    exact = source.covariance(lag)
    assert abs(estimate["op"] - np.linalg.norm(exact, 2)) < 4 * estimate["op_se"]
    assert abs(estimate["frobenius"] - np.linalg.norm(exact)) < 4 * estimate["frobenius_se"]


@pytest.mark.parametrize("lag", [1, 8, 64])
def test_correlation_of_a_capped_renewal_process(lag):
    source = Renewal(vocab_size=12, longest=64, decay=0.7)
    estimate = estimate_lag(cut(source.sample(2_000_000, seed=0), 1000, 12), lag)
    exact = abs(source.correlation(lag)[lag]) * np.sqrt(11) / 12
    assert abs(estimate["frobenius"] - exact) < 4 * estimate["frobenius_se"]


def test_standard_errors_are_the_spread_over_independent_texts():
    source = Copying(0.9, vocab_size=500)
    estimates = [estimate_lags(cut(source.sample(100_000, seed), 500, 500), [1], 0.0)[0][0]
                 for seed in range(40)]
    for name in ("op", "frobenius"):
        spread = np.std(values(estimates, name), ddof=1)
        assert np.mean(values(estimates, f"{name}_se")) == pytest.approx(spread, rel=0.25)


def test_norms_of_shuffled_text_are_zero_within_their_errors():
    source = Copying(0.9)
    tokens = np.random.default_rng(1).permutation(source.sample(500_000, seed=3))
    corpus = cut(tokens, 1000, source.vocab_size)
    estimate = estimate_lag(corpus, 1)
    assert abs(estimate["op"]) < 4 * estimate["op_se"] and not estimate["usable"]
    fold = Fold(corpus, np.random.default_rng(0))
    plug_in = Covariance(fold.count(1)).top_singular()[1][0]
    assert plug_in * np.sqrt(estimate["n_pairs"]) == pytest.approx(
        null_coefficient(corpus), rel=0.25)


def test_long_documents_full_of_one_token_are_outliers():
    rng = np.random.default_rng(0)
    arrays = list(rng.integers(0, 1000, (40, 2000)))
    arrays.append(np.where(rng.random(9467) < 0.31, 7, rng.integers(0, 1000, 9467)))
    arrays.append(np.array([7, 7, 7, 1]))
    corpus = Corpus.of(arrays, 1000)
    assert list(corpus.lengths[find_outliers(corpus)]) == [9467]
    frequent = np.where(rng.random((40, 800)) < 0.25, 7, rng.integers(0, 1000, (40, 800)))
    assert not find_outliers(Corpus.of(list(frequent), 1000)).any()


def test_text_is_read_without_bos_up_to_max_tokens_in_complete_documents():
    arrays = np.random.default_rng(0).integers(0, 9, (100, 10))
    shards = [(np.insert(part, 0, 9, axis=1).ravel(), np.arange(0, 551, 11))
              for part in (arrays[:50], arrays[50:])]
    corpus = read_corpus(shards, 10, max_tokens=551)
    assert sorted(corpus.tokens.reshape(-1, 10).tolist()) == sorted(arrays[:56].tolist())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60),
       st.integers(0, 5))
def test_witten_bell_equals_its_definition(pairs, head):
    keys = np.array([first << 21 | last for first, last in pairs])  # 21 bits per token
    queries = np.array([head << 21 | last for last in range(5)])
    probability, entropy = witten_bell(keys, queries, np.full(5, 0.2))
    after = Counter(last for first, last in pairs if first == head)
    n, types = after.total(), len(after)
    expected = [(after[last] + types * 0.2) / (n + types) if n else 0.2 for last in range(5)]
    np.testing.assert_allclose(probability, expected, atol=1e-12)
    nats = [-np.log(count / sum(first == pair[0] for first, _ in pairs)) * count
            for pair, count in Counter(pairs).items()]
    assert entropy == pytest.approx(sum(nats) / len(pairs))


def test_bounds_hold_the_entropies_of_a_renewal_process_and_a_markov_chain():
    renewal, chain = Renewal(vocab_size=6, longest=16, decay=0.7), Markov(40)
    exact = [renewal.entropy(1), renewal.entropy(2)]
    for corpus, entropies in ((cut(renewal.sample(1_000_000, seed=1), 1000, 6), exact),
                              (chain.sample(2000, 500, seed=1), [chain.entropy()] * 2)):
        for bound, entropy in zip(bound_entropies(corpus), entropies, strict=True):
            assert bound["lo"] < entropy < bound["hi"] < bound["lo"] + 0.2
    assert bound_entropies(Markov(9).sample(100, 100, seed=0)) == []
