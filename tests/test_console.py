"""The console's lines and bar; wandb's numbers and steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

from nanochat import common
from nanochat.console import ConsoleSink

ROOT = Path(__file__).parent.parent


def train(sink, steps):
    for step in steps:
        sink("train", {"step": step, "loss": 2.5, "tok_per_sec": 12345.6, "dt_ms": 10.0})


def test_a_log_gets_lines_with_steps_loss_and_speed_on_stderr(capsys, monkeypatch):
    monkeypatch.setattr(common, "LOG_SEC", 0)
    sink = ConsoleSink(40, start_step=10)
    sink.bar.delay = 0
    train(sink, range(11, 41))
    sink.close()
    out, err = capsys.readouterr()
    assert out == "" and "training: 100%" in err and "40/40" in err.splitlines()[-1]
    assert "loss 2.5000, 12,346 tok/s" in err.splitlines()[-1]


def test_evaluations_checkpoints_and_samples_get_their_lines(capsys):
    sink = ConsoleSink(10)
    val = {"n_tokens": 8192, "train_time_sec": 12.345}
    sink("val", {"step": 0, "val_bpb": 1.5, **val})
    sink("val", {"step": 5, "val_bpb": 1.23456, "val_bpb_se": 0.01, **val})
    sink("val", {"step": 5, "val_bpb": float("inf"), **val})
    sink("core", {"step": 5, "core_metric": 0.2565, "tasks": {}})
    sink("checkpoint", {"step": 5, "path": "/cache/d4"})
    sink("resume", {"step": 7})
    sink("sample", {"step": 5, "prompt": "One\nday", "text": " later\nit [bold]"})
    sink("unknown", {"step": 5})
    sink.close()
    assert capsys.readouterr().out == (
        "step 0: val_bpb 1.5000 on 8,192 tokens after 12.3 s of training\n"
        "step 5: val_bpb 1.2346 ± 0.0100 on 8,192 tokens after 12.3 s of training\n"
        "step 5: val_bpb inf on 8,192 tokens after 12.3 s of training\n"
        "step 5: CORE 0.2565\n"
        "step 5: checkpoint saved in /cache/d4\n"
        "resumed at step 7\n"
        "step 5: sample (the model continues after [...]):\n"
        "    One\n    day[...] later\n    it [bold]\n")


def test_a_terminal_gets_a_bar_with_loss_and_speed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sink = ConsoleSink(50, start_step=20)
    train(sink, range(21, 31))
    sink("val", {"step": 30, "val_bpb": 1.5, "n_tokens": 64, "train_time_sec": 3.0})
    sink.bar.refresh()
    sink.close()
    out, err = capsys.readouterr()
    assert out == "step 30: val_bpb 1.5000 on 64 tokens after 3.0 s of training\n"
    assert "30/50" in err and "loss 2.5000, 12,346 tok/s" in err


def test_wandb_offline_records_each_step_once_also_after_a_resume(tmp_path):
    code = """
from nanochat.console import WandbSink
for first in (1, 2):
    sink = WandbSink("name", "run-1", {"depth": 4})
    for step in range(first, first + 3):
        sink("train", {"step": step, "loss": 2.5})
    sink("sample", {"step": step, "text": "b"})
    sink.close()
"""  # in a process of its own: wandb starts a service and threads that outlive the run
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=True, env=environment)
    assert re.search(r"train/loss +2\.5", done.stderr)
    assert len(list(tmp_path.rglob("offline-run-*/run-run-1.wandb"))) >= 1
