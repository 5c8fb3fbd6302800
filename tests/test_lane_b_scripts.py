import contextlib
import json
import math
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.lane_b.infer.curve_law import FORMS, Progress
from nanochat.lane_b.infer.inference_file import read_inference
from nanochat.lane_b.infer.inputs import read_statistics
from nanochat.lane_b.infer.record import read_records
from nanochat.runlog import RunLog
from nanochat.schedule import lr_multipliers
from scripts import lane_b_infer_ratio, lane_b_log_run

WORKSHEET = (Path(__file__).parents[1] / "ideas" / "lane_b_inference_worksheet.md").read_text()
PARAMS = 1_000_000
STEP_TOKENS = 20_000
STEP_SEC = 0.2
RECIPE = {"warmup_steps": 40, "warmdown_ratio": 0.65, "final_lr_frac": 0.05, "matrix_lr": 0.02}


@cache
def curve(steps):
    """(evaluated steps, bits per byte) of a whole schedule by a law whose learning rates are too low."""
    at = np.unique([*range(20, steps + 1, 20), steps])
    return at, FORMS["relaxing"].loss(Progress(lr_multipliers(steps), at), 1.5, 0.6, 0.4, 0.1, 30.0)


def end_of(steps):
    return float(curve(steps)[1][-1])


def statistics_document(**changes):
    """A stats.json of schema version 1, as far as the inference reads it: gamma a bracket."""
    document = {
        "schema_version": 1, "dataset_id": "books", "tokenizer_id": "bpe", "vocab_size": 8192,
        "beta": {"value": 0.9, "se": 0.05, "lo": 0.8, "hi": 1.0, "max_data_tokens": 4e5},
        "gamma": {"value": None, "se": None, "lo": 0.12, "hi": 0.34, "refusal": "gamma not reported: H_2 still falls"},
        "warnings": ["counted on little text"]}
    return document | changes


@pytest.fixture
def stats_json(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(statistics_document()))
    return path


@pytest.fixture
def make_run(base_dir):
    """Writes the record of a run of so many steps; `excess`: bits per byte above the law's curve."""

    def make(run_id, steps, excess=0.0, config=(), summary=(), seed=0, flags=(), stopped_at=None):
        at, loss = curve(steps)
        loss = loss * np.exp(0.0005 * np.random.default_rng([steps, seed]).standard_normal()) + excess
        log = RunLog.create(base_dir / "runs", run_id, {
            "created_utc": "2026-11-23T10:00:00+00:00", "git_commit": "abc1234", "dataset_id": "books",
            "tokenizer_id": "bpe", "model_config": {"n_layer": 4, "sequence_len": 256}, "n_scaling_params": PARAMS,
            "total_batch_size_tokens": STEP_TOKENS, "num_iterations": steps, "target_tokens": steps * STEP_TOKENS,
            "seed": seed, "flags": RECIPE | dict(flags), "train_tokens": 10**9, **dict(config)})
        for step, value in zip(at.tolist(), loss.tolist(), strict=True):
            log.event("val", step=step, tokens=step * STEP_TOKENS, val_bpb=value, train_time_sec=step * STEP_SEC)
        done = stopped_at or steps
        log.finish(**{"status": "ok", "steps": done, "tokens": done * STEP_TOKENS, "min_val_bpb": float(min(loss)),
                      "final_val_bpb": float(loss[-1]), "train_time_sec": steps * STEP_SEC, "epochs": 0.5,
                      "tok_per_sec_median": 1e5, "dt_median_ms": 1e3 * STEP_SEC, **dict(summary)})
        log.close()
        return run_id

    return make


@pytest.fixture
def calibration(make_run):
    return [make_run(f"cal-{steps}-s{seed}", steps, seed=seed) for steps in (480, 640) for seed in (0, 1)]


@pytest.fixture
def baseline(make_run):
    return [make_run(f"base-s{seed}", 800, seed=seed) for seed in (0, 1)]


def infer(tmp_path, *flags):
    output = tmp_path / "infer.json"
    lane_b_infer_ratio.main(["--output-json", str(output), "--resamples", "40", *map(str, flags)])
    return json.loads(output.read_text())


def refused(tmp_path, capsys, *flags):
    """(exit code, the one line on stderr) of an inference that must leave nothing behind."""
    with pytest.raises(SystemExit) as stopped:
        infer(tmp_path, *flags)
    assert not (tmp_path / "infer.json").exists()
    return stopped.value.code, capsys.readouterr().err.strip()


