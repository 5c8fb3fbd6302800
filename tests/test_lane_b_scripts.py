import contextlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.errors import UserError
from nanochat.lane_b.infer.calibration import BitsPerByte
from nanochat.lane_b.infer.horizon import infer_horizon
from nanochat.lane_b.infer.inference_file import inference_document, read_inference
from nanochat.lane_b.infer.inputs import parse_point, read_statistics
from nanochat.lane_b.infer.record import read_records
from nanochat.runlog import RunLog
from scripts import lane_b_infer_ratio, lane_b_log_run

ROOT = Path(__file__).parents[1]
WORKSHEET = ROOT / "ideas" / "lane_b_inference_worksheet.md"
PARAMS = 1_000_000
STEP_TOKENS = 20_000


def metric_at(tokens):
    return 0.8 + 0.3 * (tokens / 3e6) ** -0.3


def statistics_document(**changes):
    """A stats.json of schema version 1, as far as the inference reads it: one law, gamma a bracket."""
    document = {
        "schema_version": 1, "dataset_id": "books", "tokenizer_id": "bpe", "vocab_size": 8192, "context_tokens": 512,
        "null_coefficient": 0.26, "lags": [{"lag": 1}, {"lag": 64}], "n_break": None,
        "fits": {"op": {"single": {"slope": 0.9, "log_intercept": -5.5}, "broken": None}},
        "beta": {"value": 0.9, "se": 0.05, "lo": 0.8, "hi": 1.0, "max_data_tokens": 4e5},
        "gamma": {"value": None, "se": None, "lo": 0.12, "hi": 0.34, "refusal": "gamma not reported: H_2 still falls"},
        "warnings": []}
    return document | changes


@pytest.fixture
def stats_json(tmp_path):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(statistics_document()))
    return path


@pytest.fixture
def make_run(base_dir):
    """Writes the record of a run: `val_bpb` at the end of its schedule, evaluated at a quarter, half and all of it."""

    def make(run_id, tokens, val_bpb=None, config=(), summary=(), seed=0, stopped_at=None):
        steps = tokens // STEP_TOKENS
        val_bpb = metric_at(tokens) + 0.002 * (-1) ** seed if val_bpb is None else val_bpb
        log = RunLog.create(base_dir / "runs", run_id, {
            "created_utc": "2026-11-23T10:00:00+00:00", "git_commit": "abc1234", "dataset_id": "books",
            "tokenizer_id": "bpe", "model_config": {"n_layer": 4, "sequence_len": 256}, "n_scaling_params": PARAMS,
            "total_batch_size_tokens": STEP_TOKENS, "num_iterations": steps, "target_tokens": tokens, "seed": seed,
            **dict(config)})
        for share, excess in ((0.25, 0.4), (0.5, 0.2), (1.0, 0.0)):
            log.event("val", step=round(steps * share), tokens=round(tokens * share), val_bpb=val_bpb + excess,
                      train_time_sec=tokens * share / 1e5)
        done = stopped_at or steps
        log.finish(**{"status": "ok", "steps": done, "tokens": done * STEP_TOKENS, "min_val_bpb": val_bpb,
                      "final_val_bpb": val_bpb, "train_time_sec": tokens / 1e5,
                      "tok_per_sec_median": 1e5, "dt_median_ms": 200.0, **dict(summary)})
        log.close()
        return run_id

    return make


@pytest.fixture
def calibration(make_run):
    return [make_run(f"cal-{k}-s{seed}", 1_000_000 * 2**k, seed=seed) for k in range(4) for seed in (0, 1)]


@pytest.fixture
def baseline(make_run):
    return [make_run(f"base-s{seed}", 16_000_000, seed=seed) for seed in (0, 1)]


def infer(tmp_path, stats_json, *flags):
    output = tmp_path / "infer.json"
    lane_b_infer_ratio.main(["--stats-json", str(stats_json), "--output-json", str(output), *flags])
    return json.loads(output.read_text())


def refused(tmp_path, stats_json, capsys, *flags):
    """(exit code, the one line on stderr) of an inference that must leave nothing behind."""
    with pytest.raises(SystemExit) as stopped:
        infer(tmp_path, stats_json, *flags)
    assert not (tmp_path / "infer.json").exists()
    return stopped.value.code, capsys.readouterr().err.strip()


