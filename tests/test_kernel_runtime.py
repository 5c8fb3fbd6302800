"""What the kernels share: refusals, running without Triton, rounding, launches by the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import kernel_device

from nanochat.common import UserError
from nanochat.kernels import runtime
from nanochat.kernels.rms_norm import rms_norm

ROOT = Path(__file__).parents[1]


def python(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT,
                          env=environment | {"PYTHONPATH": str(ROOT)})


def test_a_machine_that_cannot_run_kernels_is_refused(monkeypatch):
    def refuses(device, words):
        with pytest.raises(UserError, match=f"--fused-rmsnorm {words}"):
            runtime.require_kernels("--fused-rmsnorm", device)

    monkeypatch.setattr(runtime, "INTERPRETED", False)
    refuses("cpu", "needs a CUDA device, and this run is on cpu")
    monkeypatch.setattr(runtime, "INTERPRETED", True)
    refuses("cuda", "on cuda cannot run in Triton's interpreter; unset TRITON_INTERPRET")
    monkeypatch.setattr(runtime, "triton", None)
    refuses("cuda", "needs Triton")


WITHOUT_TRITON = """
import sys, torch
sys.modules["triton"] = None
from nanochat.gpt import GPT, GPTConfig
idx = torch.arange(20).view(2, 10)
models = [GPT(GPTConfig(16, 64, 1, 2, 2, 32), chunked_ce=chunked) for chunked in (False, True)]
for model in models:
    model.init_weights(0)
plain, chunked = (model(idx, idx) for model in models)
chunked.backward()
assert torch.allclose(plain, chunked)
"""


def test_without_triton_the_torch_form_still_works():
    done = python("-c", WITHOUT_TRITON)
    assert done.returncode == 0, done.stderr


def test_stores_round_to_nearest_even():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x.to(kernel_device())
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 2**-23)
    # the order of fp32 sums decides only ties
    assert (rms_norm(x) != exact.bfloat16()).float().mean() < 0.002


@pytest.mark.skipif(
    runtime.triton is None or torch.cuda.is_available() or torch.__version__ < "2.13",
    reason="needs Triton, no GPU, and the torch whose internals the program replaces")
@pytest.mark.parametrize("check", ["aot_eager", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("opcheck", "inductor"))])
def test_kernels_launched_by_the_compiler(check):
    """The tests of each op cover this on a GPU; without one, compiled_launches.py shows it."""
    done = python("tests/compiled_launches.py", check)
    assert done.returncode == 0, done.stderr
