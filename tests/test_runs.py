"""scripts.runs: states from records alone, comparison against scipy, what may be freed and what never."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import make_run

from nanochat import common as files
from nanochat.common import RunLock, UserError, checkpoints_dir, is_owned, locks_dir, runs_dir, write_json
from nanochat.experiments.runs import listing
from nanochat.experiments.runs import watch as following
from nanochat.experiments.runs.compare import compare
from nanochat.experiments.runs.listing import RECENT_SEC, list_runs, read_state, table
from nanochat.experiments.runs.prune import LEFTOVER_SEC
from nanochat.experiments.runs.watch import curve, frame, watch
from nanochat.runlog import RunLog
from scripts import runs as script

SMALL = {"steps": 40, "eval_every": 10}


def owned(run_id, folder=None, lock=None):
    return RunLock(folder or runs_dir() / run_id, locks_dir() / (lock or f"run.{run_id}"), run_id, "wait")


def dead_pid():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def state_of(run_id, **options):
    return read_state(runs_dir() / run_id, locks_dir(), **options)


def listed(*patterns, **options):
    return [run.run_id for run in list_runs(runs_dir(), locks_dir(), patterns, **options)[0]]


def tree(folder):
    """Every file below a folder with its bytes and time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


# --- states ----------------------------------------------------------------------------------------------------------

def test_states_are_those_of_summary_and_owner():
    make_run("ok", **SMALL), make_run("diverged", nan_at=20, **SMALL)
    stopped = make_run("stopped", **SMALL).folder
    write_json(stopped / "summary.json", {"status": "interrupted", "steps": 20})
    for name in ("runs", "killed", "closed"):
        make_run(name, finished=False, **SMALL)
    lock = owned("runs")
    write_json(locks_dir() / "run.killed", {"owner": "killed", "host": files.socket.gethostname(), "pid": dead_pid()})
    owned("closed").release()
    found = {run.run_id: run.state for run in list_runs(runs_dir(), locks_dir())[0]}
    lock.release()
    assert found == {"ok": "finished", "diverged": "failed", "stopped": "stopped", "runs": "running",
                     "killed": "stale", "closed": "stale"}


def test_a_run_of_another_host_runs_while_its_record_is_young():
    make_run("far", finished=False, **SMALL)
    write_json(locks_dir() / "run.far", {"owner": "far", "host": "elsewhere", "pid": os.getpid()})
    now = time.time()
    assert state_of("far", now_unix_sec=now + RECENT_SEC / 2).state == "running"
    assert state_of("far", now_unix_sec=now + 2 * RECENT_SEC).state == "stale"


@pytest.mark.parametrize("content", [b"[]", b"\xff", b"{", b'{"host": 3, "pid": "x"}'])
def test_a_lock_that_names_nobody_says_nothing(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    assert is_owned(tmp_path / "lock") is None and is_owned(tmp_path / "missing") is None


def test_looking_takes_no_lock_and_writes_nothing(base_dir, monkeypatch, capsys):
    make_run("a", **SMALL), make_run("b", finished=False, **SMALL)
    lock, before = owned("b"), tree(base_dir)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", lambda *_: pytest.fail("a lock was tried"))
            script.main([]), script.main(["--compare", "a"]), script.main(["--prune"]), script.main(["--watch", "a"])
        assert tree(base_dir) == before and "running" in capsys.readouterr().out
    finally:
        lock.release()


def test_a_run_under_way_shows_what_its_summary_will(capsys):
    make_run("done", **SMALL), make_run("going", finished=False, **SMALL)
    record = runs_dir() / "going" / "config.json"
    config = json.loads(record.read_text())
    config["flags"] |= {"target_metric_name": "val_bpb", "target_metric_threshold": 1.5}
    write_json(record, config)
    done, going = (dict(zip(("id", "state", "age", "steps", "tokens", "bpb", "speed", "target"),
                            state_of(name).cells(), strict=True)) for name in ("done", "going"))
    for cell in ("steps", "tokens", "bpb", "speed", "target"):
        assert done[cell] == going[cell] != "·", cell


def test_a_run_that_ends_while_it_is_read_never_looks_stale(monkeypatch):
    log = RunLog.create(runs_dir(), "r", {"flags": {}}, owned=[owned("r")])
    read = listing.read_run

    def ends_then(*arguments):
        record = read(*arguments)
        log.finish(status="ok", steps=1), log.close()
        return record
    monkeypatch.setattr(listing, "read_run", ends_then)
    assert state_of("r").state == "running"
    monkeypatch.setattr(listing, "read_run", read)
    assert state_of("r").state == "finished"


@pytest.mark.parametrize("last", [b"", b"[]\n", b'{"kind": "val", "time_unix_sec": null}\n', b"\xff\n", None])
def test_a_copy_is_as_old_as_its_last_event_and_its_files_say_it_otherwise(last):
    folder = make_run("copy", finished=False, **SMALL).folder
    hour_ago = time.time() - 3600
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    earlier = [json.dumps(json.loads(line) | {"time_unix_sec": hour_ago}) + "\n" for line in lines]
    (folder / "metrics.jsonl").write_text("".join(earlier))
    run = state_of("copy")
    assert run.state == "stale" and 3600 <= run.age_sec < 3660
    if last is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "metrics.jsonl").write_bytes(last)
    write_json(folder / "summary.json", {"status": "ok"})
    assert state_of("copy", skip_curves=True).age_sec < 60


