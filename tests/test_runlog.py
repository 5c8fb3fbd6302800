import math
import os
import re
import resource
from pathlib import Path

import pytest
from full_disk import full_disk
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from nanochat import common as files
from nanochat.common import UserError
from nanochat.runlog import CONFIG, METRICS, SUMMARY, RunLog, check_run_id, find_run, read_run

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = st.text(min_size=1, max_size=8).filter(lambda key: key not in ("kind", "time_unix_sec", "nonfinite", "self"))
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12)
FIELDS = st.dictionaries(KEYS.filter(lambda key: key != "step"), VALUES, max_size=5)
KINDS = ("train", "val", "core", "sample", "checkpoint", "position_losses")


def start(runs_dir, run_id="r", config=None, **options):
    return RunLog.create(runs_dir, run_id, config or {}, **options)


def without_time(events):
    """Events as (kind, fields), the writer's clock left out."""
    return [(event["kind"], {k: v for k, v in event.items() if k not in ("kind", "time_unix_sec")}) for event in events]


def as_recorded(value, path, names):
    """What the record holds of a value; the names of what is not finite are added to `names` in reading order."""
    if isinstance(value, float) and (math.isnan(value) or value in (math.inf, -math.inf)):
        names.append(path)
        return None
    if isinstance(value, dict):
        return {key: as_recorded(item, f"{path}.{key}", names) for key, item in value.items()}
    if isinstance(value, list):
        return [as_recorded(item, f"{path}[{i}]", names) for i, item in enumerate(value)]
    return value


def expected_fields(fields):
    names = []
    recorded = {key: as_recorded(value, key, names) for key, value in fields.items()}
    return {**recorded, "nonfinite": names} if names else recorded


# --- what is written comes back --------------------------------------------------------------------------------------

@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KINDS), FIELDS), max_size=5), FIELDS, FIELDS)
def test_any_run_comes_back_exactly(tmp_path_factory, events, config, summary):
    assume("run_id" not in config and not {"run_id", "status"} & set(summary))
    runs = tmp_path_factory.mktemp("runs")
    log = start(runs, "run-1", config)
    for kind, fields in events:
        log.event(kind, **fields)
    log.finish(status="ok", **summary)
    log.close()
    run = read_run(runs / "run-1")
    assert without_time(run.events) == [(kind, expected_fields(fields)) for kind, fields in events]
    assert run.config == {"run_id": "run-1", **expected_fields(config)}
    assert run.summary == {"run_id": "run-1", "status": "ok", **expected_fields(summary)}
    assert (run.run_id, run.status, run.folder) == ("run-1", "ok", runs / "run-1")
    for path in (runs / "run-1").iterdir():  # strict JSON: readers in other languages know no NaN
        assert not re.search(r"[:\[,] ?-?(NaN|Infinity)\b", re.sub(r'"(\\.|[^"\\])*"', '""', path.read_text()))


def test_numbers_are_not_rounded_and_not_finite_ones_are_null_and_named(tmp_path):
    with_log = start(tmp_path)
    with_log.event("val", step=3, val_bpb=0.1 + 0.2, tasks={"a": math.nan, "b": [1.0, -math.inf]}, mfu=None)
    with_log.close()
    [event] = read_run(tmp_path / "r").events
    assert event["val_bpb"] == 0.1 + 0.2
    assert (event["tasks"], event["mfu"]) == ({"a": None, "b": [1.0, None]}, None)
    assert event["nonfinite"] == ["tasks.a", "tasks.b[1]"]
    assert isinstance(event["time_unix_sec"], float)


def test_flags_with_names_of_files_that_are_not_utf8_come_back(tmp_path):
    folder = os.fsdecode(b"/data/r\xe9sum\xe9")
    start(tmp_path, config={"flags": {"dataset": folder}}).close()
    assert read_run(tmp_path / "r").config["flags"] == {"dataset": folder}


def test_an_event_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    log = start(tmp_path)
    log.event("train", step=1)
    assert [event["step"] for event in read_run(tmp_path / "r").events] == [1]
    log.close()


