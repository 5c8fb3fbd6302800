"""Lane C's flags in training: the same losses, and checkpoints that do not depend on them."""

import inspect
import json
import textwrap

import pytest
from corpus import TINY_FLAGS

from nanochat.checkpoint import checkpoint_folder
from nanochat.common import runs_dir
from nanochat.runlog import read_run
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")

FLAGS = {"fused-rmsnorm": ["--fused-rmsnorm"], "chunked-ce": ["--chunked-ce"]}
FLAGS["both"] = FLAGS["fused-rmsnorm"] + FLAGS["chunked-ce"]


@pytest.fixture
def text(tmp_path):
    """Real text: the paragraphs of a few modules as documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    sources = "\n\n".join(inspect.getsource(module) for module in (json, textwrap))
    documents = [{"text": part} for part in sources.split("\n\n") if part.strip()]
    (folder / "sources.jsonl").write_text("\n".join(map(json.dumps, documents)))
    return str(folder)


def train(text, run_id, *more, steps=4):
    """Train and return the losses by step."""
    flags = ["--dataset", text, "--num-iterations", str(steps), "--eval-every", "-1",
             "--total-batch-size", "128", "--run-id", run_id, "--model-tag", run_id]
    assert main([*TINY_FLAGS, *flags, *more]) == 0
    losses = {event["step"]: event["loss"] for event in read_run(runs_dir() / run_id).of("train")}
    return list(losses.values())


@pytest.mark.parametrize("steps", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_losses_are_the_same_with_and_without_the_flags(text, steps):
    plain = train(text, "plain", steps=steps)
    assert steps < 50 or plain[-1] < plain[0] - 0.05  # it learns
    for name, flags in FLAGS.items():
        assert train(text, name, *flags, steps=steps) == pytest.approx(plain, rel=1e-4), name


def test_a_run_may_resume_with_other_flags_of_lane_c(text):
    expected = train(text, "straight", *FLAGS["both"])
    train(text, "run", *FLAGS["both"], "--save-every", "2")
    for path in checkpoint_folder("run").glob("*_000004*"):
        path.unlink()
    resumed = train(text, "run", "--resume-from-step", "2", "--allow-changed")
    assert resumed[-2:] == pytest.approx(expected[-2:], rel=1e-4)