def test_runs_to_inference_to_figure(tmp_path, stats_json, calibration, baseline, capsys):
    pytest.importorskip("matplotlib")
    found = infer(tmp_path, stats_json, "--calibration-run", *calibration, "--baseline-run", *baseline,
                  "--plot", str(tmp_path / "infer.png"))
    assert (found["state"], found["decision"], found["alpha_source"]) == ("ok", "inferred", "calibration")
    assert found["target_metric_threshold"] == pytest.approx(metric_at(16e6), abs=1e-12)  # the median of both seeds
    target, ratio = found["target_tokens"], found["target_param_data_ratio"]
    assert target["value"] == pytest.approx(16e6, rel=0.05) and target["lo"] < 16e6 < target["hi"]
    assert ratio["value"] == target["value"] / PARAMS == found["chosen_ratio"]
    assert found["confirmation_ratio"] == pytest.approx(1.05 * ratio["value"])
    assert found["n_scaling_params"] == PARAMS
    assert found["regime"]["context_tokens"] == 256
    assert (tmp_path / "infer.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "from the calibration (the statistics give no alpha (gamma not reported: H_2 still falls))" in printed
    assert "state ok, decision inferred" in printed


def test_points_by_hand_give_what_runs_give(tmp_path, stats_json, calibration):
    by_hand = [f"{tokens}:{metric_at(tokens) + sign * 0.002!r}" for tokens in (10**6, 2 * 10**6, 4 * 10**6, 8 * 10**6)
               for sign in (1, -1)]
    threshold = ("--target-metric-threshold", "1.0")
    from_runs = infer(tmp_path, stats_json, "--calibration-run", *calibration, *threshold)
    typed = infer(tmp_path, stats_json, "--calibration", *by_hand, *threshold, "--n-scaling-params", str(PARAMS))
    assert typed["target_tokens"] == from_runs["target_tokens"]


def test_depth_gives_the_parameters_of_the_model_that_would_be_trained(tmp_path, stats_json):
    gpt = pytest.importorskip("nanochat.model.gpt")
    by_hand = [f"{10**6 * 2**k}:{metric_at(10**6 * 2**k)}" for k in range(4)]
    found = infer(tmp_path, stats_json, "--calibration", *by_hand, "--target-metric-threshold", "1.0",
                  "--depth", "4", "--aspect-ratio", "64", "--head-dim", "64")
    config = gpt.GPTConfig(vocab_size=8192, n_layer=4, n_head=4, n_kv_head=4, n_embd=256)
    assert found["n_scaling_params"] == gpt.scaling_params(config)


POINTS = ["1000000:1.2170", "2000000:1.1388", "4000000:1.0752", "8000000:1.0236"]


@pytest.mark.parametrize("points, threshold, code, fault", [
    (POINTS[:2], "1.0", 3, "2 distinct horizons"),
    (["1000000:1.2", "1000000:1.1", "1000000:1.0"], "1.0", 3, "1 distinct horizons"),
    (POINTS[:3], "1.0", 3, "no alpha to use"),
    (["1000000:1.0", "2000000:1.1", "4000000:1.2", "8000000:1.3"], "1.0", 3, "do not fall"),
    ([*POINTS[:3], "8000000:nan"], "1.0", 3, "nan bits per byte cannot be"),
    (POINTS, "nan", 3, "nan bits per byte cannot be"),
    (POINTS, "0.5", 3, "threshold_not_above_asymptote"),
    ([*POINTS[:3], "eight:1.0"], "1.0", 2, "neither a run nor TOKENS:METRIC"),
    ([*POINTS[:3], "8000000"], "1.0", 2, "neither a run nor TOKENS:METRIC"),
    ([*POINTS[:3], "0:1.0"], "1.0", 2, "cannot be a horizon"),
])
def test_points_that_carry_no_answer_are_refused(tmp_path, stats_json, capsys, points, threshold, code, fault):
    found, line = refused(tmp_path, stats_json, capsys, "--calibration", *points, "--n-scaling-params", str(PARAMS),
                          "--target-metric-threshold", threshold)
    assert (found, fault in line, line.count("\n")) == (code, True, 0), line


def test_fallback_to_the_default_ratio_is_asked_for_and_recorded(tmp_path, stats_json, capsys):
    by_hand = ("--n-scaling-params", str(PARAMS), "--fallback", "--default-ratio", "10")
    no_alpha = infer(tmp_path, stats_json, "--calibration", *POINTS[:3], "--target-metric-threshold", "1.0", *by_hand)
    too_low = infer(tmp_path, stats_json, "--calibration", *POINTS, "--target-metric-threshold", "0.5", *by_hand)
    for found, state, source in ((no_alpha, "low_quality", "default"),
                                 (too_low, "threshold_not_above_asymptote", "calibration")):
        assert (found["decision"], found["alpha_source"], found["chosen_ratio"]) == ("fallback", source, 10)
        assert (found["state"], found["target_tokens"]) == (state, None)
    assert "no alpha to use" in no_alpha["fallback_reason"]
    printed = capsys.readouterr().out
    assert "falling back to the default ratio: threshold_not_above_asymptote" in printed
    assert "from the calibration" in printed and "from the default" not in printed


@pytest.mark.parametrize("change, code, fault", [
    ({"config": {"dataset_id": "web"}}, 3, "trained on dataset web, the statistics are of books"),
    ({"config": {"tokenizer_id": "other"}}, 3, "trained on tokenizer other, the statistics are of bpe"),
    ({"config": {"n_scaling_params": 7}}, 3, "different models"),
    ({"summary": {"status": "nan"}}, 3, "did not end well (status nan)"),
    ({"stopped_at": 100}, 3, "ended after 2000000 of 16000000 tokens"),
    ({"summary": {"final_val_bpb": None}}, 3, "not evaluated at the end"),
    ({"summary": {"steps": 801}}, 3, "not evaluated at the end"),
    ({"config": {"total_batch_size_tokens": 7}}, 3, "different batch sizes"),
    ({"summary": {"final_val_bpb": "low"}}, 2, "final_val_bpb is 'low'"),
    ({"config": {"model_config": "d4"}}, 2, "model_config is 'd4'"),
])
def test_runs_that_are_no_calibration_points_are_refused(tmp_path, stats_json, make_run, calibration, capsys, change,
                                                         code, fault):
    odd = make_run("odd", 16_000_000, **change)
    found, line = refused(tmp_path, stats_json, capsys, "--calibration-run", *calibration, odd,
                          "--target-metric-threshold", "1.0")
    assert (found, fault in line) == (code, True), line


def test_a_baseline_of_other_data_and_a_wrong_size_are_refused(tmp_path, stats_json, make_run, calibration, capsys):
    web = make_run("web", 16_000_000, config={"dataset_id": "web"})
    assert refused(tmp_path, stats_json, capsys, "--calibration-run", *calibration, "--baseline-run", web)[0] == 3
    code, line = refused(tmp_path, stats_json, capsys, "--calibration-run", *calibration, "--target-metric-threshold",
                         "1.0", "--n-scaling-params", "5")
    assert code == 3 and "the calibration runs have 1000000" in line
    code, line = refused(tmp_path, stats_json, capsys, "--calibration", *POINTS, "--target-metric-threshold", "1.0")
    assert code == 2 and "--n-scaling-params or --depth" in line


def test_one_run_given_twice_is_refused(tmp_path, stats_json, calibration, baseline, base_dir, capsys):
    again = str(base_dir / "runs" / "base-s1")
    for calibrated, ends, name in (([*calibration, "cal-2-s1"], baseline, "cal-2-s1"),
                                   (calibration, [*baseline, again], "base-s1")):
        code, line = refused(tmp_path, stats_json, capsys, "--calibration-run", *calibrated, "--baseline-run", *ends)
        assert (code, f"{name} is given 2 times" in line) == (3, True), line


@pytest.mark.parametrize("change, code, fault", [
    ({"config": {"n_scaling_params": 7}}, 3, "has 7 scaling parameters, the calibration 1000000"),
    ({"config": {"total_batch_size_tokens": 7}}, 3, "has 7 tokens a step, the calibration 20000"),
    ({"summary": {"min_val_bpb": None}}, 3, "has no validation"),
    ({"summary": {"min_val_bpb": "low"}}, 2, "min_val_bpb is 'low'"),
])
def test_a_baseline_of_another_recipe_is_refused(tmp_path, stats_json, make_run, calibration, capsys, change, code,
                                                 fault):
    odd = make_run("odd", 16_000_000, **change)
    found, line = refused(tmp_path, stats_json, capsys, "--calibration-run", *calibration, "--baseline-run", odd)
    assert (found, fault in line) == (code, True), line


@pytest.mark.parametrize("flags, fault", [
    (["--resamples", "0"], "--resamples must be at least 100"),
    (["--default-ratio", "nan"], "must be positive and finite"),
    (["--default-ratio", "inf"], "must be positive and finite"),
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--plot", "figure.odd"], "no kind of figure"),
])
def test_flags_without_sense_exit_with_2(tmp_path, stats_json, capsys, flags, fault):
    if "--plot" in flags:
        pytest.importorskip("matplotlib")
    code, line = refused(tmp_path, stats_json, capsys, "--calibration", *POINTS, "--target-metric-threshold", "1.0",
                         "--n-scaling-params", str(PARAMS), *flags)
    assert (code, fault in line) == (2, True), line


def test_an_output_that_cannot_be_written_or_drawn_is_named_before_the_work(tmp_path, stats_json, monkeypatch, capsys):
    flags = ("--calibration", *POINTS, "--target-metric-threshold", "1.0", "--n-scaling-params", str(PARAMS))
    code, line = refused(tmp_path, stats_json, capsys, *flags, "--output-json", str(tmp_path))
    assert (code, "--out " in line) == (2, True), line
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, line = refused(tmp_path, stats_json, capsys, *flags, "--plot", str(tmp_path / "infer.png"))
    assert (code, "pip install 'nanochat[report]'" in line) == (2, True), line


@pytest.mark.parametrize("text, fault", [
    ("{\n \"schema_version\": 1,\n", "stats.json, line 3: not JSON"),
    ("[]", "not a JSON object"),
    (json.dumps(statistics_document(schema_version=2)), "schema_version 2"),
    (json.dumps({**statistics_document(), "beta": {}}), "no field beta.value"),
    (json.dumps(statistics_document(null_coefficient=math.nan)), "null_coefficient is nan"),
    (json.dumps(statistics_document(vocab_size="many")), "vocab_size is 'many'"),
])
def test_malformed_statistics_are_named_by_file_and_place(tmp_path, stats_json, capsys, text, fault):
    stats_json.write_text(text)
    code, line = refused(tmp_path, stats_json, capsys, "--calibration", *POINTS, "--target-metric-threshold", "1.0",
                         "--n-scaling-params", "1")
    assert (code, fault in line, "make the file again" in line) == (2, True, True), line


# scripts.lane_b_log_run

@pytest.fixture
def inferred(tmp_path, stats_json, calibration, baseline, capsys):
    found = infer(tmp_path, stats_json, "--calibration-run", *calibration, "--baseline-run", *baseline)
    capsys.readouterr()
    return found


def steps_of(ratio):
    return int(ratio * PARAMS) // STEP_TOKENS * STEP_TOKENS


def log(tmp_path, *flags):
    ledger = tmp_path / "lane_b.csv"
    lane_b_log_run.main(["--inference-json", str(tmp_path / "infer.json"), "--csv", str(ledger), *flags])
    return read_records(ledger)


def test_a_run_and_its_inference_become_a_row(tmp_path, inferred, make_run):
    tokens = steps_of(inferred["chosen_ratio"])
    run = make_run("inferred-s1", tokens, val_bpb=metric_at(16e6) - 0.001, seed=1)
    (row,) = log(tmp_path, "--run", run)
    assert (row.run_id, row.seed, row.git_commit) == (run, 1, "abc1234")
    assert (row.lane_b_decision, row.status) == ("inferred", "ok")
    assert row.chosen_ratio == row.inferred_target_param_data_ratio == inferred["chosen_ratio"]
    assert row.inferred_target_tokens == math.ceil(inferred["target_tokens"]["value"])
    assert row.inferred_data_scaling_exponent == inferred["alpha"]["value"]
    assert row.time_to_target_sec_measured == pytest.approx(tokens / 1e5)  # reached at the end alone
    assert row.notes == "alpha_source=calibration; state=ok"


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
    assert row.notes == "alpha_source=calibration; state=ok; the fan was loud"


def test_logging_again_skips_what_is_there_only_when_asked(tmp_path, inferred, make_run, capsys):
    runs = [make_run(f"inferred-s{seed}", steps_of(inferred["chosen_ratio"]), seed=seed) for seed in (0, 1)]
    assert len(log(tmp_path, "--run", runs[0])) == 1
    assert [row.run_id for row in log(tmp_path, "--skip-logged", "--run", *runs)] == runs
    with pytest.raises(SystemExit):
        log(tmp_path, "--run", runs[0])
    assert "line 2: run_id 'inferred-s0' is already there" in capsys.readouterr().err


@pytest.mark.parametrize("flags, change, fault", [
    (["--decision", "confirmation"], {}, "the confirmation ratio is"),
    ([], {"config": {"dataset_id": "web"}}, "has dataset_id web, the inference books"),
    ([], {"config": {"n_scaling_params": 7}}, "has n_scaling_params 7"),
    (["--seed", "one"], {}, "seed is 'one', not a whole number"),
])
def test_a_row_that_would_not_be_true_is_refused(tmp_path, inferred, make_run, capsys, flags, change, fault):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]), **change)
    with pytest.raises(SystemExit) as stopped:
        log(tmp_path, "--run", run, *flags)
    assert stopped.value.code == 2 and fault in capsys.readouterr().err
    assert not (tmp_path / "lane_b.csv").exists()


