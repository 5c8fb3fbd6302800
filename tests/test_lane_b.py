"""Lane B as a user sees it: runs of small models to an answer, a refusal, a ledger row."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from corpus import write_corpus
from lane_b_runs import CALIBRATION, CURVES, write_record

from nanochat import schedule
from nanochat.config import parse_config
from nanochat.experiments.ledger import append_row, columns, read_rows
from nanochat.lane_b import calibration, curves, inference, trainings, verdict
from nanochat.lane_b.ledger import LaneBRecord
from nanochat.runlog import find_run
from scripts import base_train, lane_b, lane_b_infer_ratio, lane_b_log_run, tok_train

TARGET = 1.6708  # the measured end of depth 4 at ratio 4


@pytest.fixture(autouse=True)
def _few_replicates(monkeypatch):
    monkeypatch.setattr(inference, "Forecast", partial(curves.Forecast, n_replicates=16))


@pytest.fixture
def record(base_dir):
    return partial(write_record, base_dir / "runs")


def infer(tmp_path, runs, *flags):
    lane_b_infer_ratio.main(["--calibration-run", *runs, f"--target-metric-threshold={TARGET}",
                             f"--out={tmp_path / 'infer.json'}", *flags])


def read(tmp_path):
    return json.loads((tmp_path / "infer.json").read_text())


# --- the answer -----------------------------------------------------------------------------------

def test_small_runs_name_the_depth_and_ratio_of_a_larger_model(tmp_path, record, capsys):
    runs = [record(key) for key in CALIBRATION]
    timing = [record((4, 4, 10), "t4", summary={"steps": 41}), record((5, 4, 10), "t5")]
    plot = [f"--plot={tmp_path / 'x.png'}"] if importlib.util.find_spec("matplotlib") else []
    infer(tmp_path, runs, "--timing-run", *timing, *plot)
    found, printed = read(tmp_path), capsys.readouterr().out
    named, default = found["named"], found["default"]
    assert (found["state"], found["chosen_depth"]) == ("ok", 4)
    assert 4 <= found["chosen_ratio"] <= 5.5  # measured: ratio 4 reaches it at its end
    assert found["confirmation"]["ratio"] == pytest.approx(1.05 * found["chosen_ratio"])
    assert named["lo"] < 2044 < named["hi"]  # the measured crossing at ratio 4
    assert default["depth"] == 4 and default["ratio"] == 12
    assert 0.4 < 1 - named["sec"] / default["sec"] < 0.7  # measured: 59 %
    flops, seconds = found["calibration_cost"]
    assert 0 < flops < seconds < 0.6
    assert 0.2 < found["alpha"] < 0.7
    assert "depth 4, --target-param-data-ratio=" in printed
    assert not plot or (tmp_path / "x.png").stat().st_size > 10_000


def test_the_automatic_batch_gives_the_answer_of_the_constant_one(tmp_path, record, monkeypatch):
    """Scaled down to 1,024, 2,048 and 4,096 tokens at depths 2, 3 and 5."""
    infer(tmp_path, [record(key) for key in CALIBRATION], "--depth=5")
    one = read(tmp_path)
    monkeypatch.setattr(schedule, "REFERENCE_BATCH_TOKENS", 13_000)
    flags = {"flags": ["--total-batch-size=-1"]}
    infer(tmp_path, [record(key, f"mixed{i}", batch=1024 if key[0] == 2 else 2048, **flags)
                     for i, key in enumerate(CALIBRATION)], "--depth=5")
    mixed = read(tmp_path)
    assert (one["named"]["batch"], mixed["named"]["batch"]) == (2048, 4096)
    assert mixed["total_batch_size_tokens"] == 4096
    assert mixed["chosen_ratio"] == one["chosen_ratio"]
    for name in ("steps", "lo", "horizon"):
        assert mixed["named"][name] == pytest.approx(one["named"][name] / 2, rel=0.015)
    assert mixed["named"]["sec"] == pytest.approx(one["named"]["sec"], rel=0.015)
    assert mixed["calibration_cost"] == pytest.approx(one["calibration_cost"], rel=0.015)
    last = mixed["forecast_curve"]["steps"][-1]
    assert last == pytest.approx(mixed["named"]["horizon"], abs=1)


@pytest.mark.parametrize(("target", "code"), [(1.695, 0), (1.69, 4)])
def test_the_default_is_named_where_nothing_is_forecast_to_be_faster(tmp_path, record, refusal,
                                                                     target, code):
    """Ratio 12 takes depth 3 to 1.695; it just reaches 1.69, where depth 4 would be slower."""
    runs, flag = [record(key) for key in CALIBRATION], f"--target-metric-threshold={target}"
    if code:
        assert "may_miss" in refusal(infer, tmp_path, runs, flag, exit_code=code)
    else:
        infer(tmp_path, runs, flag)
    found = read(tmp_path)
    assert found["named"] == found["default"] and found["chosen_ratio"] == 12
    assert any("is the answer" in warning for warning in found["warnings"])
    assert not code or "depth 4 at ratio 4.24 is surer" in found["reasons"]["may_miss"]


def test_with_a_depth_only_its_ratio_is_inferred(tmp_path, record):
    infer(tmp_path, [record(key) for key in CALIBRATION], "--depth=5")
    found = read(tmp_path)
    assert found["chosen_depth"] == 5 and found["default"]["depth"] == 5
    assert any("estimated from its FLOPs" in warning for warning in found["warnings"])


def test_the_theory_s_exponent_stands_beside_the_law_s(tmp_path, record, capsys, refusal):
    runs = [record(key) for key in CALIBRATION]
    statistics = {"dataset_id": "books", "alpha_theory": {"value": None, "lo": 0.05, "hi": None}}
    (tmp_path / "stats.json").write_text(json.dumps(statistics))
    flag = f"--stats-json={tmp_path / 'stats.json'}"
    infer(tmp_path, runs, flag)
    assert "gamma/2beta (0.05 to no bound) is not used" in capsys.readouterr().out
    (tmp_path / "stats.json").write_text(json.dumps(statistics | {"dataset_id": "web"}))
    assert "about the text web" in refusal(infer, tmp_path, runs, flag, exit_code=3)


def test_no_interval_holds_steps_at_which_a_calibration_run_was_above_the_target():
    runs = [CURVES[key] for key in CALIBRATION]
    small, large = runs[0], runs[2]
    target = large.loss[-1] - 0.01  # not reached by any run
    steps = partial(inference.steps_above, runs, target)
    assert steps(large.n_params, 2 * large.horizon) == large.horizon
    assert steps(large.n_params + 1, 2 * large.horizon) == 0  # a larger model may be quicker
    assert steps(small.n_params, large.horizon - 1) == runs[1].horizon  # also a shorter schedule
    crossed = inference.steps_above([large], large.loss[-3], large.n_params, large.horizon)
    assert crossed == large.steps[-4]


# --- refusals and doubts --------------------------------------------------------------------------

def short(key, steps):
    run = CURVES[key]
    return curves.Curve(run.n_params, run.multipliers[:steps], np.arange(20, steps + 1, 20),
                        np.linspace(3, 2, steps // 20))


def sparse(key):
    run = CURVES[key]
    return replace(run, steps=run.steps[::-7][::-1], loss=run.loss[::-7][::-1])


REFUSALS = [
    ("one size", [(2, 4, 0), (2, 8, 0)], {}, []),
    ("one ratio", [(2, 4, 0), (3, 4, 0)], {}, []),
    ("400 steps", [*CALIBRATION, (2, 4, 1)], {"curve": short((2, 4, 1), 400)}, []),
    ("batches", CALIBRATION, {"batch": 256}, []),
    ("resumed with changes", CALIBRATION, {"changed": [["horizon", 900, 1032]]}, []),
    ("matrix_lr", CALIBRATION, {"flags": ["--matrix-lr=0.1"]}, []),
    ("dataset_id", CALIBRATION, {"config": {"dataset_id": "web"}}, []),
    ("given twice", [*CALIBRATION[:2], (2, 4, 0)], {"run_id": "d2.r4.s0"}, []),
    ("not complete", CALIBRATION, {"summary": {"status": "interrupted"}}, []),
    ("evaluations", CALIBRATION, {"curve": sparse((3, 4, 0))}, []),
    ("1.50 times", CALIBRATION, {"summary": {"epochs": 1.5}}, []),
    ("reach", CALIBRATION, {}, ["--depth=9"]),
    ("forecast", CALIBRATION, {}, ["--target-metric-threshold=1.52"]),
    ("floor", CALIBRATION, {}, ["--target-metric-threshold=1.0"]),
]


@pytest.mark.parametrize(("words", "keys", "change", "flags"), REFUSALS)
def test_a_calibration_without_an_answer_is_refused(tmp_path, record, refusal, words, keys, change,
                                                    flags):
    runs = [record(key) for key in keys[:-1]]
    runs.append(runs[0] if "run_id" in change else record(keys[-1], **change))
    error = refusal(infer, tmp_path, runs, *flags, exit_code=3)
    assert error.count("\n") == 1 and words in error
    assert not (tmp_path / "infer.json").exists()


def test_a_size_that_the_law_misses_makes_the_answer_uncertain(tmp_path, record, refusal):
    runs = [record(key) for key in CALIBRATION]
    run = CURVES[4, 4, 10]
    runs.append(record((4, 4, 10), curve=replace(run, loss=1.05 * run.loss)))
    refusal(infer, tmp_path, runs, "--target-metric-threshold=1.72", exit_code=4)
    assert "holdout" in read(tmp_path)["reasons"] and read(tmp_path)["chosen_depth"]


@pytest.mark.parametrize(("gap", "code"), [(0, 0), (0.03, 4)])
def test_sizes_with_differently_shaped_curves(tmp_path, record, refusal, gap, code):
    runs, run = [record(key) for key in CALIBRATION[:2]], CURVES[3, 4, 0]
    shape = 1 + gap * (run.steps < 0.8 * run.horizon)
    runs.append(record((3, 4, 0), curve=replace(run, loss=run.loss * shape)))
    if code:
        assert "collapse_gap" in refusal(infer, tmp_path, runs, exit_code=code)
    else:
        infer(tmp_path, runs)
        assert any("curves of different sizes" in line for line in read(tmp_path)["warnings"])


def test_a_text_that_is_too_short_makes_the_answer_uncertain(tmp_path, record, refusal):
    runs = [record(key, config={"train_tokens": 3_000_000}) for key in CALIBRATION]
    assert "repeated_text" in refusal(infer, tmp_path, runs, exit_code=4)
    assert "no calibration run shows repetition" in read(tmp_path)["reasons"]["repeated_text"]


@pytest.mark.parametrize(("effect", "code"), [(-0.01, 4), (0.007, 0)])
def test_learning_rates_that_do_not_transfer_make_it_uncertain(tmp_path, record, refusal, effect,
                                                               code):
    runs = [record(key) for key in CALIBRATION]
    halved = ["--matrix-lr=0.16", "--embedding-lr=2.4", "--unembedding-lr=0.064"]
    halves = [record(key, f"half{key[0]}", flags=halved,
                     curve=replace(CURVES[key], loss=CURVES[key].loss + excess))
              for key, excess in (((2, 4, 0), 0.006), ((3, 4, 0), effect))]
    flags = ["--half-rate-run", *halves]
    if code:
        assert "rates" in refusal(infer, tmp_path, runs, *flags, exit_code=code)
        assert "halve them there" in read(tmp_path)["reasons"]["rates"]
    else:
        infer(tmp_path, runs, *flags)


# --- the ledger -----------------------------------------------------------------------------------

@pytest.fixture
def inferred(tmp_path, record):
    infer(tmp_path, [record(key) for key in CALIBRATION])
    return read(tmp_path)


def where(tmp_path):
    return [f"--inference-json={tmp_path / 'infer.json'}", f"--ledger={tmp_path / 'lane_b.csv'}"]


def log(tmp_path, *flags):
    lane_b_log_run.main([*flags, *where(tmp_path)])
    return read_rows(tmp_path / "lane_b.csv", LaneBRecord)


def trained(record, run_id, ratio, loss=None, **change):
    run = CURVES[4, 4, 10]
    horizon = int(ratio * run.n_params) // 2048
    steps = np.linspace(50, horizon, 28).astype(int)
    loss = np.linspace(2.5, loss or TARGET - 0.01, 28)
    made = curves.Curve(run.n_params, np.ones(horizon), steps, loss)
    return record((4, 4, 10), run_id, curve=made, **change)


def test_a_run_and_its_inference_become_a_row(tmp_path, record, inferred, refusal):
    run = trained(record, "named", inferred["chosen_ratio"])
    (row,) = log(tmp_path, run)
    assert row.lane_b_decision == "inferred" and row.chosen_ratio == inferred["chosen_ratio"]
    assert row.inferred_data_scaling_exponent == inferred["alpha"]
    assert row.time_to_target_sec_measured > 0 and row.time_to_target_sec_extrapolated is None
    assert row.notes == "alpha_source=law; state=ok"
    baseline = trained(record, "base", 12.0)
    rows = log(tmp_path, baseline, "--decision=fallback", "--notes=a note")
    assert rows[1].chosen_ratio == 12 and rows[1].notes.endswith("; a note")
    assert "already there" in refusal(log, tmp_path, run)
    assert "trained at ratio" in refusal(log, tmp_path, run, "--decision=confirmation")
    other = trained(record, "web", inferred["chosen_ratio"], config={"dataset_id": "web"})
    assert "has dataset_id web" in refusal(log, tmp_path, other)


def test_the_file_of_a_person(tmp_path, record, inferred, refusal):
    run = trained(record, "named", inferred["chosen_ratio"])
    log(tmp_path, run)
    ledger = tmp_path / "lane_b.csv"
    ledger.write_text(ledger.read_text().replace(",inferred,", ",infered,"))
    assert "line 2: lane_b_decision is 'infered'" in refusal(log, tmp_path, run)
    (tmp_path / "infer.json").write_text(json.dumps(inferred | {"schema_version": 2}))
    assert "schema_version is 2" in refusal(log, tmp_path, run)


def test_the_columns_of_the_committed_ledger_are_fixed(tmp_path):
    path = Path(__file__).parents[1] / "ideas" / "lane_b_inference_schema.csv"
    assert path.read_text().splitlines()[0].split(",") == columns(LaneBRecord)
    for row in read_rows(path, LaneBRecord):
        append_row(tmp_path / "copy.csv", row)
    assert read_rows(tmp_path / "copy.csv", LaneBRecord) == read_rows(path, LaneBRecord)


# --- while the target trains, and after -----------------------------------------------------------

def test_a_run_is_compared_with_its_forecast(tmp_path, record, inferred, capsys):
    """The first half of a run follows the forecast, or is 1 % above it."""
    named, forecast = inferred["named"], inferred["forecast_curve"]
    steps = np.append(np.arange(100, named["horizon"], 50), named["horizon"])
    loss = np.interp(steps, forecast["steps"], forecast["val_bpb"])
    multipliers = np.ones(named["horizon"])

    def compared(run_id, share, factor, is_finished=False):
        seen = steps <= share * named["horizon"]
        made = curves.Curve(inferred["n_scaling_params"], multipliers, steps[seen],
                            loss[seen] * factor)
        record((4, 4, 10), run_id, curve=made, is_finished=is_finished)
        lane_b_log_run.main([run_id, *where(tmp_path)])
        return capsys.readouterr().out

    assert "on track: val_bpb is +0.00% from the forecast" in compared("even", 0.6, 1)
    assert "on track" in compared("ahead", 0.6, 0.98)
    assert "needs step" in compared("early", 0.4, 1)
    printed = compared("late", 0.6, 1.01)
    assert "slower: val_bpb is +1.00%" in printed and "is not logged" in printed
    expected = int(printed.split("expected crossing: step ")[1].split()[0])
    assert named["steps"] < expected <= named["horizon"]
    assert "not within the horizon instead of step" in compared("never", 0.6, 1.1)
    assert "not reached at the end" in compared("missed", 1.01, 1.1, is_finished=True)
    printed = compared("ended", 1.01, 1, is_finished=True)
    assert f"target reached at step {named['steps']:.0f}" in printed and ", ratio" in printed


def judged(record, gains=(1, 1, 1), loss=1.66, calibration=CALIBRATION):
    """Judge made runs: depth 4 reaches 1.67 at steps 1,000 * gain, depth 5 at step 2,000."""
    for key in {(2, 4, 0), *calibration}:
        record(key)

    def run(name, depth, seed, crossing, end):
        made = curves.Curve(10**6, np.ones(3000), np.array([0, int(crossing), 3000]),
                            np.array([3, 1.67, end]))
        record((depth, 4, seed), f"{name}{seed}", curve=made, target=1.67)
        return find_run(f"{name}{seed}", record.args[0])

    named = [run("named", 4, seed, 1000 * gain, loss)
             for seed, gain in zip(verdict.SEEDS, gains, strict=False)]
    baseline = [run("base", 5, seed, 2000, 1.6) for seed in verdict.SEEDS]
    return verdict.judge(named, baseline, [find_run("d2.r4.s0", record.args[0])])


def test_the_verdict_on_lane_b(record):
    """Steps times each depth's own step time: 160 ms at depth 4, 250 ms at depth 5."""
    lines = judged(record, (1, 1.01, 0.99))
    assert lines[0] == "lane B: PROMOTE" and "mean +68 %" in lines[1]  # 160 s for 500 s
    assert lines[-1].endswith("340 s saved per run pay for it after 1 runs")


