"""The runner, with a small stand-in for base_train that writes valid run records."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nanochat.common import QUIET, UserError, runs_dir
from nanochat.experiments.ledger import ExperimentRow, read_rows
from nanochat.experiments.profiles import CANDIDATES, Profile, candidate_flags
from nanochat.experiments.runner import (
    Experiment,
    Probe,
    probe_candidates,
    read_probe,
    run_experiment,
    threshold_from,
    training_runs,
)

FAKE_TRAIN = textwrap.dedent("""
    import argparse, os, sys, time
    from nanochat.common import runs_dir
    from nanochat.runlog import RunLog
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("run-id", "dataset", "fate"):
        parser.add_argument("--" + name)
    for name, default in (("depth", 4), ("seed", 0), ("num-iterations", 4), ("save-every", 0),
                          ("resume-from-step", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    for name in ("pause-sec", "resume-error", "target-metric-threshold"):
        parser.add_argument("--" + name, type=float, default=0.0)
    parser.add_argument("--no-compile", action="store_true")
    args, _ = parser.parse_known_args()
    last, first = args.num_iterations, args.resume_from_step
    if args.fate == "refused" or args.fate == "cannot load" and first:
        sys.exit("error: these flags are refused")
    if first:
        log = RunLog.resume(runs_dir(), args.run_id, first)
    else:
        log = RunLog.create(runs_dir(), args.run_id, {
            "flags": vars(args), "dataset_id": args.dataset + "-1", "git_commit": "c" * 40,
            "num_iterations": last, "device": {"type": "cpu", "name": "CPU x2", "world_size": 1}})
    for step in range(first + 1, last + 1):
        time.sleep(args.pause_sec / 4)
        loss = 5.0 - step / last + (args.resume_error if first else 0.0)
        log.event("train", step=step, tokens=step * 10, loss=loss, dt_ms=1.0, tok_per_sec=100.0,
                  train_time_sec=step * 0.1)
        if args.fate == "crash" and step == 2:
            os._exit(1)
        if args.fate == "crash later" and step == 15 and first:
            os._exit(1)
        if args.save_every and step % args.save_every == 0:
            folder = runs_dir().parent / "base_checkpoints" / args.run_id
            folder.mkdir(parents=True, exist_ok=True)
            log.event("checkpoint", step=step, path=str(folder))
    status = args.fate if args.fate in ("nan", "interrupted") else "ok"
    log.finish(status=status, tokens=40, min_val_bpb=1.0 + args.seed / 1000,
               tok_per_sec_median=100.0, dt_median_ms=1.0, wall_time_sec=0.4,
               target_metric_name="val_bpb", time_to_target_sec_measured=0.3,
               target_metric_threshold=args.target_metric_threshold)
""")
PROFILE = Profile("a stand-in", 4, "stdlib", "--num-iterations=4")


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    return lambda flags: [sys.executable, str(script), *flags]


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


def experiment(name="matrix", candidates=("baseline", "both"), seeds=(0, 1), depths=(4,), **more):
    flags = {candidate: CANDIDATES[candidate] for candidate in candidates}
    return Experiment(name, PROFILE, flags, seeds, depths,
                      **{"target_metric_threshold": 1.2, **more})


def run(asked, ledger, fake, lines=None):
    report = ([] if lines is None else lines).append
    return run_experiment(asked, ledger, runs_dir(), fake, report)


def rows_of(ledger):
    return read_rows(ledger, ExperimentRow)


def one_run(**more):
    return experiment(candidates=("baseline",), seeds=(0,), **more)


# --- rows -----------------------------------------------------------------------------------------

def test_each_run_gets_one_row_with_its_metrics(ledger, fake):
    lines = []
    assert run(experiment(), ledger, fake, lines) == 4
    rows = rows_of(ledger)
    assert [row.run_id for row in rows] == [
        f"matrix.{name}.d4.s{seed}" for seed in (0, 1) for name in ("baseline", "both")]
    assert dataclasses.replace(rows[1], timestamp="now") == ExperimentRow(
        timestamp="now", git_commit="c" * 40, experiment_name="matrix", seed=0, depth=4,
        target_metric_name="val_bpb", target_metric_threshold=1.2, time_to_target_sec_measured=0.3,
        time_to_target_sec_extrapolated=None, tok_per_sec_median=100.0, dt_median_ms=1.0,
        wall_time_sec=0.4, min_val_bpb=1.0, status="ok",
        candidate_flags="--fused-rmsnorm --chunked-ce", dataset_id="stdlib-1", total_tokens=40,
        device="CPU x2", peak_memory_mib=None, run_id="matrix.both.d4.s0")
    assert lines[1] == "[1/4] matrix.baseline.d4.s0: ok"


def test_only_missing_runs_are_trained(ledger, fake):
    run(experiment(seeds=(0,)), ledger, fake)
    before = ledger.read_bytes()
    assert run(experiment(seeds=(0,)), ledger, fake) == 0 and ledger.read_bytes() == before
    assert run(experiment(), ledger, fake) == 2 and ledger.read_bytes().startswith(before)
    lines = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(lines[:-1]))  # killed between the end of the run and its row
    assert run(experiment(), ledger, fake) == 0 and len(rows_of(ledger)) == 4


@pytest.mark.parametrize(("fate", "statuses"), [("crash", ["ok"]), ("nan", ["nan", "ok"])])
def test_a_run_that_fails_keeps_the_others_going(ledger, fake, fate, statuses):
    def command(flags):
        return fake([*flags, *(["--fate", fate] if "--seed=0" in flags else [])])

    lines = []
    run(experiment(candidates=("baseline",)), ledger, command, lines)
    assert [row.status for row in rows_of(ledger)] == statuses
    assert ("was killed; repeat" in "".join(lines)) == (fate == "crash")
    assert run(experiment(candidates=("baseline",)), ledger, fake) == (fate == "crash")


def test_a_refused_start_stops_the_experiment(ledger, fake, capfd):
    with pytest.raises(UserError, match=r"did not start \(exit code 1\)"):
        run(experiment(extra_flags=("--fate=refused",)), ledger, fake)
    assert "error: these flags are refused" in capfd.readouterr().err and not ledger.exists()


def test_an_interrupted_run_is_trained_again(ledger, fake):
    with pytest.raises(UserError, match="stopped by a signal"):
        run(one_run(), ledger, lambda flags: fake([*flags, "--fate=interrupted"]))
    assert not ledger.exists() and run(one_run(), ledger, fake) == 1
    assert [row.status for row in rows_of(ledger)] == ["ok"]


@pytest.mark.parametrize("has_row", [True, False])
def test_a_record_made_with_other_flags_is_refused(ledger, fake, has_row):
    run(one_run(extra_flags=("--no-compile",)), ledger, fake)
    if not has_row:
        ledger.unlink()
    with pytest.raises(UserError, match=r"other flags, they differ in .*--no-compile.*threshold"):
        run(one_run(target_metric_threshold=1.1), ledger, fake)
    assert ledger.exists() == has_row


def test_rows_without_records_are_refused_before_anything_runs(ledger, fake, monkeypatch, tmp_path):
    run(experiment(), ledger, fake)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "fresh"))
    with pytest.raises(UserError, match=r"made elsewhere; .*TAG=\.\.\."):
        run(experiment(seeds=(0, 5)), ledger, fake)
    assert not list(runs_dir().glob("matrix*"))


def test_the_threshold_is_one_that_every_baseline_seed_reached_and_is_kept(ledger, fake):
    run(experiment(name="base", seeds=(0, 1, 2)), ledger, fake)
    assert threshold_from("base", "new", runs_dir()) == pytest.approx(1.002 + 0.001)
    run(experiment(seeds=(0,)), ledger, fake)
    assert threshold_from("base", "matrix", runs_dir()) == 1.2
    with pytest.raises(UserError, match="two baseline seeds"):
        threshold_from("matrix", "new", runs_dir())


# --- processes ------------------------------------------------------------------------------------

def driver(tmp_path, ledger, pause_sec=0.6):
    """Start a process that runs all of the matrix, in a process group of its own."""
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_runner import experiment
        from nanochat.common import runs_dir
        from nanochat.experiments.runner import run_experiment
        asked = experiment(extra_flags=("--pause-sec={pause_sec}",))
        run_experiment(asked, {str(ledger)!r}, runs_dir(),
                       lambda flags: [sys.executable, {str(tmp_path / "fake_train.py")!r}, *flags])
    """)
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            env={**os.environ, QUIET: "1"})


