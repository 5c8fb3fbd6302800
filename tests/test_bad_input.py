"""One mistake per program: one line that begins with `error:`, exit code 2, nothing written."""

import importlib

import pytest

from nanochat.common import base_dir, runs_dir
from scripts import plan

MISTAKES = [
    ("scripts.base_eval", ["--model-tag", "none"]),
    ("scripts.base_train", ["--dataset", "/no/such/folder"]),
    ("scripts.experiment", ["--name", "../x", "--profile", "cpu"]),
    ("scripts.export", ["--model-tag", "none", "--to", "/no/such/folder/x"]),
    ("scripts.lane_b", ["--profile", "small"]),
    ("scripts.lane_b_infer_ratio", ["--calibration-run", "none", "--out", "/no/such/folder/x.json",
                                    "--target-metric-threshold", "1"]),
    ("scripts.lane_b_log_run", ["none", "--inference-json", "/no/such/file.json"]),
    ("scripts.lane_b_stats", ["--dataset", "/no/such/folder", "--out", "/no/such/folder/x.json"]),
    ("scripts.plan", ["--depth", "0"]),
    ("scripts.report", ["none"]),
    ("scripts.runs", ["--compare", "none"]),
    ("scripts.sample", ["--model-tag", "none"]),
    ("scripts.tok_eval", ["--tokenizer-dir", "/no/such/folder"]),
    ("scripts.tok_train", ["--dataset", "/no/such/folder"]),
    ("scripts.verdict", ["--experiment", "none"]),
    ("nanochat.dataset", ["--dataset", "/no/such/folder"]),
]


PROGRAMS = [name for name, _ in MISTAKES] + ["nanochat.core_eval"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_is_printed(program, capsys):
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(program).main(["--help"])
    assert stopped.value.code == 0 and f"usage: python -m {program} " in capsys.readouterr().out


@pytest.mark.parametrize(("program", "arguments"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_an_unknown_flag_is_two_lines(program, arguments, refusal):
    printed = refusal(importlib.import_module(program).main, [*arguments, "--hel"])
    assert printed.splitlines() == ["error: unknown flag --hel; did you mean --help?",
                                    "run with --help to see all flags"]


@pytest.mark.parametrize(("program", "arguments"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_mistake_is_one_line(program, arguments, capsys):
    program = importlib.import_module(program).main
    with pytest.raises(SystemExit) as stopped:
        program(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if "error: " in line]
    assert len(lines) <= lines.index(line) + 2 and not any("Traceback" in line for line in lines)
    assert not list(base_dir().rglob("*.tmp")) and not runs_dir().exists()


def test_an_unknown_choice_is_two_lines(refusal):
    lines = refusal(plan.main, ["--depth", "4", "--gpu", "none"]).splitlines()
    assert len(lines) == 2 and "invalid choice: 'none' (choose from 'a100', 'h100'" in lines[0]