@pytest.mark.parametrize(("options", "decision"), [
    ({"gains": (1, 2, 2.9)}, "OPTIONAL"), ({"gains": (1, 1, 3.2)}, "REJECT"),
    ({"gains": (1, 1)}, "INSUFFICIENT")])
def test_the_verdict_without_a_shown_gain(record, options, decision):
    assert judged(record, **options)[0] == f"lane B: {decision}"


# --- one command ----------------------------------------------------------------------------------

def test_the_first_trainings_are_two_ratios_and_two_depths(capsys):
    lane_b.main(["--target-metric-threshold=1.62", "--dry-run"])
    *lines, cost = capsys.readouterr().out.splitlines()
    configs = [parse_config(line.split()[3:]) for line in lines]
    n_params = {depth: CURVES[depth, 4, 0].n_params for depth in (2, 3)}
    six_nd = sum(6 * n_params[c.depth] * c.num_iterations * 2048 for c in configs)
    assert six_nd < float(cost.split()[1]) < 1.3 * six_nd  # and attention
    assert [(c.depth, c.num_iterations) for c in configs] == [(2, 448), (2, 896), (3, 1032)]
    assert {c.total_batch_size for c in configs} == {2048}
    assert all(c.run_id == c.tag and c.eval_every < 40 for c in configs)


