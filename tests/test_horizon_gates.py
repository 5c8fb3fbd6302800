"""The gates of a candidate that sets nothing but the horizon, on made ledgers with known crossings."""

import dataclasses
import math
import re

import pytest
from synthetic_runs import make_trial

from nanochat.common import UserError, runs_dir
from nanochat.experiments.gates import judge
from nanochat.experiments.runner import Probe
from nanochat.experiments.report import experiment_report
from nanochat.experiments.runner import SLACK_BPB
from nanochat.experiments.trials import load_trials

SEEDS = (0, 1, 2)


class Bench:
    """Baselines of 200 steps and a candidate of another horizon: the made curves scale with it, and their crossings."""

    def __init__(self, tmp_path):
        self.ledger = tmp_path / "experiments.csv"

    def run(self, candidate, seed, *, steps=200, flags=None, experiment="lane_b", **run):
        row = run.pop("row", {})
        if candidate != "baseline":
            row = {"candidate_flags": f"--num-iterations {steps}" if flags is None else flags} | row
        make_trial(self.ledger, experiment, candidate=candidate, seed=seed, steps=steps, row=row, **run)

    def pairs(self, seeds=SEEDS, steps=180, baseline=None, **candidate):
        for seed in seeds:
            self.run("baseline", seed, **(baseline or {}))
            self.run("shorter", seed, **{"steps": steps + seed, **candidate,
                                         "flags": candidate.get("flags", "--target-param-data-ratio 9")})

    def miniseries(self, thresholds=(1.6, 1.55, 1.5), steps=(150, 170, 180), **candidate):
        for depth, threshold, own in zip((2, 3, 4), thresholds, steps, strict=True):
            world = {"experiment": "series", "depth": depth, "threshold": threshold}
            self.run("baseline", 0, **world)
            self.run("shorter", 0, **{"steps": own, **world, **candidate})

    def verdict(self):
        trials = load_trials(self.ledger, "lane_b", runs_dir())
        series = load_trials(self.ledger, "series", runs_dir()) if "series" in self.ledger.read_text() else ()
        return judge("shorter", trials, series, Probe(0, 0.0, 10))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def outcomes(verdict):
    return [gate.outcome for gate in verdict.gates]


def test_a_horizon_that_reaches_the_target_sooner_is_promoted(bench):
    """Though each depth has a ratio and a target of its own, and a shorter run may end worse than the baseline."""
    bench.pairs(row={"min_val_bpb": 1.49})
    bench.miniseries()
    verdict = bench.verdict()
    assert (verdict.decision, verdict.decided_by) == ("promote", "all four gates")
    assert verdict.gain.mean == pytest.approx(100 * (1 - 181 / 200), abs=0.3)
    assert "target reached in all 3 seeds" in verdict.gates[1].detail


def test_a_flag_beside_the_horizon_leaves_the_kernels_rules(bench):
    bench.pairs(row={"min_val_bpb": 1.49}, flags="--target-param-data-ratio 9 --fused-rmsnorm")
    assert bench.verdict().gates[1].outcome == "fail" and "margin" in bench.verdict().gates[1].detail


def test_times_are_interpolated_steps_and_not_the_clocks_of_the_runs(bench):
    """Every candidate run met a machine twice as slow, between evaluations that are coarser than its gain."""
    bench.pairs(steps=196, step_ms=200.0)
    gain = bench.verdict().gain
    assert gain.mean == pytest.approx(100 * (1 - 197 / 200), abs=0.4)
    trials = load_trials(bench.ledger, "lane_b", runs_dir())
    assert all(t.time_to_target_sec > 20 for t in trials if t.candidate == "shorter")  # by their own clocks


def test_a_second_is_a_step_at_the_median_step_time_of_all_runs(bench):
    bench.pairs(step_ms=200.0)
    figures = bench.verdict().gates[0].figures
    crossing = next(t.crossing_step for t in load_trials(bench.ledger, "lane_b", runs_dir()))
    assert figures["gain_sec"].mean == pytest.approx(crossing * (1 - 181 / 200) * 0.15, rel=0.05)


def test_two_seeds_are_not_enough(bench):
    bench.pairs(SEEDS[:2])
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["insufficient", "insufficient", "pass", "pass"]
    assert verdict.decision == "insufficient" and "2 of 3 seeds" in verdict.gates[0].detail


def test_a_seed_that_misses_the_target_fails_gate_2(bench):
    bench.pairs(SEEDS[:2])
    bench.run("baseline", 2), bench.run("shorter", 2, flags="--target-param-data-ratio 9", steps=182, bpb_shift=0.1)
    bench.miniseries()
    verdict = bench.verdict()
    assert verdict.gates[1].outcome == "fail" and verdict.gates[1].detail == (
        "target not reached: shorter, depth 4, seed 2")
    assert verdict.decision == "reject"


def test_a_run_that_did_not_end_well_missed_nothing(bench):
    bench.pairs(SEEDS[:2])
    bench.run("baseline", 2), bench.run("shorter", 2, flags="--target-param-data-ratio 9", steps=182, nan_at=20)
    verdict = bench.verdict()
    assert verdict.gates[1].outcome == "insufficient" and verdict.gates[2].outcome == "fail"


def test_a_depth_that_misses_its_target_fails_gate_4_before_the_other_depths_are_run(bench):
    bench.pairs()
    bench.run("baseline", 0, experiment="series", depth=2)
    bench.run("shorter", 0, experiment="series", depth=2, steps=150, bpb_shift=0.2)
    gate = bench.verdict().gates[3]
    assert gate.outcome == "fail" and "target not reached: shorter, depth 2, seed 0" in gate.detail


