"""The four gates on made ledgers with known answers."""

import math

import numpy as np
import pytest
from scipy import stats
from synthetic_runs import make_trial

from nanochat.common import UserError, runs_dir
from nanochat.experiments.comparison import Rules
from nanochat.experiments.gates import judge
from nanochat.experiments.paired import paired
from nanochat.experiments.runner import Probe
from nanochat.experiments.trials import load_trials

CANDIDATE = "fused-rmsnorm"


class Bench:
    """A made experiment: two or more seeds of baseline and candidate, a miniseries, a resume probe."""

    def __init__(self, tmp_path):
        self.ledger = tmp_path / "experiments.csv"
        self.probe = Probe(graph_breaks=0, resume_difference_nats=0.0, steps_compared=10)

    def pair(self, seed, gain=0.05, depth=4, experiment="lane_c", baseline=None, **candidate):
        jitter = 1 + 0.001 * math.sin(7 * seed + depth)
        self.baseline(seed, depth, experiment, **(baseline or {}))
        make_trial(self.ledger, experiment, candidate=CANDIDATE, depth=depth, seed=seed,
                   **{"step_ms": 100 * (1 - gain) * jitter} | candidate)

    def pairs(self, n_seeds, **run):
        for seed in range(n_seeds):
            self.pair(seed, **run)

    def baseline(self, seed, depth=4, experiment="lane_c", **run):
        make_trial(self.ledger, experiment, depth=depth, seed=seed, **run)

    def miniseries(self, gain=0.05, **candidate):
        for depth in (2, 3, 4):
            self.pair(0, gain=gain, depth=depth, experiment="miniseries", **candidate)

    def verdict(self, miniseries=True):
        return judge(CANDIDATE, load_trials(self.ledger, "lane_c", runs_dir()),
                     load_trials(self.ledger, "miniseries", runs_dir()) if miniseries else (),
                     self.probe)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def outcomes(verdict):
    return [gate.outcome for gate in verdict.gates]


def test_a_real_gain_is_promoted(bench):
    bench.pairs(3)
    bench.miniseries()
    verdict = bench.verdict()
    assert (verdict.decision, verdict.decided_by) == ("promote", "all four gates")
    assert outcomes(verdict) == ["pass"] * 4
    assert verdict.gain.n == 3 and verdict.gain.mean == pytest.approx(5.0, abs=0.2) and verdict.gain.p < 0.01
    assert "n=3" in verdict.gates[0].detail and "sd" in verdict.gates[0].detail and "p=" in verdict.gates[0].detail


def test_slower_in_one_seed_fails_gate_1_alone(bench):
    bench.pair(0), bench.pair(1, gain=-0.02), bench.pair(2)
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["fail", "pass", "pass", "pass"]
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 1 time")
    assert "not lower in seed 1" in verdict.gates[0].detail


def test_equal_times_are_not_a_gain(bench):
    bench.pairs(3, step_ms=100.0)
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["fail", "pass", "pass", "pass"] and verdict.decision == "reject"
    assert verdict.gain.mean == 0 and verdict.gain.p is None


def test_target_never_reached_where_the_baseline_reached_it_fails_gate_1(bench):
    bench.pairs(2, gain=-0.05, bpb_shift=0.2)
    bench.miniseries()
    assert "not lower in seed 0, 1" in bench.verdict().gates[0].detail


def test_worse_end_fails_gate_2_alone(bench):
    # baseline sd 0.0005: the margin is 2 sd; the excess comes after the target was reached
    bench.pairs(3, bpb_shift=0.0028, threshold=2.5, baseline={"threshold": 2.5})
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass", "fail", "pass", "pass"]
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 2 quality")


def test_excess_below_the_floor_passes_even_when_repeats_are_equal(bench):
    for seed in (0, 1):
        bench.pair(seed, bpb_shift=0.00045 - 0.001 * math.sin(seed), baseline={"bpb_shift": -0.001 * math.sin(seed)})
    bench.miniseries()
    gate = bench.verdict().gates[1]
    assert gate.outcome == "pass" and "margin 0.00050" in gate.detail


def test_excess_in_mid_run_fails_gate_2(bench, monkeypatch):
    import synthetic_runs
    plain = synthetic_runs._bpb
    for seed in range(3):
        bench.baseline(seed)
    monkeypatch.setattr(synthetic_runs, "_bpb", lambda step, *a: plain(step, *a) + (0.05 if step == 60 else 0))
    for seed in range(3):
        make_trial(bench.ledger, "lane_c", candidate=CANDIDATE, seed=seed, step_ms=95 + 0.1 * seed)
    verdict = bench.verdict(miniseries=False)
    assert verdict.gates[1].outcome == "fail" and "at step 60" in verdict.gates[1].detail


