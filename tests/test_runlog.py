"""A run's record: everything comes back exactly; kills, resumes, full disks and damaged files."""

import math
import os
import re
from pathlib import Path

import pytest
from full_disk import full_disk
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nanochat import common
from nanochat.common import RunLock, UserError, locks_dir
from nanochat.runlog import (
    CONFIG,
    METRICS,
    SUMMARY,
    RunLog,
    changes,
    figures_of,
    find_run,
    in_words,
    read_run,
)

SETTINGS = settings(max_examples=60, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
RESERVED = ("kind", "time_unix_sec", "self", "step")
KEYS = st.text(min_size=1, max_size=8).filter(lambda key: key not in RESERVED)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12)
FIELDS = st.dictionaries(KEYS, VALUES, max_size=5)
KINDS = ("train", "val", "core", "sample", "checkpoint")


def start(runs_dir, run_id="r", **options):
    return RunLog.create(runs_dir, run_id, {}, **options)


def record_of_one_step(runs_dir):
    log = start(runs_dir)
    log.event("train", step=1)
    log.close()
    return runs_dir / "r"


def without_time(events):
    """Return events as (kind, fields) without the writer's clock."""
    left_out = ("kind", "time_unix_sec")
    return [(event["kind"], {k: v for k, v in event.items() if k not in left_out})
            for event in events]


def recorded(value):
    """Return a value as a record has it: None in the place of non-finite numbers."""
    if isinstance(value, dict):
        return {key: recorded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [recorded(item) for item in value]
    return None if value in (math.inf, -math.inf) or value != value else value


# --- writing and reading -------------------------------------------------------------------------

@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KINDS), FIELDS), max_size=5), FIELDS, FIELDS)
def test_any_run_comes_back_exactly(tmp_path_factory, events, config, summary):
    assume("run_id" not in config and not {"run_id", "status"} & set(summary))
    runs = tmp_path_factory.mktemp("runs")
    config["dataset"] = os.fsdecode(b"/data/r\xe9sum\xe9")  # a file name that is not UTF-8
    log = RunLog.create(runs, "run-1", config)
    for number, (kind, fields) in enumerate(events, start=1):
        log.event(kind, **fields)
        assert len(read_run(runs / "run-1").events) == number  # in the file at once
    log.finish(status="ok", **summary)
    log.close()
    run = find_run("run-1", runs)
    assert without_time(run.events) == [(kind, recorded(f)) for kind, f in events]
    assert run.config == {"run_id": "run-1", **recorded(config)}
    assert run.summary == {"run_id": "run-1", "status": "ok", **recorded(summary)}
    assert (run.run_id, run.status, run.folder) == ("run-1", "ok", runs / "run-1")
    for path in (runs / "run-1").iterdir():  # strict JSON: readers in other languages know no NaN
        text = re.sub(r'"(\\.|[^"\\])*"', '""', path.read_text())
        assert not re.search(r"NaN|Infinity", text)


def test_a_sink_receives_the_events_until_it_fails(tmp_path, capsys):
    seen = []

    def sink(kind, fields):
        seen.append((kind, fields))
        if len(seen) == 2:
            raise OSError("the terminal is gone")

    log = start(tmp_path, sinks=[sink])
    for step in range(3):
        log.event("train", step=step, loss=math.inf)
    log.close()
    assert seen == [("train", {"step": step, "loss": math.inf}) for step in range(2)]
    assert len(read_run(tmp_path / "r").events) == 3
    assert "warning: function failed (the terminal is gone)" in capsys.readouterr().err


def test_a_run_is_found_by_its_id_its_path_and_its_tag(tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    record_of_one_step(runs)
    newest = "d4-20260202-101010-s42"
    for run_id in ("d4-20260101-101010-s42", newest, "d4-x-20270101-101010-s42"):
        start(runs, run_id).close()
    monkeypatch.chdir(tmp_path)
    for name in ("r", "runs/r", str(runs / "r"), Path("runs") / "r"):
        assert find_run(name, runs).run_id == "r"
    assert find_run("d4", runs).run_id == newest
    with pytest.raises(UserError, match=r"no run 'b' in .*; there are d4-.*newest first"):
        find_run("b", runs)


def test_a_taken_id_is_refused_and_its_record_kept(base_dir):
    runs = base_dir / "runs"
    folder = record_of_one_step(runs)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lock = RunLock(folder, locks_dir() / "run.r", "r", "wait")
    with pytest.raises(UserError, match=rf"run r \(pid {os.getpid()} on .*\) is running"):
        start(runs)
    lock.release()
    (locks_dir() / "run.r").unlink()
    with pytest.raises(UserError, match=r"'r' is taken.*--run-id"):
        start(runs)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / CONFIG).unlink()  # a start that failed does not take the id
    start(runs).close()
    assert read_run(folder).events == []


@pytest.mark.parametrize(("name", "content", "message"), [
    (CONFIG, "{", "config.json: not JSON"), (CONFIG, "[]", "config.json: not a JSON object"),
    (CONFIG, "{}", "needs a run_id"), (SUMMARY, "", "summary.json: not JSON"),
    (SUMMARY, '{"steps": 1}', "summary.json a status"), (METRICS, "{}\n", "line 1: not an event"),
    (METRICS, '{"kind": "val"}\n[\n', "metrics.jsonl, line 2: not an event"),
    (METRICS, "[" * 100_000 + "\n", "line 1: not an event"),
    (METRICS, '{"kind": "resume"}\n', "line 1: not an event"),
    (METRICS, '{"kind": "train", "step": "1"}\n', "line 1: not an event")])
