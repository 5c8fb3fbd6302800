"""The kernels' common ground: refusals, life without Triton, compiling for a GPU without one."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat.errors import UserError
from nanochat.kernels import runtime


def python(code, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)


def test_a_machine_with_neither_cuda_nor_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(UserError, match="--fused-rmsnorm needs a CUDA device, and this run is on cpu"):
        runtime.require_kernels("cpu", "--fused-rmsnorm")
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    with pytest.raises(UserError, match="unset TRITON_INTERPRET"):
        runtime.require_kernels("cuda", "--fused-rmsnorm")
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(UserError, match="--fused-rmsnorm needs Triton"):
        runtime.require_kernels("cuda", "--fused-rmsnorm")


_WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from nanochat.kernels.rms_norm import rms_norm
from nanochat.kernels.linear_cross_entropy import linear_cross_entropy
from nanochat.model.plain import plain_linear_cross_entropy
x, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(64, 8), torch.arange(5)
loss = linear_cross_entropy(x, weight, targets, 60, implementation="torch")
loss.backward()
assert torch.allclose(loss, plain_linear_cross_entropy(x, weight, targets, 60))
"""


def test_without_triton_the_torch_form_still_works():
    run = python(_WITHOUT_TRITON)
    assert run.returncode == 0, run.stderr


_COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanochat.kernels import linear_cross_entropy, rms_norm

def compile_for_hopper(kernel, **constants):
    kinds = {"targets": "*i64", "losses": "*fp32", "scale": "*fp32"}
    pointers = ("logits", "x", "grad", "out", "cos", "sin")
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*bf16" if name in pointers else "i32")
                 for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name not in constants}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["ptx"]

rows = dict(VOCAB_SIZE=32700, N_COLUMNS=32768, CAP=15.0, INVERSE_CAP=1 / 15, CAP_LOG2_E=21.64, ROWS=1,
            BLOCK=4096, INTERPRETED=False)
norm = dict(EPS=1e-7, INTERPRETED=False)
for gradient in (True, False):
    for ptx in (
        compile_for_hopper(linear_cross_entropy._rows_kernel, GRADIENT=gradient, APPROXIMATE=gradient, **rows),
        compile_for_hopper(rms_norm._norm_kernel, WIDTH=768, ROWS=4, BLOCK=1024, BACKWARD=gradient, **norm),
        compile_for_hopper(rms_norm._rope_norm_kernel, HEADS=6, HALF=64, SCALE=1.2, ROWS=64, BLOCK=64,
                           BACKWARD=gradient, **norm)):
        wide, local = "ld.global.v4.b32" in ptx, ".local" in ptx
        print("wide" if wide else "narrow", "spills" if local else "registers")
"""


@pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed")
def test_the_kernels_compile_for_hopper_with_wide_loads_and_without_spills(tmp_path):
    """No GPU is needed to compile for one; the interpreter takes programs that the compiler refuses."""
    run = python(_COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["wide", "registers"] * 6


def test_stores_round_to_nearest_even():
    if not runtime.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("neither CUDA nor the interpreter")
    from nanochat.kernels.rms_norm import rms_norm

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.to("cpu" if runtime.INTERPRETED else "cuda")
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 2**-23)
    assert (rms_norm(x) != exact.bfloat16()).float().mean() < 0.002  # fp32 sums sway the ties alone