def test_a_copied_record_is_listed_by_the_name_that_commands_take():
    shutil.copytree(make_run("r", **SMALL).folder, runs_dir() / "r-copy")
    assert sorted(run.cells()[0] for run in list_runs(runs_dir(), locks_dir())[0]) == ["r", "r-copy"]


def test_runs_are_chosen_by_name_state_and_age():
    for at, name in enumerate(("x-s0", "x-s1", "y")):
        folder = make_run(name, **SMALL).folder
        for path in folder.iterdir():
            os.utime(path, (1e9 + at, 1e9 + at))
    make_run("bad", nan_at=20, **SMALL)
    assert listed() == ["bad", "y", "x-s1", "x-s0"]
    assert listed("x-*") == ["x-s1", "x-s0"] and listed("y", "bad") == ["bad", "y"] and listed("none") == []
    assert listed(states=("finished",)) == ["y", "x-s1", "x-s0"] and listed(newest=2) == ["bad", "y"]


# --- strange records -------------------------------------------------------------------------------------------------

def test_broken_records_are_named_beside_the_others(capsys):
    make_run("good", **SMALL)
    (make_run("torn", finished=False, **SMALL).folder / "metrics.jsonl").write_text('{"kind": 3}\n')
    (make_run("odd", finished=False, **SMALL).folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (runs_dir() / "empty").mkdir()
    script.main([])
    out = capsys.readouterr().out
    assert "good" in out and "\nbroken: torn: " in out and "line 1: not an event" in out
    assert "\nbroken: odd: " in out and "not a number" in out and "\nbroken: empty: " in out


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(max_size=5), lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(st.text(max_size=5), inner, max_size=2), max_leaves=4)
NAMES = ("flags", "num_iterations", "seed", "device", "dataset_id", "steps", "tokens", "min_val_bpb",
         "target_metric_name", "tok_per_sec_median", "target_metric_threshold", "time_to_target_sec_measured",
         "train_time_sec")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(NAMES), JSON), st.none() | st.dictionaries(st.sampled_from(NAMES), JSON))
def test_no_record_that_reads_makes_a_traceback(capsys, config, summary):
    make_run("plain", **SMALL) if not (runs_dir() / "plain").exists() else None
    folder = runs_dir() / "strange"
    for path in folder.glob("*"):
        path.unlink()
    write_json(folder / "config.json", {"run_id": "strange", **config})
    if summary is not None:
        write_json(folder / "summary.json", {"status": "ok", **summary})
    assert script.main([]) is None and "plain" in capsys.readouterr().out
    for argv in (["--compare", "plain", "strange"], ["--prune", "strange"]):
        try:
            script.main(argv)
        except SystemExit as stop:
            assert stop.code == 2
    with contextlib.suppress(UserError):
        frame(state_of("strange"), 80, 24)


def test_a_speed_that_is_not_known_is_left_out_of_the_median():
    metrics = make_run("r", finished=False, **SMALL).folder / "metrics.jsonl"
    for value in (20.48, None):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines[20]["dt_ms"] = lines[20]["tok_per_sec"] = None
        lines[30]["tok_per_sec"] = value
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert state_of("r").cells()[6] == "20,480"


def test_a_strangers_name_does_not_move_the_cursor(capsys):
    for name in ("a", "b"):
        folder = make_run(name, seed=1, candidate=name, **SMALL).folder
        config = json.loads((folder / "config.json").read_text())
        config["flags"]["depth"] = name
        write_json(folder / "config.json", config | {"run_id": f"{name}\x1b[2J"})
    (runs_dir() / "c\x1b[2J").mkdir()
    for argv in ([], ["--compare", "a", "b"], ["--watch", "a"]):
        script.main(argv)
    assert "\x1b" not in capsys.readouterr().out
    assert table([("a\x1b[2Jb",)], ("run",), slice(0)) == ["run", "a?[2Jb"]


