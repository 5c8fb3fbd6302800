"""scripts.experiment as a user calls it, and the commands of runs/*.sh."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from synthetic_runs import make_trial

from nanochat import core_eval, dataset
from nanochat.config import parse_config
from nanochat.experiments.profiles import PROFILES
from nanochat.experiments.runner import training_runs
from scripts import (
    base_eval,
    experiment,
    lane_b,
    plan,
    report,
    runs,
    tok_eval,
    tok_train,
    verdict,
)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


@pytest.fixture
def dry_run(ledger, capsys):
    """Return the printed text and the training commands of a dry run."""
    def dry_run(*argv):
        experiment.main(["--ledger", str(ledger), "--dry-run", *argv])
        printed = capsys.readouterr().out
        return printed, [line for line in printed.splitlines() if "scripts.base_train" in line]
    return dry_run


def test_a_dry_run_prints_rules_and_the_commands_of_missing_runs(dry_run):
    make_trial("x", seed=0)
    printed, commands = dry_run("--name", "x", "--profile", "cpu", "--candidates", "baseline",
                                "both", "--seeds", "0", "1", "0", "--", "--device-type=cpu")
    assert [line.split("--run-id=")[1].split()[0] for line in commands] == [
        "x.both.d4.s0", "x.baseline.d4.s1", "x.both.d4.s1"]
    assert all("--device-type=cpu" in line for line in commands)
    assert "gate 4, generalisation" in printed and "4 runs, 3 of them missing" in printed


PROTOCOL = """
    --depth=12 --head-dim=128 --window-pattern=L --max-seq-len=512 --device-batch-size=16
    --total-batch-size=16384 --eval-every=100 --eval-tokens=524288 --core-metric-every=-1
    --sample-every=-1 --save-every=-1 --num-iterations=1500 --run=dummy
"""


def test_the_d12_profile_is_the_protocol_to_the_letter(base_dir, dry_run):
    _, commands = dry_run("--name", "b", "--profile", "d12-protocol")
    for seed, line in enumerate(commands):
        run_id = f"b.baseline.d12.s{seed}"
        assert line.split("scripts.base_train ")[1].split() == [
            *PROTOCOL.split(), f"--tokenizer-dir={base_dir}/tokenizer_climbmix",
            "--dataset=climbmix", f"--seed={seed}", f"--run-id={run_id}", f"--model-tag={run_id}"]
    assert len(commands) == 2


def test_only_protocols_write_to_the_tracked_ledger(base_dir):
    ledgers = {name: str(profile.ledger()) for name, profile in PROFILES.items()}
    tracked, own = "dev/experiments.csv", f"{base_dir}/experiments.csv"
    assert ledgers == {"d12-protocol": tracked, "miniseries": tracked, "cpu": own,
                       "cpu-short": own}


def test_missing_data_of_a_profile_is_prepared(ledger, base_dir, monkeypatch):
    calls = []
    monkeypatch.setattr(experiment, "download_shards", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(experiment.runner, "run_module",
                        lambda module, flags: calls.append((module, *map(str, flags))))
    monkeypatch.setattr(experiment.runner, "run_experiment", lambda *_: calls.append("trained"))
    argv = ["--name", "x", "--profile", "d12-protocol", "--ledger", str(ledger)]
    experiment.main(argv)
    folder = base_dir / "tokenizer_climbmix"
    tokenizer = ("scripts.tok_train", "--dataset", "climbmix", "--vocab-size", "32768",
                 "--tokenizer-dir", str(folder))
    folder.mkdir()
    experiment.main(argv)
    experiment.main([*argv, "--", "--dataset", "books"])
    assert calls == [("climbmix", 8), tokenizer, "trained", ("climbmix", 8), "trained", "trained"]


@pytest.mark.parametrize(("argv", "message"), [
    (["--profile", "cpu", "--candidates", "magic"], "no candidate 'magic'"),
    (["--profile", "cpu", "--target-metric-threshold", "-1"], "above 0"),
    (["--profile", "cpu", "--depths", "0", "--dry-run"], "--depth 0 must be"),
    (["--profile", "cpu", "--target-from", "nothing"], "no experiment 'nothing'"),
])
def test_experiment_refuses_in_one_line(ledger, refusal, argv, message):
    error = refusal(experiment.main, ["--name", "x", "--ledger", str(ledger), *argv])
    assert error.count("\n") == 1 and message in error


def test_a_broken_ledger_is_refused_before_the_data_are_prepared(ledger, refusal, monkeypatch):
    monkeypatch.setattr(experiment, "prepare", lambda _: pytest.fail("data were prepared"))
    Path(ledger).write_text("seed,depth\n0,4\n")
    error = refusal(experiment.main, ["--name", "x", "--profile", "cpu", "--ledger", str(ledger)])
    assert f"{ledger}, line 1" in error


MODULES = (core_eval, dataset, base_eval, experiment, lane_b, plan, report, runs, tok_eval,
           tok_train, verdict)
PARSERS = {module.__name__: module.parse_args for module in MODULES}
PARSERS["scripts.base_train"] = parse_config


@pytest.mark.parametrize(("script", "argv"), [
    ("baseline.sh", []), ("miniseries.sh", ["d12-protocol", "chunked-ce", "8 12"]),
    ("lane_c.sh", ["d12-protocol", "0 1 2"]), ("lane_c.sh", []),
    ("scaling_laws.sh", ["1e17", "4 6", "8"]), ("lane_b.sh", ["1.62", "books"]),
    ("speedrun.sh", []),
])
def test_every_command_of_the_shell_scripts_parses(tmp_path, script, argv):
    """The scripts run with a stand-in `python` that writes down its arguments."""
    shutil.copytree(Path(__file__).parents[1] / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "setup.sh").write_text("")
    calls, programs = tmp_path / "calls", tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(
        f'#!/bin/sh\nfor arg in "$@"; do printf "%s\\0" "$arg"; done >> {calls}\necho >> {calls}\n')
    (programs / "torchrun").write_text('#!/bin/sh\nshift 2\nexec python "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}",
                   "NANOCHAT_BASE_DIR": str(tmp_path / "cache")}
    subprocess.run(["bash", tmp_path / "runs" / script, *argv], check=True, timeout=30,
                   capture_output=True, env=environment)
    for line in calls.read_text().splitlines():
        _, module, *flags = line.rstrip("\0").split("\0")
        args = PARSERS[module](flags)
        if module == "scripts.experiment":
            args.target_from = None
            for run in training_runs(experiment.experiment_of(args)):
                assert parse_config(run.flags).tokenizer_dir
