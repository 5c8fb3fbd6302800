import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lane_b_sources import Copying, Markov, Renewal, cut

from nanochat.lane_b import Refusal
from nanochat.lane_b.measure.corpus import from_documents, from_shards, outliers
from nanochat.lane_b.measure.correlation import (
    SUBSPACE,
    Covariance,
    counters_of,
    estimate_lags,
    null_coefficient,
    top_singular,
)
from nanochat.lane_b.measure.counting import PairCounter, count_pairs, document_sums
from nanochat.lane_b.measure.documents import from_arrays
from nanochat.lane_b.measure.fit import fit_power_law, slopes, weights_of

COPYING_LAGS = 2 ** np.arange(7)

token_arrays = st.lists(
    hnp.arrays(np.uint16, st.integers(2, 40), elements=st.integers(0, 6)), min_size=1, max_size=12)


def estimate_lag(documents, lag):
    return estimate_lags(counters_of(from_documents(documents)), [lag])[0]


def counts_by_hand(arrays, lag, vocab_size):
    counts = np.zeros((vocab_size, vocab_size), int)
    for array in arrays:
        for left, right in zip(array, array[lag:], strict=False):
            counts[left, right] += 1
    return counts


@settings(deadline=None, max_examples=50)
@given(token_arrays, st.integers(1, 45))
def test_counts_equal_counting_by_hand(arrays, lag):
    assert (count_pairs(from_arrays(arrays, 7), lag).toarray() == counts_by_hand(arrays, lag, 7)).all()


@settings(deadline=None, max_examples=50)
@given(token_arrays, st.integers(1, 10), st.integers(0, 12))
def test_counts_of_parts_add_up_to_those_of_the_whole(arrays, lag, split):
    whole = count_pairs(from_arrays(arrays, 7), lag)
    parts = [count_pairs(from_arrays(part, 7), lag) for part in (arrays[:split], arrays[split:]) if part]
    assert (sum(parts[1:], parts[0]) != whole).nnz == 0


def test_counts_do_not_depend_on_how_the_text_is_cut_into_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    documents = from_arrays([rng.integers(0, 50, rng.integers(2, 300)) for _ in range(200)], 50)
    monkeypatch.setattr("nanochat.lane_b.measure.counting._COUNT_TOKENS", 1000)
    counter = PairCounter(from_documents(documents), np.arange(200))
    assert (counter.counts(3) != count_pairs(documents, 3)).nnz == 0


def test_counts_reach_the_largest_vocabulary():
    documents = from_arrays([np.array([65535, 0, 65535, 65535], np.uint16)], 65536)
    counts = count_pairs(documents, 1)
    assert (counts[65535, 0], counts[0, 65535], counts[65535, 65535], counts.sum()) == (1, 1, 1, 3)


@settings(deadline=None, max_examples=50)
@given(token_arrays, st.integers(1, 45))
def test_document_sums_equal_sums_by_hand(arrays, lag):
    documents = from_arrays(arrays, 7)
    left, right = np.random.default_rng(0).standard_normal((2, 7, 3)).astype(np.float32)
    sums = document_sums(documents, lag, left, right)
    for i, total in enumerate(sums):
        tokens = documents.tokens[documents.offsets[i]:documents.offsets[i + 1]]
        expected = (left[tokens[:-lag]] * right[tokens[lag:]]).sum(axis=0)
        np.testing.assert_allclose(total, expected, atol=1e-4)


def test_pairs_never_touch_bos_and_never_cross_documents():
    bos, shard = 9, np.array([9, 1, 2, 3, 9, 4, 9, 5, 6, 9], np.uint16)
    documents = from_shards_unchecked([(shard, np.array([0, 4, 6, 9, 10]))], bos)
    assert documents.n_documents == 2 and bos not in documents.tokens
    counts = count_pairs(documents, 1).toarray()
    assert counts.sum() == 3 and counts[1, 2] == counts[2, 3] == counts[5, 6] == 1


def test_folds_and_order_depend_on_the_text_alone():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 50, 30).astype(np.uint16) for _ in range(60)]
    one, other = from_arrays(arrays, 50), from_arrays(arrays[::-1], 50)
    assert (one.tokens == other.tokens).all() and (one.folds == other.folds).all()
    assert set(one.folds) == {0, 1, 2}


def test_first_tokens_are_whole_documents_and_a_cut_one():
    documents = from_arrays([np.full(10, i, np.uint16) for i in range(4)], 4)
    part = documents.first(25)
    assert part.n_tokens == 25 and list(part.lengths) == [10, 10, 5]
    assert documents.first(20).n_documents == 2 and documents.first(1000) is documents