def test_sinks_get_the_same_events_unchanged(tmp_path):
    seen = []
    log = start(tmp_path, sinks=[lambda kind, fields: seen.append((kind, fields))])
    log.event("train", step=1, loss=math.inf, text="é\u2028")
    log.close()
    assert seen == [("train", {"step": 1, "loss": math.inf, "text": "é\u2028"})]
    log = RunLog.resume(tmp_path, "r", 1, sinks=[lambda kind, fields: seen.append((kind, fields))], world_size=2)
    log.close()
    assert seen[1:] == [("resume", {"step": 1, "world_size": 2})]


def test_an_event_that_json_cannot_hold_leaves_the_record_whole(tmp_path):
    log = start(tmp_path)
    log.event("train", step=1)
    with pytest.raises(TypeError):
        log.event("train", step=2, loss=object())
    log.event("train", step=3)
    log.close()
    assert [event["step"] for event in read_run(tmp_path / "r").events] == [1, 3]


def test_a_checkpoint_that_was_whole_only_later_belongs_to_the_step_it_holds(tmp_path):
    log = start(tmp_path)
    for step in range(1, 9):
        log.event("train", step=step)
    for saved_step in (3, 6, "x"):
        log.event("checkpoint", step=8, saved_step=saved_step)
    log.close()
    RunLog.resume(tmp_path, "r", 4).close()
    assert [event["saved_step"] for event in read_run(tmp_path / "r").of("checkpoint")] == [3]


def test_events_of_one_kind_in_order(tmp_path):
    log = start(tmp_path)
    for step in range(3):
        log.event("train", step=step)
        log.event("val", step=step)
    log.close()
    assert [event["step"] for event in read_run(tmp_path / "r").of("val")] == [0, 1, 2]
    assert read_run(tmp_path / "r").of("core") == []


# --- starting, ending, finding ---------------------------------------------------------------------------------------

def test_taken_id_is_refused_and_its_record_kept(tmp_path):
    log = start(tmp_path, config={"seed": 1})
    log.event("train", step=1)
    log.close()
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    with pytest.raises(UserError, match=r"'r' is taken.*--run-id"):
        start(tmp_path, config={"seed": 2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()} == before


def test_folder_left_by_a_start_that_failed_does_not_take_the_id(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / METRICS).write_text('{"kind": "train", "step": 9}\n')
    start(tmp_path).close()
    assert read_run(tmp_path / "r").events == []


@pytest.mark.parametrize("run_id", ["", ".", "..", ".hidden", "a/b", "/a", "-x", "a b", "a\n", "ü", "a\0", "x" * 129])
def test_ids_that_cannot_name_a_folder_are_refused(tmp_path, run_id):
    for use in (check_run_id, lambda name: start(tmp_path / "runs", name),
                lambda name: RunLog.resume(tmp_path / "runs", name, 1)):
        with pytest.raises(UserError, match="cannot name a folder"):
            use(run_id)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("run_id", ["a", "0", "d12-20261123-101500-s42", "lr=0.02_x+y", "x" * 128])
def test_ids_that_can(run_id):
    assert check_run_id(run_id) == run_id


def test_run_without_a_summary_is_unfinished(tmp_path):
    log = start(tmp_path)
    log.event("train", step=1)
    log.close()
    assert (read_run(tmp_path / "r").status, read_run(tmp_path / "r").summary) == ("unfinished", None)


@pytest.mark.parametrize("status", ["ok", "nan", "interrupted", "error"])
def test_status_is_the_summarys(tmp_path, status):
    log = start(tmp_path)
    log.finish(status=status, min_val_bpb=math.nan)
    log.close()
    run = read_run(tmp_path / "r")
    assert run.status == status
    assert (run.summary["min_val_bpb"], run.summary["nonfinite"]) == (None, ["min_val_bpb"])


def test_summary_that_cannot_be_written_leaves_an_unfinished_run(tmp_path, monkeypatch):
    log = start(tmp_path)
    log.event("train", step=1)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full_disk)
        with pytest.raises(UserError, match=r"No space left on device\); make room"):
            log.finish(status="ok")
    log.close()
    run = read_run(tmp_path / "r")
    assert (run.status, len(run.events)) == ("unfinished", 1)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [CONFIG, METRICS]


