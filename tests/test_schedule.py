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
    """Scaling parameters at the default sizes: 12 d^2 a layer, a gate of 12 per head on every second, the head."""
    width, heads = 128 * math.ceil(depth / 2), math.ceil(depth / 2)
    return 12 * width**2 * depth + 12 * heads * math.ceil(depth / 2) + VOCAB * width


D12 = params_by_hand(12)


def plan(n=D12, reference=D12, flops=10**9, **flags):
    return plan_horizon(n, reference, flops, **flags)


# --- sizes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "shape"), [
    ((12,), ModelShape(12, 768, 6)), ((20,), ModelShape(20, 1280, 10)), ((26,), ModelShape(26, 1664, 13)),
    ((1,), ModelShape(1, 128, 1)), ((3,), ModelShape(3, 256, 2)), ((13,), ModelShape(13, 896, 7)),
    ((4, 64, 64), ModelShape(4, 256, 4)), ((3, 50, 64), ModelShape(3, 192, 3)), ((2, 16, 32), ModelShape(2, 32, 1)),
    ((1, 24, 24), ModelShape(1, 24, 1)), ((1, 13, 12), ModelShape(1, 24, 2)),
])
def test_sizes_by_hand(arguments, shape):
    assert model_shape(*arguments) == shape


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 128).map(lambda half: 2 * half))
def test_width_is_the_smallest_whole_number_of_heads(depth, aspect_ratio, head_dim):
    wanted = depth * aspect_ratio
    assume(-(-wanted // head_dim) * head_dim >= 24)
    shape = model_shape(depth, aspect_ratio, head_dim)
    assert shape.n_layer == depth
    assert shape.n_embd == shape.n_head * head_dim
    assert wanted <= shape.n_embd < wanted + head_dim


@pytest.mark.parametrize(("arguments", "message"), [
    ((0,), "--depth 0"), ((-1,), "--depth -1"), ((12, 0), "--aspect-ratio 0"), ((12, -64), "--aspect-ratio -64"),
    ((12, 64, 0), "--head-dim 0"), ((12, 64, -128), "--head-dim -128"), ((12, 64, 65), "--head-dim 65"),
    ((1, 2, 2), "width of 2 .*24 channels"), ((1, 22, 22), "width of 22"),
])
def test_sizes_that_cannot_be_are_user_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        model_shape(*arguments)


# --- horizon and batch -----------------------------------------------------------------------------------------------

def test_depth_12_is_the_reference():
    horizon = plan()
    tokens = 12 * D12
    assert horizon == Horizon(tokens // 2**19, 2**19, tokens // 2**19 * 2**19, 1.0, 1.0)


@pytest.mark.parametrize(("depth", "log2_batch"), [(2, 17), (4, 18), (8, 18), (12, 19), (16, 19), (20, 20), (26, 20),
                                                   (32, 21)])
def test_automatic_batch_by_depth(depth, log2_batch):
    """Nearest power of two to 2^19 (D/D_ref)^0.383; 'nearest' on the log scale, as the dial itself is."""
    wanted = 19 + 0.383 * math.log2(params_by_hand(depth) / D12)
    assert abs(wanted - log2_batch) <= 0.5  # the expected column is itself right
    assert plan(params_by_hand(depth)).total_batch_size_tokens == 2**log2_batch


@given(st.integers(10**4, 10**12), st.integers(10**4, 10**12))
def test_automatic_batch_is_the_nearest_power_of_two(n, reference):
    batch = plan(n, reference, num_iterations=1).total_batch_size_tokens
    assert isinstance(batch, int) and batch.bit_count() == 1
    distance = abs(math.log2(batch) - 19 - 0.383 * (math.log2(n) - math.log2(reference)))
    assert distance <= 0.5 + 1e-9


def test_batch_scales_learning_rates_by_the_root_and_decay_by_the_horizon_too():
    """By hand: a batch of 4 B_ref and 8 D_ref give sqrt(4) = 2 and 2 / 8."""
    horizon = plan(8 * 10**6, 10**6, total_batch_size_tokens=2**21, num_iterations=3)
    assert (horizon.batch_lr_scale, horizon.decay_scale) == (2.0, 0.25)
    horizon = plan(10**6, 4 * 10**6, total_batch_size_tokens=2**17, num_iterations=3)
    assert (horizon.batch_lr_scale, horizon.decay_scale) == (0.5, 2.0)


def test_horizon_is_the_first_that_is_given():
    size = {"n": 10**6, "reference": 10**6, "flops": 100, "total_batch_size_tokens": 1000}
    ratio, flops, steps = {"target_param_data_ratio": 20.0}, {"target_flops": 3e7}, {"num_iterations": 7}
    assert plan(**size, **ratio).num_iterations == 20_000
    assert plan(**size, **ratio, **flops).num_iterations == 300
    assert plan(**size, **ratio, **flops, **steps).num_iterations == 7
    assert plan(**size).num_iterations == 12_000
    assert plan(**size, **steps).target_tokens == 7000


def test_ratio_gives_whole_batches_within_it_and_flops_the_nearest_step():
    size = {"n": 1000, "reference": 1000, "total_batch_size_tokens": 999}
    assert plan(**size, target_param_data_ratio=1.997).num_iterations == 1  # 1997 tokens: one batch, not two
    assert plan(**size, target_param_data_ratio=1.998).num_iterations == 2
    size = {"n": 1000, "reference": 1000, "flops": 10, "total_batch_size_tokens": 100}
    assert plan(**size, target_flops=1499.0).num_iterations == 1
    assert plan(**size, target_flops=1501.0).num_iterations == 2


@given(n=st.integers(10**4, 10**11), flops=st.integers(10**7, 10**13), batch=st.integers(1, 2**22) | st.just(-1),
       ratio=st.floats(0.1, 1000), budget=st.floats(1e10, 1e20) | st.just(-1.0),
       steps=st.integers(1, 10**6) | st.just(-1))
def test_horizon_adds_up(n, flops, batch, ratio, budget, steps):
    try:
        horizon = plan(n, 10**8, flops, target_param_data_ratio=ratio, total_batch_size_tokens=batch,
                       target_flops=budget, num_iterations=steps)
    except UserError as error:
        assert "shorter than one batch" in str(error)
        return
    used = horizon.total_batch_size_tokens
    assert horizon.num_iterations >= 1 and isinstance(horizon.num_iterations, int)
    assert horizon.target_tokens == horizon.num_iterations * used
    assert batch in (-1, used)
    if steps != -1:
        assert horizon.num_iterations == steps
    elif budget != -1:
        assert abs(horizon.num_iterations - Fraction(budget) / (flops * used)) <= 0.501
    else:
        assert horizon.target_tokens <= ratio * n < horizon.target_tokens + used + 1
    assert horizon.batch_lr_scale == pytest.approx(math.sqrt(used / 2**19))
    assert horizon.decay_scale == pytest.approx(horizon.batch_lr_scale * 10**8 / n)


def test_ratio_may_be_left_out_where_another_horizon_is_given():
    """Upstream's users write --target-flops=1e18 --target-param-data-ratio=-1."""
    size = {"n": 10**6, "reference": 10**6, "flops": 100, "total_batch_size_tokens": 1000}
    assert plan(**size, target_flops=3e7, target_param_data_ratio=-1.0).num_iterations == 300
    assert plan(**size, num_iterations=7, target_param_data_ratio=-1.0).num_iterations == 7
    with pytest.raises(UserError, match="no horizon"):
        plan(**size, target_param_data_ratio=-1.0)


@pytest.mark.parametrize("flags", [
    {"num_iterations": 0}, {"num_iterations": -2}, {"target_flops": 0.0}, {"target_flops": -1e18},
    {"target_flops": math.nan}, {"target_flops": math.inf}, {"target_param_data_ratio": 0.0},
    {"target_param_data_ratio": -12.0}, {"target_param_data_ratio": math.nan}, {"target_param_data_ratio": math.inf},
    {"total_batch_size_tokens": 0}, {"total_batch_size_tokens": -5},
])
def test_values_that_cannot_be_are_user_errors_and_named(flags):
    name = next(iter(flags)).replace("_tokens", "").replace("_", "-")
    for others in ({}, {"num_iterations": 10} if "num_iterations" not in flags else {"target_flops": 1e18}):
        with pytest.raises(UserError, match=rf"--{name} \S+ must be positive"):
            plan(**{**others, **flags})


@pytest.mark.parametrize("flags", [{"target_flops": 1.0}, {"target_param_data_ratio": 1e-9}])
def test_horizon_of_less_than_a_batch_is_a_user_error(flags):
    with pytest.raises(UserError, match=r"shorter than one batch of 524288 tokens.*--total-batch-size"):
        plan(**flags)


# --- micro-batches ---------------------------------------------------------------------------------------------------

@given(st.integers(1, 300), st.integers(1, 64), st.integers(1, 64), st.integers(1, 16))
def test_a_batch_is_whole_micro_batches_or_the_sizes_named_can_split_it(total_rows, rows, length, world_size):
    try:
        count = count_micro_batches(total_rows * length, rows, length, world_size)
        assert count * rows == total_rows and count >= world_size
    except UserError as error:
        assert total_rows % rows or total_rows < rows * world_size
        words = str(error).split("; give ")[1].removesuffix(", or start fewer ranks")
        for size in map(int, words.split(" or ")):
            count_micro_batches(*((size, 1) if "whole row" in str(error) else (total_rows * length, size)),
                                length, world_size)


@pytest.mark.parametrize(("arguments", "words"), [
    ((100, 8, 16, 1), "give 96 or 112"), ((0, 8, 16, 1), "give 16"), ((32, 8, 16, 3), "give 48, or start fewer ranks"),
    ((64, 8, 16, 1), "8 does not split --total-batch-size 64, 4 rows, over 1 rank(s); give 1 or 2 or 4"),
    ((512, 16, 16, 3), "give 1 or 2 or 4 or 8"), ((10**15, 7, 2**11, 1), "--device-batch-size 7")])
def test_batches_that_cannot_be_split_are_user_errors_that_name_those_that_can(arguments, words):
    with pytest.raises(UserError) as refused:
        count_micro_batches(*arguments)
    assert words in str(refused.value)


# --- over the steps --------------------------------------------------------------------------------------------------

def test_learning_rate_multiplier_by_hand():
    """1000 steps: up to 40, flat to 350, down over 650."""
    at = {step: lr_multiplier(step, 1000) for step in (0, 19, 38, 39, 40, 350, 351, 675, 999, 1000)}
    assert at[0] == 1 / 40
    assert at[19] == 0.5
    assert at[38] < 1.0 == at[39] == at[40] == at[350]
    assert at[351] == pytest.approx(1 - 0.95 / 650)
    assert at[675] == pytest.approx(0.525)
    assert at[999] == pytest.approx(0.05 + 0.95 / 650)
    assert at[1000] == pytest.approx(0.05)


@given(st.integers(1, 5000), st.integers(0, 200), st.floats(0, 1), st.floats(0, 1))
def test_learning_rate_multiplier_is_two_lines_and_a_plateau(num_iterations, warmup, warmdown, final):
    down = round(warmdown * num_iterations)
    assume(warmup <= num_iterations - down)  # else the run is too short to have a plateau
    steps = np.arange(num_iterations)
    got = [lr_multiplier(int(step), num_iterations, warmup_steps=warmup, warmdown_ratio=warmdown, final_lr_frac=final)
           for step in steps]
    up = np.minimum(1, (steps + 1) / warmup) if warmup else 1.0
    knots = ([num_iterations - down, num_iterations], [1.0, final]) if down else ([0], [1.0])
    np.testing.assert_allclose(got, np.minimum(up, np.interp(steps, *knots)), rtol=1e-9)


@given(st.integers(1, 300), st.integers(0, 400), st.floats(0, 1), st.floats(0, 1), st.data())
def test_learning_rate_multiplier_is_positive_and_at_most_one(num_iterations, warmup, warmdown, final, data):
    step = data.draw(st.integers(0, num_iterations - 1))
    value = lr_multiplier(step, num_iterations, warmup_steps=warmup, warmdown_ratio=warmdown, final_lr_frac=final)
    assert 0 < value <= 1


def test_momentum_by_hand():
    """2000 steps: 0.85 to 0.97 over 400, flat to 700, to 0.90 over 1300."""
    at = [muon_momentum(step, 2000) for step in (0, 100, 200, 400, 500, 700, 1350, 2000)]
    np.testing.assert_allclose(at, [0.85, 0.88, 0.91, 0.97, 0.97, 0.97, 0.935, 0.90], rtol=1e-12)


@given(st.integers(1, 20_000), st.floats(0, 1))
def test_momentum_is_its_warmup_then_its_warmdown(num_iterations, warmdown):
    down, flat = round(warmdown * num_iterations), 0.97
    steps = np.unique(np.linspace(0, num_iterations - 1, 400).astype(int))
    got = np.array([muon_momentum(int(step), num_iterations, warmdown_ratio=warmdown) for step in steps])
    late = np.interp(steps, [num_iterations - down, num_iterations], [flat, 0.90]) if down else flat
    np.testing.assert_allclose(got, np.where(steps < 400, 0.85 + 0.0003 * steps, late), rtol=1e-9)
    assert got.min() >= 0.85 and got.max() <= 0.97 + 1e-12


def test_weight_decay_by_hand():
    at = [muon_weight_decay(step, 300, 0.28) for step in (0, 100, 150, 200, 300)]
    np.testing.assert_allclose(at, [0.28, 0.21, 0.14, 0.07, 0.0], atol=1e-15)


@given(st.integers(2, 2000), st.floats(1e-6, 10))
def test_weight_decay_falls_from_its_initial_value_and_stays_positive(num_iterations, initial):
    values = [muon_weight_decay(step, num_iterations, initial) for step in range(num_iterations)]
    assert values[0] == initial
    assert all(a > b for a, b in itertools.pairwise(values))
    assert values[-1] > 0
    mirrored = [initial - value for value in values[:0:-1]]  # the half cosine is odd around its middle
    np.testing.assert_allclose(values[1:], mirrored, rtol=0, atol=1e-12 * initial)
