import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from golden_figures import FACTS, arrays, batch, golden_model, relative_error
from ranks import run_on_ranks

from dev.bench.ranks import count_step
from nanochat import optim
from nanochat.distributed import Ranks
from nanochat.gpt import Linear
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.optim import adamw_update, muon_direction, muon_update, polar_express


def take_golden_steps(model, optimizer):
    idx, targets = batch()
    losses = []
    for figures in FACTS["schedule_per_step"]:
        loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.schedule(figures["lr_multiplier"], figures["muon_momentum"], figures["muon_weight_decay"] / 0.28)
        optimizer.step()
        optimizer.zero_grad()
    return [*losses, model(idx, targets).item()]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_three_steps_match_golden(compiled):
    model = golden_model()
    losses = take_golden_steps(model, MuonAdamW(parameter_groups(model), compiled=compiled))
    assert losses == pytest.approx(FACTS["loss_before_each_step_then_after"], abs=1e-4)
    golden = arrays("after_step_3")
    errors = {name: relative_error(p.detach(), golden[name]) for name, p in model.named_parameters()}
    assert max(errors.values()) < 1e-3, errors


def test_a_state_brings_no_learning_rates_of_its_own():
    """A resume with --allow-changed --matrix-lr ... must do what its flags say."""
    model = golden_model()
    saved = MuonAdamW(parameter_groups(model, matrix_lr=0.1, weight_decay=0.5))
    take_golden_steps(model, saved)
    optimizer = MuonAdamW(parameter_groups(golden_model()))
    given = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved.state_dict())
    assert [{name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups] == given
    assert len(optimizer.state) == len(saved.state) > 0


def test_groups_match_golden():
    model = golden_model()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {frozenset(names[id(p)] for p in group["params"]): group for group in parameter_groups(model)}
    golden = {frozenset(group["params"]): group for group in FACTS["optimizer_groups"]}
    assert set(found) == set(golden)
    for params, group in golden.items():
        for key in ("kind", "lr", "weight_decay", *(("eps",) if group["kind"] == "adamw" else ("beta2", "momentum"))):
            assert found[params][key] == pytest.approx(group[key]), (params, key)
        if group["kind"] == "adamw":
            assert list(found[params]["betas"]) == group["betas"]


def test_batch_and_decay_scales_multiply_every_lr_and_muons_decay():
    plain, scaled = (parameter_groups(golden_model(), **scales)
                     for scales in ({}, {"batch_lr_scale": 0.5, "decay_scale": 0.1}))
    for a, b in zip(plain, scaled, strict=True):
        assert b["lr"] == pytest.approx(0.5 * a["lr"])
        assert b["weight_decay"] == pytest.approx((0.1 if a["kind"] == "muon" else 1.0) * a["weight_decay"])


def test_adamw_agrees_with_torchs_own():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=generator)
    ours, theirs = w.clone(), torch.nn.Parameter(w.double())
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.1)
    m, v = torch.zeros(50), torch.zeros(50)
    for step in range(1, 20):
        grad = torch.randn(50, generator=generator)
        numbers = (0.03, 0.8, 0.96, 1e-10, 0.1, 1 - 0.8**step, 1 - 0.96**step)
        adamw_update(ours, None, grad, m, v, *map(torch.tensor, numbers))
        theirs.grad = grad.double()
        reference.step()
    torch.testing.assert_close(ours.double(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 40, 40), (3, 64, 16), (1, 16, 64), (2, 1, 12)])
def test_polar_express_approaches_the_polar_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = polar_express(x)
    singular_values = torch.linalg.svdvals(found)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.25
    cosine = (found * (u @ vh)).sum() / found.norm() / (u @ vh).norm()
    assert cosine > 0.98


def test_muon_direction_has_equal_rows_and_spectral_norm_below_one():
    grad = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 20)[None, :, None]
    grad[1, 4] = 0
    direction = muon_direction(grad, torch.zeros_like(grad), torch.tensor(0.9), torch.float32)
    norms = direction.norm(dim=-1)
    assert norms[1, 4] == 0
    others = norms[norms > 0]
    torch.testing.assert_close(others, others[:1].expand_as(others), rtol=0.05, atol=0)
    assert torch.linalg.svdvals(direction).max() < 1


def test_muon_direction_of_no_gradient_is_none():
    """Ranks fill their stacks up with zero matrices: no NaN may come of them."""
    zeros = torch.zeros(2, 8, 6)
    assert torch.equal(muon_direction(zeros, zeros.clone(), torch.tensor(0.9), torch.float32), zeros)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_muon_update_by_its_formulas(shape):
    """In fp64, one matrix at a time; one row and one column are far smaller than the rest, one element is zero."""
    rows, cols = shape
    axis, lr, beta2, decay = (1 if rows >= cols else 0), 0.02, 0.9, 0.5
    rng = np.random.default_rng(0)
    p, moment = rng.standard_normal(shape), 0.0
    found = torch.from_numpy(p[None]).float()
    found_moment = torch.zeros(1, rows, 1) if rows >= cols else torch.zeros(1, 1, cols)
    for _ in range(3):
        u = rng.standard_normal(shape)
        u[3], u[:, 2], u[5, 5] = 1e-6 * u[3], 1e-6 * u[:, 2], 0.0
        muon_update(found, None, torch.from_numpy(u[None]), found_moment, *map(torch.tensor, (lr, beta2, decay)))
        u *= math.sqrt(min(shape)) / np.linalg.norm(u)
        norm = np.linalg.norm(u)
        moment = beta2 * moment + (1 - beta2) * (u**2).mean(axis, keepdims=True)
        u /= np.sqrt(np.maximum(moment, 1e-10))
        u *= norm / np.linalg.norm(u)
        p = p - lr * (u + decay * p * (u * p >= 0))
    np.testing.assert_allclose(found[0], p, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_moment[0], moment, rtol=1e-4)


