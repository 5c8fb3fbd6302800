"""Validation rows, bits per byte and its standard error against brute force."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_shards import LONGEST, make_shards
from ranks import run_on_ranks

from nanochat import dataloader
from nanochat.common import UserError
from nanochat.dataloader import RowPlanner
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import (
    SplitRows,
    evaluate_split,
    load_document_losses,
    paired_difference,
    save_document_losses,
)
from nanochat.tokens import TokenShard, write_token_shard

CPU = torch.device("cpu")
VOCAB, OTHER_SPECIAL, BOS = 12, 10, 11
TOKEN_BYTES = np.array([1, 1, 2, 3, 5, 8, 1, 4, 2, 16, 0, 0], np.int32)
EVERYTHING = 10**9  # --eval-tokens beyond every split

property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
splits = st.lists(st.lists(st.integers(1, 90), max_size=9), min_size=1, max_size=3).filter(any)
lengths_of_rows = st.integers(1, 40)


def targets_of(rows, batch_rows=3):
    """Return {(document, position): number of times it is scored}, check the labels of batches."""
    scored = {}
    for first in range(0, len(rows.plan), batch_rows):
        batch = rows.batch(rows.plan[first : first + batch_rows], batch_rows)
        assert all(part.shape == (batch_rows, rows.sequence_len) for part in batch)
        for inputs, targets, documents, positions in zip(*batch, strict=True):
            for at, target in enumerate(targets):
                assert (target == -1) == (documents[at] == -1)
                if target > 0:
                    document, position = divmod(int(target), LONGEST)
                    assert document == documents[at]
                    context = inputs[at - positions[at] : at + 1]
                    assert inputs[at - positions[at]] == 0, "the context begins with BOS"
                    assert context[1:].tolist() == list(range(target - positions[at], target))
                    scored[document, position] = scored.get((document, position), 0) + 1
    return scored


@property_test
@given(splits, lengths_of_rows, st.integers(1, 400) | st.just(EVERYTHING), st.integers(1, 12),
       st.sampled_from(["carry", "drop"]))
def test_no_token_is_scored_twice_and_with_carry_all_tokens_are(
        tmp_path, monkeypatch, lengths, T, eval_tokens, buffer, crop):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", buffer)
    shards = make_shards(tmp_path / "s", lengths)
    rows = SplitRows(shards, T, eval_tokens, crop)
    scored = targets_of(rows)
    flat = [length for shard in lengths for length in shard]
    every = {(d, position) for d, length in enumerate(flat) for position in range(1, length)}
    assert set(scored.values()) <= {1} and len(scored) <= eval_tokens + T - 1
    if crop == "drop":
        assert all((document, position - 1) in scored for document, position in scored
                   if position > 1), "only beginnings of documents"
    elif eval_tokens >= len(every):
        assert set(scored) == every
    complete = SplitRows(shards, T, EVERYTHING, crop).plan
    n_rows = -(-eval_tokens // T) if eval_tokens < len(every) else len(complete)
    assert len(rows.plan) == min(n_rows, len(complete))


def test_drop_has_upstreams_rows_until_its_buffer_would_mix_two_passes(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 300, 3000).tolist()
    shards = make_shards(tmp_path / "s", [lengths])
    upstream = RowPlanner(shards, 129, 0, "drop", shuffle=False)
    rows = SplitRows(shards, 128, EVERYTHING, "drop").plan
    n_equal = 0
    while upstream.order.epoch == 0:
        assert rows[n_equal] == upstream.next_row()
        n_equal += 1
    assert n_equal > 1000
    documents = [part[1] for row in rows for part in row]
    assert sorted(documents) == list(range(3000)), "the pass is completed, each document once"


def test_carry_takes_the_leading_documents_not_the_longest(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 200, 1000).tolist()
    shards = make_shards(tmp_path / "s", [lengths[:50], lengths[50:]])
    rows = SplitRows(shards, 256, 10_000, "carry")
    documents = {document for document, _ in targets_of(rows)}
    assert max(documents) < 110
    assert len(documents) > 0.95 * max(documents)


# --- the loss -------------------------------------------------------------------------------------


class PairLoss(torch.nn.Module):
    """Every pair of input and target has its own loss."""

    def __init__(self):
        super().__init__()
        losses = np.random.default_rng(0).uniform(0.1, 9.0, (VOCAB, VOCAB))
        self.losses = torch.nn.Parameter(torch.from_numpy(losses).float())

    def forward(self, inputs, targets, loss_reduction):
        assert loss_reduction == "none"
        assert not self.training and not torch.is_grad_enabled()
        return torch.where(targets >= 0, self.losses[inputs, targets.clamp_min(0)], 0.0).flatten()


def shard_of(folder, documents):
    tokens = [token for document in documents for token in (BOS, *document)]
    lengths = [1 + len(document) for document in documents]
    header = {"vocab_size": VOCAB, "bos_id": BOS}
    write_token_shard(folder / "shard.bin", [(lengths, np.array(tokens))], header)
    return TokenShard(folder / "shard.bin")


documents_strategy = st.lists(st.lists(st.integers(0, OTHER_SPECIAL), max_size=30), min_size=1,
                              max_size=12)


@property_test
@given(documents_strategy, lengths_of_rows)
def test_the_loss_equals_scoring_token_by_token(tmp_path, documents, T):
    model = PairLoss()
    rows = SplitRows([shard_of(tmp_path, documents)], T, EVERYTHING, "carry")
    found = evaluate_split(model, rows, 3, TOKEN_BYTES, CPU)

    nats, n_bytes = np.zeros(len(documents)), np.zeros(len(documents), int)
    by_position = [[] for _ in range(T)]
    for row in rows.plan:
        for _, d, start, length in row:
            segment = [BOS, *documents[d]][start : start + length]
            segment[:1] = [BOS]
            for at, (token, target) in enumerate(pairwise(segment)):
                if target != OTHER_SPECIAL:
                    loss = model.losses[token, target].item()
                    nats[d] += loss
                    n_bytes[d] += TOKEN_BYTES[target]
                    by_position[at].append(loss)

    n_tokens = sum(map(len, by_position))
    assert (found.n_bytes, found.n_tokens) == (n_bytes.sum(), n_tokens)
    assert found.counts_by_position == [len(losses) for losses in by_position]
    assert found.nats_by_position == [pytest.approx(np.mean(losses), rel=1e-12) if losses else None
                                      for losses in by_position]
    assert found.documents.tolist() == np.flatnonzero(n_bytes).tolist()
    assert found.document_bytes.tolist() == n_bytes[n_bytes > 0].tolist()
    assert found.document_nats == pytest.approx(nats[n_bytes > 0], rel=1e-12)
    bits = nats.sum() / math.log(2) / n_bytes.sum() if n_tokens else math.nan
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-12, nan_ok=True)
    per_token = nats.sum() / n_tokens if n_tokens else math.nan
    assert found.nats_per_token == pytest.approx(per_token, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_show(tmp_path, loss):
    model = PairLoss()
    model.losses.data[1, 2] = loss
    rows = SplitRows([shard_of(tmp_path, [[1, 2, 3], [3]])], 8, 8, "carry")
    found = evaluate_split(model, rows, 4, TOKEN_BYTES, CPU)
    assert not math.isfinite(found.bits_per_byte) and found.warning() is None
    assert found.event_fields()["val_bpb_se"] is None


# --- one model and text, one loss -----------------------------------------------------------------

N_ROWS_PER_BATCH = (1, 4, 8, 64, 128)


def evaluate_gpt(rank, world_size, path, batch_rows):
    model = GPT(GPTConfig(64, VOCAB, 2, 2, 2, 32, "L"), torch.float32)
    model.init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    rows = SplitRows([TokenShard(path)], 64, EVERYTHING, "carry")
    ranks = Ranks(rank, rank, world_size)
    return evaluate_split(model, rows, batch_rows, TOKEN_BYTES, CPU, ranks)


@pytest.fixture
def three_books(tmp_path):
    """The path of a shard of three long documents, 41 rows: the last is a partial one."""
    random = np.random.default_rng(0)
    return shard_of(tmp_path, [random.integers(0, OTHER_SPECIAL, n) for n in (1100, 37, 1405)]).path


def test_batch_size_and_ranks_do_not_change_the_loss(three_books):
    one, *others = (evaluate_gpt(0, 1, three_books, batch_rows) for batch_rows in N_ROWS_PER_BATCH)
    others += run_on_ranks(2, evaluate_gpt, three_books, 4)
    assert one.n_tokens == 1100 + 37 + 1405, "all tokens of the split"
    assert one.documents.tolist() == [0, 1, 2]
    for other in others:
        assert (other.n_tokens, other.n_bytes) == (one.n_tokens, one.n_bytes)
        assert other.counts_by_position == one.counts_by_position
        for name in ("bits_per_byte", "standard_error", "document_nats"):
            assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-6)


# --- standard errors ------------------------------------------------------------------------------


def losses_of(nats, n_bytes):
    return {"dataset_id": "text-1", "documents": np.arange(len(nats)), "nats": nats,
            "n_bytes": n_bytes}


def bootstrap_error(nats, n_bytes):
    picks = np.random.default_rng(1).integers(0, len(nats), (4000, len(nats)))
    return (nats[picks].sum(1) / n_bytes[picks].sum(1) / math.log(2)).std()


def random_documents(n=300):
    random = np.random.default_rng(0)
    n_bytes = random.integers(10, 4000, n)
    return n_bytes * random.normal(0.8, 0.2, n), n_bytes


def test_a_paired_difference_has_the_bootstraps_error_and_is_smaller_than_its_parts():
    nats, n_bytes = random_documents()
    better = nats - n_bytes * np.random.default_rng(2).normal(0.05, 0.01, len(nats))
    difference, error = paired_difference(losses_of(better, n_bytes), losses_of(nats, n_bytes))
    bits = (better.sum() - nats.sum()) / math.log(2) / n_bytes.sum()
    assert difference == pytest.approx(bits, rel=1e-9) and difference < 0
    assert error == pytest.approx(bootstrap_error(better - nats, n_bytes), rel=0.05)
    assert error < 0.2 * bootstrap_error(nats, n_bytes)


@pytest.mark.parametrize("changes", [
    {"dataset_id": "text-2"}, {"documents": np.arange(1, 301)}, {"n_bytes": np.full(300, 7)}])
def test_losses_of_other_text_are_not_paired(changes):
    losses = losses_of(*random_documents())
    with pytest.raises(UserError, match="different text"):
        paired_difference(losses, losses | changes)


def test_losses_per_document_are_saved_and_read(tmp_path, three_books):
    found, path = evaluate_gpt(0, 1, three_books, 8), tmp_path / "validation.npz"
    save_document_losses(path, found, "text-1", "a")
    read = load_document_losses(path)
    assert read["dataset_id"] == "text-1" and read["nats"].tolist() == found.document_nats.tolist()
    assert paired_difference(read, read) == (0.0, 0.0)
    for damage in (b"", b"no archive", path.read_bytes()[:-30]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match="holds no losses per document"):
            load_document_losses(path)


def test_a_validation_split_that_is_too_small_is_named(three_books):
    found = evaluate_gpt(0, 1, three_books, 8)
    bits = found.bits_per_byte
    assert replace(found, standard_error=0.0099 * bits).warning() is None
    warning = replace(found, standard_error=0.021 * bits).warning()
    assert "val_bpb is 2.1% of its loss (3 documents" in warning
    assert "unknown" in replace(found, standard_error=math.nan).warning()
