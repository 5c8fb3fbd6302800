"""Shared parts of the kernels. Without Triton (macOS) they import, but nothing launches them."""

from __future__ import annotations

import torch

from nanochat.common import UserError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

jit = triton.jit if triton else lambda function: function

# Triton reads this setting when a kernel is decorated, so it cannot change later in the process.
INTERPRETED = bool(triton and triton.knobs.runtime.interpret)

# Elements per program. The interpreter's cost is per operation, so it gets much larger tiles.
TILE_ELEMENTS = 1 << 18 if INTERPRETED else 4096


def kernel_op(name):
    """Return a decorator that makes a function, which launches kernels by `wrap_triton`, an op.

    The compiler launches the kernels itself, except in the interpreter, which needs Python.
    """
    opaque = INTERPRETED or triton is None
    declare = torch.library.custom_op if opaque else torch.library.triton_op
    return declare(name, mutates_args=())


def wrap_triton(kernel):
    """Return the kernel as an op must launch it; torch finds an op's kernels by this name."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def require_kernels(flag, device):
    """Raise UserError unless `device` runs Triton kernels: CUDA, or a CPU with the interpreter."""
    if triton is None:
        raise UserError(f"{flag} needs Triton, which is not installed; omit the flag")
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        raise UserError(f"{flag} needs a CUDA device, or for tests a CPU and TRITON_INTERPRET=1 "
                        "set before Python starts (never both); omit the flag")


def require_dtype(flag, dtype, supported):
    """Raise UserError unless the compute dtype is one of `supported`."""
    if dtype not in supported:
        raise UserError(f"{flag} cannot run in {dtype}; set NANOCHAT_DTYPE=bfloat16 or omit it")


@jit
def store_rounded(pointers, values, mask, INTERPRETED: tl.constexpr):
    """Store fp32 values in the pointers' dtype, rounded to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:  # the interpreter would truncate
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointers, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