@pytest.mark.parametrize("name, value", [("decision", "guessed"), ("target_metric_name", "loss")])
def test_an_inference_that_names_what_nobody_knows_is_an_error(tmp_path, inferred, make_run, capsys, name, value):
    run = make_run("inferred-s0", steps_of(inferred["chosen_ratio"]))
    (tmp_path / "infer.json").write_text(json.dumps(inferred | {name: value}))
    with pytest.raises(SystemExit) as stopped:
        log(tmp_path, "--run", run)
    assert stopped.value.code == 2 and f"infer.json: {name} is '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("summary, code, fault", [
    ({"final_val_bpb": None, "min_val_bpb": None}, 3, "was not evaluated at its end"),
    ({"final_val_bpb": "low"}, 2, "final_val_bpb is 'low'"),
    ({"dt_median_ms": "quick"}, 2, "dt_median_ms is 'quick'"),
])
def test_a_record_without_a_metric_is_one_line(tmp_path, inferred, make_run, capsys, summary, code, fault):
    run = make_run("odd", steps_of(inferred["chosen_ratio"]), val_bpb=2.0, summary=summary)
    with pytest.raises(SystemExit) as stopped:
        log(tmp_path, "--run", run)
    assert (stopped.value.code, fault in capsys.readouterr().err) == (code, True)
    assert not (tmp_path / "lane_b.csv").exists()