# --- scripts.lane_b_infer_ratio --------------------------------------------------------------------------------------

def test_runs_to_inference_to_figure(tmp_path, stats_json, calibration, baseline, capsys):
    pytest.importorskip("matplotlib")
    found = infer(tmp_path, "--stats-json", stats_json, "--calibration-run", *calibration, "--baseline-run", *baseline,
                  "--plot", tmp_path / "infer.png")
    assert (found["state"], found["decision"], found["alpha_source"]) == ("ok", "inferred", "curves")
    assert found["target_metric_threshold"] == pytest.approx(end_of(800), rel=1e-3)
    whole, quickest = found["shortest_whole_steps"], found["predicted"]["quickest"]
    assert whole["lo"] <= 800 <= whole["hi"] and whole["value"] == pytest.approx(800, rel=0.03)
    assert found["chosen_ratio"] == quickest["steps"] * STEP_TOKENS / PARAMS == found["target_tokens"]["value"] / PARAMS
    assert quickest["time_sec"]["value"] == pytest.approx((quickest["time_steps"]["value"] - 11) * STEP_SEC)
    assert quickest["time_steps"]["lo"] <= quickest["time_steps"]["value"] <= quickest["time_steps"]["hi"] < 800
    assert found["confirmation_ratio"] == pytest.approx(1.05 * found["chosen_ratio"])
    assert found["predicted"]["default"]["steps"] == 600 and found["predicted"]["default"]["reaches"] == 0
    assert found["calibration"]["tokens"] == 2 * (480 + 640) * STEP_TOKENS
    assert found["alpha_theory"]["lo"] == pytest.approx(0.12 / 2) and found["alpha"]["lo"] > 0.2
    assert found["slopes"]["says"] == "longer" and "counted on little text" in found["warnings"]
    assert (tmp_path / "infer.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "the statistics say 0.06 to 0.2125, which enters nothing" in printed
    assert "state ok, decision inferred" in printed


def test_statistics_decide_nothing_and_may_be_left_out(tmp_path, stats_json, calibration):
    flags = ("--calibration-run", *calibration, "--target-metric-threshold", end_of(800))
    with_them, without = infer(tmp_path, *flags, "--stats-json", stats_json), infer(tmp_path, *flags)
    assert without["alpha_theory"] is None
    for name in ("chosen_ratio", "alpha", "predicted"):
        assert with_them[name] == without[name]


def test_the_schedule_is_that_of_the_runs_flags(tmp_path, make_run):
    """By its recorded flags nothing was annealed: another reading of the same curves."""
    threshold = ("--target-metric-threshold", end_of(700))
    alphas = []
    for ratio in (0.65, 0.0):
        runs = [make_run(f"w{ratio}-{steps}-s{seed}", steps, seed=seed, flags={"warmdown_ratio": ratio})
                for steps in (480, 640) for seed in (0, 1)]
        found = infer(tmp_path, "--calibration-run", *runs, *threshold, "--fallback")
        alphas.append(found["alpha"] and found["alpha"]["value"])
    assert alphas[0] == pytest.approx(0.4, abs=0.05) and alphas[1] != alphas[0]


def test_repeated_text_is_said_of_calibration_and_plan(tmp_path, make_run):
    runs = [make_run(f"cal-{steps}-s{seed}", steps, seed=seed, summary={"epochs": steps / 500},
                     config={"train_tokens": 500 * STEP_TOKENS}) for steps in (480, 640) for seed in (0, 1)]
    warnings = infer(tmp_path, "--calibration-run", *runs, "--target-metric-threshold", end_of(800))["warnings"]
    assert [warning.split(":")[0] for warning in warnings if "text" in warning][:2] == [
        f"run cal-640-s{seed} read its text 1.28 times" for seed in (0, 1)]
    assert any("longer than the text of 1e+07" in warning for warning in warnings)


def test_fallback_to_the_default_ratio_is_asked_for_and_recorded(tmp_path, calibration, capsys):
    flags = ("--calibration-run", *calibration, "--fallback", "--default-ratio", "10", "--target-metric-threshold")
    beyond, never = infer(tmp_path, *flags, end_of(1200)), infer(tmp_path, *flags, 1.0)
    for found, state, more in ((beyond, "too_short", 853), (never, "refused", None)):
        assert (found["decision"], found["alpha_source"], found["chosen_ratio"]) == ("fallback", "default", 10)
        assert (found["state"], found["target_tokens"], found["next_num_iterations"]) == (state, None, more)
    assert "falling back to the default ratio: likely_unreachable" in capsys.readouterr().out


@pytest.mark.parametrize("flags, code, fault", [
    (["--target-metric-threshold", end_of(1200)], 3, "extend the calibration: --num-iterations 853"),
    (["--target-metric-threshold", "1.0"], 3, "likely_unreachable"),
    (["--target-metric-threshold", "nan"], 2, "is not a number"),
    (["--target-metric-threshold", "-1"], 2, "bits per byte are above 0"),
    (["--target-metric-threshold", "2.2", "--calibration", "1000000:1.2"], 2, "unrecognized arguments: --calibration"),
    (["--target-metric-threshold", "2.2", "--resamples", "0"], 2, "--resamples must be at least 40"),
    (["--target-metric-threshold", "2.2", "--default-ratio", "nan"], 2, "must be positive and finite"),
    (["--target-metric-threshold", "2.2", "--default-ratio", "inf"], 2, "must be positive and finite"),
    (["--target-metric-threshold", "2.2", "--seed", "-1"], 2, "--seed must be at least 0"),
])
def test_targets_and_flags_without_an_answer_are_refused(tmp_path, calibration, capsys, flags, code, fault):
    found, line = refused(tmp_path, capsys, "--calibration-run", *calibration, *flags)
    assert (found, fault in line) == (code, True), line


@pytest.mark.parametrize("change, code, fault", [
    ({"config": {"dataset_id": "web"}}, 3, "different datasets"),
    ({"config": {"tokenizer_id": "other"}}, 3, "different tokenizers"),
    ({"config": {"n_scaling_params": 7}}, 3, "different models"),
    ({"config": {"total_batch_size_tokens": 7}}, 3, "different batch sizes"),
    ({"flags": {"warmup_steps": 10}}, 3, "different warmup_steps"),
    ({"flags": {"matrix_lr": 0.04}}, 3, "different matrix_lr"),
    ({"summary": {"status": "nan"}}, 3, "did not end well (status nan)"),
    ({"stopped_at": 100}, 3, "ended after 100 of 853 steps"),
    ({"config": {"model_config": "d4"}}, 2, "model_config is 'd4'"),
    ({"config": {"flags": {}}}, 2, "flags.warmup_steps is None"),
    ({"config": {"flags": 7}}, 2, "flags is 7"),
    ({"summary": {"dt_median_ms": "quick"}}, 2, "dt_median_ms is"),
    ({"excess": math.nan}, 3, "has a val_bpb of None at step 20"),
    ({"excess": -9.0}, 3, "has a val_bpb of -"),
])
def test_runs_that_are_no_calibration_are_refused(tmp_path, make_run, calibration, capsys, change, code, fault):
    odd = make_run("odd", 853, **change)
    found, line = refused(tmp_path, capsys, "--calibration-run", *calibration, odd, "--target-metric-threshold", "2.2")
    assert (found, fault in line, line.count("\n")) == (code, True, 0), line


def test_a_run_that_was_not_evaluated_at_its_end_is_refused(tmp_path, make_run, calibration, base_dir, capsys):
    odd = make_run("odd", 853)
    log = base_dir / "runs" / odd / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    found, line = refused(tmp_path, capsys, "--calibration-run", *calibration, odd, "--target-metric-threshold", "2.2")
    assert (found, "not evaluated at the end of its schedule (step 853)" in line) == (3, True), line


@pytest.mark.parametrize("change, code, fault", [
    ({"config": {"dataset_id": "web"}}, 3, "has dataset web, the calibration books"),
    ({"config": {"n_scaling_params": 7}}, 3, "has scaling parameters 7, the calibration 1000000"),
    ({"config": {"total_batch_size_tokens": 7}}, 3, "has tokens a step 7, the calibration 20000"),
    ({"summary": {"min_val_bpb": None}}, 3, "has no validation"),
    ({"summary": {"min_val_bpb": "low"}}, 2, "min_val_bpb is 'low'"),
])
def test_a_baseline_of_another_recipe_is_refused(tmp_path, make_run, calibration, capsys, change, code, fault):
    odd = make_run("odd", 800, **change)
    found, line = refused(tmp_path, capsys, "--calibration-run", *calibration, "--baseline-run", odd)
    assert (found, fault in line) == (code, True), line


def test_one_run_given_twice_is_refused(tmp_path, calibration, baseline, base_dir, capsys):
    again = str(base_dir / "runs" / "base-s1")
    for calibrated, ends, name in (([*calibration, "cal-480-s1"], baseline, "cal-480-s1"),
                                   (calibration, [*baseline, again], "base-s1")):
        code, line = refused(tmp_path, capsys, "--calibration-run", *calibrated, "--baseline-run", *ends)
        assert (code, f"{name} is given 2 times" in line) == (3, True), line


def test_statistics_of_other_text_are_refused(tmp_path, stats_json, calibration, capsys):
    stats_json.write_text(json.dumps(statistics_document(dataset_id="web")))
    code, line = refused(tmp_path, capsys, "--stats-json", stats_json, "--calibration-run", *calibration,
                         "--target-metric-threshold", "2.2")
    assert (code, "have dataset_id books, the statistics are of web" in line) == (3, True), line


def test_an_output_that_cannot_be_written_or_drawn_is_named_before_the_work(tmp_path, calibration, monkeypatch, capsys):
    flags = ("--calibration-run", *calibration, "--target-metric-threshold", "2.2")
    code, line = refused(tmp_path, capsys, *flags, "--output-json", tmp_path)
    assert (code, "--out " in line) == (2, True), line
    code, line = refused(tmp_path, capsys, *flags, "--plot", "figure.odd")
    assert code == 2 and ("known file type" in line or "matplotlib" in line), line
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, line = refused(tmp_path, capsys, *flags, "--plot", tmp_path / "infer.png")
    assert (code, "pip install 'nanochat[report]'" in line) == (2, True), line


@pytest.mark.parametrize("text, fault", [
    ("{\n \"schema_version\": 1,\n", "stats.json: not JSON"),
    ("[]", "not a JSON object"),
    (json.dumps(statistics_document(schema_version=2)), "schema_version 2"),
    (json.dumps({**statistics_document(), "beta": {}}), "no field beta.value"),
    (json.dumps(statistics_document(dataset_id=7)), "dataset_id is 7"),
    (json.dumps(statistics_document(warnings="many")), "warnings is 'many'"),
])
def test_malformed_statistics_are_named_by_file_and_place(tmp_path, stats_json, calibration, capsys, text, fault):
    stats_json.write_text(text)
    code, line = refused(tmp_path, capsys, "--stats-json", stats_json, "--calibration-run", *calibration,
                         "--target-metric-threshold", "2.2")
    assert (code, fault in line, "make the file again" in line) == (2, True, True), line


def test_the_worksheet_s_example_is_what_the_tool_prints(tmp_path, stats_json, calibration, monkeypatch, capsys):
    """Word by word; figures within 2 %, as another release of the optimizer may find them."""
    command, expected = (re.search(rf"```{kind}\n(.*?)```", WORKSHEET, re.DOTALL)[1] for kind in ("sh", "text"))
    monkeypatch.chdir(tmp_path)
    lane_b_infer_ratio.main(shlex.split(command.replace("\\\n", " "))[3:])
    number = re.compile(r"\d[\d.]*(?:e[+-]\d+)?")
    printed = capsys.readouterr().out
    assert number.sub("N", " ".join(printed.split())) == number.sub("N", " ".join(expected.split()))
    found, wanted = ([float(text.rstrip(".")) for text in number.findall(page)] for page in (printed, expected))
    assert found == pytest.approx(wanted, rel=0.02)


def test_the_worksheet_s_arithmetic_is_right():
    """The figures in bold, worked out by the steps of the page."""
    first, second = (2.3814 + 2.3815) / 2, (2.2702 + 2.2676) / 2
    slope = (first - second) / math.log(640 / 480)
    for figure in (f"{first:.5f}", f"{second:.5f}", f"= **{slope:.3f}** bits",
                   f"**{640 * math.exp((second - 2.18) / slope):.0f}** steps", f"**{1.5 * 640:.0f}** steps",
                   f"**{12 * PARAMS / STEP_TOKENS:.0f}** steps", f"**{939 * STEP_TOKENS / PARAMS:.2f}**;",
                   f"**{1.05 * 18.78:.2f}**.", f"= **{(758.5 - 11) * STEP_SEC:.1f}**",
                   f"**{2 * (480 + 640) / 939:.2f}** chosen"):
        assert figure in WORKSHEET, figure


# --- scripts.lane_b_log_run ------------------------------------------------------------------------------------------

_made = {}


@pytest.fixture
def inferred(tmp_path, calibration, baseline, capsys):
    """The infer.json of calibration and baseline, made once."""
    if not _made:
        _made.update(infer(tmp_path, "--calibration-run", *calibration, "--baseline-run", *baseline))
    (tmp_path / "infer.json").write_text(json.dumps(_made))
    capsys.readouterr()
    return dict(_made)


def steps_of(ratio):
    return round(ratio * PARAMS / STEP_TOKENS)


def log(tmp_path, *flags):
    ledger = tmp_path / "lane_b.csv"
    lane_b_log_run.main(["--inference-json", str(tmp_path / "infer.json"), "--csv", str(ledger), *flags])
    return read_records(ledger)


def test_a_run_and_its_inference_become_a_row(tmp_path, inferred, make_run):
    steps = steps_of(inferred["chosen_ratio"])
    run = make_run("inferred-s1", steps, seed=1)
    (row,) = log(tmp_path, "--run", run)
    assert (row.run_id, row.seed, row.git_commit) == (run, 1, "abc1234")
    assert (row.lane_b_decision, row.status) == ("inferred", "ok")
    assert row.chosen_ratio == row.inferred_target_param_data_ratio == inferred["chosen_ratio"]
    assert row.inferred_target_tokens == math.ceil(inferred["target_tokens"]["value"])
    assert row.inferred_data_scaling_exponent == inferred["alpha"]["value"]
    predicted = inferred["predicted"]["quickest"]["time_steps"]
    assert predicted["lo"] * STEP_SEC < row.time_to_target_sec_measured < predicted["hi"] * STEP_SEC + 20 * STEP_SEC
    assert row.notes == "alpha_source=curves; state=ok"


def test_every_column_can_be_given_by_hand(tmp_path, inferred, make_run):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]))
    by_hand = {"timestamp-utc": "t", "git-commit": "c", "run-id": "renamed", "seed": "7", "dataset-id": "d",
               "target-metric-name": "m", "target-metric-threshold": "0.5", "n-scaling-params": "5",
               "inferred-data-scaling-exponent": "0.25", "inferred-target-tokens": "9",
               "inferred-target-param-data-ratio": "1.5", "confirmation-ratio": "1.575",
               "chosen-ratio": str(inferred["chosen_ratio"]), "time-to-target-sec-measured": "",
               "time-to-target-sec-extrapolated": "12.5", "min-val-bpb": "0.9", "tok-per-sec-median": "1",
               "dt-median-ms": "2", "status": "checked", "notes": "alpha_source=theory, by hand"}
    (row,) = log(tmp_path, "--run", run, "--decision", "inferred",
                 *(part for name, value in by_hand.items() for part in (f"--{name}", value)))
    for name, value in by_hand.items():
        stored = getattr(row, name.replace("-", "_"))
        assert stored == (type(stored)(value) if stored is not None else None)
    assert row.time_to_target_sec_measured is None


