"""scripts.experiment and scripts.verdict as a person calls them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_runs import make_trial

from nanochat import core_eval, dataset
from nanochat.experiments.ledger import read_experiments
from nanochat.experiments.runner import plan
from scripts import (
    base_eval,
    base_train,
    experiment,
    lane_b,
    leaderboard,
    report,
    tok_eval,
    tok_train,
    verdict,
)
from scripts import plan as plan_script


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


@pytest.fixture
def matrix(ledger):
    """Two seeds of baseline and candidate at depth 4, and a three-depth miniseries."""
    for seed in (0, 1):
        make_trial(ledger, "lane_c", seed=seed)
        make_trial(ledger, "lane_c", candidate="chunked-ce", seed=seed, step_ms=90.0)
    for depth in (2, 3, 4):
        make_trial(ledger, "depths", depth=depth)
        make_trial(ledger, "depths", candidate="chunked-ce", depth=depth, step_ms=90.0)
    return ledger


def test_dry_run_prints_rules_and_commands_and_runs_nothing(ledger, capsys):
    experiment.main(["--name", "x", "--profile", "cpu", "--candidates", "baseline", "both", "--seeds", "0", "1",
                     "--ledger", str(ledger), "--dry-run", "--", "--device-type", "cpu"])
    out = capsys.readouterr().out
    commands = [line for line in out.splitlines() if "scripts.base_train" in line]
    assert [line.split("--run-id=")[1].split()[0] for line in commands] == [
        f"x.{c}.d4.s{s}" for s in (0, 1) for c in ("baseline", "both")]
    assert all("--device-type cpu" in line for line in commands) and "4 generalisation" in out
    assert not ledger.exists()


def test_dry_run_marks_what_is_done(matrix, capsys):
    experiment.main(["--name", "lane_c", "--profile", "cpu", "--seeds", "0", "9", "--target-metric-threshold", "1.5",
                     "--ledger", str(matrix), "--dry-run"])
    commands = [line for line in capsys.readouterr().out.splitlines() if "scripts.base_train" in line]
    assert [line.startswith("# done: ") for line in commands] == [True, False]


def test_every_flag_given_is_one_that_base_train_has(matrix, capsys):
    experiment.main(["--name", "x", "--profile", "d12", "--candidates", "both", "--seeds", "3", "4",
                     "--ledger", str(matrix), "--target-from", "lane_c", "--dry-run"])
    flags = capsys.readouterr().out.split("scripts.base_train ")[1].splitlines()[0].split()
    args = base_train.parse_args(flags)
    ends = [row.min_val_bpb for row in read_experiments(matrix) if row.run_id.startswith("lane_c.baseline")]
    assert args.target_metric_threshold == max(ends) + 0.001
    assert (args.depth, args.seed, args.run_id, args.fused_rmsnorm) == (12, 3, "x.both.d12.s3", True)


PROTOCOL = """
    --depth=12 --head-dim=128 --window-pattern=L --max-seq-len=512 --device-batch-size=16 --total-batch-size=16384
    --eval-every=100 --eval-tokens=524288 --core-metric-every=-1 --sample-every=-1 --save-every=-1
    --num-iterations=1500 --run=dummy
