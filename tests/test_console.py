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


def train_event(step, loss=2.5, tok_per_sec=12345.6):
    return {"step": step, "loss": loss, "tok_per_sec": tok_per_sec, "dt_ms": 10.0}


def train(sink, clock, steps, sec_per_step=1.0):
    for step in steps:
        clock.now += sec_per_step
        sink("train", train_event(step))


# --- without a terminal ----------------------------------------------------------------------------------------------

def test_log_gets_a_line_for_the_first_step_and_every_tenth(capsys, clock):
    sink = ConsoleSink(40)
    train(sink, clock, range(1, 41))
    sink.close()
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == [f"step {step}/40" for step in (1, *range(4, 41, 4))]
    assert err == ""


def test_line_says_loss_speed_and_time_left(capsys, clock):
    sink = ConsoleSink(100)
    train(sink, clock, range(1, 41), sec_per_step=2.0)
    sink.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100: loss 2.5000, 12,346 tok/s"  # it compiled: no rate to go by yet
    assert lines[-1] == "step 40/100: loss 2.5000, 12,346 tok/s, ETA 02:00"


def test_time_left_of_a_resumed_run_is_by_its_own_steps(capsys, clock):
    sink = ConsoleSink(1000, start_step=900)
    train(sink, clock, range(901, 911), sec_per_step=10.0)
    sink.close()
    assert capsys.readouterr().out.splitlines()[-1] == "step 910/1000: loss 2.5000, 12,346 tok/s, ETA 15:00"


def test_every_evaluation_checkpoint_and_sample_gets_its_line(capsys, clock):
    sink = ConsoleSink(10)
    sink("val", {"step": 5, "tokens": 99, "val_bpb": 1.23456, "train_time_sec": 12.345})
    sink("core", {"step": 5, "core_metric": 0.2565, "tasks": {}})
    sink("checkpoint", {"step": 5, "path": "/cache/d4"})
    sink("sample", {"step": 5, "prompt": "One\nday", "text": " later\nit [bold]"})
    sink.close()
    assert capsys.readouterr().out == (
        "step 5: val_bpb 1.2346 after 12.3 s of training\n"
        "step 5: CORE 0.2565\n"
        "step 5: checkpoint saved in /cache/d4\n"
        "step 5: sample, the model continues after [...]:\n"
        "    One\n    day[...] later\n    it [bold]\n")


def test_losses_that_are_not_numbers_are_shown(capsys, clock):
    sink = ConsoleSink(1)
    sink("train", train_event(1, loss=float("nan")))
    sink("val", {"step": 1, "val_bpb": float("inf"), "train_time_sec": 0.0})
    sink.close()
    out = capsys.readouterr().out
    assert "loss nan" in out and "val_bpb inf" in out


@pytest.mark.parametrize("kind", ["resume", "position_losses", "unheard_of"])
def test_other_events_are_not_printed(capsys, clock, kind):
    sink = ConsoleSink(1)
    sink(kind, {"step": 1})
    sink.close()
    assert capsys.readouterr() == ("", "")


# --- on a terminal ---------------------------------------------------------------------------------------------------

def test_terminal_gets_a_bar_from_the_step_resumed_with_loss_and_speed(capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sink = ConsoleSink(50, start_step=20)
    assert (sink.bar.n, sink.bar.total) == (20, 50)
    train(sink, clock, range(21, 31))
    sink("val", {"step": 30, "val_bpb": 1.5, "train_time_sec": 3.0})
    assert sink.bar.n == 30
    sink.bar.refresh()
    sink.close()
    out, err = capsys.readouterr()
    assert out == "step 30: val_bpb 1.5000 after 3.0 s of training\n"  # whole lines; the bar is on stderr alone
    assert "30/50" in err and "loss 2.5000, 12,346 tok/s" in err


# --- wandb -----------------------------------------------------------------------------------------------------------

class FakeWandb(types.ModuleType):
    """Takes the place of the wandb module; `fails` is raised by init."""

    def __init__(self, fails=None):
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(UsageError=type("UsageError", (Exception,), {}),
                                            CommError=type("CommError", (Exception,), {}))
        self.logged, self.finished, self.started, self.fails = [], 0, None, fails

    def init(self, **options):
        if self.fails:
            raise getattr(self.errors, self.fails)("api_key not configured")
        self.started = options
        return types.SimpleNamespace(log=self.logged.append, finish=self._finish)

    def _finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_the_numbers_under_their_kind(wandb):
    sink = WandbSink("name", "run-1", {"depth": 4})
    assert wandb.started == {"project": "nanochat", "name": "name", "id": "run-1", "resume": "allow",
                             "config": {"depth": 4}}
    sink("train", {"step": 3, "tokens": 300, "loss": 2.5, "mfu": None})
    sink("core", {"step": 3, "core_metric": 0.2, "tasks": {"a": 1.0}})
    sink("sample", {"step": 3, "prompt": "a", "text": "b"})
    sink("resume", {"step": 3})
    assert wandb.logged == [{"step": 3, "train/tokens": 300, "train/loss": 2.5}, {"step": 3, "core/core_metric": 0.2}]
    sink.close()
    assert wandb.finished == 1


@pytest.mark.parametrize("error", ["UsageError", "CommError"])
def test_wandb_that_does_not_start_is_a_user_error_that_says_why(monkeypatch, error):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=error))
    with pytest.raises(UserError, match=r"^wandb does not start \(api_key not configured\); .*--run=dummy$"):
        WandbSink("name", "run-1", {})


def test_wandb_offline_records_a_run_without_a_network(tmp_path):
    code = """
from nanochat.console import WandbSink
sink = WandbSink("name", "run-1", {"depth": 4})
sink("train", {"step": 1, "loss": 2.5})
sink.close()
"""  # in a process of its own: wandb starts a service and threads that outlive the run
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"})
    assert re.search(r"train/loss +2\.5", done.stderr)
    assert len(list(tmp_path.rglob("offline-run-*/run-run-1.wandb"))) == 1
