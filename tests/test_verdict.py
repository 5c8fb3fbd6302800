"""scripts.verdict as a person calls it."""

import pytest
from synthetic_runs import make_trial

from scripts import verdict


@pytest.fixture
def ledger(tmp_path):
    """Two seeds of baseline and candidate at depth 4, and a three-depth miniseries."""
    path = tmp_path / "experiments.csv"
    for experiment, depth, seed in (("lane_c", 4, 0), ("lane_c", 4, 1), ("depths", 2, 0),
                                    ("depths", 3, 0), ("depths", 4, 0)):
        make_trial(path, experiment, depth=depth, seed=seed)
        make_trial(path, experiment, candidate="chunked-ce", depth=depth, seed=seed, step_ms=90.0)
    return path


def test_verdict_prints_rules_gates_and_decision(ledger, capsys):
    verdict.main(["--experiment", "lane_c", "--miniseries", "depths", "--ledger", str(ledger)])
    out = capsys.readouterr().out
    assert "chunked-ce: INSUFFICIENT (gate 3 stability)" in out and "no save/resume probe" in out
    assert "gain n=2, mean +10 %" in out and "Decision: reject if" in out


@pytest.mark.parametrize(("argv", "message"), [
    (["--experiment", "x"], "no experiment 'x'"),
    (["--experiment", "lane_c", "--candidates", "both"], "'both' is judged against"),
    (["--experiment", "lane_c", "--ledger", "nowhere.csv"], "nowhere.csv"),
])
def test_verdict_refuses_in_one_line(ledger, refusal, argv, message):
    error = refusal(verdict.main, ["--ledger", str(ledger), *argv])
    assert error.count("\n") == 1 and message in error
