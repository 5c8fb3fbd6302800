"""scripts.verdict as a person calls it, and the targets that lane B's verdict refuses."""

import shutil
import statistics

import pytest
from synthetic_runs import make_run, make_trial

from nanochat.common import base_dir, runs_dir
from nanochat.experiments.ledger import append_row, row_of
from nanochat.lane_b import verdict as lane_b_verdict
from scripts import report, verdict


@pytest.fixture(autouse=True)
def experiment():
    """Two seeds of baseline and candidate at depth 4, and a three-depth miniseries."""
    for experiment, depth, seed in (("lane_c", 4, 0), ("lane_c", 4, 1), ("depths", 2, 0),
                                    ("depths", 3, 0), ("depths", 4, 0)):
        make_trial(experiment, depth=depth, seed=seed)
        make_trial(experiment, candidate="chunked-ce", depth=depth, seed=seed, step_ms=90.0)


def test_verdict_prints_rules_gates_and_decision(capsys):
    verdict.main(["--experiment", "lane_c", "--miniseries", "depths"])
    out = capsys.readouterr().out
    assert "chunked-ce: INSUFFICIENT (gate 3 stability)" in out and "no save/resume probe" in out
    assert "gain n=2, mean +10 %" in out and "Decision: reject if" in out


def test_verdict_refuses_in_one_line(refusal):
    error = refusal(verdict.main, ["--experiment", "x"])
    assert error.count("\n") == 1 and "no experiment 'x'" in error


@pytest.mark.parametrize("program", [verdict, report])
def test_an_experiment_that_only_the_ledger_has_is_named(program, refusal):
    for seed, status in enumerate(("ok", "ok", "nan")):
        record = make_trial("elsewhere", seed=seed)
        append_row(base_dir() / "experiments.csv",
                   row_of(record, experiment_name="elsewhere", status=status))
        shutil.rmtree(record.folder)
    error = refusal(program.main, ["--experiment", "elsewhere"])
    assert "'elsewhere' (status: 2 ok, 1 nan)" in error and f"not in {runs_dir()};" in error


@pytest.mark.parametrize("derive", [min, statistics.mean, statistics.median])
def test_lane_b_refuses_a_target_derived_from_its_baseline(derive):
    def runs(name, **run):
        return [make_run(f"{name}.s{seed}", seed=seed, **run) for seed in lane_b_verdict.SEEDS]

    target = derive(run.summary["min_val_bpb"] for run in runs("first"))
    for threshold, outcome in ((target, "INSUFFICIENT"), (target + 0.02, "PROMOTE")):
        named = runs(f"named-{outcome}", threshold=threshold, steps=180, bpb_shift=-0.01)
        baseline = runs(f"baseline-{outcome}", threshold=threshold)
        lines = lane_b_verdict.judge(named, baseline, baseline[:1])
        assert outcome in lines[0] and ("was derived" in lines[1]) == (threshold == target)