def test_notes_by_hand_keep_the_source_of_alpha(tmp_path, inferred, make_run):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]))
    (row,) = log(tmp_path, "--run", run, "--notes", "the fan was loud")
    assert row.notes == "alpha_source=curves; state=ok; the fan was loud"


def test_logging_again_skips_what_is_there_only_when_asked(tmp_path, inferred, make_run, refusal):
    runs = [make_run(f"inferred-s{seed}", steps_of(inferred["chosen_ratio"]), seed=seed) for seed in (0, 1)]
    assert len(log(tmp_path, "--run", runs[0])) == 1
    assert [row.run_id for row in log(tmp_path, "--skip-logged", "--run", *runs)] == runs
    assert "line 2: run_id 'inferred-s0' is already there" in refusal(log, tmp_path, "--run", runs[0])


@pytest.mark.parametrize("flags, change, fault", [
    (["--decision", "confirmation"], {}, "the confirmation ratio is"),
    ([], {"config": {"dataset_id": "web"}}, "has dataset_id web, the inference books"),
    ([], {"config": {"n_scaling_params": 7}}, "has n_scaling_params 7"),
    (["--seed", "one"], {}, "seed is 'one', not a whole number"),
])
def test_a_row_that_would_not_be_true_is_refused(tmp_path, inferred, make_run, refusal, flags, change, fault):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]), **change)
    assert fault in refusal(log, tmp_path, "--run", run, *flags)
    assert not (tmp_path / "lane_b.csv").exists()


