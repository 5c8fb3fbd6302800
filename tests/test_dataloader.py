"""Rows against a brute-force packer; batches, loader states, ranks."""

import json
import subprocess
import sys
from collections import Counter
from itertools import count, groupby, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import BOS, LONGEST, make_shards

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import DocumentOrder, RowPlanner, TokenLoader, n_batches_of_rank

CROPS = ("carry", "drop")


@pytest.fixture
def shards(tmp_path):
    lengths = np.random.default_rng(5).integers(1, 60, (3, 40))
    return make_shards(tmp_path / "shards", [row.tolist() for row in lengths])


# --- rows

document_lengths = st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=1, max_size=4)
packings = st.fixed_dictionaries({
    "lengths": document_lengths.filter(any),
    "row_tokens": st.integers(2, 50),
    "seed": st.integers(0, 2**40),
    "shuffle": st.booleans(),
    "buffer_documents": st.integers(1, 20),
    "crop": st.sampled_from(CROPS),
})
property_test = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def planner_of(tmp_path, monkeypatch):
    """A function that builds the RowPlanner of a drawn packing."""
    def build(packing, **more):
        monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", packing["buffer_documents"])
        shards = make_shards(tmp_path / "drawn", packing["lengths"])
        arguments = {name: packing[name] for name in ("row_tokens", "seed", "crop", "shuffle")}
        return RowPlanner(shards, **{**arguments, **more})

    return build


def spell_out(planner, row):
    """Return a row's tokens as (shard, document, position); an added BOS has position None."""
    tokens = []
    for shard, document, start, length in row:
        positions = list(range(start, start + length))
        is_only_bos = length == 1 < planner.order.length(shard, document)
        if planner.crop == "carry" and (start or is_only_bos):
            positions[0] = None
        tokens += [(shard, document, position) for position in positions]
    return tokens


def next_rows(planner, n_rows):
    return [spell_out(planner, planner.next_row()) for _ in range(n_rows)]


def pack_by_brute_force(order, n_rows, row_tokens, buffer_size, crop, n_docs=None):
    """Apply the packing rule to lists of tokens; the buffer holds the oldest first."""
    def drawn():
        for number in islice(count(), n_docs):
            length, shard, document = order.draw()
            tokens = [(shard, document, position) for position in range(length)]
            yield number // order.n_docs, tokens

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
                    epoch = next(epochs, None)
                    if epoch is None:
                        break
                    documents = epoch[1]
                else:
                    break
            if not buffer:
                break
            space = row_tokens - len(row)
            fitting = [document for document in buffer if len(document) <= space]
            if fitting:
                chosen = max(fitting, key=len)  # the first of equal lengths
            else:
                chosen = buffer[0] if crop == "carry" else min(buffer, key=len)
            buffer.remove(chosen)
            rest = chosen[space:]
            if crop == "drop" or not rest:
                row += chosen[:space]
                continue
            shard, document, first = chosen[0]
            if space == 1:
                row.append((shard, document, None))
                rest = chosen[1:] if first is None else chosen
            else:
                row += chosen[:space]
            starts_with_bos = rest[0][2] in (0, None)
            buffer.append(rest if starts_with_bos else [(shard, document, None), *rest])
        rows.append(row)
    return rows


@property_test
@given(packings)
def test_rows_obey_the_packing_rule(planner_of, packing):
    planner = planner_of(packing)
    shards, seed, shuffle = planner.order._shards, packing["seed"], packing["shuffle"]
    arguments = 60, packing["row_tokens"], planner.buffer_size, packing["crop"]
    expected = pack_by_brute_force(DocumentOrder(shards, seed, shuffle), *arguments)
    assert next_rows(planner, 60) == expected