# --- comparison ------------------------------------------------------------------------------------------------------

def test_differences_are_paired_over_seeds_with_students_interval():
    bits = {}
    for candidate in ("baseline", "both"):
        for seed in range(3):
            record = make_run(f"{candidate}-s{seed}", candidate=candidate, seed=seed, step_ms=100 + 3 * seed**2
                              * (candidate == "both"), bpb_shift=0.01 * seed * (candidate == "both"), **SMALL)
            bits[candidate, seed] = record.summary["min_val_bpb"]
    text = "\n".join(compare([state_of(f"{name}-s{seed}") for name in ("baseline", "both") for seed in range(3)]))
    differences = [bits["both", seed] - bits["baseline", seed] for seed in range(3)]
    lo, hi = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert "both-s{0,1,2} minus baseline-s{0,1,2}" in text
    assert f"min val_bpb: {np.mean(differences):+.4f}" in text
    assert f"95% interval {lo:+.4f} to {hi:+.4f}, n=3" in text
    means = [np.mean([bits[name, seed] for seed in range(3)]) for name in ("baseline", "both")]
    assert all(f"{mean:.4f}" in text for mean in means)
    assert "--fused-rmsnorm" in text and "--seed" not in text and "--depth" not in text


def test_seeds_of_one_candidate_are_a_mean_and_no_difference():
    make_run("a-s0", seed=0, **SMALL), make_run("a-s1", seed=1, **SMALL)
    text = "\n".join(compare([state_of("a-s0"), state_of("a-s1")]))
    assert "seeds of one candidate" in text and "mean" in text and "minus" not in text


def test_a_mean_and_a_difference_in_percent_are_of_the_runs_they_name():
    for seed, shift in ((0, 0.0), (1, 0.5)):
        make_run(f"a-s{seed}", seed=seed, bpb_shift=shift, **SMALL)
    make_run("a-s2", seed=2, bpb_shift=-1, finished=False, **SMALL)
    make_run("b-s0", candidate="both", bpb_shift=0.1, **SMALL)
    text = "\n".join(compare([state_of(name) for name in ("a-s0", "a-s1", "a-s2", "b-s0")]))
    bits = {name: state_of(name).figure("min_val_bpb") for name in ("a-s0", "a-s1", "b-s0")}
    assert f"mean, finished  {(bits['a-s0'] + bits['a-s1']) / 2:11.4f}" in text
    difference = bits["b-s0"] - bits["a-s0"]
    assert f"min val_bpb: {difference:+.4f} ({100 * difference / bits['a-s0']:+.1f} %)" in text


def test_values_that_differ_at_their_end_are_shown_to():
    for name in ("a", "b"):
        folder = make_run(name, **SMALL).folder
        config = json.loads((folder / "config.json").read_text())
        config["flags"]["dataset"] = "/a/folder" * 10 + name
        write_json(folder / "config.json", config)
    assert "/a/folderb" in "\n".join(compare([state_of("a"), state_of("b")]))


def test_what_cannot_be_compared_is_said():
    make_run("a", seed=0, **SMALL), make_run("b", seed=1, candidate="both", dataset_id="books", device="H200", **SMALL)
    make_run("a-again", seed=0, **SMALL)
    text = "\n".join(compare([state_of("a"), state_of("b")]))
    assert "no difference can be given" in text
    assert "another dataset: losses" in text and "another device: times" in text
    with pytest.raises(UserError, match="a and a-again have the same flags and the same seed"):
        compare([state_of("a"), state_of("a-again")])


def test_only_what_ended_well_enters_a_difference():
    make_run("a-s0", **SMALL), make_run("b-s0", candidate="both", nan_at=20, **SMALL)
    assert "no difference can be given" in "\n".join(compare([state_of("a-s0"), state_of("b-s0")]))


# --- following -------------------------------------------------------------------------------------------------------

def test_watching_without_a_terminal_is_a_line_every_tenth_until_the_end(capsys):
    log, step = RunLog.create(runs_dir(), "r", {"num_iterations": 40, "flags": {}}, owned=[owned("r")]), 0

    def read():
        nonlocal step
        if step < 40:
            step += 1
            log.event("train", step=step, tokens=step * 8, loss=3 - step / 40, dt_ms=1.0, tok_per_sec=8.0,
                      train_time_sec=float(step))
        else:
            log.finish(status="ok", steps=40)
        return read_state(runs_dir() / "r", locks_dir())

    assert watch(read, interval_sec=0) == 0
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1] for line in lines] == [
        "step 1/40", *(f"step {4 * tenth}/40" for tenth in range(1, 11)), "step 40/40"]
    assert lines[5].split(", ")[2].endswith("left") and lines[-1].startswith("r: finished")
    assert "\x1b" not in "".join(lines)


