"""The plan of rows: the packing rule, what becomes of cropped documents, states, counts."""

import json
from collections import Counter
from itertools import count, groupby

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import make_shards

from nanochat import packing
from nanochat.common import UserError
from nanochat.packing import CROPS, DocumentOrder, RowPlanner

lengths_strategy = st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=1, max_size=4).filter(any)
property_test = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
shapes = given(lengths=lengths_strategy, row_tokens=st.integers(2, 50), seed=st.integers(0, 2**40),
               shuffle=st.booleans(), buffer_documents=st.integers(1, 20), crop=st.sampled_from(CROPS))


@pytest.fixture
def shards(tmp_path):
    lengths = np.random.default_rng(5).integers(1, 60, (3, 40))
    return make_shards(tmp_path / "shards", [row.tolist() for row in lengths])


def spelled_out(planner, row):
    """A row's tokens as (shard, document, position); a BOS put in front is (shard, document, None)."""
    tokens = []
    for shard, document, start, length in row:
        positions = list(range(start, start + length))
        if start or length == 1 < planner.order.length(shard, document):
            positions[0] = None
        tokens += [(shard, document, position) for position in positions]
    assert len(tokens) == planner.row_tokens
    return tokens


def next_rows(planner, n_rows):
    return [spelled_out(planner, planner.next_row()) for _ in range(n_rows)]


def packed_by_brute_force(order, n_rows, row_tokens, buffer_size, crop):
    """The packing rule in its plainest form: a buffer of lists of tokens, the oldest first."""
    def drawn():
        for number in count():
            length, shard, document = order.draw()
            yield number // order.n_docs, [(shard, document, position) for position in range(length)]

    epochs = groupby(drawn(), key=lambda pair: pair[0])
    documents, buffer, rows = iter(()), [], []
    while len(rows) < n_rows:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_size:
                following = next(documents, None)
                if following is not None:
                    buffer.append(following[1])
                elif crop == "drop" or not buffer:
                    documents = next(epochs)[1]
                else:
                    break
            space = row_tokens - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            chosen = (max(fitting, key=len) if fitting  # the first among equals
                      else buffer[0] if crop == "carry" else min(buffer, key=len))
            buffer.remove(chosen)
            shard, document, first = chosen[0]
            rest = chosen[space:]
            if rest and space == 1:
                row.append((shard, document, None))
                rest = chosen[1:] if first is None else chosen
            else:
                row += chosen[:space]
            if rest and crop == "carry":
                starts_anew = rest[0][2] in (0, None)
                buffer.append(rest if starts_anew else [(shard, document, None), *rest])
        rows.append(row)
    return rows


@property_test
@shapes
def test_rows_obey_the_packing_rule(tmp_path, monkeypatch, lengths, row_tokens, seed, shuffle, buffer_documents, crop):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", buffer_documents)
    shards = make_shards(tmp_path / "s", lengths)
    planner = RowPlanner(shards, row_tokens, seed, shuffle, crop)
    expected = packed_by_brute_force(DocumentOrder(shards, seed, shuffle), 60, row_tokens, planner.buffer_size, crop)
    assert next_rows(planner, 60) == expected


@property_test
@shapes
def test_carrying_serves_every_token_once_in_every_epoch(
        tmp_path, monkeypatch, lengths, row_tokens, seed, shuffle, buffer_documents, crop):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", buffer_documents)
    planner = RowPlanner(make_shards(tmp_path / "s", lengths), row_tokens, seed, shuffle, "carry")
    every_token = Counter((shard, document, position) for shard, in_shard in enumerate(lengths)
                          for document, length in enumerate(in_shard) for position in range(length))
    served = []
    while len(served) < 2 * len(every_token):
        served += [token for token in next_rows(planner, 1)[0] if token[2] is not None]
        assert planner.counts() == (len(served), min(len(served), len(every_token)))
    assert Counter(served[:len(every_token)]) == every_token
    assert Counter(served[len(every_token):2 * len(every_token)]) == every_token


@property_test
@shapes
def test_dropping_serves_beginnings_once_an_epoch_and_counts_what_is_new(
        tmp_path, monkeypatch, lengths, row_tokens, seed, shuffle, buffer_documents, crop):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", buffer_documents)
    planner = RowPlanner(make_shards(tmp_path / "s", lengths), row_tokens, seed, shuffle, "drop")
    uses, tokens = Counter(), set()
    for n_rows in range(1, 60):
        row = planner.next_row()
        uses.update(segment[:2] for segment in row)
        tokens |= {(*segment[:2], position) for segment in row for position in range(segment[3])}
        assert all(segment[2] == 0 for segment in row)
        assert planner.counts() == (n_rows * row_tokens, len(tokens))
    assert max(uses.values()) <= planner.order.epoch + 1


