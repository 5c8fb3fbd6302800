import json
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.data import dataloader
from nanochat.data.dataloader import DocumentOrder, RowPlanner, TokenLoader
from nanochat.data.tokens import HEADER_BYTES, TokenShard, write_token_shard
from nanochat.errors import UserError

BOS = 0
LONGEST = 1000  # the token at position p > 0 of document d is d * LONGEST + p: each says where it comes from


def make_shards(folder, lengths_by_shard):
    folder.mkdir(exist_ok=True)
    shards, d = [], 0
    for number, lengths in enumerate(lengths_by_shard):
        tokens = []
        for length in lengths:
            tokens += [BOS, *(d * LONGEST + p for p in range(1, length))]
            d += 1
        path = folder / f"shard_{number:05d}.bin"
        write_token_shard(path, [(lengths, np.array(tokens, np.uint32))], {"vocab_size": 10**9, "bos_id": BOS})
        shards.append(TokenShard(path))
    return shards


@pytest.fixture
def shards(tmp_path):
    lengths = np.random.default_rng(5).integers(1, 60, (3, 40))
    return make_shards(tmp_path / "shards", [row.tolist() for row in lengths])


def rows(loader, n_batches):
    """Whole rows, T + 1 tokens each, of the next batches."""
    batches = [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in islice(loader, n_batches)]
    return torch.cat(batches).tolist() if batches else []


def packed_by_brute_force(documents, n_rows, row_tokens, buffer_size):
    """The packing rule in its plainest form. documents: iterator of (name, length)."""
    buffer, packed = [], []
    for _ in range(n_rows):
        row = []
        while (space := row_tokens - sum(length for _, length in row)) > 0:
            while len(buffer) < buffer_size:
                buffer.append(next(documents))
            fitting = [document for document in buffer if document[1] <= space]
            if fitting:
                chosen = max(fitting, key=lambda document: document[1])  # max and min take the first among equals
            else:
                chosen = min(buffer, key=lambda document: document[1])
            buffer.remove(chosen)
            row.append((chosen[0], min(chosen[1], space)))
        packed.append(row)
    return packed


def drawn(order):
    for arrival in range(10**9):
        length, shard, document = order.draw()
        yield (arrival, shard, document), length


lengths_strategy = st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=1, max_size=4).filter(any)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=lengths_strategy, row_tokens=st.integers(2, 50), seed=st.integers(0, 2**40), shuffle=st.booleans(),
       buffer_documents=st.integers(1, 20))
def test_rows_obey_the_packing_rule(tmp_path, monkeypatch, lengths, row_tokens, seed, shuffle, buffer_documents):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", buffer_documents)
    shards = make_shards(tmp_path / "s", lengths)
    n_docs = sum(map(len, lengths))
    planner = RowPlanner(shards, row_tokens, seed, shuffle)
    plan = [planner.next_row() for _ in range(60)]
    expected = packed_by_brute_force(drawn(DocumentOrder(shards, seed, shuffle)), 60, row_tokens,
                                     min(buffer_documents, n_docs))
    assert plan == [[(shard, document, length) for (_, shard, document), length in row] for row in expected]
    uses = Counter((shard, document) for row in plan for shard, document, _ in row)
    assert max(uses.values()) <= planner.order.epoch + 1


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=lengths_strategy, sequence_len=st.integers(1, 50), batch_rows=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_row_is_full_begins_with_bos_and_holds_beginnings_of_documents(
        tmp_path, lengths, sequence_len, batch_rows, seed):
    shards, flat = make_shards(tmp_path / "s", lengths), [length for shard in lengths for length in shard]
    with TokenLoader(shards, batch_rows, sequence_len, seed) as loader:
        for row in rows(loader, 5):
            assert len(row) == sequence_len + 1 and row[0] == BOS
            starts = [at for at, token in enumerate(row) if token == BOS]
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                if end - start > 1:
                    d, position = divmod(row[start + 1], LONGEST)
                    assert position == 1 and end - start <= flat[d]
                    assert row[start + 1:end] == list(range(d * LONGEST + 1, d * LONGEST + end - start))


def test_targets_are_inputs_one_later_as_contiguous_int64(shards):
    with TokenLoader(shards, 4, 32) as loader:
        for inputs, targets in islice(loader, 3):
            assert inputs.shape == targets.shape == (4, 32)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])


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


@pytest.mark.parametrize("position", [0, 1, 39, 40, 41, 119, 120])
def test_seeking_continues_the_order_anywhere(shards, position):
    straight, sought = (DocumentOrder(shards, seed=1, shuffle=True) for _ in range(2))
    for _ in range(120 + position):
        straight.draw()
    sought.seek(1, position)
    assert [sought.draw() for _ in range(200)] == [straight.draw() for _ in range(200)]


def test_without_shuffling_documents_come_as_they_lie_and_every_loader_serves_the_same(shards):
    order = DocumentOrder(shards, seed=0, shuffle=False)
    assert [order.draw()[1:] for _ in range(120)] == [(shard, d) for shard in range(3) for d in range(40)]
    with TokenLoader(shards, 2, 50, seed=1, shuffle=False) as one, \
            TokenLoader(shards, 2, 50, seed=2, shuffle=False) as two:
        assert rows(one, 9) == rows(two, 9)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_deal_out_the_micro_batches_of_one(shards, world_size):
    with TokenLoader(shards, 2, 30) as whole:
        expected = rows(whole, 4 * world_size)
    for rank in range(world_size):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=world_size) as loader:
            mine = rows(loader, 4)
            state = loader.state_dict()
        assert mine == [row for k in range(4) for row in expected[2 * (k * world_size + rank):][:2]]
    assert state == whole.state_dict()


