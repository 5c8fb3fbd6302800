import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import loss_eval
from nanochat.distributed import Ranks
from nanochat.loss_eval import evaluate_loss, tokens_since_bos

BOS, OTHER_SPECIAL, VOCAB = 11, 10, 12
TOKEN_BYTES = torch.tensor([1, 1, 2, 3, 5, 8, 1, 4, 2, 16, 0, 0], dtype=torch.int32)
NATS = torch.from_numpy(np.random.default_rng(0).uniform(0.1, 9.0, (VOCAB, VOCAB))).float()

tokens = st.integers(0, VOCAB - 1) | st.just(BOS)


def model(inputs, targets, reduction):
    """Each pair of input and target has a loss of its own; ignored targets have none, as in cross-entropy."""
    assert reduction == "none"
    return torch.where(targets >= 0, NATS[inputs, targets.clamp_min(0)], 0.0)


@st.composite
def streams(draw, min_rows=1):
    """(inputs, targets) of rows that begin with BOS; some targets are ignored (-1)."""
    length, n_rows = draw(st.integers(1, 12)), draw(st.integers(min_rows, 6))
    rows = [[BOS, *draw(st.lists(tokens, min_size=length, max_size=length))] for _ in range(n_rows)]
    grid = torch.tensor(rows)
    inputs, targets = grid[:, :-1], grid[:, 1:].clone()
    for row in range(n_rows):
        for position in draw(st.sets(st.integers(0, length - 1), max_size=3)):
            targets[row, position] = -1
    return inputs, targets


def in_batches(inputs, targets, sizes):
    return iter(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def evaluate(inputs, targets, sizes=None, ranks=None):
    sizes = sizes or [len(inputs)]
    return evaluate_loss(model, in_batches(inputs, targets, sizes), len(sizes), TOKEN_BYTES, BOS, ranks)


def brute_force(inputs, targets):
    """Token by token: (bits per byte, nats per token, {tokens since BOS: losses})."""
    nats = n_bytes = 0.0
    by_position = {}
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        since_bos = None
        for token, answer in zip(row, answers, strict=True):
            since_bos = 0 if token == BOS else since_bos + 1
            if answer in (-1, BOS, OTHER_SPECIAL):
                continue
            loss = NATS[token, answer].item()
            nats, n_bytes = nats + loss, n_bytes + TOKEN_BYTES[answer].item()
            by_position.setdefault(since_bos, []).append(loss)
    count = sum(map(len, by_position.values()))
    if not count:
        return math.nan, math.nan, {}
    return nats / math.log(2) / n_bytes, nats / count, by_position


@settings(max_examples=150, deadline=None)
@given(streams())
def test_equals_counting_token_by_token(stream):
    bits, nats, by_position = brute_force(*stream)
    result = evaluate(*stream)
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-12, nan_ok=True)
    assert result.nats_per_token == pytest.approx(nats, rel=1e-12, nan_ok=True)
    length = stream[0].size(1)
    assert result.counts_by_position == [len(by_position.get(n, ())) for n in range(length)]
    assert result.n_tokens == sum(result.counts_by_position)
    expected = [np.mean(by_position[n]) if n in by_position else None for n in range(length)]
    assert result.nats_by_position == [None if n is None else pytest.approx(n, rel=1e-12) for n in expected]


@settings(max_examples=50, deadline=None)
@given(streams(min_rows=2), st.data())
def test_does_not_depend_on_how_rows_are_cut_into_batches(stream, data):
    sizes, left = [], len(stream[0])
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    whole, cut = evaluate(*stream), evaluate(*stream, sizes)
    assert cut.counts_by_position == whole.counts_by_position
    assert cut.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-12, nan_ok=True)
    assert cut.nats_by_position == [None if n is None else pytest.approx(n, rel=1e-12) for n in whole.nats_by_position]