@pytest.mark.usefixtures("fp32")
def test_one_command_trains_infers_and_continues(tmp_path, base_dir, monkeypatch, capsys, refusal):
    """A miniature: its law means nothing; the chain of programs does."""
    for module, name, value in (
            (calibration, "MIN_STEPS", 25), (trainings, "MIN_STEPS", 25), (curves, "FIRST_STEP", 5),
            (trainings, "EVALUATIONS", 12), (trainings, "TIMED_STEPS", 13),
            (trainings, "GROWTH", 1.4),
            (lane_b, "PROFILES", {"small": ("", 300, None, 2)}), (verdict, "SEEDS", (10,)),
            (inference, "REACH_LARGEST", 5)):
        monkeypatch.setattr(module, name, value)
    programs, trained = {"scripts.base_train": base_train, "scripts.tok_train": tok_train}, []

    def train(module, flags):
        if module == "scripts.base_train":
            trained.append(parse_config(flags))
        programs[module].main(list(map(str, flags)))

    monkeypatch.setattr(lane_b, "run_module", train)
    monkeypatch.setattr(trainings, "run_module", train)
    corpus = write_corpus(tmp_path / "corpus", documents_per_shard=6000)
    flags = ["--aspect-ratio=12", "--head-dim=24", "--max-seq-len=32", "--device-batch-size=32",
             "--total-batch-size=2048", "--window-pattern=L", "--eval-tokens=1024", "--no-compile",
             "--warmup-steps=2"]
    argv = [f"--dataset={corpus}", "--quiet", "--budget=0.9", "--target-metric-threshold=2",
            "--name=mini", "--smallest-depth=1", "--verify", "--", *flags]

    def exit_code():
        try:
            lane_b.main(argv)
        except SystemExit as stopped:
            return stopped.code
        return 0

    code, printed = exit_code(), capsys.readouterr().out
    assert [(c.depth, c.num_iterations) for c in trained][:4] == [(1, 28), (1, 57), (2, 42),
                                                                    (3, 13)]
    assert code in (0, 3, 4) and ("train it: " in printed) == (code != 3)
    assert ("\n  2 reach" in printed or "no baseline" in printed) == (code != 3)
    trained.clear()
    assert exit_code() == code and not trained  # every record is there
    argv[-1] = "--warmup-steps=3"
    assert "another warmup_steps" in refusal(lane_b.main, argv)