# --- copies of the weights in the compute dtype ----------------------------------------------------------------------

def bf16_trainer(keep_casts, ranks=None):
    """(model, optimizer, function that takes a step of `n` micro-batches of a row each and returns its losses)."""
    model = golden_model(compute_dtype=torch.bfloat16)
    casts = model.keep_casts() if keep_casts else {}
    optimizer = MuonAdamW(parameter_groups(model), ranks, torch.bfloat16, casts=casts)

    def step(n=1, first=0):
        losses = []
        for idx, targets in list(zip(*batch(), strict=True))[first : first + n]:
            loss = model(idx[None, :64], targets[None, :64])
            (loss / n).backward()
            if n > 1:
                optimizer.accumulate()
            losses.append(loss.item())
        optimizer.schedule(1.0, 0.9, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return losses

    return model, optimizer, step


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_kept_casts_change_no_bit(n_micro_batches):
    """Neither with the gradients of one backward pass, in bf16, nor with the sum of several, which is fp32."""
    (plain, _, step), (kept, optimizer, step_kept) = bf16_trainer(False), bf16_trainer(True)
    for _ in range(3):
        assert step_kept(n_micro_batches) == step(n_micro_batches)
    for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(optimizer.casts) == sum(isinstance(module, Linear) for module in kept.modules())
    assert all(torch.equal(cast, weight.to(cast.dtype)) for weight, cast in optimizer.casts.items())
    assert {grad for grad in (p.grad for p in [*kept.parameters(), *optimizer.casts.values()])} == {None}


def test_in_fp32_the_weights_need_no_copies():
    assert golden_model().keep_casts() == {}


def test_a_resumed_optimizer_goes_on_where_it_was():
    model, optimizer, step = bf16_trainer(True)
    step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer_state = copy.deepcopy(optimizer.state_dict())
    losses = step(first=1) + step()
    resumed, other, step = bf16_trainer(True)
    resumed.load_state_dict(state)
    other.load_state_dict(optimizer_state)
    other.write_casts()
    assert step(first=1) + step() == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_the_weights_of_a_shape_are_views_of_one_tensor_and_stay_so():
    model, _, step = bf16_trainer(True)
    storages = {p.untyped_storage().data_ptr() for p in model.transformer.h.parameters()}
    assert len(storages) == len({tuple(p.shape) for p in model.transformer.h.parameters()})
    step()
    assert {p.untyped_storage().data_ptr() for p in model.transformer.h.parameters()} == storages


# --- several ranks ---------------------------------------------------------------------------------------------------

def counted_step_of(rank, world_size):
    """([collectives of a step: (name, bytes put in)], whether copies fit their weights, the weights)."""
    model, optimizer, step = bf16_trainer(True, Ranks(rank, rank, world_size))
    calls = []

    def counted(function, which):
        def call(*args, **options):
            calls.append((function.__name__, args[which].nbytes))
            return function(*args, **options)
        return call

    with (mock.patch.object(optim, "_reduce_scatter", counted(optim._reduce_scatter, 1)),
          mock.patch.object(optim, "_all_gather", counted(optim._all_gather, 1)),
          mock.patch.object(optim.dist, "all_reduce", counted(optim.dist.all_reduce, 0))):
        step(first=rank)
    optimizer.complete_weights()
    consistent = all(torch.equal(cast, weight.to(cast.dtype)) for weight, cast in optimizer.casts.items())
    return calls, consistent, {name: p.detach().float().numpy() for name, p in model.named_parameters()}


def test_collectives_of_a_step():
    """A reduce-scatter and an all-gather of each Muon shape and each large table, in bf16, and one all-reduce."""
    ranks = run_on_ranks(2, counted_step_of)
    model = golden_model()
    small = sum(p.numel() for group in parameter_groups(model) if group["kind"] == "adamw" for p in group["params"]
                if p.numel() < optim.SMALL_NUMEL)
    groups = parameter_groups(model)
    stacks = [len(g["params"]) + len(g["params"]) % 2 for g in groups if g["kind"] == "muon"]
    shapes = [g["params"][0].numel() for g in groups if g["kind"] == "muon"]
    tables = [p.numel() for g in groups if g["kind"] == "adamw" for p in g["params"] if p.numel() >= optim.SMALL_NUMEL]
    sharded = [2 * n for n in tables] + [2 * k * n for k, n in zip(stacks, shapes, strict=True)]
    for calls, consistent, weights in ranks:
        assert consistent
        assert [n for name, n in calls if name.startswith("reduce_scatter")] == sharded
        assert [n for name, n in calls if name.startswith("all_gather")] == [n // 2 for n in sharded]
        assert [n for name, n in calls if name == "all_reduce"] == [4 * small]
        assert len(calls) == 2 * len(sharded) + 1
        assert all((weights[name] == ranks[0][2][name]).all() for name in weights)


def counts_of(rank, world_size, micro_batches):
    return count_step(golden_model(compute_dtype=torch.bfloat16), Ranks(rank, rank, world_size), micro_batches)


@pytest.mark.parametrize("world_size", [2, 3])
def test_state_and_traffic_of_a_rank_follow_the_readmes_formulas(world_size):
    """The large tables divide by both. Embeddings and their gradients are bf16 themselves."""
    micro_batches = world_size - 1  # one and several
    groups = parameter_groups(golden_model(compute_dtype=torch.bfloat16))
    tables = [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    shared = [p for p in tables if p.numel() >= optim.SMALL_NUMEL and len(p) % world_size == 0]
    stacks = [(-(-len(group["params"]) // world_size), *group["params"][0].shape)
              for group in groups if group["kind"] == "muon"]
    state = sum(4 * share * (rows * cols + max(rows, cols)) for share, rows, cols in stacks)
    state += sum(2 * p.nbytes // (world_size if p in set(shared) else 1) for p in tables)
    matrices = sum(world_size * share * rows * cols for share, rows, cols in stacks)
    gathered = 2 * (matrices + sum(p.numel() for p in shared))
    reduced = gathered if micro_batches == 1 else 4 * matrices + sum(p.nbytes for p in shared)
    replicated = 4 * (sum(p.numel() for p in tables) - sum(p.numel() for p in shared))
    for counts in run_on_ranks(world_size, counts_of, micro_batches):
        assert counts == {"state": state, "reduce_scatter": reduced, "all_gather": gathered, "all_reduce": replicated}


def step_after_a_warm_up(rank, world_size):
    """(collectives of a warm-up, whether it changed anything that a step sees, weights after a step: without, with)."""
    weights, calls, changed = [], [], False

    def count(*args, **_):
        calls.append(args)

    for warm in (False, True):
        model, optimizer, step = bf16_trainer(True, Ranks(rank, rank, world_size))
        step(first=rank)
        if warm:
            before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), list(optimizer.casts.values())))
            idx, targets = batch()
            model(idx[:1, :64], targets[:1, :64]).backward()
            with (mock.patch.object(optim, "_reduce_scatter", count), mock.patch.object(optim, "_all_gather", count),
                  mock.patch.object(optim.dist, "all_reduce", count)):
                optimizer.warm_up()
            optimizer.zero_grad()
            after = copy.deepcopy((model.state_dict(), optimizer.state_dict(), list(optimizer.casts.values())))
            changed = repr_of(before) != repr_of(after)
        step(first=rank)
        optimizer.complete_weights()
        weights.append(repr_of(model.state_dict()))
    return len(calls), changed, weights[0] == weights[1]


def repr_of(value):
    """Comparable to the bit: tensors as bytes."""
    if torch.is_tensor(value):
        return value.detach().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: repr_of(item) for name, item in value.items()}
    return [repr_of(item) for item in value] if isinstance(value, list | tuple) else value


def test_a_warm_up_changes_no_bit_and_waits_for_nobody():
    assert step_after_a_warm_up(0, 1) == (0, False, True)
    assert run_on_ranks(2, step_after_a_warm_up) == [(0, False, True)] * 2


def train_on_one_of(rank, world_size):
    """A few steps on this rank's rows of a fixed batch; (losses, parameters, elements of optimizer state)."""
    idx, targets = batch()
    idx, targets = idx[:2].view(world_size, -1, 256)[rank], targets[:2].abs().view(world_size, -1, 256)[rank]
    model = golden_model()
    optimizer = MuonAdamW(parameter_groups(model), Ranks(rank, rank, world_size))
    losses = []
    for _ in range(4):
        for row in range(len(idx)):
            loss = model(idx[row : row + 1], targets[row : row + 1])
            (loss / len(idx)).backward()
            losses.append(loss.item())
        optimizer.schedule(1.0, 0.9, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v))
    return losses, {name: p.detach().numpy() for name, p in model.named_parameters()}, state


def test_two_ranks_make_the_updates_of_one_and_share_the_state():
    losses, one, state = train_on_one_of(0, 1)
    ranks = run_on_ranks(2, train_on_one_of)
    for rank, (rank_losses, params, rank_state) in enumerate(ranks):
        assert rank_losses == pytest.approx(losses[rank::2], rel=1e-5)
        for name, value in params.items():
            assert relative_error(torch.from_numpy(value), torch.from_numpy(one[name])) < 1e-4, name
        assert 0.45 * state < rank_state < 0.6 * state
    assert all((ranks[0][1][name] == ranks[1][1][name]).all() for name in one)