def test_a_schedule_that_ended_short_is_extrapolated_as_a_schedule(tmp_path, inferred, make_run):
    """By the curve, the end of a schedule a tenth shorter than the target needs one that is a ninth longer."""
    curve = inferred["calibration"]
    tokens = steps_of(0.9 * inferred["chosen_ratio"])
    end = curve["L_inf_bits_per_byte"] + curve["A_bits_per_byte"] * tokens ** -curve["alpha"]
    (row,) = log(tmp_path, "--run", make_run("short", tokens, val_bpb=end), "--chosen-ratio", str(tokens / PARAMS))
    assert row.time_to_target_sec_measured is None
    assert row.time_to_target_sec_extrapolated == pytest.approx(inferred["target_tokens"]["value"] / 1e5, rel=1e-6)


def test_a_run_that_diverged_has_no_time(tmp_path, inferred, make_run):
    run = make_run("nan", steps_of(inferred["chosen_ratio"]), summary={"status": "nan", "final_val_bpb": None})
    (row,) = log(tmp_path, "--run", run)
    assert (row.status, row.time_to_target_sec_extrapolated) == ("nan", None)


def test_the_standing_says_which_decision_came_first(tmp_path, inferred, make_run, baseline, capsys):
    reached = inferred["target_metric_threshold"] - 0.001
    for decision, tokens in (("inferred", inferred["chosen_ratio"]), ("confirmation", inferred["confirmation_ratio"])):
        for seed in (0, 1):
            missed = decision == "confirmation" and seed == 1
            run = make_run(f"{decision}-s{seed}", steps_of(tokens), val_bpb=reached + 0.01 * missed, seed=seed)
            log(tmp_path, "--run", run, "--decision", decision)
    capsys.readouterr()
    log(tmp_path, "--standing", "--baseline-run", *baseline)
    lines = capsys.readouterr().out.splitlines()
    marks = [(line.split()[0], line.count("~")) for line in lines[1:4]]
    assert marks == [("baseline", 1), ("inferred", 0), ("confirmation", 1)]  # the worse half misses its own median
    assert lines[4].startswith("first: inferred")
    with pytest.raises(SystemExit) as stopped:
        log(tmp_path, "--standing", "--baseline-run", *baseline, baseline[0])
    assert stopped.value.code == 3 and f"{baseline[0]} is given 2 times" in capsys.readouterr().err


