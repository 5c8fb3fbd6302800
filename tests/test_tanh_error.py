"""Training in bf16 with the error of the hardware's tanh, emulated in Triton's interpreter.

The limits are those of `dev.gpu_checks.tanh_floors`, which derives them from the error 2^-11. At
logits of 1e4 the gradient has no relative limit: 1 - tanh^2 is about 0 and its error up to 2^-10,
so dx can be wrong by more than its own size, which is then tiny. Trained logits are far smaller.
"""

import numpy as np
import pytest
import torch
from kernel_cases import error, kernel_device

from dev.bench.variants import sliced_loss, triton_chunks
from dev.gpu_checks import TANH_ERROR, tanh_floors, with_gradients
from nanochat.kernels import linear_cross_entropy as module
from nanochat.kernels import runtime

# The relative error as a function of the argument, in units of the largest.
SHAPES = {
    "constant": np.ones_like,
    "wave": lambda x: np.cos(12345.678 * x),
    "half": lambda x: 0.5 * np.sign(np.cos(12345.678 * x)),
}


@pytest.fixture
def set_tanh(monkeypatch):
    """Return a function that gives the kernel's tanh a relative error of a shape and a size."""
    if not runtime.INTERPRETED:
        pytest.skip("the interpreter emulates the error; a GPU has it")
    from triton.runtime.interpreter import TensorHandle

    def set_error(shape, size):
        def tanh(x, APPROXIMATE):
            values = x.handle.data.astype(np.float64)
            inexact = np.clip(np.tanh(values) * (1 + size * SHAPES[shape](values)), -1, 1)
            handle = TensorHandle(inexact.astype(np.float32), x.handle.dtype)
            return runtime.tl.tensor(handle, x.type)

        monkeypatch.setattr(module, "_tanh", tanh)

    return set_error


def errors_and_limits(amplitude, n_rows=127, width=96, vocab_size=193):
    """Return ([error of loss, dx, dW], [limit of each], floors) of bf16 training against fp64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, width, generator=generator)
    weight = torch.randn(256, width, generator=generator) * amplitude / width**0.5
    targets = torch.randint(vocab_size, (n_rows,), generator=generator).to(kernel_device())
    case = [t.to(kernel_device(), torch.bfloat16).requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in case]
    ours, plain, truth = (with_gradients(loss, *tensors, targets, vocab_size) for loss, tensors in (
        (triton_chunks, case), (sliced_loss, case), (sliced_loss, exact)))
    floors = tanh_floors(*case, targets, vocab_size)
    found = [error(a, t) for a, t in zip(ours, truth, strict=True)]
    limits = [1.5 * error(p, t) + floor + 2e-6
              for p, t, floor in zip(plain, truth, floors, strict=True)]
    return found, limits, floors


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("amplitude", [0.5, 3.0, 30.0, 1e4])
def test_training_is_within_what_the_error_of_tanh_can_cause(set_tanh, shape, amplitude):
    set_tanh(shape, TANH_ERROR)
    found, limits, floors = errors_and_limits(amplitude)
    assert (floors[1] > 1) == (amplitude == 1e4)
    assert all(e <= limit for e, limit in zip(found, limits, strict=True)), (found, limits)


@pytest.mark.parametrize("amplitude", [3.0, 30.0])
def test_a_larger_error_exceeds_the_limits(set_tanh, amplitude):
    set_tanh("constant", 32 * TANH_ERROR)
    found, limits, _ = errors_and_limits(amplitude)
    assert any(e > limit for e, limit in zip(found, limits, strict=True)), (found, limits)