def test_covariance_times_and_inner_equal_dense_algebra():
    rng = np.random.default_rng(0)
    documents = from_arrays([rng.integers(0, 30, 200) for _ in range(20)], 30)
    halves = [documents.select(np.arange(20) % 2 == i) for i in (0, 1)]
    a, b = (Covariance(count_pairs(half, 2)) for half in halves)
    dense_a, dense_b = (counts.toarray() / counts.sum() - np.outer(
        counts.sum(axis=1), counts.sum(axis=0)) / counts.sum() ** 2 for counts in (a.counts, b.counts))
    v = rng.standard_normal((30, 2))
    np.testing.assert_allclose(a.times(v), dense_a @ v, atol=1e-15)
    np.testing.assert_allclose(a.transposed_times(v[:, 0]), dense_a.T @ v[:, 0], atol=1e-15)
    assert a.inner(b) == pytest.approx((dense_a * dense_b).sum(), rel=1e-10)


@pytest.mark.parametrize("size", [5, 200])
def test_top_singular_equals_lapack(size):
    rng = np.random.default_rng(1)
    documents = from_arrays([np.minimum(rng.geometric(0.1, 300), size) - 1 for _ in range(30)], size)
    covariance = Covariance(count_pairs(documents, 1))
    dense = covariance.times(np.eye(size))
    u, s, v = top_singular(covariance, 2, steps=60)
    np.testing.assert_allclose(s, np.linalg.svd(dense)[1][:2], rtol=1e-8)
    np.testing.assert_allclose(dense @ v, u * s, atol=1e-10)


def test_top_singular_of_rank_one_and_of_nothing():
    documents = from_arrays([np.array([i % 2, 1 - i % 2] * 50) for i in range(4)], 2)
    assert top_singular(Covariance(count_pairs(documents, 1)), 1)[1][0] > 0.2
    constant = from_arrays([np.zeros(50, np.uint16)], 2)
    assert top_singular(Covariance(count_pairs(constant, 1)), 1)[1][0] == pytest.approx(0, abs=1e-12)


def test_folds_take_turns_in_giving_directions_choosing_among_them_and_measuring():
    """By dense algebra on text without correlations, where each fold's noise points elsewhere."""
    rng = np.random.default_rng(0)
    documents = from_arrays([rng.integers(0, 12, 40) for _ in range(60)], 12)
    counts = [count_pairs(documents.select(documents.folds == fold), 2).toarray() for fold in range(3)]
    a, b, c = (n / n.sum() - np.outer(n.sum(axis=1), n.sum(axis=0)) / n.sum() ** 2 for n in counts)
    op = 0.0
    for directions, choice, strength in ((a, b, c), (b, c, a), (c, a, b)):
        u, _, vt = np.linalg.svd(directions)
        u, vt = u[:, :SUBSPACE], vt[:SUBSPACE]
        left, _, right = np.linalg.svd(u.T @ choice @ vt.T)
        op += (u @ left[:, 0]) @ strength @ (right[0] @ vt) / 3
    estimate = estimate_lag(documents, 2)
    assert estimate.op == pytest.approx(op, rel=1e-9)
    assert estimate.frobenius_squared == pytest.approx(((a * b).sum() + (b * c).sum() + (c * a).sum()) / 3, rel=1e-9)


@pytest.mark.parametrize("exponent, exact", [(0.9, 0.593), (1.5, 0.958)])
def test_exponent_of_a_copying_source_is_recovered(exponent, exact):
    source = Copying(exponent)
    norms = source.operator_norm(COPYING_LAGS)
    assert fit_power_law(COPYING_LAGS, norms).slope == pytest.approx(exact, abs=5e-4)
    documents = cut(source.sample(4_000_000, seed=0), 2000, source.vocab_size)
    null = null_coefficient(from_documents(documents)) / np.sqrt(documents.n_tokens)
    counters = counters_of(from_documents(documents))
    estimates = estimate_lags(counters, COPYING_LAGS.tolist())
    frobenius, error = (np.array([getattr(e, name) for e in estimates]) for name in ("frobenius", "frobenius_se"))
    assert (np.abs(frobenius - source.frobenius_norm(COPYING_LAGS)) < 4 * error).all()
    assert fit_power_law(COPYING_LAGS, frobenius).slope == pytest.approx(exact, abs=0.03)
    usable = np.array([e.is_usable(null) for e in estimates])
    assert usable.sum() >= 6  # at lag 64 noise hides the directions of a corpus this small
    op, op_se = (np.array([getattr(e, name) for e in estimates])[usable] for name in ("op", "op_se"))
    assert (np.abs(op - norms[usable]) < 4 * op_se).all()
    slope, expected = slopes(COPYING_LAGS[usable], [op, norms[usable]], weights_of(op, op_se))
    assert slope == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("exponent, exact", [(0.9, 0.593), (1.5, 0.958)])
