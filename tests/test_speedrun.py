"""runs/speedrun.sh with stand-ins for python and torchrun."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat.config import parse_config

ROOT = Path(__file__).parents[1]
PROGRAMS = ("nanochat.dataset", "nanochat.core_eval", "scripts.tok_train", "scripts.tok_eval",
            "scripts.base_train", "scripts.base_eval", "scripts.runs")
STAND_IN = """#!/bin/sh
[ "$1" = -m ] && shift
echo "$@" >> "$CALLS"
[ "$1" = "$FAILING" ] && exit 1
case "$1" in
    scripts.plan) shift 5; echo "$@ --device-batch-size=16" | sed "s/ --as-flags//" ;;
    scripts.tok_train) mkdir -p "$NANOCHAT_BASE_DIR/tokenizer" ;;
esac
exit 0
"""


@pytest.fixture
def speedrun(tmp_path):
    """Run the script; return its exit code, the commands of that call, and stderr."""
    shutil.copytree(ROOT / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text("")
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    (programs / "python").write_text(STAND_IN)
    (programs / "torchrun").write_text('#!/bin/sh\nshift 2\nexec python "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)

    def run(*argv, failing="", **environment):
        calls.unlink(missing_ok=True)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}",
                       "CALLS": str(calls), "FAILING": failing,
                       "NANOCHAT_BASE_DIR": str(tmp_path / "cache"), **environment}
        done = subprocess.run(["bash", tmp_path / "runs" / "speedrun.sh", *argv],
                              capture_output=True, text=True, timeout=60, env=environment)
        commands = [line.split() for line in calls.read_text().splitlines()]
        return done.returncode, commands, done.stderr

    return run


@pytest.mark.parametrize("stage", ["scripts.tok_train", "scripts.base_train"])
def test_the_same_command_continues_at_the_stage_that_failed(speedrun, stage):
    at = PROGRAMS.index(stage)
    code, commands, _ = speedrun(failing=stage)
    assert code == 1
    assert [command[0] for command in commands] == ["scripts.plan", *PROGRAMS[:at + 1]]
    code, commands, _ = speedrun()
    assert code == 0 and [command[0] for command in commands] == ["scripts.plan", *PROGRAMS[at:]]
    _, commands, _ = speedrun()
    assert [command[0] for command in commands] == ["scripts.plan", "scripts.runs"]


def test_the_training_has_the_flags_of_the_plan_and_resumes(speedrun):
    _, commands, _ = speedrun("9.5", "wand", "7")
    [flags] = [command[1:] for command in commands if command[0] == "scripts.base_train"]
    config = parse_config(flags)
    assert config.depth == 24 and config.fp8 and config.device_batch_size == 16
    assert config.target_param_data_ratio == 9.5 and config.core_metric_max_per_task == -1
    assert config.run == "wand" and config.seed == 7
    assert config.run_id == config.tag == "speedrun_s7"
    assert config.resume_from_step == "auto" and config.save_minutes > 0
    assert config.target == ("core", 0.256525)


def test_other_flags_need_another_name(speedrun):
    assert speedrun("8")[0] == 0
    code, commands, error = speedrun("9")
    assert code == 2 and len(commands) == 1 and "TAG=_2" in error
    code, commands, _ = speedrun("9", TAG="_2")
    assert code == 0 and commands[-1][-1] == "speedrun_s42_2"


def test_the_ratio_may_come_from_lane_b(speedrun):
    _, commands, _ = speedrun("found/infer.json")
    assert "--inference-json=found/infer.json" in commands[0]