def test_watching_takes_a_twentieth_of_a_core(monkeypatch):
    make_run("r", finished=False, **SMALL)
    times, waits = iter([0.0, 4.0]), []

    def sleep(seconds):
        waits.append(seconds)
        raise KeyboardInterrupt
    monkeypatch.setattr(following.time, "thread_time", lambda: next(times))
    monkeypatch.setattr(following.time, "sleep", sleep)
    assert script.main(["--watch", "r"]) == 130
    assert waits == [80]


def test_a_run_that_failed_ends_the_watching_with_1(capsys):
    make_run("bad", nan_at=20, **SMALL)
    assert script.main(["--watch", "bad"]) == 1


def test_a_terminal_of_80_columns_shows_the_time_left_of_a_run_with_a_name_as_they_are_made():
    name = "quickstart-20261126-050342-s42"
    metrics = make_run(name, steps=1000, finished=False).folder / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(line | {"time_unix_sec": 1e9 + line["step"]}) + "\n"
                               for line in lines if line["step"] <= 500))
    run = replace(state_of(name), state="running")
    assert frame(run, 80, 24)[0].startswith(f"{name}: running, step 500/1,000, about 8 min left, ")


def test_a_loss_that_is_not_finite_is_said():
    make_run("bad", nan_at=20, **SMALL)
    assert ", loss not finite" in frame(state_of("bad"), 80, 24)[0]


def test_the_frame_fits_the_terminal_and_shows_the_ends():
    make_run("r", steps=300)
    for columns, rows in ((80, 24), (20, 8), (200, 60)):
        lines = frame(state_of("r"), columns, rows)
        assert len(lines) < rows and max(map(len, lines)) < columns
    assert "(300)" in frame(state_of("r"), 120, 30)[-1]


@given(st.lists(st.floats(0.5, 12), min_size=2, max_size=300), st.integers(20, 150), st.integers(2, 20))
def test_a_falling_curve_never_rises(values, columns, rows):
    lines = curve(list(enumerate(sorted(values, reverse=True), start=1)), columns, rows)
    assert len(lines) == rows and max(map(len, lines)) <= columns
    at = {column: row for row, line in enumerate(lines) for column, letter in enumerate(line) if letter == "*"}
    heights = [at[column] for column in sorted(at)]
    assert heights == sorted(heights) and sum(line.count("*") for line in lines) == len(at)


# --- pruning ---------------------------------------------------------------------------------------------------------

def checkpoint(tag, step, run_id, good=True):
    folder = checkpoints_dir() / tag
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"model_{step:06d}.pt").write_bytes(bytes(1000))
    (folder / f"optim_{step:06d}_rank0.pt").write_bytes(bytes(2000))
    write_json(folder / f"meta_{step:06d}.json", {"step": step, "run_id": run_id, "good": good})


def steps_left(tag):
    return sorted(int(path.stem[5:]) for path in (checkpoints_dir() / tag).glob("meta_*.json"))


@pytest.fixture
def cache(base_dir):
    """Five runs with checkpoints: finished with its best in the middle, running, diverged, set aside, unknown."""
    best = make_run("best", **SMALL).folder / "metrics.jsonl"
    lines = [json.loads(line) for line in best.read_text().splitlines()]
    for event in lines:
        if event["kind"] == "val" and event["step"] == 20:
            event["val_bpb"] = 0.5
    best.write_text("".join(json.dumps(event) + "\n" for event in lines))
    make_run("diverged", nan_at=30, **SMALL), make_run("going", finished=False, **SMALL), make_run("old", **SMALL)
    for step in (10, 20, 30, 40):
        for tag in ("best", "going", "old"):
            checkpoint(tag, step, tag)
        checkpoint("diverged", step, "diverged", good=step < 30)
        checkpoint("stranger", step, "who")
    (checkpoints_dir() / "old").rename(checkpoints_dir() / "old.before-20261126-010203")
    torn = base_dir / "tokens" / f".shard.bin.{'0' * 16}.tmp"
    torn.parent.mkdir()
    torn.write_bytes(bytes(500)), os.utime(torn, (1e9, 1e9))
    (torn.parent / f".young.bin.{'1' * 16}.tmp").write_bytes(bytes(5))
    (torn.parent / ".mine.tmp").write_bytes(bytes(5)), os.utime(torn.parent / ".mine.tmp", (1e9, 1e9))
    lock = owned("going")
    yield base_dir
    lock.release()


