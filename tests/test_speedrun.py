"""runs/speedrun.sh beside stand-ins for python and torchrun; the leaderboard's row."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.runlog import RunRecord
from scripts import base_train
from scripts.leaderboard import leaderboard_row, time_to_target_line

PROGRAMS = ("nanochat.dataset", "nanochat.core_eval", "scripts.tok_train", "scripts.tok_eval", "scripts.base_train",
            "scripts.base_eval", "scripts.leaderboard")
STAND_IN = """#!/bin/sh
[ "$1" = -m ] && shift
echo "$@" >> "$CALLS"
[ "$1" = "$FAILING" ] && exit 1
case "$1" in
    scripts.plan) echo "--depth=24 --fp8 --device-batch-size=16 --target-param-data-ratio=${9#--ratio=}" ;;
    scripts.tok_train) mkdir -p "$NANOCHAT_BASE_DIR/tokenizer" && touch "$NANOCHAT_BASE_DIR/tokenizer/tokenizer.tiktoken" ;;
esac
exit 0
"""


@pytest.fixture
def speedrun(tmp_path):
    """A function (arguments, failing program) -> (exit code, commands of that call, stderr)."""
    shutil.copytree(Path(__file__).parents[1] / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text("")
    (tmp_path / "bin").mkdir()
    for name, text in (("python", STAND_IN), ("torchrun", '#!/bin/sh\nshift 2\nexec python "$@"\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def run(*argv, failing="", **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", tmp_path / "runs" / "speedrun.sh", *argv], capture_output=True, text=True, timeout=60,
            env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls),
                 "FAILING": failing, "NANOCHAT_BASE_DIR": str(tmp_path / "cache"), **environment})
        return done.returncode, [line.split() for line in calls.read_text().splitlines()], done.stderr

    return run


@pytest.mark.parametrize("stage", PROGRAMS)
def test_the_same_command_goes_on_at_the_stage_that_failed(speedrun, stage):
    code, calls, _ = speedrun(failing=stage)
    assert code == 1 and [call[0] for call in calls] == ["scripts.plan", *PROGRAMS[:PROGRAMS.index(stage) + 1]]
    code, calls, _ = speedrun()
    assert code == 0 and [call[0] for call in calls] == ["scripts.plan", *PROGRAMS[PROGRAMS.index(stage):]]
    code, calls, _ = speedrun()
    assert code == 0 and [call[0] for call in calls] == ["scripts.plan", "scripts.leaderboard"]


def test_the_training_has_the_plan_s_flags_and_resumes(speedrun):
    _, calls, _ = speedrun("9.5", "wand", "7")
    [train] = [call[1:] for call in calls if call[0] == "scripts.base_train"]
    config = base_train.parse_args(train)
    assert (config.depth, config.fp8, config.target_param_data_ratio, config.device_batch_size) == (24, True, 9.5, 16)
    assert (config.run, config.seed, config.run_id, config.tag) == ("wand", 7, "speedrun_s7", "speedrun_s7")
    assert config.resume_from_step == "auto" and config.save_minutes > 0 and config.target == ("core", 0.256525)
    assert config.core_metric_max_per_task == -1
    assert config.total_batch_size == -1 and config.warmdown_ratio == 0.65  # the recipe's own


def test_another_recipe_needs_another_name(speedrun):
    assert speedrun("8")[0] == 0
    code, calls, error = speedrun("9")
    assert code == 2 and [call[0] for call in calls] == ["scripts.plan"] and "TAG=_2" in error
    code, calls, _ = speedrun("9", TAG="_2")
    assert code == 0 and calls[-1] == ["scripts.leaderboard", "speedrun_s42_2"]


def test_lane_b_s_file_gives_the_ratio(speedrun):
    _, calls, _ = speedrun("found/infer.json")
    assert "--inference-json=found/infer.json" in calls[0]


def run_of(hours, core, bits=0.718, status="ok", commit="a" * 40, events=()):
    summary = {"status": status, "train_time_sec": 3600 * hours, "core_metric": core, "final_val_bpb": bits}
    return RunRecord(Path(), {"run_id": "r", "git_commit": commit, "git_dirty": False}, list(events), summary)


def test_a_row_has_the_leaderboard_s_columns():
    header = (Path(__file__).parents[1] / "dev" / "LEADERBOARD.md").read_text().split("## Our measurements")[1]
    columns = next(line for line in header.splitlines() if line.startswith("|"))
    assert columns == "| hours | CORE (mean of n) | val_bpb | what | commit |"
    assert leaderboard_row([run_of(1.65, 0.26)], "x") == "| 1.65 | 0.2600 (1) | 0.71800 | x | aaaaaaaaaaaa |"
    assert leaderboard_row([run_of(1.6, 0.25), run_of(1.8, 0.27)], "x") == (
        "| 1.70 ± 0.14 | 0.2600 ± 0.0141 (2) | 0.71800 ± 0.00000 | x | aaaaaaaaaaaa |")


@pytest.mark.parametrize(("runs", "message"), [
    ([run_of(1, None)], "without CORE"), ([run_of(1, 0.3, status="nan")], "ended nan"),
    ([run_of(1, 0.3), run_of(1, 0.3, commit="b" * 40)], "several commits"),
])
def test_runs_that_are_no_row_are_refused(runs, message):
    with pytest.raises(UserError, match=message):
        leaderboard_row(runs, "x")


def test_the_time_to_the_target_is_the_record_s():
    reached = {"kind": "target", "step": 9, "description": "time to core >= 0.256525: 5,900 s"}
    assert time_to_target_line(run_of(1, 0.3, events=[reached])) == "r: time to core >= 0.256525: 5,900 s"
    assert time_to_target_line(run_of(1, 0.3)) == "r: its record has no target"
