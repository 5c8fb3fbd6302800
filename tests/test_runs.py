"""scripts.runs: status and numbers from records, comparison against scipy, records of strangers."""

import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import make_run

from nanochat.common import RunLock, locks_dir, runs_dir, write_json
from nanochat.experiments.ledger import RECENT_SEC
from scripts import runs as script

SMALL = {"steps": 40, "eval_every": 10}


def said(capsys, *argv):
    script.main(list(argv))
    return capsys.readouterr().out


def listed(capsys, *argv):
    """The first word of the status of each run listed, by id."""
    return dict(line.split()[:2] for line in said(capsys, *argv).splitlines()[1:])


def set_age(name, age_sec):
    for path in (runs_dir() / name).iterdir():
        os.utime(path, (time.time() - age_sec,) * 2)


def test_the_status_is_that_of_summary_or_owner(capsys):
    assert said(capsys) == f"no runs in {runs_dir()}\n"
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
    assert listed(capsys) == {"ok": "ok", "diverged": "nan", "stopped": "interrupted",
                              "runs": "running,", "killed": "stale", "far": "running,"}
    set_age("far", 2 * RECENT_SEC)
    assert listed(capsys, "far") == {"far": "stale"}
    lock.release()


def test_runs_are_listed_by_name_newest_first_with_unreadable_ones(capsys, refusal):
    for age_sec, name in enumerate(("y", "x-s1", "x-s0", "torn")):
        make_run(name, finished=name != "torn", **SMALL)
        set_age(name, age_sec)
    shutil.copytree(runs_dir() / "y", runs_dir() / "y-copy")
    assert list(listed(capsys)) == ["y", "y-copy", "x-s1", "x-s0", "torn"]
    assert list(listed(capsys, "x-*", "torn")) == ["x-s1", "x-s0", "torn"]
    (runs_dir() / "torn" / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (runs_dir() / "empty").mkdir()
    out = said(capsys)
    assert "y   " in out and all(f"\nbroken: {x}: " in out for x in ("torn", "empty"))
    error = refusal(script.main, ["none"])
    assert f"no run none in {runs_dir()}; there are " in error and "y" in error
    assert "no run 'no' in" in refusal(script.main, ["--compare", "no"])


def test_a_running_run_shows_its_numbers_so_far(capsys):
    make_run("done", **SMALL), make_run("going", finished=False, **SMALL)
    done, going = (said(capsys, name).splitlines()[1] for name in ("done", "going"))
    assert "running, step 40 of 40" in going and "1.45372" in going and "1.45372" in done


scalars = (st.none() | st.booleans() | st.integers() | st.text()
           | st.floats(allow_nan=False, allow_infinity=False))
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


def test_differences_are_paired_over_seeds_with_students_interval(capsys, refusal):
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
    assert (f"min val_bpb: n=3, mean {differences.mean():+.4g} ({percent:+.1f} %) (interval "
            f"{lo:+.4g} to {hi:+.4g}") in text
    mean_sd = f"mean ± sd of 3 {np.mean(bits['both']):.5f} ± {np.std(bits['both'], ddof=1):.5f}"
    assert mean_sd in " ".join(text.split("both-s{0,1,2,3}, depth 4")[1].split())
    flags = text.partition("\n\n")[0]
    assert "fused_rmsnorm" in flags and "chunked_ce" in flags and "seed" not in flags

    text = said(capsys, "--compare", "baseline-s0", str(runs_dir() / "baseline-s1"))
    assert "baseline-s{0,1}, depth 4" in text and "minus" not in text
    shutil.copytree(runs_dir() / "baseline-s0", runs_dir() / "again")
    assert "have the same flags" in refusal(script.main, ["--compare", "baseline-s0", "again"])
    make_run("b", seed=9, dataset_id="books", device="H200", **SMALL)
    text = said(capsys, "--compare", "baseline-s0", "b")
    assert "books" in text and "H200" in text and "there is no such seed" in text
