import itertools
import math
from fractions import Fraction

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


# --- sizes ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "shape"), [
    ((12,), ModelShape(12, 768, 6)), ((26,), ModelShape(26, 1664, 13)),
    ((3,), ModelShape(3, 256, 2)), ((4, 64, 64), ModelShape(4, 256, 4)),
    ((3, 50, 64), ModelShape(3, 192, 3)), ((1, 13, 12), ModelShape(1, 24, 2)),
])
def test_sizes_by_hand(arguments, shape):
    assert model_shape(*arguments) == shape


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 128).map(lambda half: 2 * half))
def test_width_is_the_smallest_number_of_complete_heads(depth, aspect_ratio, head_dim):
    wanted = depth * aspect_ratio
    assume(-(-wanted // head_dim) * head_dim >= 24)
    shape = model_shape(depth, aspect_ratio, head_dim)
    assert shape.n_layer == depth and shape.n_embd == shape.n_head * head_dim
    assert wanted <= shape.n_embd < wanted + head_dim


@pytest.mark.parametrize(("arguments", "message"), [
    ((0,), "--depth 0"), ((12, -64), "--aspect-ratio -64"), ((12, 64, 0), "--head-dim 0"),
    ((12, 64, 65), "--head-dim 65"), ((1, 22, 22), "width of 22 .*24 channels"),
])
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


@given(n=st.integers(10**4, 10**11), flops=st.integers(10**7, 10**13),
       batch=st.integers(1, 2**22) | st.just(-1), ratio=st.floats(0.1, 1000),
       budget=st.floats(1e10, 1e20) | st.just(-1.0), steps=st.integers(1, 10**6) | st.just(-1))
def test_the_parts_of_a_horizon_agree(n, flops, batch, ratio, budget, steps):
    try:
        horizon = plan(n, 10**8, flops, target_param_data_ratio=ratio, target_flops=budget,
                       total_batch_size_tokens=batch, num_iterations=steps)
    except UserError as error:
        assert "shorter than one batch" in str(error)
        return
    used = horizon.total_batch_size_tokens
    assert horizon.num_iterations >= 1 and isinstance(horizon.num_iterations, int)
    assert horizon.target_tokens == horizon.num_iterations * used
    assert used == batch if batch != -1 else used.bit_count() == 1
    if steps != -1:
        assert horizon.num_iterations == steps
    elif budget != -1:
        assert abs(horizon.num_iterations - Fraction(budget) / (flops * used)) <= 0.501
    else:
        assert horizon.target_tokens <= ratio * n < horizon.target_tokens + used + 1
    assert horizon.batch_lr_scale == pytest.approx(math.sqrt(used / 2**19))
    assert horizon.decay_scale == pytest.approx(horizon.batch_lr_scale * 10**8 / n)


@pytest.mark.parametrize("flags", [
    {"num_iterations": 0}, {"num_iterations": -2}, {"target_flops": -1e18},
    {"target_flops": math.nan}, {"target_param_data_ratio": 0.0},
    {"target_param_data_ratio": math.inf}, {"total_batch_size_tokens": 0}])
def test_impossible_values_are_user_errors_that_name_the_flag(flags):
    name = next(iter(flags)).replace("_tokens", "").replace("_", "-")
    with pytest.raises(UserError, match=rf"--{name} \S+ must be positive"):
        plan(**flags)


@pytest.mark.parametrize("flags", [{"target_flops": 1.0}, {"target_param_data_ratio": 1e-9}])
def test_a_horizon_of_less_than_a_batch_is_a_user_error(flags):
    with pytest.raises(UserError, match=r"shorter than one batch of 524288 tokens"):
        plan(**flags)


# --- micro-batches --------------------------------------------------------------------------------

@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_a_batch_splits_into_micro_batches_or_the_named_sizes_do(rows, device_rows, length,
                                                                world_size):
    try:
        count = count_micro_batches(rows * length, device_rows, length, world_size)
        assert count * device_rows == rows and count >= world_size
    except UserError as error:
        assert rows % device_rows or rows < device_rows * world_size
        words = str(error).split("; give ")[1].removesuffix(", or start fewer ranks")
        for size in map(int, words.split(" or ")):
            batch = (size, 1) if "must be a multiple" in str(error) else (rows * length, size)
            count_micro_batches(*batch, length, world_size)


@pytest.mark.parametrize(("arguments", "words"), [
    ((100, 8, 16, 1), "give 96 or 112"), ((32, 8, 16, 3), "give 48, or start fewer ranks"),
    ((64, 8, 16, 1), "give 1 or 2 or 4"), ((512, 16, 16, 3), "give 1 or 2 or 4 or 8"),
    ((10**15, 7, 2**11, 1), "--device-batch-size 7")])
def test_a_batch_that_cannot_be_split_is_a_user_error_with_sizes_that_can(arguments, words):
    with pytest.raises(UserError) as refused:
        count_micro_batches(*arguments)
    assert words in str(refused.value)


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


@given(st.integers(2, 2000), st.floats(1e-6, 10))
def test_weight_decay_falls_from_its_initial_value_and_stays_positive(n_steps, initial):
    values = [muon_weight_decay(step, n_steps, initial) for step in range(n_steps)]
    assert values[0] == initial and values[-1] > 0
    assert all(one > next_one for one, next_one in itertools.pairwise(values))
    np.testing.assert_allclose(muon_weight_decay(1, 4, 0.28), 0.28 * 0.5 * (1 + 0.5**0.5))