def test_the_worksheet_s_example_is_what_the_tool_prints(tmp_path, monkeypatch, capsys):
    page = WORKSHEET.read_text()
    blocks = {kind: re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("json", "sh", "text")}
    monkeypatch.chdir(tmp_path)
    Path("stats.json").write_text(blocks["json"])
    flags = shlex.split(blocks["sh"].replace("\\\n", " ").removeprefix("python -m scripts.lane_b_infer_ratio"))
    lane_b_infer_ratio.main(flags)
    assert capsys.readouterr().out == blocks["text"]


def test_the_worksheet_s_arithmetic_is_right():
    """The figures in bold, worked out by the steps of the page."""
    page = WORKSHEET.read_text()
    alpha = 0.325 / (2 * 0.88)
    tokens = [1e6, 2e6, 4e6]
    means = [(1.2521 + 1.2480) / 2, (1.2066 + 1.2094) / 2, (1.1721 + 1.1695) / 2]
    x = [t**-alpha for t in tokens]
    mean_x, mean_y = sum(x) / 3, sum(means) / 3
    scale = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, means, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    asymptote = mean_y - scale * mean_x
    target = (scale / (1.14 - asymptote)) ** (1 / alpha)
    usable = (math.exp(-5.55) * math.sqrt(target) / 0.26) ** (1 / 0.88)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, means, strict=True))
    squares = sum((a - mean_x) ** 2 for a in x)
    for figure in (f"mean x {mean_x:.6f}", f"mean y {mean_y:.6f}", f"{products * 1e4:.4f}e-4",
                   f"{squares * 1e4:.5f}e-4", f"= {scale / (1.14 - asymptote):.2f}^{1 / alpha:.4f}",
                   *(f"{mean:.5f}" for mean in means),
                   f"**{alpha:.4f}**", f"**{0.309 / 2:.4f}**", f"**{0.341 / 1.52:.4f}**", f"A = **{scale:.3f}**",
                   f"**{asymptote:.4f}** bits", f"**{target / 1e6:.2f}·10^6** tokens", f"**{target / 8e5:.2f}**",
                   f"**{1.05 * target / 8e5:.2f}**", f"**{usable:.0f}** tokens", *(f"{v:.6f}" for v in x)):
        assert figure in page, figure


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