def test_a_run_that_went_on_past_the_baselines_crossing_is_not_lower(bench):
    """In steps: by its own clock the short run took longer than the baseline did."""
    bench.pairs(SEEDS[:2])
    bench.run("baseline", 2), bench.run("shorter", 2, flags="--target-param-data-ratio 9", steps=100, step_ms=900.0,
                                        bpb_shift=0.1)
    assert "not lower" not in bench.verdict().gates[0].detail
    bench.run("baseline", 3), bench.run("shorter", 3, flags="--target-param-data-ratio 9", steps=190, bpb_shift=0.1)
    assert "not lower in seed 3" in bench.verdict().gates[0].detail


def test_a_baseline_that_misses_the_target_is_no_time_to_compare_with(bench):
    bench.pairs(baseline={"bpb_shift": 0.1})
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["insufficient", "pass", "pass", "pass"]
    assert "no time to target in seed 0, 1, 2" in verdict.gates[0].detail


@pytest.mark.parametrize("own", [lambda ends: ends[0], lambda ends: sorted(ends)[1], lambda ends: sum(ends) / 3,
                                 lambda ends: max(ends) + SLACK_BPB])
def test_an_end_of_the_baselines_own_is_no_outside_target(bench, own):
    threshold = own([1.45 + 1.5 * math.exp(-6) + 0.001 * math.sin(seed) for seed in SEEDS])
    bench.pairs(threshold=threshold, bpb_shift=-0.01, baseline={"threshold": threshold})
    gate = bench.verdict().gates[0]
    assert gate.outcome == "insufficient" and "an end of the baseline's own seeds" in gate.detail


def test_a_target_that_was_not_recorded_is_no_target(bench):
    row = {"target_metric_threshold": None}
    bench.pairs(row=row, baseline={"row": row})
    for gate in bench.verdict().gates[:2]:
        assert gate.outcome == "insufficient" and "no target recorded of baseline, depth 4, seed 0" in gate.detail


def test_steps_of_other_batches_are_not_compared(bench):
    bench.pairs()
    config = runs_dir() / "lane_b.shorter.d4.s1" / "config.json"
    config.write_text(config.read_text().replace('"total_batch_size_tokens": 2048', '"total_batch_size_tokens": 4096'))
    gate = bench.verdict().gates[0]
    assert gate.outcome == "insufficient" and "batches of 2048, 4096 tokens" in gate.detail


@pytest.mark.parametrize(("series", "outcome", "words"), [
    ({"steps": (220, 220, 220)}, "fail", "worse at 3 of 3 depths"),
    ({"steps": (150, 170, 180), "bpb_shift": 0.2}, "fail", "target not reached: shorter, depth 2, seed 0"),
    ({"steps": (150, 170, 220)}, "pass", "worse at 1 of 3 depths"),
])
def test_gate_4_takes_each_depths_own_horizon(bench, series, outcome, words):
    bench.pairs()
    bench.miniseries(**series)
    gate = bench.verdict().gates[3]
    assert gate.outcome == outcome and words in gate.detail and "val_bpb" not in gate.detail


def test_gate_4_refuses_a_depths_own_end_and_lacks_what_it_lacks(bench):
    bench.pairs()
    assert bench.verdict().gates[3].outcome == "insufficient"
    end = 1.45 - 0.05 * (2 - 4) + 1.5 * math.exp(-6)
    bench.miniseries(thresholds=(end, 1.55, 1.5), bpb_shift=-0.01)
    gate = bench.verdict().gates[3]
    assert gate.outcome == "insufficient" and "at depth 2 is an end" in gate.detail


def test_one_name_has_one_horizon_at_each_depth(bench):
    bench.pairs()
    bench.run("shorter", 3, steps=150)
    with pytest.raises(UserError, match="keep the lines of one"):
        bench.verdict()


def test_a_kernels_flags_do_not_differ_by_depth(bench):
    for depth, flags in ((2, "--chunked-ce --x 1"), (3, "--chunked-ce --x 2")):
        bench.run("shorter", 0, depth=depth, flags=flags)
    with pytest.raises(UserError, match="keep the lines of one"):
        load_trials(bench.ledger, "lane_b", runs_dir())


def test_a_target_reached_before_the_clock_is_said_to_be_that(bench):
    row = {"time_to_target_sec_measured": 0.0, "time_to_target_sec_extrapolated": None}
    bench.pairs(row=row, baseline={"row": row})
    gate = bench.verdict().gates[0]
    assert gate.outcome == "insufficient"
    assert gate.detail.startswith("target reached before the clock starts in seed 0, 1, 2; no seed has both times")


def test_a_horizon_is_judged_where_triton_is_interpreted(bench):
    device = {"device": "CPU, Triton interpreted"}
    bench.pairs(**device, baseline=device)
    assert outcomes(bench.verdict())[:3] == ["pass"] * 3


def test_curves_that_are_elsewhere_give_no_crossings(bench, tmp_path):
    bench.pairs()
    trials = [dataclasses.replace(t, record=None) for t in load_trials(bench.ledger, "lane_b", runs_dir())]
    assert judge("shorter", trials).gates[0].outcome == "insufficient"


def test_a_report_shows_the_times_that_the_gates_judge(bench):
    """Half as long a horizon, on a machine that was four times as slow meanwhile."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib (extra `report`)")
    bench.pairs(steps=100, step_ms=400.0, baseline={"step_ms": 100.0})
    means = re.search(r"Training time to target, means: baseline ([\d.]+) s, shorter ([\d.]+) s",
                      experiment_report(bench.ledger, "lane_b", runs_dir()).html())
    assert float(means[2]) / float(means[1]) == pytest.approx(101 / 200, rel=0.01)