def test_a_loss_spike_fails_gate_3_alone(bench):
    bench.pair(0), bench.pair(1, spike_at=150), bench.pair(2)
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass", "pass", "fail", "pass"]
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 3 stability")
    assert "seed 1 has a loss spike at step 150" in verdict.gates[2].detail


def test_a_spike_that_the_baseline_has_too_is_the_datas(bench):
    bench.pairs(3, spike_at=150, baseline={"spike_at": 150})
    bench.miniseries()
    assert bench.verdict().decision == "promote"


@pytest.mark.parametrize(("probe", "words"), [
    (Probe(0, 0.1, 10), "differ by 0.1 nats"), (Probe(0, None, 10), "did not end well"),
    (Probe(2, 0.0, 10), "2 graph breaks"),
])
def test_a_failed_probe_fails_gate_3_alone(bench, probe, words):
    bench.pairs(3)
    bench.miniseries()
    bench.probe = probe
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass", "pass", "fail", "pass"] and words in verdict.gates[2].detail


def test_an_uncompiled_probe_says_nothing_of_graph_breaks(bench):
    bench.pairs(3)
    bench.miniseries()
    bench.probe = Probe(None, 0.0, 10)
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass", "pass", "insufficient", "pass"] and "uncompiled" in verdict.gates[2].detail


@pytest.mark.parametrize(("steps", "outcome"), [(50, "insufficient"), (60, "pass")])
def test_runs_too_short_to_look_for_a_spike_are_not_called_stable(bench, steps, outcome):
    short = {"steps": steps, "eval_every": 5}
    bench.pairs(2, baseline=short, **short)
    gate = bench.verdict(miniseries=False).gates[2]
    assert gate.outcome == outcome and ("too short to look for a spike" in gate.detail) == (steps == 50)


def test_identical_differences_are_no_interval_and_never_promoted(bench):
    bench.pairs(3, step_ms=95.0)
    bench.miniseries(step_ms=95.0)
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass"] * 4 and (verdict.gain.lo, verdict.gain.p) == (None, None)
    assert (verdict.decision, verdict.decided_by) == ("optional", "gate 1 time: the gain has no interval")


@pytest.mark.parametrize("step", [20, 160])
def test_noise_of_early_evaluations_excuses_no_late_excess(bench, monkeypatch, step):
    """Baselines that differ by 0.2 at step 20 alone: an excess of 0.05 is within the noise there, and only there."""
    import synthetic_runs
    plain = synthetic_runs._bpb
    for seed in range(3):
        noise = 0.2 * seed
        monkeypatch.setattr(synthetic_runs, "_bpb", lambda s, *a, n=noise: plain(s, *a) + (n if s == 20 else 0))
        bench.baseline(seed)
        monkeypatch.setattr(synthetic_runs, "_bpb", lambda s, *a, n=noise: (
            plain(s, *a) + (n if s == 20 else 0) + (0.05 if s == step else 0)))
        make_trial(bench.ledger, "lane_c", candidate=CANDIDATE, seed=seed, step_ms=95 + 0.1 * seed)
    gate = bench.verdict(miniseries=False).gates[1]
    assert gate.outcome == ("pass" if step == 20 else "fail")


@pytest.mark.parametrize(("world", "word"), [({"device": "H200"}, "device"), ({"dataset_id": "books-2"}, "dataset")])
def test_a_miniseries_of_another_world_is_refused(bench, world, word):
    bench.pairs(2)
    bench.miniseries(baseline=world, **world)
    with pytest.raises(UserError, match=f"another {word}.*miniseries"):
        bench.verdict()


def test_runs_of_another_tokenizer_are_not_compared(bench):
    bench.pair(0), bench.pair(1)
    config = runs_dir() / f"lane_c.{CANDIDATE}.d4.s1" / "config.json"
    config.write_text(config.read_text().replace("abc123", "def456"))
    with pytest.raises(UserError, match=r"another tokenizer.*def456"):
        bench.verdict(miniseries=False)


@pytest.mark.parametrize(("worse", "decision"), [({}, "not judged"), ({"nan_at": 120}, "reject"),
                                                 ({"bpb_shift": 0.05}, "reject")])
def test_an_interpreters_times_are_not_judged_but_its_numbers_are(bench, worse, decision):
    """A kernel six times slower in the interpreter: gates 1 and 4 say neither that it is slower nor that it is not."""
    device = {"device": "CPU, Triton interpreted"}
    bench.pairs(3, step_ms=600.0, baseline=device, **device, **worse)
    bench.miniseries(step_ms=600.0, baseline=device, **device)
    verdict = bench.verdict()
    assert verdict.decision == decision and outcomes(verdict)[0] == outcomes(verdict)[3] == "insufficient"
    if not worse:
        assert outcomes(verdict) == ["insufficient", "pass", "pass", "insufficient"]
        assert "not judged on this device" in verdict.decided_by and "Triton" in verdict.gates[0].detail


