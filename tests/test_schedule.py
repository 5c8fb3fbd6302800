"""Sizes, horizon, batch and schedules against numbers computed by hand."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.schedule import (
    Horizon,
    ModelShape,
    count_micro_batches,
    lr_multiplier,
    model_shape,
    muon_momentum,
    muon_weight_decay,
    plan_horizon,
)

VOCAB = 32768


def params_by_hand(depth):
    """Scaling parameters at the default sizes: 12 d^2 per layer, value gates, the head."""
    heads = math.ceil(depth / 2)
    width = 128 * heads
    return 12 * width**2 * depth + 12 * heads * math.ceil(depth / 2) + VOCAB * width


D12 = params_by_hand(12)


def plan(n=D12, reference=D12, flops=10**9, **flags):
    return plan_horizon(n, reference, flops, **flags)


@pytest.mark.parametrize(("arguments", "shape"), [
    ((12,), ModelShape(12, 768, 6)), ((26,), ModelShape(26, 1664, 13)),
    ((3,), ModelShape(3, 256, 2)), ((4, 64, 64), ModelShape(4, 256, 4)),
    ((3, 50, 64), ModelShape(3, 192, 3)), ((1, 13, 12), ModelShape(1, 24, 2))])
def test_sizes_by_hand(arguments, shape):
    assert model_shape(*arguments) == shape


@pytest.mark.parametrize(("arguments", "message"), [
    ((12, 64, 65), "--head-dim 65"), ((1, 22, 22), "width of 22 .*24 channels")])
def test_impossible_sizes_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        model_shape(*arguments)


# --- horizon and batch ----------------------------------------------------------------------------

def test_depth_12_is_the_reference():
    tokens = 12 * D12
    assert plan() == Horizon(tokens // 2**19, 2**19, tokens // 2**19 * 2**19, 1.0, 1.0)


@pytest.mark.parametrize(("depth", "log2_batch"), [(2, 17), (8, 18), (12, 19), (20, 20), (32, 21)])
def test_automatic_batch_by_depth(depth, log2_batch):
    """The nearest power of two to 2^19 (D/D_ref)^0.383, on the log scale."""
    wanted = 19 + 0.383 * math.log2(params_by_hand(depth) / D12)
    assert abs(wanted - log2_batch) <= 0.5  # the expected column is itself right
    assert plan(params_by_hand(depth)).total_batch_size_tokens == 2**log2_batch


def test_batch_scales_learning_rates_by_its_root_and_decay_by_the_horizon_too():
    """By hand: a batch of 4 B_ref and 8 D_ref give sqrt(4) = 2 and 2 / 8."""
    horizon = plan(8 * 10**6, 10**6, total_batch_size_tokens=2**21, num_iterations=3)
    assert (horizon.batch_lr_scale, horizon.decay_scale) == (2.0, 0.25)
    horizon = plan(10**6, 4 * 10**6, total_batch_size_tokens=2**17, num_iterations=3)
    assert (horizon.batch_lr_scale, horizon.decay_scale) == (0.5, 2.0)


def test_the_horizon_is_the_first_flag_that_is_given():
    """A ratio of -1 beside another horizon is how users of upstream leave the ratio out."""
    size = {"n": 10**6, "reference": 10**6, "flops": 100, "total_batch_size_tokens": 1000}
    ratio, flops = {"target_param_data_ratio": 20.0}, {"target_flops": 3e7}
    assert plan(**size).num_iterations == 12_000
    assert plan(**size, **ratio).num_iterations == 20_000
    assert plan(**size, **ratio, **flops).num_iterations == 300
    assert plan(**size, **ratio, **flops, num_iterations=7).num_iterations == 7
    assert plan(**size, **flops, target_param_data_ratio=-1.0).num_iterations == 300
    with pytest.raises(UserError, match="no horizon"):
        plan(**size, target_param_data_ratio=-1.0)
    for short in ({"target_flops": 1.0}, {"target_param_data_ratio": 1e-9}):
        with pytest.raises(UserError, match="shorter than one batch of 1000 tokens"):
            plan(**size, **short)


# --- micro-batches --------------------------------------------------------------------------------

@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_a_batch_splits_into_micro_batches_or_the_named_size_does(rows, device_rows, length, ranks):
    try:
        count = count_micro_batches(rows * length, device_rows, length, ranks)
        assert count * device_rows == rows and count >= ranks
    except UserError as error:
        assert rows % device_rows or rows < device_rows * ranks
        size = int(str(error).split("; give ")[1])
        batch = (size, 1) if "must be a multiple" in str(error) else (rows * length, size)
        count_micro_batches(*batch, length, ranks)


@pytest.mark.parametrize(("arguments", "words"), [
    ((100, 8, 16, 1), "give 96"), ((32, 8, 16, 3), "give 48"), ((512, 16, 16, 3), "give 8")])
def test_a_batch_that_cannot_be_split_is_a_user_error_with_a_size_that_can(arguments, words):
    with pytest.raises(UserError, match=words):
        count_micro_batches(*arguments)


# --- schedules ------------------------------------------------------------------------------------

def test_learning_rate_multiplier_by_hand():
    """1000 steps: rise to 40, constant to 350, fall over 650."""
    steps = (0, 19, 38, 39, 40, 350, 351, 675, 999, 1000)
    at = {step: lr_multiplier(step, 1000) for step in steps}
    assert at[0] == 1 / 40 and at[19] == 0.5
    assert at[38] < 1.0 == at[39] == at[40] == at[350]
    assert at[351] == pytest.approx(1 - 0.95 / 650)
    assert at[675] == pytest.approx(0.525)
    assert at[1000] == pytest.approx(0.05)


@given(st.integers(1, 5000), st.integers(0, 200), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_multiplier_is_two_lines_and_a_plateau(n_steps, warmup, warmdown, final):
    down = round(warmdown * n_steps)
    assume(warmup <= n_steps - down)  # else the run is too short to have a plateau
    steps = np.arange(n_steps)
    got = [lr_multiplier(int(step), n_steps, warmup_steps=warmup, warmdown_ratio=warmdown,
                         final_lr_frac=final) for step in steps]
    up = np.minimum(1, (steps + 1) / warmup) if warmup else 1.0
    knots = ([n_steps - down, n_steps], [1.0, final]) if down else ([0], [1.0])
    np.testing.assert_allclose(got, np.minimum(up, np.interp(steps, *knots)), rtol=1e-9)


def test_momentum_by_hand():
    """2000 steps: 0.85 to 0.97 over 400, constant to 700, to 0.90 over 1300."""
    at = [muon_momentum(step, 2000) for step in (0, 100, 200, 400, 500, 700, 1350, 2000)]
    np.testing.assert_allclose(at, [0.85, 0.88, 0.91, 0.97, 0.97, 0.97, 0.935, 0.90], rtol=1e-12)


def test_weight_decay_falls_from_its_initial_value_and_stays_positive():
    values = [muon_weight_decay(step, 500, 0.28) for step in range(500)]
    assert values[0] == 0.28 and values[-1] > 0
    assert all(one > next_one for one, next_one in itertools.pairwise(values))
    np.testing.assert_allclose(muon_weight_decay(1, 4, 0.28), 0.28 * 0.5 * (1 + 0.5**0.5))