def test_pruning_keeps_the_newest_and_the_best_and_touches_no_running_run(cache, capsys):
    before = tree(cache)
    script.main(["--prune"])
    assert tree(cache) == before and "best, step 30" in capsys.readouterr().out  # it only says what it would do
    script.main(["--prune", "--yes"])
    assert steps_left("best") == [20, 40] and steps_left("going") == steps_left("stranger") == [10, 20, 30, 40]
    assert steps_left("diverged") == [20] and steps_left("old.before-20261126-010203") == [40]
    assert len(list((checkpoints_dir() / "best").iterdir())) == 6  # their files went with their metas
    assert sorted(path.name[:6] for path in (cache / "tokens").iterdir()) == [".mine.", ".young"]
    script.main(["--prune", "--yes"])
    assert capsys.readouterr().out.endswith("0.0 MiB freed\n")


def test_the_last_checkpoints_go_when_they_are_asked_for_by_name(cache, refusal):
    refusal(script.main, ["--prune", "--yes", "--with-last"])
    script.main(["--prune", "--yes", "--with-last", "old", "going"])
    assert not (checkpoints_dir() / "old.before-20261126-010203").exists()
    assert steps_left("going") == steps_left("best") == [10, 20, 30, 40]


def test_a_folder_that_a_run_takes_meanwhile_is_left_alone(cache, monkeypatch, capsys):
    from nanochat.experiments.runs import prune
    monkeypatch.setattr(prune, "is_owned", lambda lock: False)  # it was free when it was looked at
    lock = owned("new", checkpoints_dir() / "best", "checkpoints.best")
    script.main(["--prune", "--yes", "best"])
    lock.release()
    assert steps_left("best") == [10, 20, 30, 40]
    assert "left alone: best, step 10" in capsys.readouterr().out


@pytest.mark.parametrize("lock", ["checkpoints.best", "run.best"])
def test_what_another_machine_may_be_writing_is_left_alone(cache, capsys, lock):
    entry = {"owner": "best", "host": "elsewhere", "pid": 1}
    write_json(locks_dir() / lock, entry)
    script.main(["--prune", "--yes", "best"])
    assert steps_left("best") == [10, 20, 30, 40] and json.loads((locks_dir() / lock).read_text()) == entry
    said = capsys.readouterr().out
    assert "another machine may be writing it; if none does, delete " in said and lock in said
    (locks_dir() / lock).unlink()
    script.main(["--prune", "--yes", "best"])
    assert steps_left("best") == [20, 40]


def test_a_copied_record_does_not_judge_the_runs_checkpoints(cache):
    shutil.copytree(runs_dir() / "best", runs_dir() / "copy")
    write_json(runs_dir() / "best" / "summary.json", {"status": 3})  # the run's own cannot be read
    script.main(["--prune", "--yes", "--with-last", "*"])
    assert steps_left("best") == [10, 20, 30, 40]


def test_a_checkpoint_without_its_model_is_not_the_newest(cache):
    (checkpoints_dir() / "old.before-20261126-010203" / "model_000040.pt").unlink()
    script.main(["--prune", "--yes", "old"])
    assert steps_left("old.before-20261126-010203") == [30]


def test_a_meta_that_cannot_be_read_is_said_and_left(cache, capsys):
    path = checkpoints_dir() / "best" / "meta_000010.json"
    path.write_text("{")
    script.main(["--prune", "--yes", "best"])
    assert path.exists() and "1 checkpoint(s) whose meta cannot be read" in capsys.readouterr().out


def test_a_record_that_does_not_tell_the_best_keeps_its_checkpoints(cache, capsys):
    metrics = runs_dir() / "best" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_bpb": 0.5', '"val_bpb": "low"'))
    script.main(["--prune", "--yes", "best", "diverged"])
    assert steps_left("best") == [10, 20, 30, 40] and steps_left("diverged") == [20]
    assert "the record of best does not say which is best" in capsys.readouterr().out


def test_leftovers_are_a_day_old_and_of_no_run_in_particular(cache):
    assert LEFTOVER_SEC >= 86400
    script.main(["--prune", "--yes", "best"])
    assert len(list((cache / "tokens").iterdir())) == 3


@pytest.mark.parametrize(("argv", "words"), [
    (["--watch", "no"], "no run 'no'"), (["--compare", "no"], "no run 'no'"), (["--newest", "0"], "at least 1"),
    (["x", "--watch", "y"], "name their runs"), (["--compare", "x", "--newest", "2"], "name their runs"),
    (["--yes"], "go with --prune"), (["--prune", "--with-last"], "name the runs")])
def test_wrong_calls_are_refused(refusal, argv, words):
    assert words in refusal(script.main, argv)