def test_a_kernel_whose_bits_per_byte_rise_over_the_depths_fails_in_the_interpreter_too(bench):
    device = {"device": "CPU, Triton interpreted"}
    bench.pairs(3, baseline=device, **device)
    bench.miniseries(bpb_shift=0.05, threshold=2.5, baseline={"threshold": 2.5, **device}, **device)
    assert (bench.verdict().decision, bench.verdict().decided_by) == ("reject", "gate 4 generalisation")


def test_a_target_reached_before_the_clock_is_said_to_be_that(bench):
    row = {"time_to_target_sec_measured": 0.0, "time_to_target_sec_extrapolated": None}
    bench.pair(0, row=row, baseline={"row": row}), bench.pair(1)
    gate = bench.verdict(miniseries=False).gates[0]
    assert gate.outcome == "insufficient"
    assert gate.detail.startswith("target reached before the clock starts in seed 0; gain n=1")


def test_a_nan_run_is_rejected_by_gate_3(bench):
    bench.pair(0), bench.pair(1, nan_at=120), bench.pair(2)
    bench.miniseries()
    verdict = bench.verdict()
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 3 stability")
    assert "seed 1 ended as 'nan'" in verdict.gates[2].detail
    assert outcomes(verdict)[0] == "insufficient"


def test_a_run_without_summary_counts_as_failed(bench):
    bench.pair(0), bench.pair(1, finished=False)
    bench.miniseries()
    verdict = bench.verdict()
    assert verdict.decision == "reject" and "'failed'" in verdict.gates[2].detail


def test_slower_at_every_depth_fails_gate_4_alone(bench):
    bench.pairs(3)
    bench.miniseries(gain=-0.05)
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass", "pass", "pass", "fail"]
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 4 generalisation")
    assert "worse at 3 of 3 depths (sign test p=0.12)" in verdict.gates[3].detail


def test_worse_bits_per_byte_at_every_depth_fails_gate_4_alone(bench):
    bench.pairs(3)
    bench.miniseries(bpb_shift=0.02, threshold=2.5, baseline={"threshold": 2.5})
    assert outcomes(bench.verdict()) == ["pass", "pass", "pass", "fail"]


def test_slower_at_one_depth_of_four_is_not_systematic(bench):
    bench.pairs(3)
    bench.miniseries()
    bench.pair(0, gain=-0.03, depth=6, experiment="miniseries")
    assert outcomes(bench.verdict()) == ["pass"] * 4


def test_gates_give_figures_and_one_place_words_them(bench):
    bench.pair(0), bench.pair(1), bench.pair(2, row={"min_val_bpb": None})
    bench.baseline(3)
    time, quality, *_ = bench.verdict(miniseries=False).gates
    assert time.figures["absent"] == [("candidate", 4, 3)] and time.figures["gain_percent"].n == 3
    assert time.detail.startswith("no run of the candidate at depth 4 seed 3; gain n=3, mean +")
    assert quality.figures["excess_and_margin_bpb"][0].n == 2


def test_a_seed_without_val_bpb_is_one_of_those_needed(bench):
    bench.pair(0), bench.pair(1), bench.pair(2, row={"min_val_bpb": None})
    gate = bench.verdict(miniseries=False).gates[1]
    assert gate.outcome == "insufficient" and gate.detail.startswith("2 of 3 seeds; min val_bpb n=2")


@pytest.mark.parametrize("missing", ["candidate seed", "baseline seed", "one seed", "miniseries", "depths", "probe",
                                     "failed baseline"])
def test_missing_runs_are_insufficient_never_a_pass(bench, missing):
    bench.pair(0)
    if missing != "one seed":
        bench.pair(1, baseline={"finished": missing != "failed baseline"})
    if missing == "candidate seed":
        bench.baseline(2)
    if missing == "baseline seed":
        make_trial(bench.ledger, "lane_c", candidate=CANDIDATE, seed=2, step_ms=95.0)
    if missing == "probe":
        bench.probe = None
    if missing == "depths":
        bench.pair(0, depth=2, experiment="miniseries"), bench.pair(0, depth=3, experiment="miniseries")
    elif missing != "miniseries":
        bench.miniseries()
    verdict = bench.verdict(miniseries=missing != "miniseries")
    assert verdict.decision == "insufficient" and "fail" not in outcomes(verdict)
    number = {"miniseries": 3, "depths": 3, "probe": 2}.get(missing, 0)
    assert outcomes(verdict)[number] == "insufficient"