def wait_until(condition, timeout_sec=30):
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def is_training_since(time_unix_sec):
    return any(config.stat().st_mtime > time_unix_sec
               and not (config.parent / "summary.json").exists()
               for config in runs_dir().glob("*/config.json"))


def test_a_matrix_killed_five_times_ends_with_the_rows_of_an_uninterrupted_one(
        tmp_path, ledger, fake, monkeypatch):
    """SIGKILL the runner only (its training lives on) or both, at random moments."""
    rng = random.Random(7)
    for kill in rng.sample([os.kill, os.killpg] * 3, 5):
        started, process = time.time(), driver(tmp_path, ledger)
        wait_until(lambda since=started: is_training_since(since))
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, "the matrix ended before the kill"
        kill(process.pid, signal.SIGKILL)
        process.stderr.close()
        process.wait()
    last = driver(tmp_path, ledger)
    assert last.communicate(timeout=60)[1] == "" and last.returncode == 0

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    straight = tmp_path / "straight.csv"
    run(experiment(extra_flags=("--pause-sec=0",)), straight, fake)
    rows, expected = ([dataclasses.replace(row, timestamp="") for row in rows_of(path)]
                      for path in (ledger, straight))
    assert rows == expected


def test_two_runners_of_one_experiment_take_turns(tmp_path, ledger, fake):
    processes = [driver(tmp_path, ledger, pause_sec=0.2) for _ in range(2)]
    assert [process.communicate(timeout=60)[1] for process in processes] == ["", ""]
    assert len(rows_of(ledger)) == 4


