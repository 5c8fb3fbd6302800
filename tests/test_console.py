import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nanochat import console
from nanochat.common import UserError
from nanochat.console import ConsoleSink, WandbSink

ROOT = Path(__file__).parent.parent


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic of the console, set by hand."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(console.time, "monotonic", lambda: clock.now)
    return clock


def train(sink, clock, steps, sec_per_step=1.0, loss=2.5):
    for step in steps:
        clock.now += sec_per_step
        sink("train", {"step": step, "loss": loss, "tok_per_sec": 12345.6, "dt_ms": 10.0})


def test_a_log_gets_a_line_for_the_first_step_and_every_ten_percent(capsys, clock):
    sink = ConsoleSink(40)
    train(sink, clock, range(1, 41))
    sink.close()
    out, err = capsys.readouterr()
    expected = [f"step {step}/40" for step in (1, *range(4, 41, 4))]
    assert [line.split(":")[0] for line in out.splitlines()] == expected
    assert err == ""


def test_a_line_has_loss_speed_and_the_time_left(capsys, clock):
    sink = ConsoleSink(100)
    train(sink, clock, range(1, 41), sec_per_step=2.0)
    sink.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100: loss 2.5000, 12,346 tok/s"  # it compiled: no rate yet
    assert lines[-1] == "step 40/100: loss 2.5000, 12,346 tok/s, ETA 02:00"


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(capsys, clock):
    sink = ConsoleSink(1000, start_step=900)
    train(sink, clock, range(901, 911), sec_per_step=10.0)
    sink.close()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 910/1000: loss 2.5000, 12,346 tok/s, ETA 15:00"


def test_evaluations_checkpoints_and_samples_get_their_lines(capsys, clock):
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


def test_a_terminal_gets_a_bar_with_loss_and_speed(capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sink = ConsoleSink(50, start_step=20)
    train(sink, clock, range(21, 31))
    sink("val", {"step": 30, "val_bpb": 1.5, "n_tokens": 64, "train_time_sec": 3.0})
    sink.bar.refresh()
    sink.close()
    out, err = capsys.readouterr()
    # the bar is on stderr
    assert out == "step 30: val_bpb 1.5000 on 64 tokens after 3.0 s of training\n"
    assert "30/50" in err and "loss 2.5000, 12,346 tok/s" in err


# --- wandb ----------------------------------------------------------------------------------------

class FakeWandb(types.ModuleType):
    """Replaces the wandb module; `fails` is the name of the error that init raises."""

    def __init__(self, fails=None):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}),
                                            CommError=type("CommError", (Exception,), {}))
        self.logged, self.metrics, self.finished, self.fails = [], [], 0, fails

    def init(self, **options):
        if self.fails:
            raise getattr(self.errors, self.fails)("api_key not configured")
        self.options = options
        return types.SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            define_metric=lambda *names, **options: self.metrics.append((names, options)),
            finish=self._finish)

    def _finish(self):
        self.finished += 1


def test_wandb_gets_the_numbers_on_the_axis_of_our_steps(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sink = WandbSink("name", "run-1", {"depth": 4})
    assert fake.options == {"project": "nanochat", "name": "name", "id": "run-1",
                            "resume": "allow", "config": {"depth": 4}}
    assert (("*",), {"step_metric": "step"}) in fake.metrics
    sink("train", {"step": 3, "tokens": 300, "loss": 2.5, "mfu": None})
    sink("core", {"step": 3, "core_metric": 0.2, "tasks": {"a": 1.0}})
    sink("sample", {"step": 3, "prompt": "a", "text": "b"})
    sink.close()
    assert fake.logged == [(3, {"step": 3, "train/tokens": 300, "train/loss": 2.5}),
                           (3, {"step": 3, "core/core_metric": 0.2})]
    assert fake.finished == 1


@pytest.mark.parametrize("error", ["UsageError", "CommError"])
def test_wandb_that_does_not_start_is_a_user_error_with_the_reason(monkeypatch, error):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=error))
    with pytest.raises(UserError, match=r"^wandb does not start \(api_key not .*--run=dummy$"):
        WandbSink("name", "run-1", {})


def test_wandb_offline_records_each_step_once_also_after_a_resume(tmp_path):
    code = """
from nanochat.console import WandbSink
for first in (1, 2):
    sink = WandbSink("name", "run-1", {"depth": 4})
    for step in range(first, first + 3):
        sink("train", {"step": step, "loss": 2.5})
    sink.close()
"""  # in a process of its own: wandb starts a service and threads that outlive the run
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, check=True, env=environment)
    assert re.search(r"train/loss +2\.5", done.stderr)
    assert len(list(tmp_path.rglob("offline-run-*/run-run-1.wandb"))) >= 1
