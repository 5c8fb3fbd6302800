import json
import subprocess
import sys
import textwrap
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import BOS, LONGEST, make_shards

from nanochat import dataloader, packing
from nanochat.common import UserError
from nanochat.dataloader import TokenLoader
from nanochat.packing import CROPS, DocumentOrder
from nanochat.tokens import TokenShard, write_token_shard


@pytest.fixture
def shards(tmp_path):
    lengths = np.random.default_rng(5).integers(1, 60, (3, 40))
    return make_shards(tmp_path / "shards", [row.tolist() for row in lengths])


def rows(loader, n_batches):
    """Whole rows, T + 1 tokens each, of the next batches."""
    batches = [torch.cat([inputs, targets[:, -1:]], dim=1) for inputs, targets in islice(loader, n_batches)]
    return torch.cat(batches).tolist() if batches else []


lengths_strategy = st.lists(st.lists(st.integers(1, 40), max_size=12), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=lengths_strategy, sequence_len=st.integers(1, 50), batch_rows=st.integers(1, 3), seed=st.integers(0, 99),
       crop=st.sampled_from(CROPS))
def test_every_row_is_full_begins_with_bos_and_holds_runs_of_documents(
        tmp_path, lengths, sequence_len, batch_rows, seed, crop):
    """With "drop", beginnings."""
    shards, flat = make_shards(tmp_path / "s", lengths), [length for shard in lengths for length in shard]
    with TokenLoader(shards, batch_rows, sequence_len, seed, crop=crop) as loader:
        for row in rows(loader, 5):
            assert len(row) == sequence_len + 1 and row[0] == BOS
            starts = [at for at, token in enumerate(row) if token == BOS]
            for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
                if end - start > 1:
                    d, position = divmod(row[start + 1], LONGEST)
                    assert position == 1 or crop == "carry"
                    assert position + end - start - 1 <= flat[d]
                    assert row[start + 1:end] == list(range(row[start + 1], row[start + 1] + end - start - 1))


def test_targets_are_inputs_one_later_as_contiguous_int64(shards):
    with TokenLoader(shards, 4, 32) as loader:
        for inputs, targets in islice(loader, 3):
            assert inputs.shape == targets.shape == (4, 32)
            assert inputs.dtype == targets.dtype == torch.int64
            assert inputs.is_contiguous() and targets.is_contiguous()
            assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_without_shuffling_documents_come_as_they_lie_and_every_loader_serves_the_same(shards):
    order = DocumentOrder(shards, seed=0, shuffle=False)
    assert [order.draw()[1:] for _ in range(120)] == [(shard, d) for shard in range(3) for d in range(40)]
    with TokenLoader(shards, 2, 50, seed=1, shuffle=False) as one, \
            TokenLoader(shards, 2, 50, seed=2, shuffle=False) as two:
        assert rows(one, 9) == rows(two, 9)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_deal_out_the_micro_batches_of_one(shards, world_size, crop):
    with TokenLoader(shards, 2, 30, crop=crop) as whole:
        expected = rows(whole, 4 * world_size)
    for rank in range(world_size):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=world_size, crop=crop) as loader:
            mine = rows(loader, 4)
            state = loader.state_dict()
        assert mine == [row for k in range(4) for row in expected[2 * (k * world_size + rank):][:2]]
    assert state == whole.state_dict()


@pytest.mark.parametrize(("world_size", "step_batches"), [(2, 3), (3, 4), (3, 5), (4, 7)])
def test_ranks_that_do_not_divide_a_step_still_share_out_its_rows(shards, monkeypatch, world_size, step_batches):
    """Batch k of a step is rank k mod W's; after it all ranks have the state of one rank."""
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 3 * 2 * 30)
    with TokenLoader(shards, 2, 30) as whole:
        expected = [rows(whole, step_batches) for _ in range(4)]
        state = whole.state_dict()
    for rank in range(world_size):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=world_size, step_batches=step_batches) as loader:
            n_own = dataloader.n_batches_of_rank(step_batches, rank, world_size)
            mine = [rows(loader, n_own) for _ in range(4)]
            assert loader.state_dict() == state
        assert mine == [[row for k in range(rank, step_batches, world_size) for row in step[2 * k:][:2]]
                        for step in expected]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("buffer_documents", [7, 1000])
@pytest.mark.parametrize("delivered", [0, 1, 2, 7, 40, 80])
def test_a_restored_loader_continues_with_the_very_rows(shards, monkeypatch, buffer_documents, delivered, crop):
    monkeypatch.setattr(packing, "BUFFER_DOCUMENTS", buffer_documents)
    monkeypatch.setattr(dataloader, "GROUP_TOKENS", 3 * 2 * 30)
    with TokenLoader(shards, 2, 30, seed=9, crop=crop) as straight:
        rows(straight, delivered)
        state = json.loads(json.dumps(straight.state_dict()))
        expected = rows(straight, 50)
        final = straight.state_dict()
    with TokenLoader(shards, 2, 30, seed=9, crop=crop, state=state) as restored:
        assert restored.state_dict() == state
        assert rows(restored, 50) == expected
        assert restored.state_dict() == final


@pytest.mark.parametrize("crop", CROPS)
def test_a_state_goes_on_with_another_number_of_ranks(shards, crop):
    with TokenLoader(shards, 2, 30, crop=crop) as whole:
        rows(whole, 6)
        state = whole.state_dict()
        expected = rows(whole, 6)
    halves = []
    for rank in range(2):
        with TokenLoader(shards, 2, 30, rank=rank, world_size=2, crop=crop, state=state) as loader:
            halves.append(rows(loader, 3))
    assert [row for k in range(3) for half in halves for row in half[2 * k:2 * k + 2]] == expected


@pytest.mark.parametrize(("crop", "epochs", "distinct"), [
    ("drop", [0, 1, 1, 1.5, 2, 2.5, 3], [0, 20, 40, 40, 40, 40, 40]),  # ten tokens of each document, again and again
    ("carry", [0, 1, 1, 1, 1, 1, 1.1], [0, 20, 40, 57, 74, 91, 100]),
])
def test_epochs_are_passes_over_the_distinct_tokens_served(tmp_path, crop, epochs, distinct):
    shards = make_shards(tmp_path / "s", [[25] * 4])
    with TokenLoader(shards, 1, 9, crop=crop) as loader:
        found = [(loader.epochs, loader.distinct_tokens)]
        for _ in range(6):
            for _ in range(2):
                next(loader)
            found.append((loader.epochs, loader.distinct_tokens))
    assert found == list(zip(epochs, distinct, strict=True))


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


def impossible_shard(path, at, value):
    """A shard whose writer was wrong, so that its digest fits."""
    tokens = np.array([BOS, 1, 2, 3, BOS, 4, 5, 6], np.uint16)
    tokens[at] = value
    write_token_shard(path, [([4, 4], tokens)], {"vocab_size": 100, "bos_id": BOS})
    return TokenShard(path)


@pytest.mark.parametrize(("at", "value", "message"), [
    (6, 100, "document 1 holds token id 100, the vocabulary ends at 99"),
    (4, 9, "document 1 begins with token id 9, not BOS 0"),
])
def test_a_token_that_cannot_be_is_named_and_closes_the_loader(tmp_path, at, value, message):
    shard = impossible_shard(tmp_path / "bad.bin", at, value)
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
        from nanochat.dataloader import TokenLoader
        from nanochat.tokens import TokenShard

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