@settings(max_examples=25, deadline=None)
@given(streams(min_rows=2), st.integers(2, 3))
def test_ranks_together_give_what_one_gives_alone(stream, world_size):
    inputs, targets = stream
    others = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_eval.dist, "all_reduce", lambda totals: others.append(totals.clone()))
        for rank in range(1, min(world_size, len(inputs))):
            evaluate(inputs[rank::world_size], targets[rank::world_size], ranks=Ranks(rank, rank, world_size))
        patch.setattr(loss_eval.dist, "all_reduce", lambda totals: totals.add_(sum(others)))
        together = evaluate(inputs[::world_size], targets[::world_size], ranks=Ranks(0, 0, world_size))
    alone = evaluate(inputs, targets)
    assert together.counts_by_position == alone.counts_by_position
    assert together.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-12, nan_ok=True)


def test_one_document_by_hand():
    """Targets of 1 and 3 bytes at ln 2 and 3 ln 2 nats: 4 bits over 4 bytes. BOS and ignored targets do not count."""
    nats = torch.tensor([[math.log(2), 3 * math.log(2), 50.0, 60.0]])
    inputs, targets = torch.tensor([[BOS, 0, 3, BOS]]), torch.tensor([[0, 3, BOS, -1]])
    result = evaluate_loss(lambda *_: nats, iter([(inputs, targets)]), 1, TOKEN_BYTES, BOS)
    assert result.bits_per_byte == pytest.approx(1.0)
    assert result.nats_per_token == pytest.approx(2 * math.log(2))
    assert result.nats_by_position == [pytest.approx(math.log(2)), pytest.approx(3 * math.log(2)), None, None]
    assert (result.counts_by_position, result.n_tokens) == ([1, 1, 0, 0], 2)


def test_only_the_batches_asked_for_are_taken():
    inputs, targets = torch.tensor([[BOS, 1]] * 5), torch.tensor([[1, 2]] * 5)
    batches = in_batches(inputs, targets, [1] * 5)
    assert evaluate_loss(model, batches, 3, TOKEN_BYTES, BOS).n_tokens == 6
    assert len(list(batches)) == 2


@pytest.mark.parametrize("ruined", [math.nan, math.inf])
def test_infinite_loss_of_a_counted_target_shows_and_of_one_left_out_does_not(ruined):
    inputs, targets = torch.tensor([[BOS, 1, 2]]), torch.tensor([[1, 2, BOS]])

    def evaluate_with(position):
        nats = torch.ones(1, 3)
        nats[0, position] = ruined
        return evaluate_loss(lambda *_: nats, iter([(inputs, targets)]), 1, TOKEN_BYTES, BOS).bits_per_byte

    assert not math.isfinite(evaluate_with(0))
    assert evaluate_with(2) == pytest.approx(2 / math.log(2) / 3)


def test_bfloat16_losses_are_added_up_in_fp64():
    """A thousand small losses after a large one: summed in bf16 they would vanish."""
    losses = torch.full((1, 1001), 0.01, dtype=torch.bfloat16)
    losses[0, 0] = 256.0
    inputs = torch.tensor([[BOS, *[0] * 1000]])
    result = evaluate_loss(lambda *_: losses, iter([(inputs, torch.zeros_like(inputs))]), 1, TOKEN_BYTES, BOS)
    assert result.nats_per_token * 1001 == pytest.approx(256 + 1000 * losses[0, 1].item(), rel=1e-12)


def test_no_gradient_is_kept():
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    def watched(inputs, targets, reduction):
        seen.append(weight * model(inputs, targets, reduction))
        return seen[-1]

    evaluate_loss(watched, iter([(torch.tensor([[BOS]]), torch.tensor([[1]]))]), 1, TOKEN_BYTES, BOS)
    assert not seen[0].requires_grad


@given(st.lists(st.lists(tokens, min_size=7, max_size=7), min_size=1, max_size=4))
def test_tokens_since_bos_by_counting(rows):
    expected = []
    for row in rows:
        since = -1  # a row that begins inside a document counts from its first token
        expected.append([since := 0 if token == BOS else since + 1 for token in row])
    assert tokens_since_bos(torch.tensor(rows), BOS).tolist() == expected
