"""Lane B's stages as commands: all that are given exist, and what is done is left out."""

import json

import pytest

from nanochat.config import parse_config
from nanochat.experiments.runner import training_runs
from scripts import (
    experiment,
    lane_b,
    lane_b_infer_ratio,
    lane_b_log_run,
    lane_b_stats,
    report,
    verdict,
)

PARSERS = {"scripts.experiment": experiment, "scripts.lane_b_stats": lane_b_stats, "scripts.report": report,
           "scripts.lane_b_infer_ratio": lane_b_infer_ratio, "scripts.lane_b_log_run": lane_b_log_run,
           "scripts.verdict": verdict}
INFERENCE = {"chosen_ratio": 9.5, "confirmation_ratio": 9.975, "target_metric_threshold": 1.25, "decision": "inferred",
             "fallback_reason": None, "next_num_iterations": None}
WIDE, TOO_SHORT = ({**INFERENCE, "next_num_iterations": 960, **more} for more in (
    {}, {"decision": "fallback", "fallback_reason": "no horizon up to 1080 steps"}))


@pytest.fixture
def run(monkeypatch):
    """Runs lane B with stages that only leave their files; returns what they were. inferences: in their order."""
    def run(*argv, inferences=()):
        ran, coming = [], iter(inferences)

        def stage(module, flags):
            args = PARSERS[module].parse_args(list(map(str, flags)))
            ran.append((module, args))
            if module in ("scripts.lane_b_stats", "scripts.lane_b_infer_ratio"):
                with open(args.out, "w") as file:
                    json.dump(next(coming, INFERENCE) if "infer" in module else {}, file)

        monkeypatch.setattr(lane_b, "run_module", stage)
        lane_b.main(argv)
        return ran

    return run


@pytest.mark.parametrize("argv", [[], ["--profile", "d12", "--seeds", "0", "1", "2", "--name", "mine"]])
def test_every_stage_is_a_command_that_exists_and_the_trainings_are_of_flags_that_exist(run, argv):
    ran = run(*argv)
    assert [module.removeprefix("scripts.") for module, _ in ran] == [
        "experiment", "experiment", "lane_b_stats", "lane_b_infer_ratio", "experiment", "lane_b_log_run",
        "lane_b_log_run", "report", "verdict"]
    asked = [experiment.experiment_of(args) for module, args in ran if module == "scripts.experiment"]
    made = {run.run_id for one in asked for run in training_runs(one)}
    for one in asked:
        for planned in training_runs(one):
            parse_config(planned.flags)
    target, calibration, proof = asked
    seeds = [{*one.seeds} for one in asked]
    assert len(set.union(*seeds)) == sum(map(len, seeds)) and len(calibration.seeds) == len(target.seeds) == 2
    assert proof.target_metric_threshold == 1.25 and list(proof.candidates) == ["baseline", "inferred", "confirmation"]
    assert {parse_config(run.flags).target_param_data_ratio for run in training_runs(proof)} >= {9.5, 9.975}
    stats, inference, log = ran[2][1], ran[3][1], ran[5][1]
    named = {*stats.position_losses, *inference.calibration_run, *inference.baseline_run, *log.runs}
    assert named <= made and len(inference.calibration_run) == 2 * 2
    assert all(parse_config(run.flags).position_losses for one in asked for run in training_runs(one))


@pytest.mark.parametrize("first", [WIDE, TOO_SHORT])
def test_the_calibration_gets_another_horizon_while_the_inference_asks_for_one(run, first):
    for ran in (run(inferences=[first, INFERENCE]), run(inferences=[first, INFERENCE])):  # and when it goes on
        inferences = [args for module, args in ran if module == "scripts.lane_b_infer_ratio"]
        assert [len(args.calibration_run) for args in inferences] == [4, 6] and inferences[0].out != inferences[1].out
        assert "lane_b_cpu_calibration.h960.d2.s3" in inferences[1].calibration_run
        logged = [args for module, args in ran if module == "scripts.lane_b_log_run"]
        assert {args.inference_json for args in logged} == {inferences[1].out}


def test_a_calibration_that_has_cost_enough_goes_on_with_what_it_has_or_stops_and_says_so(run, refusal):
    wider = {**WIDE, "next_num_iterations": 1280}
    assert "scripts.report" in [module for module, _ in run(inferences=[WIDE, wider])]
    shorter = [TOO_SHORT, {**TOO_SHORT, "next_num_iterations": 1280}]
    error = refusal(lambda: run("--name", "other", inferences=shorter))
    assert "after a calibration of 2.25 baseline runs a seed: no horizon up to 1080" in error


def test_a_target_from_outside_takes_the_place_of_the_run_that_would_set_it(run):
    ran = run("--target-metric-threshold", "1.3")
    assert [args.name for module, args in ran if module == "scripts.experiment"] == ["lane_b_cpu_calibration",
                                                                                     "lane_b_cpu"]
    inference = next(args for module, args in ran if module == "scripts.lane_b_infer_ratio")
    assert inference.target_metric_threshold == 1.3 and inference.baseline_run is None


def test_statistics_that_are_there_are_not_made_again(run):
    run()
    assert [module for module, _ in run()].count("scripts.lane_b_stats") == 0


def test_a_dry_run_prints_what_is_known_and_runs_nothing(run, base_dir, capsys):
    assert run("--dry-run") == [] and not (base_dir / "lane_b_cpu").exists()
    assert "scripts.lane_b_infer_ratio" in capsys.readouterr().out
    run()
    assert run("--dry-run") == [] and "--target-param-data-ratio 9.975" in capsys.readouterr().out


@pytest.mark.parametrize(("argv", "message"), [
    (["--target-metric-threshold", "-1"], "bits per byte are above 0"),
    (["--profile", "miniseries"], "use one of cpu, d12"), (["--name", "a/b"], "cannot name a folder")])
def test_a_study_that_cannot_be_is_refused_in_one_line(argv, message, refusal, base_dir):
    error = refusal(lane_b.main, argv)
    assert error.count("\n") == 1 and message in error and not list(base_dir.iterdir())