@property_test
@given(packings, st.data())
def test_one_pass_over_the_first_documents_ends(planner_of, packing, data):
    n_docs = data.draw(st.integers(1, sum(map(len, packing["lengths"]))))
    planner = planner_of(packing, n_docs=n_docs)
    order = DocumentOrder(planner.order._shards, packing["seed"], packing["shuffle"])
    arguments = packing["row_tokens"], planner.buffer_size, packing["crop"], n_docs
    rows = [spell_out(planner, row) for row in iter(planner.next_row, [])]
    expected = pack_by_brute_force(order, len(rows) + 2, *arguments)
    assert [*rows, [], []] == expected
    uses = Counter(token for row in rows for token in row if token[2] is not None)
    assert set(uses.values()) == {1}
    if packing["crop"] == "carry":
        order.seek(0, 0)
        assert uses.total() == sum(order.draw()[0] for _ in range(n_docs))


@property_test
@given(packings)
def test_carrying_serves_every_token_once_per_epoch(planner_of, packing):
    planner = planner_of(packing, crop="carry")
    all_tokens = Counter(
        (shard, document, position)
        for shard, lengths in enumerate(packing["lengths"])
        for document, length in enumerate(lengths)
        for position in range(length)
    )
    n_tokens = all_tokens.total()
    served = []
    while len(served) < 2 * n_tokens:
        served += [token for token in next_rows(planner, 1)[0] if token[2] is not None]
        counts = planner.snapshot()
        assert counts["served_tokens"] == len(served)
        assert counts["distinct_tokens"] == min(len(served), n_tokens)
    assert Counter(served[:n_tokens]) == all_tokens
    assert Counter(served[n_tokens : 2 * n_tokens]) == all_tokens


@property_test
@given(packings)
def test_dropping_counts_the_tokens_of_first_uses_as_distinct(planner_of, packing):
    planner = planner_of(packing, crop="drop")
    first_use = {}
    for n_rows in range(1, 60):
        for shard, document, start, length in planner.next_row():
            assert start == 0
            first_use.setdefault((shard, document), length)
        counts = planner.snapshot()
        assert counts["served_tokens"] == n_rows * planner.row_tokens
        assert counts["distinct_tokens"] == sum(first_use.values())


@property_test
@given(packings)
def test_a_restored_planner_continues_from_any_row(planner_of, packing):
    straight = planner_of(packing)
    for n_rows in (0, 1, 2, 7, 30):
        next_rows(straight, n_rows)
        state = json.loads(json.dumps(straight.state_dict(straight.snapshot())))
        restored = planner_of(packing, state=state)
        for _ in range(10):
            assert next_rows(restored, 1) == next_rows(straight, 1)
        assert restored.state_dict(restored.snapshot()) == straight.state_dict(straight.snapshot())


# --- the order of documents

def draws(order, n):
    return [order.draw()[1:] for _ in range(n)]


def test_an_epoch_is_a_new_permutation_shard_by_shard(shards):
    order = DocumentOrder(shards, seed=3, shuffle=True)
    epochs = [draws(order, 120) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(shard, document) for shard in range(3) for document in range(40)]
        assert all(len({shard for shard, _ in epoch[at : at + 40]}) == 1 for at in (0, 40, 80))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert draws(DocumentOrder(shards, seed=4, shuffle=True), 120) != epochs[0]


def test_the_order_of_a_seed_never_changes(shards):
    order = DocumentOrder(shards, seed=42, shuffle=True)
    assert draws(order, 6) == [(1, 26), (1, 29), (1, 13), (1, 3), (1, 10), (1, 36)]


# --- batches

def rows_of(loader, n_batches):
    """Return the rows, sequence_len + 1 tokens each, of the next batches."""
    rows = []
    for inputs, targets in islice(loader, n_batches):
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        rows += torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
    return rows


