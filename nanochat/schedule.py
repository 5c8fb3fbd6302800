"""Pure functions that derive sizes, horizon, batch size and learning rates from the depth."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanochat.common import UserError

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383  # arXiv:2505.13738: the critical batch grows as tokens^0.383
MOMENTUM_WARMUP_STEPS = 400


class ModelShape(NamedTuple):
    """Sizes that follow from the depth; there are as many key/value heads as query heads."""

    n_layer: int
    n_embd: int
    n_head: int


def model_shape(depth, aspect_ratio=64, head_dim=128):
    """Return the ModelShape; width = depth * aspect_ratio, rounded up to a multiple of head_dim.

    Raise UserError for sizes that no model can have.
    """
    if head_dim % 2:
        raise UserError(f"--head-dim {head_dim} must be even: rotary embedding rotates pairs of "
                        "channels")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    if n_head * head_dim < 24:
        raise UserError(f"a width of {n_head * head_dim} is too small: the smear gate reads 24 "
                        "channels; raise --depth or --aspect-ratio")
    return ModelShape(depth, n_head * head_dim, n_head)


@dataclass(frozen=True)
class Horizon:
    """Length and batch of a run, in optimizer steps and tokens."""

    num_iterations: int
    total_batch_size_tokens: int
    target_tokens: int  # num_iterations * total_batch_size_tokens
    batch_lr_scale: float  # factor on every learning rate
    decay_scale: float  # factor on the weight decay of Muon


def plan_horizon(n_scaling_params, reference_scaling_params, flops_per_token, *,
                 num_iterations=-1, target_flops=-1.0, target_param_data_ratio=12.0,
                 total_batch_size_tokens=-1):
    """Return the Horizon: `num_iterations`, else `target_flops`, else tokens = ratio * parameters.

    A value of -1 means that a flag was not given. `reference_scaling_params` are those of the
    depth-12 model with the same vocabulary: D_ref = ratio * these belongs to B_ref = 2^19 tokens.
    The automatic batch is B_ref (D/D_ref)^0.383 to the nearest power of two. Learning rates scale
    as sqrt(B/B_ref), Muon's decay as sqrt(B/B_ref) D_ref/D (arXiv:2505.13738, arXiv:2405.13698).
    """
    size_ratio = n_scaling_params / reference_scaling_params  # = D/D_ref: the ratio cancels
    if total_batch_size_tokens == -1:
        wanted = REFERENCE_BATCH_TOKENS * size_ratio**BATCH_EXPONENT
        total_batch_size_tokens = 2 ** round(math.log2(wanted))

    if num_iterations != -1:
        steps = num_iterations
    elif target_flops != -1:
        steps = round(target_flops / (flops_per_token * total_batch_size_tokens))
    elif target_param_data_ratio != -1:
        steps = int(target_param_data_ratio * n_scaling_params) // total_batch_size_tokens
    else:
        raise UserError("no horizon: give --num-iterations, --target-flops or "
                        "--target-param-data-ratio")
    if steps < 1:
        raise UserError(f"the horizon is shorter than one batch of {total_batch_size_tokens} "
                        "tokens; raise it or lower --total-batch-size")
    batch_lr_scale = math.sqrt(total_batch_size_tokens / REFERENCE_BATCH_TOKENS)
    return Horizon(steps, total_batch_size_tokens, steps * total_batch_size_tokens,
                   batch_lr_scale, batch_lr_scale / size_ratio)


def count_micro_batches(total_batch_size_tokens, device_batch_rows, sequence_len, world_size):
    """Return the micro-batches of all ranks in one optimizer step, at least one per rank.

    The numbers per rank may differ. Raise UserError with a possible size if the batch does not
    divide.
    """
    rows, rest = divmod(total_batch_size_tokens, sequence_len)
    if rest or rows < world_size:
        raise UserError(
            f"--total-batch-size {total_batch_size_tokens} must be a multiple of --max-seq-len "
            f"{sequence_len} with at least one row per rank ({world_size}); give "
            f"{max(rows, world_size) * sequence_len}")
    micro_batches, rest = divmod(rows, device_batch_rows)
    if rest or micro_batches < world_size:
        most = min(rows // world_size, device_batch_rows)
        fitting = next(n for n in range(most, 0, -1) if rows % n == 0)
        raise UserError(
            f"--device-batch-size {device_batch_rows} does not split the {rows} rows of "
            f"--total-batch-size {total_batch_size_tokens} over {world_size} rank(s); give "
            f"{fitting}")
    return micro_batches


def lr_multiplier(step, num_iterations, *, warmup_steps=40, warmdown_ratio=0.65,
                  final_lr_frac=0.05):
    """Return the factor on learning rates for `step` (from 0): warm-up, constant, decay."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = (num_iterations - step) / warmdown_steps
    return left + (1 - left) * final_lr_frac


def lr_multipliers(num_iterations, **shape):
    """Return `lr_multiplier` for every step of a horizon, float64 (num_iterations,)."""
    steps = range(num_iterations)
    return np.array([lr_multiplier(step, num_iterations, **shape) for step in steps])


def muon_momentum(step, num_iterations, *, warmdown_ratio=0.65):
    """Return Muon's momentum at `step`: 0.85 to 0.97 over 400 steps, then to 0.90 in the decay."""
    if step < MOMENTUM_WARMUP_STEPS:
        return 0.85 + (0.97 - 0.85) * step / MOMENTUM_WARMUP_STEPS
    warmdown_steps = round(warmdown_ratio * num_iterations)
    done = step - (num_iterations - warmdown_steps)
    if done < 0 or warmdown_steps == 0:
        return 0.97
    return 0.97 + (0.90 - 0.97) * done / warmdown_steps


def muon_weight_decay(step, num_iterations, initial):
    """Return Muon's weight decay at `step`: half a cosine from `initial` to 0."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / num_iterations))