def converged(**changes):
    return statistics_document(gamma={"value": 0.3, "se": 0.01, "lo": 0.28, "hi": 0.32, "refusal": None},
                               n_break=6.4, **changes) | {"fits": {"op": {
                                   "broken": {"slope_before": 1.5, "slope_after": 0.2, "log_intercept": -5.0}}}}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), document=st.sampled_from([statistics_document(), converged()]), value=json_values)
def test_changed_statistics_give_an_inference_or_one_line(tmp_path, data, document, value):
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(changed(document, data.draw(st.sampled_from(list(paths(document)))), value)))
    points = [parse_point(text) for text in POINTS]
    for source in ("theory", "calibration"):
        with contextlib.suppress(UserError):
            found = infer_horizon(points, BitsPerByte(1.0), PARAMS, read_statistics(path), alpha_source=source,
                                  resamples=10)
            json.dumps(inference_document(found, 12.0, found.refusal), allow_nan=False)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=json_values)
def test_a_changed_inference_is_read_or_one_line(tmp_path, inferred, data, value):
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(changed(inferred, data.draw(st.sampled_from(list(paths(inferred)))), value)))
    with contextlib.suppress(UserError):
        read_inference(path).ratio_of("inferred")
        read_inference(path).horizon_factor(1.0)


@given(st.text())
def test_points_typed_in_are_read_or_one_line(text):
    with contextlib.suppress(UserError):
        assert parse_point(text).tokens >= 1
