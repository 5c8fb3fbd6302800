"""Refusals of the kernels, and the torch form of the loss without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.kernels import runtime

ROOT = Path(__file__).parents[1]


def test_a_machine_that_cannot_run_kernels_is_refused(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for interpreted, device in ((False, cpu), (True, cuda)):
        monkeypatch.setattr(runtime, "INTERPRETED", interpreted)
        with pytest.raises(UserError, match="--fused-rmsnorm needs a CUDA device"):
            runtime.require_kernels("--fused-rmsnorm", device)
    monkeypatch.setattr(runtime, "triton", None)
    with pytest.raises(UserError, match="needs Triton"):
        runtime.require_kernels("--fused-rmsnorm", cuda)


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
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True,
                          cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