@pytest.mark.parametrize("name, value, fault", [
    ("decision", "guessed", "decision is 'guessed'"), ("target_metric_name", "loss", "target_metric_name is 'loss'"),
    ("schema_version", 1, "schema_version 1 (this program reads 2); make the file again with")])
def test_an_inference_that_names_what_nobody_knows_is_an_error(tmp_path, inferred, make_run, refusal, name, value,
                                                                fault):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]))
    (tmp_path / "infer.json").write_text(json.dumps(inferred | {name: value}))
    assert f"infer.json: {fault}" in refusal(log, tmp_path, "--run", run)


@pytest.mark.parametrize("summary, code, fault", [
    ({"final_val_bpb": None, "min_val_bpb": None}, 3, "was not evaluated at its end"),
    ({"final_val_bpb": "low"}, 2, "final_val_bpb is 'low'"),
    ({"dt_median_ms": "quick"}, 2, "dt_median_ms is 'quick'"),
])
def test_a_record_without_a_metric_is_one_line(tmp_path, inferred, make_run, refusal, summary, code, fault):
    run = make_run("odd", steps_of(inferred["chosen_ratio"]), excess=0.5, summary=summary)
    assert fault in refusal(log, tmp_path, "--run", run, exit_code=code)
    assert not (tmp_path / "lane_b.csv").exists()