def test_runs_whose_curves_are_elsewhere_are_insufficient(bench, monkeypatch, tmp_path):
    bench.pairs(3)
    bench.miniseries()
    trials, series = (load_trials(bench.ledger, name, tmp_path / "nowhere") for name in ("lane_c", "miniseries"))
    verdict = judge(CANDIDATE, trials, series, bench.probe)
    assert verdict.decision == "insufficient" and outcomes(verdict) == ["pass", *["insufficient"] * 2, "pass"]


def test_noise_at_the_size_of_the_gain_is_optional(bench):
    for seed, gain in enumerate((0.001, 0.03, 0.002)):
        bench.pair(seed, gain=gain)
    bench.miniseries()
    verdict = bench.verdict()
    assert outcomes(verdict) == ["pass"] * 4
    assert verdict.decision == "optional" and "interval reaches zero" in verdict.decided_by
    assert [gate.standing for gate in verdict.gates] == ["not shown", *["pass"] * 3]
    assert "1 time           not shown" in "\n".join(verdict.describe())


def test_extrapolated_times_are_at_most_optional(bench):
    for seed in range(3):
        bench.pair(seed, row={"time_to_target_sec_measured": None,
                              "time_to_target_sec_extrapolated": 8.0 + 0.01 * seed})
    bench.miniseries()
    verdict = bench.verdict()
    assert verdict.decision == "optional" and "extrapolated" in verdict.decided_by


@pytest.mark.parametrize(("change", "word"), [
    ({"dataset_id": "books-2"}, "dataset"), ({"device": "NVIDIA H200"}, "device"),
    ({"row": {"target_metric_threshold": 1.4}}, "target"), ({"steps": 100}, "horizon"),
])
def test_runs_of_different_worlds_are_not_compared(bench, change, word):
    bench.pair(0)
    bench.pair(1, **change)
    with pytest.raises(UserError, match=f"another {word}.*s1"):
        bench.verdict(miniseries=False)


def test_two_runs_of_one_cell_are_refused_by_name(bench):
    bench.pair(0)
    make_trial(bench.ledger, "lane_c", seed=0, depth=4, candidate="chunked-ce", row={"candidate_flags": ""})
    with pytest.raises(UserError, match=r"lane_c\.baseline\.d4\.s0 and lane_c\.chunked-ce\.d4\.s0 are both baseline"):
        bench.verdict(miniseries=False)


def test_a_hand_made_mistake_in_the_ledger_is_named_by_line(bench):
    bench.pair(0)
    lines = bench.ledger.read_text().splitlines()
    lines[2] = lines[2].replace(",4,val_bpb", ",four,val_bpb")
    bench.ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="line 3: depth is 'four'"):
        bench.verdict(miniseries=False)


def test_a_record_with_another_runs_id_is_refused(bench):
    bench.pair(0)
    folder = runs_dir() / "lane_c.baseline.d4.s0"
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("baseline.d4.s0", "other"))
    with pytest.raises(UserError, match="two runs"):
        bench.verdict(miniseries=False)


def test_unknown_names_are_refused_with_those_there_are(bench):
    bench.pair(0)
    with pytest.raises(UserError, match=r"no experiment 'x'.*lane_c"):
        load_trials(bench.ledger, "x", runs_dir())
    with pytest.raises(UserError, match=r"no candidate 'both'.*fused-rmsnorm"):
        judge("both", load_trials(bench.ledger, "lane_c", runs_dir()))


def test_several_depths_are_not_judged_as_one(bench):
    bench.miniseries()
    with pytest.raises(UserError, match="depths 2, 3, 4"):
        judge(CANDIDATE, load_trials(bench.ledger, "miniseries", runs_dir()))


def test_paired_statistics_agree_with_scipy():
    base, tried = np.array([10.0, 11.0, 9.5, 10.4]), np.array([9.1, 10.6, 9.4, 9.3])
    found = paired(base - tried, 0.9)
    want = stats.ttest_rel(base, tried, alternative="two-sided").confidence_interval(0.9)
    assert (found.lo, found.hi) == pytest.approx((want.low, want.high))
    assert found.p == pytest.approx(stats.ttest_rel(base, tried, alternative="greater").pvalue)
    assert found.sd == pytest.approx(np.std(base - tried, ddof=1))


def test_without_a_real_gain_promotion_is_rarer_than_the_intervals_error():
    """2000 experiments of three seeds whose candidate changes nothing: gate 1's interval excludes zero above."""
    rng = np.random.default_rng(0)
    gains = rng.standard_normal((2000, 3))
    promoted = sum(bool((row > 0).all()) and paired(row, Rules().confidence).lo > 0 for row in gains)
    assert promoted / 2000 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 2000)
