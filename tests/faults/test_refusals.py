"""What the machine or a person does to the training program: one line and its exit code, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from corpus import TINY_FLAGS, write_corpus

from nanochat.common import runs_dir
from nanochat.loop import Trainer
from nanochat.runlog import METRICS, read_run
from nanochat.tokenizer import Tokenizer
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")


@pytest.fixture
def flags(tmp_path):
    return [*TINY_FLAGS, "--dataset", str(write_corpus(tmp_path / "corpus")), "--num-iterations", "4", "--run-id", "r",
            "--model-tag", "r", "--device-type", "cpu"]


def ended(arguments, capsys, exit_code=2):
    """The one line that the program ends with."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == exit_code
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert not list(runs_dir().parent.rglob("*.tmp"))
    return line


def raising(error):
    def call(*_):
        raise error
    return call


def test_ctrl_c_while_text_is_tokenised(flags, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "encode", raising(KeyboardInterrupt()))
    assert "interrupted" in ended(flags, capsys, 130)
    assert not list(runs_dir().parent.rglob("*.bin"))


def test_memory_that_is_not_there_names_the_flags_and_closes_the_record(flags, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "_launch_step", raising(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")))
    assert "lower --device-batch-size" in ended(flags, capsys)
    assert read_run(runs_dir() / "r").status == "error"


@pytest.mark.parametrize("name", ["tokens", "locks"])
def test_a_cache_that_cannot_be_written(flags, capsys, base_dir, name):
    (base_dir / name).write_text("a file where a folder belongs")
    assert "cannot write in" in ended(flags, capsys)


@pytest.mark.parametrize("names", [["../../x"], ["/tmp/x"], ["."], ["x" * 300]])
def test_names_that_lead_elsewhere_end_before_anything_is_made(flags, capsys, base_dir, names):
    for flag in ("--model-tag", "--run-id"):
        assert "cannot name a folder" in ended([*flags, flag, *names], capsys)
    assert not list(base_dir.iterdir())


@pytest.mark.parametrize("spoil", [
    lambda line: line.replace(b'"dt_ms": ', b'"lost": '),
    lambda line: line.replace(b'"tokens": ', b'"tokens": "", "t": '),
    lambda line: b"[" * 100_000, lambda line: line[: len(line) // 2], lambda line: b'{"kind": "train", "step": 1}'],
    ids=["no time", "a text", "deep", "half", "no numbers"])
def test_a_record_without_its_numbers_is_found_before_a_resumed_run_trains(flags, capsys, monkeypatch, spoil):
    assert main(flags) == 0
    path = runs_dir() / "r" / METRICS
    lines = path.read_bytes().split(b"\n")
    at = next(i for i, line in enumerate(lines) if b'"train"' in line)
    lines[at] = spoil(lines[at])
    path.write_bytes(b"\n".join(lines))
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("it trained"))
    assert "metrics.jsonl" in ended([*flags, "--resume-from-step", "latest"], capsys)
    assert path.read_bytes() == b"\n".join(lines)


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_one_line_of_the_other(flags, tmp_path):
    ranks = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "scripts.base_train", *flags, "--num-iterations", "100000"]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                      text=True))
    path = runs_dir() / "r" / METRICS
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_bytes().count(b'"train"') > 3):
        assert time.monotonic() < deadline and ranks[0].poll() is None
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGKILL)
    _, said = ranks[0].communicate(timeout=120)
    ranks[1].communicate()
    assert ranks[0].returncode == 2 and "error: another rank is gone" in said and "Traceback" not in said
    assert json.loads((runs_dir() / "r" / "summary.json").read_text())["status"] == "error"
