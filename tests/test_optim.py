"""The optimizer against golden figures, torch's AdamW and its formulas; several ranks."""

import copy
import math
from unittest import mock

import numpy as np
import pytest
import torch
from golden_figures import FACTS, assert_golden, batch, golden_model, relative_error
from ranks import run_on_ranks

from nanochat import optim
from nanochat.distributed import Ranks
from nanochat.gpt import Linear
from nanochat.optim import (
    SMALL_NUMEL,
    MuonAdamW,
    adamw_updates,
    muon_direction,
    muon_update,
    parameter_groups,
    polar_express,
)


def test_three_steps_match_golden():
    model, (idx, targets) = golden_model(), batch()
    optimizer, losses = MuonAdamW(parameter_groups(model)), []
    for settings in FACTS["schedule_per_step"]:
        loss = model(idx, targets)
        loss.backward()
        losses.append(loss.item())
        optimizer.schedule(settings["lr_multiplier"], settings["muon_momentum"],
                           settings["muon_weight_decay"] / 0.28)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(model(idx, targets).item())
    assert losses == pytest.approx(FACTS["loss_before_each_step_then_after"], abs=1e-4)
    assert_golden({name: p.detach() for name, p in model.named_parameters()}, "after_step_3")


def test_compiled_updates_are_the_eager_ones():
    models = [golden_model() for _ in range(2)]
    for model, compiled in zip(models, (False, True), strict=True):
        head, *_, matrices = parameter_groups(model)
        optimizer = MuonAdamW([head, matrices], compiled=compiled)
        for seed, p in enumerate([*head["params"], *matrices["params"]]):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    for (name, p), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert relative_error(other.detach(), p.detach()) < 1e-5, name


def test_groups_match_golden_and_are_scaled():
    model = golden_model()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {frozenset(names[id(p)] for p in group["params"]): group
              for group in parameter_groups(model)}
    golden = {frozenset(group["params"]): group for group in FACTS["optimizer_groups"]}
    assert set(groups) == set(golden)
    for params, expected in golden.items():
        is_adamw = expected["kind"] == "adamw"
        keys = ("eps", "betas") if is_adamw else ("beta2", "momentum")
        for key in ("kind", "lr", "weight_decay", *keys):
            assert groups[params][key] == pytest.approx(expected[key]), (params, key)
    scaled = parameter_groups(model, batch_lr_scale=0.5, decay_scale=0.1)
    for a, b in zip(parameter_groups(model), scaled, strict=True):
        assert b["lr"] == pytest.approx(0.5 * a["lr"])
        factor = 0.1 if a["kind"] == "muon" else 1.0
        assert b["weight_decay"] == pytest.approx(factor * a["weight_decay"])


# --- the updates ----------------------------------------------------------------------------------

def test_adamw_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(50, generator=generator)
    theirs = torch.nn.Parameter(w.double())
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.96), eps=1e-10,
                                  weight_decay=0.1)
    m, v = torch.zeros(50), torch.zeros(50)
    for step in range(1, 20):
        grad = torch.randn(50, generator=generator)
        numbers = (0.03, 0.8, 0.96, 1e-10, 0.1, 1 - 0.8**step, 1 - 0.96**step)
        adamw_updates([(w, None, grad, m, v)], [map(torch.tensor, numbers)])
        theirs.grad = grad.double()
        reference.step()
    torch.testing.assert_close(w.double(), theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 40, 40), (3, 64, 16), (1, 16, 64), (2, 1, 12)])