"""


def test_d12_profile_is_the_protocol_to_the_letter(ledger, base_dir, capsys):
    experiment.main(["--name", "b", "--profile", "d12", "--ledger", str(ledger), "--dry-run"])
    commands = [line for line in capsys.readouterr().out.splitlines() if "scripts.base_train" in line]
    for seed, line in enumerate(commands):
        run_id = f"b.baseline.d12.s{seed}"
        assert line.split("scripts.base_train ")[1].split() == [
            *PROTOCOL.split(), "--crop=drop", f"--tokenizer-dir={base_dir}/tokenizer_climbmix", "--dataset=climbmix",
            f"--seed={seed}", f"--run-id={run_id}", f"--model-tag={run_id}"]
    assert len(commands) == 2


def test_a_series_is_the_profile_s_depths_which_those_given_replace(ledger, capsys):
    def depths(*flags):
        experiment.main(["--name", "x", *flags, "--seeds", "0", "--ledger", str(ledger), "--dry-run"])
        lines = [line for line in capsys.readouterr().out.splitlines() if "scripts.base_train" in line]
        return [int(line.split("--depth=")[1].split()[0]) for line in lines], "data-ratio=12" in lines[0] and (
            "--crop=drop" in lines[0])

    assert depths("--profile", "d12", "--series") == ([8, 10, 12, 14], True)
    assert depths("--profile", "cpu", "--series") == ([2, 3, 4], False)
    assert depths("--profile", "cpu", "--series", "--depths", "3") == ([3], False)


@pytest.mark.parametrize("there", [True, False])
def test_what_a_profile_trains_on_is_prepared_where_it_is_missing(ledger, base_dir, monkeypatch, there):
    calls = []
    monkeypatch.setattr(experiment, "download_shards", lambda name, n: calls.append((name, n)))
    monkeypatch.setattr(experiment, "run_module", lambda module, flags: calls.append((module, *map(str, flags))))
    monkeypatch.setattr(experiment.runner, "run_experiment", lambda *_: calls.append("trained"))
    folder = base_dir / "tokenizer_climbmix"
    if there:
        folder.mkdir()
    experiment.main(["--name", "x", "--profile", "d12", "--ledger", str(ledger)])
    tokenizer = ("scripts.tok_train", "--dataset", "climbmix", "--vocab-size", "32768", "--tokenizer-dir", str(folder))
    assert calls == [("climbmix", 8), *([] if there else [tokenizer]), "trained"]
    if not there:
        calls.clear()
        experiment.main(["--name", "x", "--profile", "d12", "--ledger", str(ledger), "--dataset", "books"])
        assert calls == ["trained"]


@pytest.mark.parametrize(("argv", "message"), [
    (["--profile", "d99"], "no profile 'd99'"),
    (["--profile", "cpu", "--candidates", "magic"], "no candidate 'magic'"),
    (["--profile", "cpu", "--candidates", "both", "both"], "named twice"),
    (["--profile", "cpu", "--target-metric-threshold", "-1"], "above 0"),
    (["--profile", "cpu", "--target-metric-name", "loss", "--target-metric-threshold", "1"], "unknown"),
    (["--profile", "cpu", "--target-from", "nothing"], "no experiment 'nothing'"),
    (["--profile", "cpu", "--nproc-per-node", "0"], "at least 1"),
])
def test_experiment_refuses_in_one_line(matrix, refusal, argv, message):
    error = refusal(experiment.main, ["--name", "x", "--ledger", str(matrix), *argv])
    assert error.count("\n") == 1 and message in error


def test_verdict_prints_rules_gates_and_decision(matrix, capsys):
    verdict.main(["--experiment", "lane_c", "--miniseries", "depths", "--ledger", str(matrix)])
    out = capsys.readouterr().out
    assert "chunked-ce: INSUFFICIENT (gate 3 stability)" in out and "no save/resume probe" in out
    assert "gain n=2, mean +10 %" in out and "decision: reject when" in out


def test_a_verdict_in_a_fresh_clone_says_what_the_ledger_says(matrix, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    verdict.main(["--experiment", "lane_c", "--ledger", str(matrix)])
    out = capsys.readouterr().out
    assert "chunked-ce: NOT JUDGED (records missing here of 4 of 4 runs; the ledger says: " in out
    assert "chunked-ce reached the target in 2 of 2 runs after 10.8 s on average" in out


def test_a_longer_baseline_leaves_the_threshold_of_rows_that_are_there(matrix):
    """A new seed ends worse than the others: --target-from would give another threshold than the rows have."""
    make_trial(matrix, "base", seed=0), make_trial(matrix, "base", seed=1)
    make_trial(matrix, "base", seed=2, bpb_shift=0.1)
    for name, kept in (("lane_c", True), ("new", False)):
        asked = experiment.experiment_of(experiment.parse_args(
            ["--name", name, "--profile", "cpu", "--ledger", str(matrix), "--target-from", "base"]))
        assert (asked.target_metric_threshold == 1.5) == kept


@pytest.mark.parametrize(("argv", "message"), [
    (["--experiment", "x"], "no experiment 'x'"),
    (["--experiment", "lane_c", "--candidates", "both"], "'both' is judged against"),
    (["--experiment", "lane_c", "--ledger", "nowhere.csv"], "nowhere.csv"),
])
def test_verdict_refuses_in_one_line(matrix, refusal, argv, message):
    error = refusal(verdict.main, ["--ledger", str(matrix), *argv])
    assert error.count("\n") == 1 and message in error


def test_verdict_names_the_line_of_a_hand_made_mistake(matrix, refusal):
    matrix.write_text(matrix.read_text().replace("lane_c,1,4", "lane_c,one,4", 1))
    assert "line 4: seed is 'one'" in refusal(verdict.main, ["--ledger", str(matrix), "--experiment", "lane_c"])


@pytest.mark.parametrize(("script", "argv"), [
    ("baseline.sh", []), ("baseline.sh", ["d12", "0 1 2"]), ("miniseries.sh", ["d12", "chunked-ce", "8 12"]),
    ("lane_c.sh", []), ("lane_c.sh", ["d12", "0 1 2"]), ("scaling_laws.sh", ["1e17", "4 6", "8"]),
    ("lane_b.sh", []), ("lane_b.sh", ["d12", "0 1 2"]), ("speedrun.sh", ["8", "dummy", "1"]), ("speedrun.sh", []),
])
def test_shell_scripts_give_only_commands_that_exist(tmp_path, script, argv):
    """The scripts run beside a stand-in `python` that writes down its arguments; each command is then parsed."""
    runs = Path(__file__).parents[1] / "runs"
    assert len((runs / script).read_text().splitlines()) <= 40
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text("")  # the environment is the tests' own
    stand_in, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\nfor arg in "$@"; do printf "%s\\0" "$arg"; done >> {calls}\necho >> {calls}\n')
    torchrun = stand_in.with_name("torchrun")
    torchrun.write_text('#!/bin/sh\nshift 2\nexec python "$@"\n')  # --standalone --nproc-per-node=8
    for program in (stand_in, torchrun):
        program.chmod(0o755)
    subprocess.run(["bash", tmp_path / "runs" / script, *argv], check=True, timeout=30, capture_output=True,
                   env={**os.environ, "PATH": f"{stand_in.parent}:{os.environ['PATH']}",
                        "NANOCHAT_BASE_DIR": str(tmp_path / "cache")})
    commands = [line.rstrip("\0").split("\0") for line in calls.read_text().splitlines()]
    parsers = {"scripts.experiment": experiment, "scripts.verdict": verdict, "scripts.report": report,
               "scripts.tok_train": tok_train, "nanochat.dataset": dataset,
               "scripts.base_train": base_train, "scripts.base_eval": base_eval, "scripts.tok_eval": tok_eval,
               "nanochat.core_eval": core_eval, "scripts.lane_b": lane_b, "scripts.plan": plan_script,
               "scripts.leaderboard": leaderboard}
    for module, *flags in (command[1:] for command in commands):
        args = parsers[module].parse_args(flags)
        if module == "scripts.experiment":
            args.target_from = None
            asked = experiment.experiment_of(args)
            assert all(base_train.parse_args(run.flags).tokenizer_dir for run in plan(asked))
    assert {command[1] for command in commands} & {"scripts.experiment", "scripts.base_train", "scripts.lane_b"}