@property_test
@shapes
def test_a_restored_planner_goes_on_from_any_row(
        tmp_path, monkeypatch, lengths, row_tokens, seed, shuffle, buffer_documents, crop):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", buffer_documents)
    shards = make_shards(tmp_path / "s", lengths)
    straight = RowPlanner(shards, row_tokens, seed, shuffle, crop)
    for n_rows in (0, 1, 2, 7, 30):
        next_rows(straight, n_rows)
        state = json.loads(json.dumps(straight.state_dict(straight.snapshot(), *straight.counts())))
        restored = [RowPlanner(shards, row_tokens, seed, shuffle, crop, state)]
        if crop == "drop":
            restored.append(RowPlanner(shards, row_tokens, seed, shuffle, crop, of_the_version_before(state)))
        expected = [(next_rows(straight, 1), straight.counts()) for _ in range(10)]
        for planner in restored:
            assert [(next_rows(planner, 1), planner.counts()) for _ in range(10)] == expected


def of_the_version_before(state):
    """The state of a loader that knew neither crops nor counts."""
    return {"documents": state["documents"], "epoch": state["epoch"], "position": state["position"],
            "buffer": [[shard, document] for shard, document, _ in state["buffer"]]}


def test_a_state_of_the_other_crop_is_refused(shards):
    planner = RowPlanner(shards, 20, 0, True, "carry")
    state = planner.state_dict(planner.snapshot(), *planner.counts())
    with pytest.raises(UserError, match="state is of --crop carry, not drop; resume with --crop carry"):
        RowPlanner(shards, 20, 0, True, "drop", state)
    dropping = RowPlanner(shards, 20, 0, True, "drop")
    state = of_the_version_before(dropping.state_dict(dropping.snapshot(), *dropping.counts()))
    with pytest.raises(UserError, match="resume with --crop drop"):
        RowPlanner(shards, 20, 0, True, "carry", state)


@pytest.fixture(scope="module")
def novels(tmp_path_factory):
    """Nine novels as the text folder cuts them: pieces of 20,000 characters, four or so a token."""
    lengths = np.random.default_rng(1).integers(4_500, 6_000, 9 * 25).tolist()
    return make_shards(tmp_path_factory.mktemp("novels"), [lengths[:80], lengths[80:160], lengths[160:]])


def test_an_epoch_of_nine_novels_is_all_of_their_text_once(novels):
    planner, uses = RowPlanner(novels, 257, 42, True, "carry"), Counter()
    n_tokens = sum(shard.n_tokens for shard in novels)
    while planner.counts()[0] < n_tokens:
        uses.update(token for token in next_rows(planner, 1)[0] if token[2] is not None)
    assert planner.counts()[1] == len(uses) == n_tokens
    assert uses.total() - n_tokens < 257, "none but the last row's end is of the next epoch"
    dropping = RowPlanner(novels, 257, 42, True, "drop")
    next_rows(dropping, n_tokens // 256)
    assert dropping.counts()[1] < 0.05 * n_tokens


def test_neighbouring_rows_are_of_many_documents(novels):
    """A batch of rows from one document would be a batch of near-copies to the optimizer."""
    planner = RowPlanner(novels, 257, 42, True, "carry")
    for _ in range(20):
        assert len({token[:2] for row in next_rows(planner, 64) for token in row}) >= 40


def test_every_epoch_is_a_new_permutation_shard_after_shard(shards):
    order = DocumentOrder(shards, seed=3, shuffle=True)
    epochs = [[order.draw()[1:] for _ in range(120)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(shard, document) for shard in range(3) for document in range(40)]
        assert all(len({shard for shard, _ in epoch[at:at + 40]}) == 1 for at in (0, 40, 80))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other_seed = DocumentOrder(shards, seed=4, shuffle=True)
    assert [other_seed.draw()[1:] for _ in range(120)] != epochs[0]


def test_the_order_of_a_seed_is_the_same_everywhere_and_for_ever(shards):
    order = DocumentOrder(shards, seed=42, shuffle=True)
    assert [order.draw()[1:] for _ in range(6)] == [(1, 26), (1, 29), (1, 13), (1, 3), (1, 10), (1, 36)]


def test_the_fingerprint_of_documents_is_the_one_in_checkpoints_already_written(shards):
    assert DocumentOrder(shards, seed=42, shuffle=True).fingerprint == "5dcad1729140f06f"


@pytest.mark.parametrize("position", [0, 1, 39, 40, 41, 119, 120])
def test_seeking_continues_the_order_anywhere(shards, position):
    straight, sought = (DocumentOrder(shards, seed=1, shuffle=True) for _ in range(2))
    for _ in range(120 + position):
        straight.draw()
    sought.seek(1, position)
    assert [sought.draw() for _ in range(200)] == [straight.draw() for _ in range(200)]
