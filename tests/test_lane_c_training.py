"""Lane C's flags in training: the same losses on real text, checkpoints that do not know of them, no graph break."""

import inspect
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from corpus import TINY_FLAGS
from golden_figures import batch, golden_model
from kernel_cases import kernel_device

from nanochat.checkpoint import checkpoint_folder
from nanochat.common import runs_dir
from nanochat.runlog import read_run
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")

FLAGS = {"fused-rmsnorm": ["--fused-rmsnorm"], "chunked-ce": ["--chunked-ce"]}
FLAGS["both"] = FLAGS["fused-rmsnorm"] + FLAGS["chunked-ce"]


@pytest.fixture
def text(tmp_path):
    """Real text: the sources of a few modules, a function or a paragraph a document."""
    folder = tmp_path / "text"
    folder.mkdir()
    sources = "\n\n".join(inspect.getsource(module) for module in (inspect, json, textwrap))
    lines = [json.dumps({"text": paragraph}) for paragraph in sources.split("\n\n") if paragraph.strip()]
    (folder / "sources.jsonl").write_text("\n".join(lines))
    return str(folder)


def train(text, run_id, *more, steps):
    """The run's training losses by step."""
    assert main([*TINY_FLAGS, "--dataset", text, "--num-iterations", str(steps), "--eval-every", "-1",
                 "--total-batch-size", "128", "--run-id", run_id, "--model-tag", run_id, *more]) == 0
    return losses(run_id)


def losses(run_id):
    return {event["step"]: event["loss"] for event in read_run(runs_dir() / run_id).of("train")}


@pytest.mark.parametrize("steps", [6, pytest.param(50, marks=pytest.mark.slow)])  # the interpreter takes 1 s a step
def test_steps_on_real_text_give_the_same_losses_with_and_without_the_flags(text, steps):
    plain = train(text, "plain", steps=steps)
    if steps == 50:
        assert plain[50] < plain[1] - 0.05  # it learns, so the comparison means something
    for name, flags in FLAGS.items():
        fused = train(text, name, *flags, steps=steps)
        assert list(fused.values()) == pytest.approx(list(plain.values()), rel=1e-4), name


@pytest.mark.parametrize(("first", "then"), [("both", None), (None, "both")], ids=["with-first", "without-first"])
def test_checkpoints_do_not_know_of_the_flags(text, first, then):
    flags = {None: [], **FLAGS}
    straight = train(text, "straight", *flags[first], steps=4)
    train(text, "run", *flags[first], "--save-every", "2", steps=4)
    for path in checkpoint_folder("run").glob("*_000004*"):
        path.unlink()
    resumed = train(text, "run", *flags[then], "--resume-from-step", "2", "--allow-changed", steps=4)
    assert list(resumed.values()) == pytest.approx(list(straight.values()), rel=1e-4)


def test_two_ranks_train_as_one_without_the_flags(text):
    plain = train(text, "one", "--total-batch-size", "256", steps=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    flags = [*TINY_FLAGS, "--dataset", text, "--num-iterations", "4", "--eval-every", "-1", "--run-id", "two",
             "--device-type", "cpu", *FLAGS["both"]]
    done = subprocess.run([*launch, "scripts.base_train", *flags], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert list(losses("two").values()) == pytest.approx(list(plain.values()), rel=1e-4)


def test_evaluation_without_gradients_is_that_of_the_plain_model():
    device = kernel_device()
    with torch.no_grad():
        plain = golden_model(device)(*batch(device), "none")
        fused = golden_model(device, fused_rmsnorm=True, chunked_ce=True)(*batch(device), "none")
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FLAGS)
def test_gradients_accumulate_over_micro_batches(name):
    device = kernel_device()
    idx, targets = batch(device)
    flags = {flag.strip("-").replace("-", "_"): True for flag in FLAGS[name]}
    gradients = []
    for model in (golden_model(device), golden_model(device, **flags)):
        for row in range(2):
            (model(idx[row : row + 1], targets[row : row + 1]) / 2).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, expected in gradients[0].items():
        assert (gradients[1][parameter] - expected).norm() <= 1e-3 * expected.norm(), parameter