def test_a_damaged_file_is_named_and_not_changed_by_a_resume(tmp_path, name, content, message):
    path = record_of_one_step(tmp_path) / name
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        _ = read_run(tmp_path / "r").events
    with pytest.raises(UserError):
        RunLog.resume(tmp_path, "r", 1)
    assert path.read_text() == content


# --- metrics and changes -------------------------------------------------------------------------

def test_metrics_leave_out_untimed_steps_and_name_missing_numbers():
    events = [{"kind": "train", "step": step, "tokens": 8 * step, "train_time_sec": 0.5 * step,
               "tok_per_sec": 100.0 * step, "dt_ms": 10.0} for step in range(1, 14)]
    clock = {"tokens": 8, "train_time_sec": 1.0}
    events += [{"kind": "val", "step": step, "val_bpb": bits, "val_bpb_se": 0.01, **clock}
               for step, bits in ((4, 1.5), (8, 1.2), (13, 1.3))]
    metrics = figures_of(events, "val_bpb", 1.25)
    expected = {"steps": 13, "tokens": 104, "min_val_bpb": 1.2, "final_val_bpb": 1.3,
                "final_val_bpb_se": 0.01, "core_metric": None, "tok_per_sec_median": 1250.0,
                "dt_median_ms": 10.0, "train_time_sec": 6.5, "time_to_target_sec_measured": 1.0}
    assert {name: metrics[name] for name in expected} == expected
    del events[0]["tokens"]
    with pytest.raises(UserError, match=r"train event of step 1 has no number tokens"):
        figures_of(events)


def test_changes_are_those_that_change_numbers():
    before = {"flags": {"seed": 1, "run": "a"}, "versions": {"torch": "2.11"}, "git_commit": "x",
              "device": {"name": "CPU", "compute_dtype": "float32", "world_size": 1}}
    now = {"flags": {"seed": 2, "run": "b"}, "versions": {"torch": "2.12"}, "git_commit": "y",
           "device": {"name": "GPU", "world_size": 8}}
    changed = in_words(changes(before, now, ["seed", "new_flag"]))
    assert changed == "device name was CPU, is GPU; torch was 2.11, is 2.12; --seed was 1, is 2"


# --- kills and full disks ------------------------------------------------------------------------

@SETTINGS
@given(lives=st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 9)), max_size=5),
       save_every=st.integers(1, 4), eval_every=st.integers(1, 4))
def test_a_resume_supersedes_exactly_the_events_after_its_checkpoint(
        tmp_path_factory, lives, save_every, eval_every):
    """Kill a trainer in the middle of a line, repeatedly; the reference is a list of events.

    A life: events until the kill, whether the kill comes between a checkpoint and its event, and
    the checkpoint that the next life resumes from.
    """
    runs = tmp_path_factory.mktemp("runs")
    log = start(runs)
    reference, cuts, step = [], {}, 0  # cuts: {step of a checkpoint: events before it}
    for n_events, kill_after_save, choice in [*lives, (10**6, False, 0)]:
        for kind, at in trainer_events(step, save_every, eval_every):
            if n_events == 0:
                break
            if kind == "checkpoint" and n_events == 1 and kill_after_save:
                cuts[at] = len(reference)
                break
            n_events -= 1
            log.event(kind, step=at, serial=n_events)
            reference.append((kind, {"step": at, "serial": n_events}))
            if kind == "checkpoint":
                cuts[at] = len(reference)
        log.finish(status="interrupted")
        log.close()
        with open(runs / "r" / METRICS, "ab") as file:
            file.write(b'{"kind": "train", "st')
        run = read_run(runs / "r")
        assert run.status == "interrupted" and without_time(run.events) == reference
        if not cuts or n_events > 10**5:
            break
        step = sorted(cuts)[choice % len(cuts)]
        resumes = [event for event in reference[cuts[step]:]
                   if event[0] == "resume" and event[1]["step"] == step]
        reference = [*reference[:cuts[step]], *resumes, ("resume", {"step": step})]
        cuts = {at: cut for at, cut in cuts.items() if at <= step}
        log = RunLog.resume(runs, "r", step)
        assert read_run(runs / "r").status == "unfinished"


def trainer_events(first, save_every, eval_every, horizon=12):
    """Yield (kind, step) in the order of the training loop, from step `first` on."""
    for step in range(first, horizon + 1):
        if step > first:
            yield "train", step
            if step % save_every == 0 or step == horizon:
                yield "checkpoint", step
        if step % eval_every == 0 or step == horizon:
            yield "val", step
            yield "core", step


def test_events_are_on_the_disk_before_a_checkpoint_and_a_failed_summary_leaves_none(
        tmp_path, monkeypatch):
    synced = []
    log = start(tmp_path)
    log.event("train", step=1)
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
        log.before_checkpoint()
        patch.setattr(common.os, "replace", full_disk)
        with pytest.raises(UserError, match="No space left on device"):
            log.finish(status="ok")
    log.close()
    assert synced[0] == (tmp_path / "r" / METRICS).stat().st_size
    assert read_run(tmp_path / "r").status == "unfinished"
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [CONFIG, METRICS]
