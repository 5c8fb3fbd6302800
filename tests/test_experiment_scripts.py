"""scripts.verdict as a user calls it."""

import re

import pytest
from synthetic_runs import make_trial

from scripts import verdict


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


def test_verdict_prints_rules_gates_and_decision(matrix, capsys):
    verdict.main(["--experiment", "lane_c", "--miniseries", "depths", "--ledger", str(matrix)])
    out = capsys.readouterr().out
    assert "chunked-ce: INSUFFICIENT (gate 3 stability)" in out and "no save/resume probe" in out
    assert "gain n=2, mean +10.00 %" in out and "decision: reject when" in out


def test_verdict_goes_into_the_log_above_older_entries(matrix, tmp_path, capsys):
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n\n## 2026-01-01 · older\n\nText.\n")
    for extra in ([], ["--miniseries", "depths"]):
        verdict.main(["--experiment", "lane_c", *extra, "--ledger", str(matrix), "--log", str(log)])
    text = log.read_text()
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert text.startswith("# Log\n\n## 20") and len(heads) == 3 and heads[-1] == "## 2026-01-01 · older"
    assert "**chunked-ce** (`--chunked-ce`): **insufficient**" in text and text.endswith("older\n\nText.\n")


def test_a_verdict_without_the_records_says_so_and_is_not_logged(matrix, tmp_path, capsys, monkeypatch, refusal):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    verdict.main(["--experiment", "lane_c", "--ledger", str(matrix)])
    assert "note: 4 of 4 runs have no record in" in capsys.readouterr().out
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n")
    argv = ["--experiment", "lane_c", "--ledger", str(matrix), "--log", str(log)]
    assert "where they were made" in refusal(verdict.main, argv) and log.read_text() == "# Log\n"


def test_the_same_verdict_is_logged_once(matrix, tmp_path, capsys):
    log = tmp_path / "LOG.md"
    log.write_text("# Log\n")
    for _ in range(2):
        verdict.main(["--experiment", "lane_c", "--ledger", str(matrix), "--log", str(log)])
        log.write_text(re.sub(r"## \d{4}", "## 2020", log.read_text()))  # the second time it is another day
    assert log.read_text().count("## ") == 1 and "nothing added" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "message"), [(None, "create it"), ("no title\n", "line 1")])
def test_verdict_refuses_a_log_without_a_title(matrix, tmp_path, refusal, text, message):
    log = tmp_path / "LOG.md"
    if text is not None:
        log.write_text(text)
    argv = ["--experiment", "lane_c", "--ledger", str(matrix), "--log", str(log)]
    assert message in refusal(verdict.main, argv)
    assert log.exists() == (text is not None) and (text is None or log.read_text() == text)


@pytest.mark.parametrize(("argv", "message"), [
    (["--experiment", "x"], "no experiment 'x'"),
    (["--experiment", "lane_c", "--candidates", "both"], "no candidate 'both'"),
    (["--experiment", "lane_c", "--ledger", "nowhere.csv"], "nowhere.csv"),
])
def test_verdict_refuses_in_one_line(matrix, refusal, argv, message):
    error = refusal(verdict.main, ["--ledger", str(matrix), *argv])
    assert error.count("\n") == 1 and message in error


def test_verdict_names_the_line_of_a_hand_made_mistake(matrix, refusal):
    matrix.write_text(matrix.read_text().replace("lane_c,1,4", "lane_c,one,4", 1))
    assert "line 4: seed is 'one'" in refusal(verdict.main, ["--ledger", str(matrix), "--experiment", "lane_c"])


