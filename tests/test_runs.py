"""scripts.runs: states and numbers from records, comparison against scipy, records of strangers."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import make_run

from nanochat.common import RunLock, locks_dir, runs_dir, write_json
from nanochat.experiments.table import RECENT_SEC
from scripts import runs as script

SMALL = {"steps": 40, "eval_every": 10}


def said(capsys, *argv):
    script.main(list(argv))
    return capsys.readouterr().out


def listed(capsys, *argv):
    """The state of each run listed, by id."""
    return dict(line.split()[:2] for line in said(capsys, *argv).splitlines()[1:])


def test_states_are_those_of_summary_and_owner(capsys):
    make_run("ok", **SMALL), make_run("diverged", nan_at=20, **SMALL)
    stopped = make_run("stopped", **SMALL).folder
    write_json(stopped / "summary.json", {"status": "interrupted", "steps": 20})
    for name in ("runs", "killed", "far"):
        make_run(name, finished=False, **SMALL)
    lock = RunLock(runs_dir() / "runs", locks_dir() / "run.runs", "runs", "wait")
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                           capture_output=True, text=True)
    for name, host in (("killed", socket.gethostname()), ("far", "elsewhere")):
        write_json(locks_dir() / f"run.{name}", {"host": host, "pid": int(child.stdout)})
    states = {"ok": "finished", "diverged": "failed", "stopped": "stopped", "runs": "running",
              "killed": "stale", "far": "running"}
    assert listed(capsys) == states
    for path in (runs_dir() / "far").iterdir():
        os.utime(path, (time.time() - 2 * RECENT_SEC,) * 2)
    assert listed(capsys, "far") == {"far": "stale"}
    lock.release()


def test_runs_are_listed_by_name_and_state_newest_first(capsys, refusal):
    for at, name in enumerate(("x-s0", "x-s1", "y")):
        for path in make_run(name, **SMALL).folder.iterdir():
            os.utime(path, (1e9 + at, 1e9 + at))
    make_run("bad", nan_at=20, **SMALL)
    shutil.copytree(runs_dir() / "y", runs_dir() / "y-copy")
    assert list(listed(capsys)) == ["bad", "y", "y-copy", "x-s1", "x-s0"]
    assert list(listed(capsys, "x-*", "bad", "--state", "finished")) == ["x-s1", "x-s0"]
    assert said(capsys, "--state", "running") == f"no such run in {runs_dir()}\n"
    assert f"error: no run none in {runs_dir()}" in refusal(script.main, ["none"])


def test_a_run_without_summary_shows_its_statistics_so_far(capsys):
    make_run("done", **SMALL), make_run("going", finished=False, **SMALL)
    config = json.loads((runs_dir() / "going" / "config.json").read_text())
    config["flags"] |= {"target_metric_name": "val_bpb", "target_metric_threshold": 1.5}
    write_json(runs_dir() / "going" / "config.json", config)
    done, going = (said(capsys, name).splitlines()[1].split()[4:] for name in ("done", "going"))
    assert done[:3] == going[:3] == ["40/40", "0.08M", "1.4537"]
    assert done[4:7] == going[4:7] == ["1.5", "reached", "after"]


def test_a_missed_target_never_reads_as_reached(capsys):
    make_run("missed", threshold=1.3, steps=200)
    assert said(capsys, "missed").rstrip().endswith("1.3 not reached")


def test_unreadable_records_are_named_beside_the_others(capsys):
    make_run("good", **SMALL)
    torn, odd = (make_run(name, finished=False, **SMALL).folder for name in ("torn", "odd"))
    (torn / "metrics.jsonl").write_text('{"kind": 3}\n')
    (odd / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (runs_dir() / "empty").mkdir()
    out = said(capsys)
    assert "good  finished" in out
    assert all(f"\nbroken: {name}: " in out for name in ("torn", "odd", "empty"))


floats = st.floats(allow_nan=False, allow_infinity=False)
scalars = st.none() | st.booleans() | st.integers() | floats | st.text()
values = scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(), scalars, max_size=2)
names = st.sampled_from([
    "flags", "num_iterations", "seed", "device", "dataset_id", "steps", "tokens", "min_val_bpb",
    "target_metric_name", "target_metric_threshold", "time_to_target_sec_measured", "status"])


@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, values), st.none() | st.dictionaries(names, values))
def test_no_readable_record_makes_a_traceback_or_moves_the_cursor(capsys, config, summary):
    if not (runs_dir() / "plain").exists():
        make_run("plain", **SMALL)
    folder = runs_dir() / "strange"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / "config.json", {"run_id": "strange\x1b[2J", **config})
    if summary is not None:
        write_json(folder / "summary.json", {"status": "ok", **summary})
    for argv in ([], ["--compare", "plain", "strange"]):
        try:
            script.main(argv)
        except SystemExit as stop:
            assert stop.code == 2
    out = capsys.readouterr().out
    assert "plain" in out and "\x1b" not in out


def test_differences_are_paired_over_seeds_with_students_interval(capsys):
    bits = {"baseline": [], "both": []}
    for candidate, ends in bits.items():
        for seed in range(3):
            shift = 0.01 * seed * (candidate == "both")
            record = make_run(f"{candidate}-s{seed}", candidate=candidate, seed=seed,
                              bpb_shift=shift, **SMALL)
            ends.append(record.summary["min_val_bpb"])
    make_run("both-s3", candidate="both", seed=3, nan_at=20, **SMALL)
    make_run("baseline-s3", seed=3, bpb_shift=0.5, **SMALL)
    ids = [f"{name}-s{seed}" for name in bits for seed in range(4)]
    text = said(capsys, "--compare", *ids)
    differences = np.subtract(bits["both"], bits["baseline"])
    lo, hi = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    percent = 100 * differences.mean() / np.mean(bits["baseline"])
    assert "both-s{0,1,2,3} minus baseline-s{0,1,2,3}, over the seeds that both have fin" in text
    assert (f"min_val_bpb: n=3, mean {differences.mean():+.4g} ({percent:+.1f} %) (interval "
            f"{lo:+.4g} to {hi:+.4g}") in text
    assert f"{np.mean(bits['both']):.6g}" in text.split("both-s{0,1,2,3} mean")[1].split("\n")[0]
    flags = text.partition("\n\n")[0]
    assert "fused_rmsnorm" in flags and "chunked_ce" in flags and "seed" not in flags


def test_seeds_of_one_candidate_have_a_mean_and_no_difference(capsys):
    make_run("a-s0", seed=0, **SMALL), make_run("a-s1", seed=1, **SMALL)
    text = said(capsys, "--compare", "a-s0", str(runs_dir() / "a-s1"))
    assert "seeds of one candidate" in text and "a-s{0,1} mean" in text and "minus" not in text


def test_runs_of_different_worlds_show_what_differs(capsys, refusal):
    make_run("a", seed=0, **SMALL), make_run("again", seed=0, **SMALL)
    make_run("b", seed=1, candidate="both", dataset_id="books", device="H200", **SMALL)
    text = said(capsys, "--compare", "a", "b")
    assert "books" in text and "H200" in text and "no difference can be given" in text
    assert "a and again have the same flags" in refusal(script.main, ["--compare", "a", "again"])


@pytest.mark.parametrize(("argv", "words"), [
    (["--compare", "no"], "no run 'no'"), (["x", "--compare", "y"], "names its runs"),
    (["--state", "odd"], "invalid choice")])
def test_wrong_calls_are_refused(refusal, argv, words):
    assert words in refusal(script.main, argv)