@pytest.mark.parametrize("buffer_documents", [7, 1000])
@pytest.mark.parametrize("delivered", [0, 1, 2, 7, 40])
def test_a_restored_loader_continues_with_the_very_rows(shards, monkeypatch, buffer_documents, delivered):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", buffer_documents)
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 3 * 2 * 30)
    with TokenLoader(shards, 2, 30, seed=9) as straight:
        rows(straight, delivered)
        state = json.loads(json.dumps(straight.state_dict()))
        expected = rows(straight, 50)
        final = straight.state_dict()
    with TokenLoader(shards, 2, 30, seed=9, state=state) as restored:
        assert restored.state_dict() == state
        assert rows(restored, 50) == expected
        assert restored.state_dict() == final


def test_a_run_may_go_on_with_another_number_of_ranks(shards):
    with TokenLoader(shards, 2, 30) as whole:
        rows(whole, 6)
        state = whole.state_dict()
        expected = rows(whole, 6)
    halves = []
    for rank in range(2):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=2, state=state) as loader:
            halves.append(rows(loader, 3))
    assert [row for k in range(3) for half in halves for row in half[2 * k:2 * k + 2]] == expected


def test_epochs_count_the_documents_served(tmp_path):
    shards = make_shards(tmp_path / "s", [[10] * 8])
    with TokenLoader(shards, 1, 19) as loader:  # two documents a row
        served = [loader.epochs]
        for _ in range(6):
            next(loader)
            served.append(loader.epochs)
    assert served == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]


@pytest.mark.parametrize(("lengths", "sequence_len"), [([1], 8), ([5], 64), ([900], 16), ([3, 2], 1)])
def test_few_tiny_or_huge_documents_still_fill_rows(tmp_path, lengths, sequence_len):
    with TokenLoader(make_shards(tmp_path / "s", [lengths]), 2, sequence_len) as loader:
        assert all(len(row) == sequence_len + 1 and row[0] == BOS for row in rows(loader, 20))


@pytest.mark.parametrize("lengths", [[], [[]], [[], []]])
def test_shards_without_documents_are_refused(tmp_path, lengths):
    with pytest.raises(UserError, match="no documents"):
        TokenLoader(make_shards(tmp_path / "s", lengths), 1, 8)


def test_a_negative_seed_is_refused(shards):
    with pytest.raises(UserError, match="seed is -1"):
        TokenLoader(shards, 1, 8, seed=-1)


def test_a_state_of_other_documents_or_another_seed_is_refused(tmp_path, shards):
    with TokenLoader(shards, 1, 8) as loader:
        state = loader.state_dict()
    for others, seed in ((shards[:2], 0), (make_shards(tmp_path / "other", [[5, 5]]), 0), (shards, 1)):
        with pytest.raises(UserError, match="other documents or another seed"):
            TokenLoader(others, 1, 8, seed=seed, state=state)


def damaged_shard(path, at, value):
    header = {"vocab_size": 100, "bos_id": BOS}
    write_token_shard(path, [([4, 4], np.array([BOS, 1, 2, 3, BOS, 4, 5, 6], np.uint16))], header)
    with open(path, "r+b") as file:
        file.seek(HEADER_BYTES + 2 * at)
        file.write(np.uint16(value).tobytes())
    return TokenShard(path)


@pytest.mark.parametrize(("at", "value", "message"), [
    (6, 100, "document 1 holds token id 100, the vocabulary ends at 99"),
    (4, 9, "document 1 begins with token id 9, not BOS 0"),
])
def test_a_token_that_cannot_be_is_named_and_closes_the_loader(tmp_path, at, value, message):
    shard = damaged_shard(tmp_path / "bad.bin", at, value)
    loader = TokenLoader([shard], 1, 3, shuffle=False)
    with pytest.raises(UserError, match=message) as error:
        rows(loader, 5)
    assert str(shard.path) in str(error.value)
    assert not loader_threads()


def loader_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_close_ends_the_thread(shards):
    loader = TokenLoader(shards, 1, 8)
    next(loader)
    assert loader_threads()
    loader.close()
    loader.close()
    assert not loader_threads()


def test_a_program_that_forgets_to_close_ends_quietly(tmp_path, shards):
    script = tmp_path / "forgets.py"
    script.write_text(textwrap.dedent("""
        import sys
        from nanochat.data.dataloader import TokenLoader
        from nanochat.data.tokens import TokenShard

        loader = TokenLoader([TokenShard(path) for path in sys.argv[1:]], 64, 512)
        print(next(loader)[0].shape)
    """))
    done = subprocess.run([sys.executable, "-W", "error", script, *(shard.path for shard in shards)], timeout=60,
                          capture_output=True, text=True, env={"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "torch.Size([64, 512])\n", "")


@pytest.mark.gpu
def test_batches_on_cuda_equal_those_on_cpu(shards):
    with TokenLoader(shards, 2, 30) as here, TokenLoader(shards, 2, 30, device="cuda") as there:
        for _ in range(50):
            for ours, theirs in zip(next(here), next(there), strict=True):
                assert theirs.is_cuda and torch.equal(ours, theirs.cpu())