def test_exponent_of_a_copying_source_is_recovered_at_16m_tokens(exponent, exact):
    source = Copying(exponent)
    counters = counters_of(from_documents(cut(source.sample(16_000_000, seed=3), 2000, source.vocab_size)))
    estimates = estimate_lags(counters, COPYING_LAGS.tolist())
    slope = fit_power_law(COPYING_LAGS, [e.op for e in estimates]).slope
    plug_in = fit_power_law(COPYING_LAGS, [e.plug_in for e in estimates]).slope
    print(f"exact {exact}, cross-fitted {slope:.4f}, plug-in {plug_in:.4f}")
    assert slope == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_correlation_of_a_markov_chain_is_recovered(lag):
    source = Markov(40)
    estimate = estimate_lag(from_arrays(list(source.sample(3000, 400, seed=1)), 40), lag)
    exact = source.covariance(lag)
    assert abs(estimate.op - np.linalg.norm(exact, 2)) < 4 * estimate.op_se
    assert abs(estimate.frobenius - np.linalg.norm(exact)) < 4 * estimate.frobenius_se


@pytest.mark.parametrize("lag", [1, 2, 8, 32, 64])
def test_correlation_of_a_capped_renewal_process_is_recovered(lag):
    source = Renewal(vocab_size=12, longest=64, decay=0.7)
    estimate = estimate_lag(cut(source.sample(2_000_000, seed=0), 1000, 12), lag)
    exact = abs(source.correlation(lag)[lag]) * np.sqrt(11) / 12
    assert abs(estimate.frobenius - exact) < 4 * estimate.frobenius_se


def test_standard_errors_are_the_spread_over_independent_corpora():
    source = Markov(60, concentration=0.5)
    estimates = [estimate_lag(from_arrays(list(source.sample(600, 100, seed)), 60), 2)
                 for seed in range(100)]
    for value, error in (("op", "op_se"), ("frobenius", "frobenius_se")):
        spread = np.std([getattr(e, value) for e in estimates], ddof=1)
        assert np.mean([getattr(e, error) for e in estimates]) == pytest.approx(spread, rel=0.25)


def test_cross_fitted_norms_of_shuffled_text_are_zero_within_their_errors():
    source = Copying(0.9)
    documents = cut(source.sample(500_000, seed=3), 1000, source.vocab_size).shuffled(np.random.default_rng(1))
    estimate = estimate_lag(documents, 1)
    null = null_coefficient(from_documents(documents)) / np.sqrt(estimate.n_pairs)
    assert abs(estimate.op) < 4 * estimate.op_se and not estimate.is_usable(null)
    assert estimate.plug_in == pytest.approx(null, rel=0.15)
    assert abs(estimate.frobenius_squared) < 4 * estimate.frobenius_squared_noise


def test_long_documents_full_of_one_token_are_outliers():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 1000, 2000) for _ in range(40)]
    arrays.append(np.where(rng.random(9467) < 0.31, 7, rng.integers(0, 1000, 9467)))
    arrays.append(np.array([7, 7, 7, 1]))
    corpus = from_documents(from_arrays([array.astype(np.uint16) for array in arrays], 1000))
    assert list(corpus.lengths[outliers(corpus)]) == [9467]
    without = corpus.without(outliers(corpus))
    assert without.n_documents == 41 and without.token_counts.sum() == without.n_tokens == corpus.n_tokens - 9467


def test_a_token_frequent_everywhere_makes_no_outliers():
    rng = np.random.default_rng(0)
    arrays = [np.where(rng.random(800) < 0.25, 7, rng.integers(0, 1000, 800)).astype(np.uint16) for _ in range(40)]
    assert not outliers(from_documents(from_arrays(arrays, 1000))).any()


def shard(arrays, bos):
    tokens = np.concatenate([np.concatenate([[bos], array]) for array in arrays]).astype(np.uint16)
    return tokens, np.concatenate([[0], np.cumsum([len(array) + 1 for array in arrays])])


def from_shards_unchecked(shards, bos):
    """from_shards, without its refusal of small corpora."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.lane_b.measure.corpus.MIN_DOCUMENTS", 0)
        corpus = from_shards(shards, bos, 10, max_tokens=1000)
        return corpus.read(np.arange(corpus.n_documents))


def test_max_tokens_takes_whole_documents_in_order():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 9, 10) for _ in range(100)]
    corpus = from_shards([shard(arrays[:50], 9), shard(arrays[50:], 9)], 9, 10, max_tokens=551)
    assert corpus.n_documents == 56
    documents = corpus.read(np.arange(56))
    assert {t.tobytes() for t in documents.tokens.reshape(-1, 10)} == {
        a.astype(np.uint16).tobytes() for a in arrays[:56]}


@pytest.mark.parametrize("arrays, vocab_size, words", [
    ([np.arange(50)], 100, "only 1 different document"),
    ([np.arange(50)] * 60, 100, "only 1 different document"),
    ([np.zeros(50 + i) for i in range(60)], 100, "one token makes up 100% of the text"),
    ([np.arange(50)], 65_537, "above 65,536"),
])
def test_text_without_variety_is_refused(arrays, vocab_size, words):
    with pytest.raises(Refusal, match=words) as refusal:
        from_shards([shard(arrays, 99)], 99, vocab_size, max_tokens=10 ** 6)
    assert refusal.value.exit_code == 3