@property_test
@given(packings)
def test_batches_hold_the_planned_tokens(planner_of, packing):
    planner = planner_of(packing, seed=0, shuffle=True)
    shards = planner.order._shards
    first = planner.order.first_documents

    def token(shard, document, position):
        return (first[shard] + document) * LONGEST + position if position else BOS

    with TokenLoader(shards, 3, planner.row_tokens - 1, crop=planner.crop) as loader:
        rows = rows_of(loader, 4)
    assert rows == [[token(*place) for place in row] for row in next_rows(planner, 12)]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize(("world_size", "step_batches"),
                         [(2, 2), (3, 3), (2, 3), (3, 4), (3, 5), (4, 7)])
def test_ranks_share_the_rows_of_a_step(shards, monkeypatch, crop, world_size, step_batches):
    """Micro-batch k of a step goes to rank k mod W; after it all ranks have the same state."""
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 3 * 2 * 30)
    with TokenLoader(shards, 2, 30, crop=crop) as loader:
        expected = [rows_of(loader, step_batches) for _ in range(4)]
        state = loader.state_dict()
    for rank in range(world_size):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=world_size, crop=crop,
                         step_batches=step_batches) as loader:
            for step in expected:
                own = rows_of(loader, n_batches_of_rank(step_batches, rank, world_size))
                batches = range(rank, step_batches, world_size)
                assert own == [row for k in batches for row in step[2 * k : 2 * k + 2]]
            assert loader.state_dict() == state


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("delivered", [0, 1, 2, 7, 40, 80])
def test_a_restored_loader_continues_on_any_number_of_ranks(shards, monkeypatch, delivered, crop):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", 7)
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 3 * 2 * 30)
    with TokenLoader(shards, 2, 30, seed=9, crop=crop) as straight:
        rows_of(straight, delivered)
        state = json.loads(json.dumps(straight.state_dict()))
        expected = rows_of(straight, 50)
        counts = straight.distinct_tokens, straight.epochs
    for world_size in (1, 2):
        for rank in range(world_size):
            with TokenLoader(shards, 2, 30, seed=9, rank=rank, world_size=world_size, crop=crop,
                             state=state) as restored:
                assert restored.state_dict() == state
                own = rows_of(restored, 50 // world_size)
                assert (restored.distinct_tokens, restored.epochs) == counts
            batches = range(rank, 50, world_size)
            assert own == [row for k in batches for row in expected[2 * k : 2 * k + 2]]


def test_a_program_that_does_not_close_the_loader_ends(shards):
    script = ("import sys; from nanochat.tokens import TokenShard; "
              "from nanochat.dataloader import TokenLoader; "
              "print(next(TokenLoader([TokenShard(sys.argv[1])], 64, 512))[0].shape)")
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, shards[0].path],
                          timeout=60, capture_output=True, text=True,
                          env={"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([64, 512])\n", "")


def test_no_documents_are_refused(tmp_path):
    for lengths in ([], [[]], [[], []]):
        with pytest.raises(UserError, match="no documents"):
            TokenLoader(make_shards(tmp_path / "s", lengths), 1, 8)


def test_a_state_of_other_documents_another_seed_crop_or_version_is_refused(tmp_path, shards):
    with TokenLoader(shards, 1, 8) as loader:
        state = loader.state_dict()
    earlier = {**state, "buffer": [entry[:3] for entry in state["buffer"]]}  # without an epoch
    others = make_shards(tmp_path / "other", [[5, 5]])
    for documents, seed, crop, other_state in (
            (shards[:2], 0, "drop", state), (others, 0, "drop", state), (shards, 1, "drop", state),
            (shards, 0, "carry", state), (shards, 0, "drop", earlier)):
        with pytest.raises(UserError, match="another --crop or an earlier version"):
            TokenLoader(documents, 1, 8, seed=seed, crop=crop, state=other_state)


@pytest.mark.gpu
def test_batches_on_cuda_equal_those_on_cpu(shards):
    with TokenLoader(shards, 2, 30) as here, TokenLoader(shards, 2, 30, device="cuda") as there:
        for _ in range(50):
            for ours, theirs in zip(next(here), next(there), strict=True):
                assert theirs.is_cuda and torch.equal(ours, theirs.cpu())