def test_event_that_a_full_disk_does_not_take_is_one_line_and_the_run_goes_on_from_the_last_whole_one(tmp_path):
    log = start(tmp_path)
    log.event("train", step=1)
    size = (tmp_path / "r" / METRICS).stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        with pytest.raises(UserError, match=r"File too large\); make room"):
            log.event("train", step=2)
        log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    RunLog.resume(tmp_path, "r", 1).close()
    assert [(e["kind"], e["step"]) for e in read_run(tmp_path / "r").events] == [("train", 1), ("resume", 1)]


def test_run_is_found_by_id_and_by_path(tmp_path, monkeypatch):
    start(tmp_path / "runs", "a").close()
    start(tmp_path / "elsewhere", "b").close()
    monkeypatch.chdir(tmp_path)
    assert find_run("a", tmp_path / "runs").run_id == "a"
    assert find_run("elsewhere/b", tmp_path / "runs").run_id == "b"
    assert find_run(str(tmp_path / "elsewhere" / "b"), "runs").folder == tmp_path / "elsewhere" / "b"
    assert find_run(Path("elsewhere") / "b", "runs").run_id == "b"
    with pytest.raises(UserError, match=r"no run 'b'.*runs"):
        find_run("b", tmp_path / "runs")


@pytest.mark.parametrize(("name", "content", "message"), [
    (CONFIG, None, "config.json \\(No such file or directory\\); this is no run"),
    (CONFIG, "{", "config.json, line 1: not JSON"),
    (CONFIG, "[]", "config.json, line 1: not a JSON object"),
    (CONFIG, "{}", "config.json: no run_id"),
    (CONFIG, '{"run_id": 3}', "config.json: no run_id"),
    (SUMMARY, "", "summary.json, line 1: not JSON"),
    (SUMMARY, "null", "summary.json, line 1: not a JSON object"),
    (SUMMARY, "{}", "summary.json: no status"),
    (SUMMARY, '{"status": null}', "summary.json: no status"),
])
def test_damaged_file_is_named(tmp_path, name, content, message):
    start(tmp_path).close()
    (tmp_path / "r" / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "r" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path / "r")


# --- killed and resumed ----------------------------------------------------------------------------------------------

@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(KINDS), FIELDS), max_size=4), st.integers(0, 300))
def test_line_torn_by_a_kill_is_left_out_and_the_run_goes_on_after_it(tmp_path_factory, events, lost_bytes):
    runs = tmp_path_factory.mktemp("runs")
    log = start(runs)
    sizes = [0]
    for kind, fields in events:
        log.event(kind, **fields)
        sizes.append((runs / "r" / METRICS).stat().st_size)
    log.close()
    cut = max(0, sizes[-1] - lost_bytes)
    os.truncate(runs / "r" / METRICS, cut)
    whole = [(kind, expected_fields(fields)) for (kind, fields), end in zip(events, sizes[1:], strict=True)
             if end <= cut]
    assert without_time(read_run(runs / "r").events) == whole
    log = RunLog.resume(runs, "r", 1)
    log.event("train", step=2)
    log.close()
    assert without_time(read_run(runs / "r").events) == [*whole, ("resume", {"step": 1}), ("train", {"step": 2})]


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[]", b"null", b"3", b'"train"', b"{}", b'{"step": 1}', b'{"kind": 3}', b'{"kind": null, "step": 1}',
    b'{"kind": "train", "step": "1"}', b'{"kind": "train", "step": null}', b'{"kind": "train", "step": 1.5}',
    b'{"kind": "resume"}', b'{"kind": "train"} {"kind": "train"}', b"\0\0\0\0\0\0", b"\xff\xfe{\0", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("line", [1, 2, 3])
def test_damaged_line_is_named_with_its_number(tmp_path, damage, line):
    log = start(tmp_path)
    for step in range(1, 4):
        log.event("train", step=step)
    log.close()
    path = tmp_path / "r" / METRICS
    lines = path.read_bytes().splitlines()
    lines[line - 1] = damage
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {line}: not an event"):
        read_run(tmp_path / "r")


def test_resuming_makes_the_run_unfinished_again(tmp_path):
    log = start(tmp_path)
    log.event("train", step=1)
    log.finish(status="interrupted")
    log.close()
    RunLog.resume(tmp_path, "r", 1).close()
    assert read_run(tmp_path / "r").status == "unfinished"


