import json
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lane_b_sources import Markov, OrderTwo, Renewal, cut

from nanochat.common import UserError
from nanochat.lane_b import Refusal
from nanochat.lane_b.measure.corpus import from_documents
from nanochat.lane_b.measure.documents import from_arrays
from nanochat.lane_b.measure.entropy import (
    PositionLosses,
    bracket_of,
    context_grid,
    entropies_by_position,
    ngram_sizes,
    score_ngrams,
)
from nanochat.lane_b.measure.fit import fit_power_law
from nanochat.lane_b.measure.kneser_ney import KneserNey, ngram_keys
from nanochat.lane_b.measure.position_losses import check_same_model, check_same_text, read_position_losses
from nanochat.runlog import RunLog

# --- Kneser-Ney against the definitions of Chen & Goodman, in dictionaries


class ByDefinition:
    def __init__(self, arrays, context, vocab_size):
        self.vocab_size, self.tables = vocab_size, {}
        ngrams = Counter(tuple(a[i:i + context + 1].tolist()) for a in arrays for i in range(len(a) - context))
        for length in range(context + 1, 0, -1):
            self.tables[length] = ngrams
            ngrams = Counter(ngram[1:] for ngram in ngrams)

    def probability(self, ngram):
        if not ngram:
            return 1 / self.vocab_size
        table, context = self.tables[len(ngram)], ngram[:-1]
        following = {key[-1]: count for key, count in table.items() if key[:-1] == context}
        shorter = self.probability(ngram[1:])
        if not following:
            return shorter
        discounts = self.discounts(table)
        total = sum(following.values())
        left_over = sum(discounts[min(count, 3)] for count in following.values()) / total
        own = following.get(ngram[-1], 0)
        return (own - discounts[min(own, 3)]) / total + left_over * shorter

    @staticmethod
    def discounts(table):
        n = defaultdict(int, Counter(table.values()))
        discounts = [0.0]
        for i in (1, 2, 3):
            if n[1] and n[i]:
                y = n[1] / (n[1] + 2 * n[2])
                discounts.append(min(max(i - (i + 1) * y * n[i + 1] / n[i], 0.05), i))
            else:
                discounts.append(0.5)
        return discounts


@settings(deadline=None, max_examples=60)
@given(st.lists(hnp.arrays(np.uint16, st.integers(2, 60), elements=st.integers(0, 5)), min_size=1, max_size=5),
       st.integers(1, 3))
def test_kneser_ney_equals_its_definition_and_sums_to_one(arrays, context):
    model, definition = KneserNey(from_arrays(arrays, 6), context), ByDefinition(arrays, context, 6)
    contexts = {tuple(a[i:i + context].tolist()) for a in arrays for i in range(len(a) - context)} | {(5,) * context}
    for head in sorted(contexts)[:8]:
        ngrams = [(*head, token) for token in range(6)]
        keys = [sum(token << 16 * (context - i) for i, token in enumerate(ngram)) for ngram in ngrams]
        probabilities = model.probability(np.array(keys, np.uint64))
        np.testing.assert_allclose(probabilities, [definition.probability(ngram) for ngram in ngrams], atol=1e-12)
        assert probabilities.sum() == pytest.approx(1) and (probabilities > 0).all()


def test_cross_entropy_equals_its_definition():
    rng = np.random.default_rng(0)
    train, test = ([rng.integers(0, 9, 80).astype(np.uint16) for _ in range(n)] for n in (20, 4))
    definition = ByDefinition(train, 2, 10)
    logs = [np.log(definition.probability(tuple(a[i:i + 3].tolist()))) for a in test for i in range(len(a) - 2)]
    mean, error = KneserNey(from_arrays(train, 10), 2).cross_entropy(from_arrays(test, 10))
    assert mean == pytest.approx(-np.mean(logs))
    assert error == pytest.approx(np.std(np.reshape(logs, (4, 78)).mean(axis=1)) / 2)


@given(st.lists(hnp.arrays(np.uint16, st.integers(1, 9), elements=st.integers(0, 65535)), min_size=1, max_size=6),
       st.integers(1, 4))