def test_a_terminated_runner_ends_its_training_too(tmp_path, ledger, fake):
    process = driver(tmp_path, ledger, pause_sec=30)
    wait_until((runs_dir() / "matrix.baseline.d4.s0" / "config.json").exists)
    process.terminate()
    process.communicate(timeout=20)  # returns when the training has closed the pipe as well
    assert process.returncode == 143 and not ledger.exists()


# --- probe ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("extra", "expected"), [
    ((), Probe(0, 0.0)), (("--resume-error=0.25",), Probe(0, 0.25)),
    (("--fate=crash later",), Probe(0, None)), (("--fate=cannot load",), Probe(0, None)),
    (("--no-compile",), Probe(None, 0.0)),
])
def test_a_probe_compares_the_losses_after_a_resume(base_dir, ledger, fake, extra, expected):
    asked, lines = experiment(extra_flags=extra), []
    probe_candidates(asked, runs_dir(), fake, lines.append)
    assert read_probe(runs_dir(), "matrix", "both") == expected
    assert not (base_dir / "base_checkpoints" / "matrix.both.probe").exists()
    n_lines = len(lines)
    probe_candidates(asked, runs_dir(), fake, lines.append)
    assert len(lines) == n_lines + 1  # the result again, no training


# --- requests -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("ask", "message"), [
    (lambda: candidate_flags("magic"), "no candidate 'magic'.*baseline"),
    (lambda: candidate_flags("hot='--matrix-lr"), "'hot': its flags .* do not parse"),
    (lambda: training_runs(experiment(name="a b")), "cannot name a folder"),
])
def test_impossible_requests_are_refused(ask, message):
    with pytest.raises(UserError, match=message):
        ask()
