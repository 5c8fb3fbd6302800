"""Shared by the tests of kernels: the device, the plain loss, and the criterion of exactness."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.gpt import plain_cross_entropy
from nanochat.kernels.runtime import INTERPRETED


def kernel_device():
    """Return the GPU if there is one, else the CPU, where Triton's interpreter runs the kernels."""
    if INTERPRETED:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    pytest.skip("neither CUDA nor the interpreter: set TRITON_INTERPRET=1 before pytest starts")


def plain_linear_cross_entropy(x, weight, targets, vocab_size, reduction="mean"):
    """The loss as the model computes it by default, from x (..., d) and weight (Vpad, d)."""
    logits = F.linear(x, weight.to(x.dtype))
    return plain_cross_entropy(logits, targets, vocab_size, reduction)


def with_gradients(function, inputs, upstream=None):
    """Return the outputs of a function and its gradients at `inputs`, as one tuple."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs, inputs, upstream))


def error(value, truth):
    """Return the relative error in the Frobenius norm; the error itself if the truth is zero."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape
    return ((value - truth).norm() / (truth.norm() or 1.0)).item()


def assert_as_exact(values, references, truths, factor=1.5, floor=2e-6):
    """Each value's error against fp64 is at most 1.5 times that of torch in the same dtype.

    The floor allows for references that happen to hit the truth, and for the order in which matmuls
    of other shapes sum their fp32 products.
    """
    for index, (value, reference, truth) in enumerate(
            zip(values, references, truths, strict=True)):
        ours, theirs = error(value, truth), error(reference, truth)
        assert ours <= factor * theirs + floor, f"result {index}: {ours:.3g}, torch {theirs:.3g}"