def test_ngrams_stay_within_documents(arrays, length):
    expected = Counter(tuple(a[i:i + length].tolist()) for a in arrays for i in range(len(a) - length + 1))
    documents = from_arrays(arrays, 65536)
    keys, document = ngram_keys(documents, length)
    found = Counter(tuple(int(key) >> 16 * (length - 1 - i) & 0xFFFF for i in range(length)) for key in keys)
    assert found == expected
    assert (np.bincount(document, minlength=len(arrays)) == np.maximum(documents.lengths - length + 1, 0)).all()


def test_cross_entropy_approaches_the_entropy_of_a_markov_chain():
    source = Markov(40)
    training, test = (from_arrays(list(source.sample(n, 500, seed)), 40) for seed, n in ((1, 2000), (2, 1000)))
    for context in (1, 2):
        assert KneserNey(training, context).cross_entropy(test)[0] == pytest.approx(source.entropy(), rel=0.01)


def test_cross_entropy_approaches_the_entropies_of_a_renewal_process():
    source = Renewal(vocab_size=6, longest=16, decay=0.7)
    training, test = (cut(source.sample(n, seed), 1000, 6) for seed, n in ((1, 2_000_000), (2, 2_000_000)))
    exact = [source.entropy(n) for n in (1, 2, 3)]
    assert exact[0] > exact[1] > exact[2] > source.entropy(16) == source.entropy(17)
    for context, entropy in zip((1, 2, 3), exact, strict=True):
        assert KneserNey(training, context).cross_entropy(test)[0] == pytest.approx(entropy, rel=0.01)


# --- the bracket

def bracket(documents):
    corpus = from_documents(documents)
    sizes = ngram_sizes(corpus)
    return bracket_of(sizes, {n: [score_ngrams(corpus, (n, size)) for size in sizes] for n in (1, 2)})


def check_order_two_bracket(n_documents):
    source = OrderTwo()
    h_1, h_2 = source.entropies()
    found = bracket(from_arrays(list(source.sample(n_documents, 500, seed=0)), source.vocab_size))
    for curve, exact in zip(found.curves, (h_1, h_2), strict=True):
        assert curve.lo < exact < curve.hi and 0 < curve.se < 0.01
    assert found.lo < np.log2(h_1 / h_2) < found.hi
    assert len(found.data_tokens) == 7


def test_bracket_covers_an_order_two_source():
    check_order_two_bracket(4000)


@pytest.mark.slow
def test_bracket_covers_an_order_two_source_at_16m_tokens():
    check_order_two_bracket(32000)


def curves(one, two, error=0.001):
    return {1: [(nats, error) for nats in one], 2: [(nats, error) for nats in two]}


def test_bracket_says_what_still_falls():
    falls = 0.1 * (2.0 ** np.arange(6, -1, -1) - 1)  # the last is 0.1, each half the one before
    found = bracket_of([2 ** k for k in range(7)], curves(5.0 + falls, 4.7 + 1.2 * falls))
    assert found.reason == "H_n at n=1 still falls 0.100 nats per data doubling (limit 0.02)"
    assert 0 <= found.lo < np.log2(5.0 / 4.7) < found.hi
    assert found.curves[0].extrapolated == pytest.approx(4.9, abs=0.01)
    assert found.curves[1].cross_entropies[0] == 5.0 + falls[0]  # the longer context could ignore its far end


def test_cross_entropies_far_from_their_limit_give_no_bracket():
    sizes = [2 ** k for k in range(7)]
    found = bracket_of(sizes, curves(np.linspace(8.0, 5.0, 7), np.linspace(8.0, 4.5, 7)))
    assert not found.is_bounded and found.lo is None and found.hi is None


def test_too_little_text_gives_no_sizes():
    rng = np.random.default_rng(0)
    assert ngram_sizes(from_documents(from_arrays([rng.integers(0, 9, 100) for _ in range(100)], 9))) == []


# --- losses by position

def losses(tokens, gamma=0.3, excess=0.0, positions=200, scale=5.0, counts=100_000, **ids):
    n = np.arange(positions)
    nats = scale * np.maximum(n, 0.5) ** -gamma + excess * (1 + n / 50)
    return PositionLosses(f"run-{tokens}", tokens, nats, np.full(positions, counts), **ids)


