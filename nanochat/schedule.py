"""From one dial, the depth, to sizes, horizon, batch, learning rates and decay: pure functions with units."""

import math
from dataclasses import dataclass

import numpy as np

from nanochat.common import UserError

REFERENCE_DEPTH = 12
REFERENCE_BATCH_TOKENS = 2**19
BATCH_EXPONENT = 0.383  # arXiv:2505.13738: the critical batch grows as tokens^0.383
MOMENTUM_WARMUP_STEPS = 400


@dataclass(frozen=True)
class ModelShape:
    """What the depth decides: layers, width, heads (as many key/value heads as query heads)."""

    n_layer: int
    n_embd: int
    n_head: int


def model_shape(depth, aspect_ratio=64, head_dim=128):
    """Width = depth * aspect_ratio rounded up to whole heads. UserError for sizes that cannot be."""
    if depth < 1 or aspect_ratio < 1:
        raise UserError(f"--depth {depth} and --aspect-ratio {aspect_ratio} must both be at least 1")
    if head_dim < 2 or head_dim % 2:
        raise UserError(f"--head-dim {head_dim} cannot be: rotary embedding needs an even number of at least 2")
    n_head = math.ceil(depth * aspect_ratio / head_dim)
    n_embd = n_head * head_dim
    if n_embd < 24:
        raise UserError(f"a width of {n_embd} is too small: the smear gate reads 24 channels; "
                        "raise --depth or --aspect-ratio")
    return ModelShape(depth, n_embd, n_head)


@dataclass(frozen=True)
class Horizon:
    """How long a run is and in what batches, all in tokens or optimizer steps."""

    num_iterations: int
    total_batch_size_tokens: int
    target_tokens: int  # num_iterations * total_batch_size_tokens
    batch_lr_scale: float  # every learning rate is multiplied by it
    decay_scale: float  # Muon's weight decay is multiplied by it


def plan_horizon(n_scaling_params, reference_scaling_params, flops_per_token, *, num_iterations=-1, target_flops=-1.0,
                 target_param_data_ratio=12.0, total_batch_size_tokens=-1):
    """Steps and batch of a run: `num_iterations`, else `target_flops`, else tokens = ratio * scaling params.

    A value of -1 leaves a flag out. `reference_scaling_params` are those of the depth-12 model with the
    same vocabulary: D_ref = ratio * them goes with B_ref = 2^19 tokens. Automatic batch:
    B_ref (D/D_ref)^0.383 to the nearest power of two; learning rates scale as sqrt(B/B_ref), Muon's
    decay as sqrt(B/B_ref) D_ref/D (arXiv:2505.13738, arXiv:2405.13698).
    """
    for flag, value in (("--num-iterations", num_iterations), ("--target-flops", target_flops),
                        ("--target-param-data-ratio", target_param_data_ratio),
                        ("--total-batch-size", total_batch_size_tokens)):
        if value != -1 and not 0 < value < math.inf:
            raise UserError(f"{flag} {value} must be positive and finite; leave it out or give -1 to do without")
    size_ratio = n_scaling_params / reference_scaling_params  # = D/D_ref, the ratio cancels
    if total_batch_size_tokens == -1:
        wanted = REFERENCE_BATCH_TOKENS * size_ratio**BATCH_EXPONENT
        total_batch_size_tokens = 2 ** round(math.log2(wanted))
    if max(target_flops / flops_per_token, target_param_data_ratio * n_scaling_params) >= 1 << 63:
        raise UserError("--target-flops or --target-param-data-ratio asks for 2^63 tokens or more, beyond what is "
                        "counted here; lower it")
    if num_iterations != -1:
        steps = num_iterations
    elif target_flops != -1:
        steps = round(target_flops / (flops_per_token * total_batch_size_tokens))
    elif target_param_data_ratio != -1:
        steps = int(target_param_data_ratio * n_scaling_params) // total_batch_size_tokens
    else:
        raise UserError("no horizon: give --num-iterations, --target-flops or --target-param-data-ratio")
    if steps < 1:
        raise UserError(f"the horizon is shorter than one batch of {total_batch_size_tokens} tokens; "
                        "raise it or lower --total-batch-size")
    batch_lr_scale = math.sqrt(total_batch_size_tokens / REFERENCE_BATCH_TOKENS)
    return Horizon(steps, total_batch_size_tokens, steps * total_batch_size_tokens,
                   batch_lr_scale, batch_lr_scale / size_ratio)


def count_micro_batches(total_batch_size_tokens, device_batch_rows, sequence_len, world_size):
    """Micro-batches of all ranks in an optimizer step, at least one a rank; the ranks need not have equally many.

    Errors: UserError naming the sizes that can be, where the batch is not made of so many whole micro-batches.
    """
    rows, rest = divmod(total_batch_size_tokens, sequence_len)
    if rest or rows < world_size:
        sizes = [n * sequence_len for n in (rows, rows + 1) if n >= world_size] or [world_size * sequence_len]
        raise UserError(f"--total-batch-size {total_batch_size_tokens} is not at least {world_size} whole row(s), one "
                        f"a rank, of --max-seq-len {sequence_len}; give {' or '.join(map(str, sizes))}"
                        + (", or start fewer ranks" if rows < world_size else ""))
    if rows % device_batch_rows or rows // device_batch_rows < world_size:
        fitting = [n for n in range(1, min(rows // world_size, 1 << 16) + 1) if rows % n == 0]
        nearest = sorted(sorted(fitting, key=lambda n: abs(math.log(n / device_batch_rows)))[:5])
        raise UserError(f"--device-batch-size {device_batch_rows} does not split --total-batch-size "
                        f"{total_batch_size_tokens}, {rows} rows, over {world_size} rank(s); give "
                        f"{' or '.join(map(str, nearest))}")
    return rows // device_batch_rows


def lr_multiplier(step, num_iterations, *, warmup_steps=40, warmdown_ratio=0.65, final_lr_frac=0.05):
    """Factor on every learning rate for optimizer step `step` (from 0): linear up, flat, linear down."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    warmdown_steps = round(warmdown_ratio * num_iterations)
    if step <= num_iterations - warmdown_steps:
        return 1.0
    left = (num_iterations - step) / warmdown_steps
    return left + (1 - left) * final_lr_frac


def lr_multipliers(num_iterations, **shape):
    """`lr_multiplier` of every step of a horizon, float64 (num_iterations,)."""
    return np.array([lr_multiplier(step, num_iterations, **shape) for step in range(num_iterations)])


def muon_momentum(step, num_iterations, *, warmdown_ratio=0.65):
    """Muon's momentum at step `step`: 0.85 to 0.97 over 400 steps, then to 0.90 over the warmdown."""
    if step < MOMENTUM_WARMUP_STEPS:
        return 0.85 + (0.97 - 0.85) * step / MOMENTUM_WARMUP_STEPS
    warmdown_steps = round(warmdown_ratio * num_iterations)
    done = step - (num_iterations - warmdown_steps)
    return 0.97 if done < 0 or warmdown_steps == 0 else 0.97 + (0.90 - 0.97) * done / warmdown_steps


def muon_weight_decay(step, num_iterations, initial):
    """Muon's weight decay at step `step`: half a cosine from `initial` to 0."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / num_iterations))
