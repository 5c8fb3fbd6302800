"""Validation rows, bits per byte and its standard error against brute force."""

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

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
@given(splits, lengths_of_rows, st.integers(1, 12))
def test_carry_scores_every_token_of_a_small_split_once(tmp_path, monkeypatch, lengths, T, buffer):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", buffer)
    rows = SplitRows(make_shards(tmp_path / "s", lengths), T, EVERYTHING, "carry")
    flat = [length for shard in lengths for length in shard]
    every = {(d, position): 1 for d, length in enumerate(flat) for position in range(1, length)}
    assert targets_of(rows) == every
    assert rows.split_tokens == len(every)


@property_test
@given(splits, lengths_of_rows, st.integers(1, 400), st.integers(1, 12),
       st.sampled_from(["carry", "drop"]))
def test_no_token_is_scored_twice(tmp_path, monkeypatch, lengths, T, eval_tokens, buffer, crop):
    monkeypatch.setattr(dataloader, "BUFFER_DOCUMENTS", buffer)
    shards = make_shards(tmp_path / "s", lengths)
    rows = SplitRows(shards, T, eval_tokens, crop)
    scored = targets_of(rows)
    assert set(scored.values()) <= {1}
    assert len(scored) <= eval_tokens + T - 1
    if crop == "drop":
        assert all((document, position - 1) in scored for document, position in scored
                   if position > 1), "only beginnings of documents"
    complete = SplitRows(shards, T, EVERYTHING, crop).plan
    if eval_tokens < rows.split_tokens:
        assert len(rows.plan) == min(-(-eval_tokens // T), len(complete))
    else:
        assert rows.plan == complete


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


# --- the loss ----------------------------------------------------------------


class PairLoss(torch.nn.Module):
    """Every pair of input and target has its own loss."""

    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        losses = np.random.default_rng(seed).uniform(0.1, 9.0, (VOCAB, VOCAB))
        self.losses = torch.nn.Parameter(torch.from_numpy(losses).to(dtype))

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

    assert found.n_bytes == n_bytes.sum()
    assert found.n_tokens == sum(map(len, by_position))
    assert found.counts_by_position == [len(losses) for losses in by_position]
    for losses, mean in zip(by_position, found.nats_by_position, strict=True):
        assert mean == (pytest.approx(np.mean(losses), rel=1e-12) if losses else None)
    assert found.documents.tolist() == np.flatnonzero(n_bytes).tolist()
    assert found.document_bytes.tolist() == n_bytes[n_bytes > 0].tolist()
    assert found.document_nats == pytest.approx(nats[n_bytes > 0], rel=1e-12)
    if found.n_bytes:
        bits = nats.sum() / math.log(2) / n_bytes.sum()
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-12)
        assert found.nats_per_token == pytest.approx(nats.sum() / found.n_tokens, rel=1e-12)
    else:
        assert math.isnan(found.bits_per_byte) and math.isnan(found.nats_per_token)
    assert model.training


def test_by_hand(tmp_path):
    """Two targets of 1 and 3 bytes at ln 2 and 3 ln 2 nats: 4 bits over 4 bytes."""
    model = PairLoss()
    model.losses.data[BOS, 0] = math.log(2)
    model.losses.data[0, 3] = 3 * math.log(2)
    model.losses.data[3, OTHER_SPECIAL] = math.inf  # a special token does not count
    rows = SplitRows([shard_of(tmp_path, [[0, 3, OTHER_SPECIAL]])], 8, 8, "carry")
    found = evaluate_split(model, rows, 4, TOKEN_BYTES, CPU)
    assert found.bits_per_byte == pytest.approx(1.0)
    assert (found.n_tokens, found.n_bytes) == (2, 4)
    bits_by_position = [pytest.approx(n * math.log(2)) for n in (1, 3)]
    assert found.nats_by_position[:3] == [*bits_by_position, None]
    assert math.isnan(found.standard_error) and found.event_fields()["val_bpb_se"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_losses_that_are_not_finite_show(tmp_path, loss):
    model = PairLoss()
    model.losses.data[1, 2] = loss
    rows = SplitRows([shard_of(tmp_path, [[1, 2, 3], [3]])], 8, 8, "carry")
    found = evaluate_split(model, rows, 4, TOKEN_BYTES, CPU)
    assert not math.isfinite(found.bits_per_byte) and found.warning() is None
    assert found.event_fields()["val_bpb_se"] is None


def test_bfloat16_losses_are_summed_in_fp64(tmp_path):
    model = PairLoss(dtype=torch.bfloat16)
    model.losses.data[BOS, 0], model.losses.data[0, 0] = 256.0, 0.01
    rows = SplitRows([shard_of(tmp_path, [[0] * 1001])], 1001, 1001, "carry")
    small = model.losses[0, 0].item()
    found = evaluate_split(model, rows, 1, TOKEN_BYTES, CPU)
    assert found.nats_per_token * 1001 == pytest.approx(256 + 1000 * small, rel=1e-12)


# --- one model and text, one loss --------------------------------------------

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


# --- standard errors ---------------------------------------------------------


def losses_of(nats, n_bytes):
    return SimpleNamespace(dataset_id="text-1", tokenizer_id="a", split="val",
                           documents=np.arange(len(nats)), nats=nats, n_bytes=n_bytes)


def bootstrap_error(nats, n_bytes):
    picks = np.random.default_rng(1).integers(0, len(nats), (4000, len(nats)))
    return (nats[picks].sum(1) / n_bytes[picks].sum(1) / math.log(2)).std()


def random_documents(seed, n=300):
    random = np.random.default_rng(seed)
    n_bytes = random.integers(10, 4000, n)
    return n_bytes * random.normal(0.8, 0.2, n), n_bytes


def test_the_standard_error_is_the_bootstraps_over_documents(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(0, 4, random.integers(1, 60)) for _ in range(400)]
    rows = SplitRows([shard_of(tmp_path, documents)], 32, EVERYTHING, "carry")
    found = evaluate_split(PairLoss(), rows, 8, TOKEN_BYTES, CPU)
    expected = bootstrap_error(found.document_nats, found.document_bytes)
    assert found.standard_error == pytest.approx(expected, rel=0.05)
    assert f"standard error {found.standard_error:.4f} over 400 documents" in found.describe()


def test_a_paired_difference_is_smaller_than_its_parts():
    nats, n_bytes = random_documents(0)
    better = nats - n_bytes * np.random.default_rng(2).normal(0.05, 0.01, len(nats))
    difference, error = paired_difference(losses_of(better, n_bytes), losses_of(nats, n_bytes))
    bits = (better.sum() - nats.sum()) / math.log(2) / n_bytes.sum()
    assert difference == pytest.approx(bits, rel=1e-9) and difference < 0
    assert error == pytest.approx(bootstrap_error(better - nats, n_bytes), rel=0.05)
    assert error < 0.2 * bootstrap_error(nats, n_bytes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"dataset_id": "text-2"}, "different texts: text-1 .val. and text-2"),
    ({"split": "train"}, "different texts"),
    ({"documents": np.arange(1, 301)}, "different parts of text-1"),
    ({"n_bytes": np.full(300, 7)}, "different parts of text-1"),
])
def test_losses_of_other_text_are_not_paired(changes, words):
    losses = losses_of(*random_documents(0))
    with pytest.raises(UserError, match=words):
        paired_difference(losses, SimpleNamespace(**{**vars(losses), **changes}))


def test_losses_per_document_are_saved_and_read(tmp_path, three_books):
    found, path = evaluate_gpt(0, 1, three_books, 8), tmp_path / "validation.npz"
    save_document_losses(path, found, "text-1", "a")
    read = load_document_losses(path)
    assert (read.dataset_id, read.tokenizer_id, read.split) == ("text-1", "a", "val")
    for name, expected in (("documents", found.documents), ("nats", found.document_nats),
                           ("n_bytes", found.document_bytes)):
        assert getattr(read, name).dtype == expected.dtype
        assert getattr(read, name).tolist() == expected.tolist()
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


@pytest.mark.gpu
def test_cuda_equals_cpu(tmp_path, three_books):
    rows = SplitRows([TokenShard(three_books)], 64, EVERYTHING, "carry")
    one = evaluate_split(PairLoss(), rows, 2, TOKEN_BYTES, CPU)
    other = evaluate_split(PairLoss().cuda(), rows, 2, TOKEN_BYTES, torch.device("cuda"))
    assert other.counts_by_position == one.counts_by_position
    assert other.document_nats == pytest.approx(one.document_nats, rel=1e-6)