def test_gamma_of_converged_losses_is_recovered():
    found = entropies_by_position([losses(10 ** 8, excess=0.001), losses(10 ** 8 // 2, excess=0.002)])
    assert found.slope.value == pytest.approx(0.3, abs=0.01)
    assert found.slope.interval[0] < 0.3 < found.slope.interval[1]
    assert found.refusal is None and found.window[0].n == 1 and found.window[-1].n > 100


def test_gamma_of_a_renewal_process_is_the_slope_of_its_exact_entropies():
    source = Renewal(vocab_size=12, longest=400, decay=0.5)
    exact = np.array([2.0] + [source.entropy(n) for n in range(1, 65)])
    runs = [PositionLosses("p", tokens, exact + 50 / tokens, np.full(65, 10 ** 6)) for tokens in (10_000, 20_000)]
    found = entropies_by_position(runs)
    grid = context_grid(64)
    assert found.slope.value == pytest.approx(fit_power_law(grid, exact[grid]).slope, rel=0.03)


def test_gamma_uses_contexts_up_to_the_first_that_still_falls():
    whole, half = losses(10 ** 8), losses(10 ** 8 // 2)
    half.nats[12:] += 0.05
    found = entropies_by_position([whole, half])
    assert found.window[-1].n <= 11 and [p.is_converged for p in found.points].count(True) == len(found.window) == 7


def test_gamma_is_refused_where_fewer_than_three_contexts_converged():
    whole, half = losses(10 ** 8), losses(10 ** 8 // 2)
    half.nats[2:] += 0.041
    found = entropies_by_position([whole, half])
    assert found.slope is None
    assert found.refusal == "H_n at n=2 still falls 0.041 nats per data doubling (limit 0.02)"


def test_a_larger_run_that_is_worse_does_not_fall():
    whole, half = losses(10 ** 8), losses(10 ** 8 // 2)
    whole.nats[1:] += 0.03
    assert entropies_by_position([whole, half]).refusal.startswith(
        "H_n at n=1 is 0.030 nats higher from twice the data (limit 0.02)")


def test_gamma_is_refused_without_a_model_of_half_the_data():
    found = entropies_by_position([losses(10 ** 8), losses(10 ** 7)])
    assert "10,000,000, 100,000,000; add a run on about 50,000,000 tokens" in found.refusal and found.slope is None


def test_gamma_is_refused_where_losses_do_not_fall():
    found = entropies_by_position([losses(10 ** 8, gamma=0.0), losses(10 ** 8 // 2, gamma=0.0)])
    assert "do not clearly fall" in found.refusal


def test_few_validation_tokens_widen_the_interval():
    narrow, wide = (entropies_by_position([losses(10 ** 8, counts=c), losses(5 * 10 ** 7, counts=c)]).slope.se
                    for c in (10 ** 6, 10 ** 4))
    assert wide > 3 * narrow


def test_seeds_are_averaged_by_their_counts():
    first, second = losses(10 ** 8), losses(10 ** 8)
    second.nats[:] += 0.02
    found = entropies_by_position([first, second, losses(5 * 10 ** 7), losses(2 * 10 ** 7)])
    assert found.n_runs == 2 and found.n_runs_half == 1
    assert found.points[0].nats == pytest.approx(first.nats[1] + 0.01)


def test_an_offset_is_reported_as_the_range_it_would_give():
    whole, half = (losses(tokens, gamma=0.6, scale=2.0) for tokens in (10 ** 8, 5 * 10 ** 7))
    for loss in (whole, half):
        loss.nats[:] += 2.0
    note = entropies_by_position([whole, half]).offset_note
    assert note.startswith("offset H_inf not fitted: gamma would range 0.")


# --- reading them

EVENT = {"kind": "position_losses", "step": 10, "tokens": 1000, "nats_by_position": [7.0, 6.0, None],
         "counts_by_position": [4, 4, 0]}


def test_losses_are_read_from_a_run_and_from_a_file(tmp_path):
    log = RunLog.create(tmp_path, "a-run", {"dataset_id": "d", "tokenizer_id": "t"})
    fields = {key: value for key, value in EVENT.items() if key != "kind"}
    log.event("position_losses", **{**fields, "tokens": 500})
    log.event("position_losses", **fields)
    log.close()
    (tmp_path / "event.json").write_text(json.dumps(EVENT))
    by_id, by_folder, by_file = (read_position_losses(name, tmp_path) for name in (
        "a-run", str(tmp_path / "a-run"), str(tmp_path / "event.json")))
    assert (by_id.tokens, by_id.dataset_id, by_id.tokenizer_id) == (1000, "d", "t") == (
        by_folder.tokens, by_folder.dataset_id, by_folder.tokenizer_id)
    assert by_file.tokens == 1000 and by_file.dataset_id is None
    assert list(by_file.nats) == [7.0, 6.0, 0.0] and list(by_file.counts) == [4, 4, 0]


@pytest.mark.parametrize("change, words", [
    ({"tokens": None}, "`tokens` is None"), ({"tokens": 0}, "`tokens` is 0"), ({"tokens": "9"}, "`tokens` is '9'"),
    ({"counts_by_position": [4, 4]}, "two lists of the same length"), ({"nats_by_position": 3}, "two lists"),
    ({"counts_by_position": [4, -1, 0]}, "not a count"), ({"nats_by_position": [7.0, "6", None]}, "not a number"),
])
def test_what_is_no_event_is_named(tmp_path, change, words):
    (tmp_path / "event.json").write_text(json.dumps({**EVENT, **change}))
    with pytest.raises(UserError, match=words) as error:
        read_position_losses(str(tmp_path / "event.json"), tmp_path)
    assert error.value.exit_code == 2 and "event.json" in str(error.value)


@pytest.mark.parametrize("loss", [None, float("nan"), float("inf"), 0.0, -1.0])
def test_losses_that_are_not_positive_numbers_are_refused(tmp_path, loss):
    (tmp_path / "event.json").write_text(json.dumps({**EVENT, "nats_by_position": [7.0, loss, None]}))
    with pytest.raises(Refusal, match="with 1 tokens of context"):
        read_position_losses(str(tmp_path / "event.json"), tmp_path)


def test_text_that_is_not_json_is_named_with_its_line(tmp_path):
    (tmp_path / "event.json").write_text('{"tokens": 1000,\n oops}')
    with pytest.raises(UserError, match=r"event.json, line 2: not JSON"):
        read_position_losses(str(tmp_path / "event.json"), tmp_path)
    (tmp_path / "event.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        read_position_losses(str(tmp_path / "event.json"), tmp_path)


def test_a_run_without_losses_by_position_says_how_to_get_them(tmp_path):
    RunLog.create(tmp_path, "bare", {}).close()
    with pytest.raises(UserError, match="train it with --position-losses"):
        read_position_losses("bare", tmp_path)


@pytest.mark.parametrize("ids, words", [({"dataset_id": "other"}, "dataset other"),
                                        ({"tokenizer_id": "other"}, "tokenizer other")])
def test_losses_of_another_text_are_refused(ids, words):
    with pytest.raises(Refusal, match=f"entropy measured on another distribution .* {words}"):
        check_same_text([losses(100, **{"dataset_id": "d", "tokenizer_id": "t", **ids})], "d", "t")
    check_same_text([losses(100, dataset_id="d"), losses(100)], "d", "t")


def test_a_run_given_twice_is_refused(tmp_path):
    log = RunLog.create(tmp_path, "a-run", {})
    log.event("position_losses", **{key: value for key, value in EVENT.items() if key != "kind"})
    log.close()
    twice = [read_position_losses(name, tmp_path) for name in ("a-run", str(tmp_path / "a-run"))]
    with pytest.raises(Refusal, match="a-run is given 2 times"):
        check_same_model(twice)
    check_same_model(twice[:1])


def test_losses_of_different_models_are_refused():
    small, large = {"n_layer": 2}, {"n_layer": 4}
    runs = [replace(losses(100), name=name, model_config=config)
            for name, config in (("a", small), ("b", None), ("c", small), ("d", large))]
    check_same_model(runs[:3])
    with pytest.raises(Refusal, match="of a and d are of different models"):
        check_same_model(runs)
