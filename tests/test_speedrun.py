"""runs/speedrun.sh with stand-ins for python and torchrun; the leaderboard's row."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.config import parse_config
from nanochat.runlog import RunRecord
from scripts.leaderboard import leaderboard_row

ROOT = Path(__file__).parents[1]
PROGRAMS = ("nanochat.dataset", "nanochat.core_eval", "scripts.tok_train", "scripts.tok_eval",
            "scripts.base_train", "scripts.base_eval", "scripts.leaderboard")
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
    assert [command[0] for command in commands] == ["scripts.plan", "scripts.leaderboard"]


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
    assert code == 0 and commands[-1] == ["scripts.leaderboard", "speedrun_s42_2"]
    _, commands, _ = speedrun("found/infer.json", TAG="_3")
    assert "--inference-json=found/infer.json" in commands[0]  # the ratio may come from lane B


def run_of(hours, core, bpb=0.718, status="ok", commit="a" * 40):
    summary = {"status": status, "train_time_sec": 3600 * hours, "core_metric": core,
               "final_val_bpb": bpb}
    config = {"run_id": "r", "git_commit": commit, "git_dirty": False}
    return RunRecord(Path(), config, [], summary)


def test_a_row_of_the_leaderboard():
    one, two, commit = run_of(1.6, 0.25), run_of(1.8, 0.27), "a" * 12
    assert leaderboard_row([one], "x") == f"| 1.60 | 0.2500 (1) | 0.71800 | x | {commit} |"
    assert leaderboard_row([one, two], "x") == (
        f"| 1.70 ± 0.14 | 0.2600 ± 0.0141 (2) | 0.71800 ± 0.00000 | x | {commit} |")


@pytest.mark.parametrize(("runs", "message"), [
    ([run_of(1, None)], "without CORE"), ([run_of(1, 0.3, status="nan")], "ended nan"),
    ([run_of(1, 0.3), run_of(1, 0.3, commit="b" * 40)], "several commits"),
])
def test_runs_that_cannot_be_a_row_are_refused(runs, message):
    with pytest.raises(UserError, match=message):
        leaderboard_row(runs, "x")