def test_polar_express_approaches_the_polar_factor(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x / (1.01 * torch.linalg.matrix_norm(x, keepdim=True))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    found = polar_express(x)
    singular_values = torch.linalg.svdvals(found)
    assert singular_values.min() > 0.6 and singular_values.max() < 1.25
    assert (found * (u @ vh)).sum() / found.norm() / (u @ vh).norm() > 0.98


def test_muon_direction_has_equal_rows_and_a_spectral_norm_below_one():
    generator = torch.Generator().manual_seed(2)
    scales = torch.logspace(-3, 3, 20)[None, :, None]
    grad = torch.randn(3, 20, 8, generator=generator) * scales
    grad[1, 4] = 0
    grad[2] = 0  # ranks pad their stacks with zero matrices
    direction = muon_direction(grad, torch.zeros_like(grad), torch.tensor(0.9), torch.float32)
    norms = direction.norm(dim=-1)
    assert norms[1, 4] == 0 and not norms[2].any()
    others = norms[norms > 0]
    torch.testing.assert_close(others, others[:1].expand_as(others), rtol=0.05, atol=0)
    assert torch.linalg.svdvals(direction).max() < 1


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_muon_update_follows_its_formulas(shape):
    """In fp64; one row and one column are much smaller than the others, and an element is zero."""
    rows, cols = shape
    axis, lr, beta2, decay = (1 if rows >= cols else 0), 0.02, 0.9, 0.5
    rng = np.random.default_rng(0)
    p, moment = rng.standard_normal(shape), 0.0
    found = torch.from_numpy(p[None]).float()
    found_moment = torch.zeros((1, rows, 1) if rows >= cols else (1, 1, cols))
    for _ in range(3):
        u = rng.standard_normal(shape)
        u[3], u[:, 2], u[5, 5] = 1e-6 * u[3], 1e-6 * u[:, 2], 0.0
        numbers = map(torch.tensor, (lr, beta2, decay))
        muon_update(found, None, torch.from_numpy(u[None]), found_moment, *numbers)
        u *= math.sqrt(min(shape)) / np.linalg.norm(u)
        norm = np.linalg.norm(u)
        moment = beta2 * moment + (1 - beta2) * (u**2).mean(axis, keepdims=True)
        u /= np.sqrt(np.maximum(moment, 1e-10))
        u *= norm / np.linalg.norm(u)
        p = p - lr * (u + decay * p * (u * p >= 0))
    np.testing.assert_allclose(found[0], p, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_moment[0], moment, rtol=1e-4)


# --- copies of the weights in the compute dtype ---------------------------------------------------

def bf16_trainer(keep_casts=True, ranks=None):
    """Return (model, optimizer, function that takes a step of n one-row micro-batches)."""
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


def assert_copies_match(optimizer):
    for weight, cast in optimizer.casts.items():
        assert torch.equal(cast, weight.to(cast.dtype))


@pytest.mark.parametrize("n_micro_batches", [1, 3])
def test_copies_change_no_bit(n_micro_batches):
    """Neither with the bf16 gradients of one backward pass nor with the fp32 sum of several."""
    plain, _, step = bf16_trainer(keep_casts=False)
    kept, optimizer, step_kept = bf16_trainer()
    for _ in range(3):
        assert step_kept(n_micro_batches) == step(n_micro_batches)
    for (name, a), b in zip(plain.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(optimizer.casts) == sum(isinstance(module, Linear) for module in kept.modules())
    assert_copies_match(optimizer)
    assert golden_model().keep_casts() == {}  # fp32 needs none


def test_a_resumed_optimizer_continues_as_if_uninterrupted():
    model, optimizer, step = bf16_trainer()
    step()
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = step(first=1) + step()
    resumed, other, step = bf16_trainer()
    resumed.load_state_dict(weights)
    for group in state["param_groups"]:
        group["initial_lr"] = 9.0  # the learning rates are those of the flags
    other.load_state_dict(state)
    other.write_casts()
    assert step(first=1) + step() == losses
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


# --- several ranks --------------------------------------------------------------------------------

def step_on_a_rank(rank, world_size, micro_batches):
    """Return the bytes of a rank's optimizer state, and the weights after a step."""
    model, optimizer, step = bf16_trainer(ranks=Ranks(rank, rank, world_size))
    step(micro_batches)
    optimizer.complete_weights()
    assert_copies_match(optimizer)
    tensors = [value for state in optimizer.state.values() for value in state.values()
               if torch.is_tensor(value)]
    return sum(value.nbytes for value in tensors), as_bytes(model.state_dict())


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_holds_its_share_of_the_state_and_ranks_agree(world_size):
    """Both numbers of ranks divide the large tables. Embeddings and their state are bf16."""
    groups = parameter_groups(golden_model(compute_dtype=torch.bfloat16))
    tables = [p for group in groups if group["kind"] == "adamw" for p in group["params"]]
    stacks = [(-(-len(group["params"]) // world_size), *group["params"][0].shape)
              for group in groups if group["kind"] == "muon"]
    state = sum(4 * share * (rows * cols + max(rows, cols)) for share, rows, cols in stacks)
    state += sum(2 * p.nbytes // (world_size if p.numel() >= SMALL_NUMEL else 1) for p in tables)
    results = run_on_ranks(world_size, step_on_a_rank, world_size - 1)
    assert results == [(state, results[0][1])] * world_size


def as_bytes(value):
    """Return a picklable value that is equal only for bitwise equal tensors."""
    if torch.is_tensor(value):
        return value.detach().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {name: as_bytes(item) for name, item in value.items()}
    return [as_bytes(item) for item in value] if isinstance(value, list | tuple) else value


def step_after_a_warm_up(rank, world_size):
    """Return (did a warm-up change weights or state, does the next step equal that without)."""
    weights, is_changed = [], False
    for warm in (False, True):
        model, optimizer, step = bf16_trainer(ranks=Ranks(rank, rank, world_size))
        step(first=rank)
        if warm:
            before = [as_bytes(part) for part in (model.state_dict(), optimizer.state)]
            idx, targets = batch()
            model(idx[:1, :64], targets[:1, :64]).backward()
            with (mock.patch.multiple(optim, _reduce_scatter=None, _all_gather=None),
                  mock.patch.object(torch.distributed, "all_reduce", None)):
                optimizer.warm_up()
            optimizer.zero_grad()
            is_changed = before != [as_bytes(part) for part in (
                model.state_dict(), optimizer.state)]
        step(first=rank)
        optimizer.complete_weights()
        weights.append(as_bytes(model.state_dict()))
    return is_changed, weights[0] == weights[1]


def test_a_warm_up_changes_no_bit_and_uses_no_collectives():
    assert step_after_a_warm_up(0, 1) == (False, True)
    assert run_on_ranks(2, step_after_a_warm_up) == [(False, True)] * 2
