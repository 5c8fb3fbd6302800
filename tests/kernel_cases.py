"""What the kernels' tests share: the device, and the criterion of exactness."""

import pytest
import torch

from nanochat.kernels.runtime import INTERPRETED


def kernel_device():
    """The GPU where there is one; otherwise the CPU, with the kernels in Triton's interpreter."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("neither CUDA nor the interpreter: set TRITON_INTERPRET=1 before pytest starts")


def error(value, truth):
    """Relative error in the Frobenius norm; the error itself where the truth is zero."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    return ((value - truth).norm() / (truth.norm() or 1.0)).item()


def assert_as_exact(values, references, truths, factor=1.5, floor=2e-6):
    """Each value's error against the fp64 truth is at most 1.5 times that of the same-dtype torch reference.

    The floor is for references that happen to hit the truth, and for the order in which matmuls of
    another shape sum their fp32 products.
    """
    for index, (value, reference, truth) in enumerate(zip(values, references, truths, strict=True)):
        ours, theirs = error(value, truth), error(reference, truth)
        assert ours <= factor * theirs + floor, f"result {index}: error {ours:.3g}, the reference's {theirs:.3g}"