def test_resuming_a_run_that_left_no_events(tmp_path):
    start(tmp_path).close()
    (tmp_path / "r" / METRICS).unlink()
    assert read_run(tmp_path / "r").events == []
    RunLog.resume(tmp_path, "r", 5).close()
    assert without_time(read_run(tmp_path / "r").events) == [("resume", {"step": 5})]


@pytest.mark.parametrize(("name", "content", "message"), [
    (CONFIG, "{", "config.json, line 1: not JSON"), (CONFIG, "{}", "no run_id"), (METRICS, "{}\n", "not an event"),
    (METRICS, "[" * 100_000 + "\n", "line 1: not an event"), (METRICS, '{"kind": "train", "step": 1e9}\n', "an event"),
    (METRICS, '{"kind": "train", "step": -1}\n', "not an event"),
    (METRICS, '{"kind": "train", "step": 2}\n{"kind": "train", "step": 1}\n', r"line 2: of step 1, after step 2")])
def test_resuming_a_damaged_record_is_refused_and_changes_nothing(tmp_path, name, content, message):
    start(tmp_path).close()
    (tmp_path / "r" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        RunLog.resume(tmp_path, "r", 1)
    assert (tmp_path / "r" / name).read_text() == content


def test_resuming_beyond_the_records_end_is_warned_of(tmp_path, capsys):
    log = start(tmp_path)
    log.event("train", step=3)
    log.close()
    RunLog.resume(tmp_path, "r", 3).close()
    assert "warning" not in capsys.readouterr().err
    RunLog.resume(tmp_path, "r", 4).close()
    assert "ends at step 3, before the checkpoint of step 4" in capsys.readouterr().err


def test_a_checkpoint_is_never_there_without_the_events_before_it(tmp_path, monkeypatch):
    synced = []
    log = start(tmp_path)
    log.event("train", step=1)
    monkeypatch.setattr(files.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    log.before_checkpoint()
    log.close()
    assert synced == [(tmp_path / "r" / METRICS).stat().st_size]


def test_resuming_what_has_no_record_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"'r' has no record.*without --resume-from-step"):
        RunLog.resume(tmp_path, "r", 5)
    assert not (tmp_path / "r").exists()


LIVES = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.integers(0, 9)), max_size=5)


@SETTINGS
@given(lives=LIVES, save_every=st.integers(1, 4), eval_every=st.integers(1, 4))
def test_resuming_supersedes_exactly_what_came_after_the_checkpoint(tmp_path_factory, lives, save_every, eval_every):
    """A trainer that is killed over and over, against a list cut where each checkpoint was made.

    A life: events until the kill, whether the kill falls between a checkpoint and its event, which of the
    checkpoints made so far the next life goes on from.
    """
    runs = tmp_path_factory.mktemp("runs")
    log, horizon = start(runs), 12
    reference, cuts, serial = [], {}, 0  # cuts: checkpoint step -> events of the reference when it was made
    step = 0
    for n_events, kill_after_save, choice in [*lives, (10**6, False, 0)]:
        for kind, at in trainer_events(step, horizon, save_every, eval_every):
            if n_events == 0:
                break
            if kind == "checkpoint" and n_events == 1 and kill_after_save:
                cuts[at] = len(reference)  # it is on disk, its event is not
                break
            n_events -= 1
            serial += 1
            log.event(kind, step=at, serial=serial)
            reference.append((kind, {"step": at, "serial": serial}))
            if kind == "checkpoint":
                cuts[at] = len(reference)
        log.close()
        assert without_time(read_run(runs / "r").events) == reference
        if not cuts or n_events > 10**5:
            break
        step = sorted(cuts)[choice % len(cuts)]
        tail = [event for event in reference[cuts[step]:] if event[0] == "resume" and event[1]["step"] == step]
        reference = [*reference[:cuts[step]], *tail, ("resume", {"step": step})]
        cuts = {at: cut for at, cut in cuts.items() if at <= step}
        log = RunLog.resume(runs, "r", step)


def trainer_events(step, horizon, save_every, eval_every):
    """(kind, step) in the order in which the training loop logs them, going on from `step`."""
    saved = step
    while True:
        if step > saved and (step % save_every == 0 or step == horizon):
            yield "checkpoint", step
        if step % eval_every == 0 or step == horizon:
            yield "val", step
            yield "core", step
            yield "sample", step
        if step == horizon:
            return
        step += 1
        yield "train", step
