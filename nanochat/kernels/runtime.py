"""What the kernels share: Triton where there is one, the interpreter's quirks, checks made before a model is built.

On machines without Triton (macOS) this imports all the same: the kernels are plain functions that nobody may launch.
"""

from __future__ import annotations

import torch

from nanochat.common import UserError

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

jit = triton.jit if triton else lambda function: function

# Triton decides when a kernel is decorated, so this holds for the life of the process.
INTERPRETED = bool(triton and triton.knobs.runtime.interpret)

# Elements a program works on at a time; the interpreter pays by the operation, so it takes many more.
TILE_ELEMENTS = 1 << 18 if INTERPRETED else 4096


def kernel_op(name):
    """Decorator: a function that launches kernels, by `wrap_triton`, as torch's operator `name`. A compiler sees the
    kernels inside and launches them by itself, but for the interpreter's, which have to be run by Python."""
    declare = torch.library.custom_op if INTERPRETED or triton is None else torch.library.triton_op
    return declare(name, mutates_args=())


def wrap_triton(kernel):
    """The kernel as it is to be launched within a `kernel_op`. torch looks for this name in an op's source: by it the
    cache of compiled graphs finds the kernels, and notices that one has been edited."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def require_kernels(device, flag):
    """UserError unless `device` can run Triton kernels: CUDA, or a CPU under the interpreter."""
    if triton is None:
        raise UserError(f"{flag} needs Triton, which is not installed here; leave the flag out")
    kind = torch.device(device).type
    if INTERPRETED and kind != "cpu":
        raise UserError(f"{flag} on {kind} cannot run in Triton's interpreter; unset TRITON_INTERPRET, "
                        "or add --device-type cpu")
    if kind != "cuda" and not INTERPRETED:
        raise UserError(f"{flag} needs a CUDA device, and this run is on {kind}; leave the flag "
                        "out (for tests on a CPU, set TRITON_INTERPRET=1 before python starts)")


def require_dtype(dtype, supported, flag):
    """UserError unless the compute dtype is one of `supported`."""
    if dtype not in supported:
        names = " or ".join(str(d).removeprefix("torch.") for d in supported)
        raise UserError(f"{flag} works in {names}, not in {str(dtype).removeprefix('torch.')}; "
                        "set NANOCHAT_DTYPE to one of them or leave the flag out")


@jit
def store_rounded(pointers, values, mask, INTERPRETED: tl.constexpr):
    """Store fp32 values in the pointers' dtype, rounded to nearest even."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:  # the interpreter's own cast truncates
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(pointers, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)
