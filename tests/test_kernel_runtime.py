"""The kernels' common ground: refusals, life without Triton, rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
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
from nanochat.gpt import plain_linear_cross_entropy
x, weight, targets = torch.randn(5, 8, requires_grad=True), torch.randn(64, 8), torch.arange(5)
loss = linear_cross_entropy(x, weight, targets, 60, implementation="torch")
loss.backward()
assert torch.allclose(loss, plain_linear_cross_entropy(x, weight, targets, 60))
"""


def test_without_triton_the_torch_form_still_works():
    run = python(_WITHOUT_TRITON)
    assert run.returncode == 0, run.stderr


def test_stores_round_to_nearest_even():
    if not runtime.INTERPRETED and not torch.cuda.is_available():
        pytest.skip("neither CUDA nor the interpreter")
    from nanochat.kernels.rms_norm import rms_norm

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.to("cpu" if runtime.INTERPRETED else "cuda")
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 2**-23)
    assert (rms_norm(x) != exact.bfloat16()).float().mean() < 0.002  # fp32 sums sway the ties alone


@pytest.mark.skipif(runtime.triton is None or torch.cuda.is_available() or torch.__version__ < "2.13",
                    reason="needs Triton, no GPU, and a torch whose inside is known")
@pytest.mark.parametrize("check", ["aot_eager", *(pytest.param(name, marks=pytest.mark.slow)
                                                  for name in ("opcheck", "inductor"))])
def test_what_a_compiler_launches_by_itself(check):
    """On a GPU the tests of each op see this; without one `compiled_launches` shows it in a process of its own."""
    program = Path(__file__).with_name("compiled_launches.py")
    run = python(f"import runpy, sys; sys.argv[1:] = [{check!r}]; runpy.run_path({str(program)!r}, None, '__main__')",
                 PYTHONPATH=str(program.parent.parent))
    assert run.returncode == 0, run.stderr