def test_a_schedule_that_ended_short_is_extrapolated_by_the_slope_of_the_ends(tmp_path, inferred, make_run):
    """An end that is 0.1 of the slope per ln above the threshold: a schedule that is e^0.1 times longer."""
    steps = steps_of(inferred["chosen_ratio"])
    envelope, threshold = inferred["slopes"]["envelope"], inferred["target_metric_threshold"]
    missed = threshold + 0.1 * envelope
    run = make_run("short", steps, excess=0.5, summary={"final_val_bpb": missed})
    far = make_run("far", steps, excess=0.9, summary={"final_val_bpb": threshold + 1.1 * envelope})
    row, too_far = log(tmp_path, "--run", run, far)
    assert row.time_to_target_sec_measured is too_far.time_to_target_sec_extrapolated is None
    assert row.time_to_target_sec_extrapolated == pytest.approx(steps * STEP_SEC * math.exp(0.1))


def test_a_run_that_diverged_has_no_time(tmp_path, inferred, make_run):
    run = make_run("nan", steps_of(inferred["chosen_ratio"]), summary={"status": "nan", "final_val_bpb": None})
    (row,) = log(tmp_path, "--run", run)
    assert (row.status, row.time_to_target_sec_extrapolated) == ("nan", None)


# Files that a person or a crash has changed

json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(
    st.none() | st.integers() | st.dictionaries(st.text(max_size=3), st.integers(), max_size=1), max_size=2)


def paths(value, prefix=()):
    """Every place in a JSON value, as a tuple of keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*prefix, key)
        yield from paths(part, (*prefix, key))


def changed(document, path, value):
    document = json.loads(json.dumps(document))
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return document


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=json_values)
def test_changed_statistics_are_read_or_one_line(tmp_path, data, value):
    path = tmp_path / "stats.json"
    document = statistics_document(gamma={"value": 0.3, "se": 0.01, "lo": 0.28, "hi": 0.32, "refusal": None})
    path.write_text(json.dumps(changed(document, data.draw(st.sampled_from(list(paths(document)))), value)))
    with contextlib.suppress(UserError):
        json.dumps(read_statistics(path).alpha.hi, allow_nan=False)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=json_values)
def test_a_changed_inference_is_read_or_one_line(tmp_path, inferred, data, value):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed(inferred, data.draw(st.sampled_from(list(paths(inferred)))), value)))
    with contextlib.suppress(UserError):
        read_inference(path).ratio_of("inferred")
        read_inference(path).horizon_factor(1.0)
