"""The four gates on made ledgers with known answers, and against plain loops."""

import math
import types

import numpy as np
import pandas as pd
import pytest
import synthetic_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_runs import make_trial

from nanochat.common import UserError, runs_dir
from nanochat.experiments.gates import (
    SPIKE_WINDOW,
    judge,
    paired,
    quality_margin,
    spikes,
    time_gate,
)
from nanochat.experiments.runner import SLACK_BPB, Probe
from nanochat.experiments.table import experiment_table, on_one_clock

KERNEL, HORIZON = "fused-rmsnorm", "shorter"
INTERPRETED = {"device": "CPU, Triton interpreted"}
UNTIMED = {"row": {"time_to_target_sec_measured": 0.0, "time_to_target_sec_extrapolated": None}}


class Bench:
    """A made experiment: seeds of a baseline and a candidate, a miniseries, a probe."""

    def __init__(self, tmp_path):
        self.ledger = tmp_path / "experiments.csv"
        self.probe = Probe(graph_breaks=0, resume_difference_nats=0.0, steps_compared=10)
        self.candidate = KERNEL

    def run(self, candidate="baseline", seed=0, experiment="own", **run):
        make_trial(self.ledger, experiment, candidate=candidate, seed=seed, **run)

    def pair(self, seed, gain=0.05, depth=4, experiment="own", baseline=None, **candidate):
        jitter = 1 + 0.001 * math.sin(7 * seed + depth)
        self.run(seed=seed, depth=depth, experiment=experiment, **(baseline or {}))
        self.run(KERNEL, seed, depth=depth, experiment=experiment,
                 **{"step_ms": 100 * (1 - gain) * jitter} | candidate)

    def pairs(self, n_seeds=3, **run):
        for seed in range(n_seeds):
            self.pair(seed, **run)
        return self

    def series(self, gain=0.05, **candidate):
        for depth in (2, 3, 4):
            self.pair(0, gain=gain, depth=depth, experiment="series", **candidate)
        return self

    def horizon(self, seed, steps=180, flags="--target-param-data-ratio 9", baseline=None, **run):
        """A candidate of another horizon: the made curve scales with it, and so its crossing."""
        self.candidate = HORIZON
        world = {name: run[name] for name in ("experiment", "depth", "threshold") if name in run}
        row = {"candidate_flags": flags} | run.pop("row", {})
        self.run(seed=seed, **world | (baseline or {}))
        self.run(HORIZON, seed, steps=steps, row=row, **run)

    def horizons(self, n_seeds=3, steps=180, **run):
        for seed in range(n_seeds):
            self.horizon(seed, steps=steps + seed, **run)
        return self

    def horizon_series(self, steps=(150, 170, 180), thresholds=(1.6, 1.55, 1.5), **run):
        for depth, own, threshold in zip((2, 3, 4), steps, thresholds, strict=True):
            self.horizon(0, own, f"--num-iterations {own}", experiment="series", depth=depth,
                         threshold=threshold, **run)
        return self

    def tables(self, folder=None):
        has_series = ",series," in self.ledger.read_text()
        return [experiment_table(self.ledger, name, folder or runs_dir()) if there else None
                for name, there in (("own", True), ("series", has_series))]

    def verdict(self, folder=None):
        return judge(self.candidate, *self.tables(folder), self.probe)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def outcomes(verdict):
    return [gate.outcome for gate in verdict.gates]


def test_a_real_gain_is_promoted(bench):
    verdict = bench.pairs().series().verdict()
    assert (verdict.decision, verdict.decided_by) == ("promote", "all four gates")
    assert outcomes(verdict) == ["pass"] * 4 and verdict.flags == "--fused-rmsnorm"
    assert verdict.gates[0].sentence.startswith("gain n=3, mean +5")
    assert "two-sided p=" in verdict.gates[0].sentence
    assert "1 time           pass          gain" in "\n".join(verdict.describe())


FAILURES = {  # (runs, failing gate's number, words)
    "slower": ({"gain": -0.02}, 1, "not lower in seed 0, 1, 2"),
    "equal": ({"step_ms": 100.0}, 1, "seed 0, 1, 2; gain n=3, mean +0 % (no interval)"),
    "worse end": ({"bpb_shift": 0.0028, "threshold": 2.5, "baseline": {"threshold": 2.5}}, 2,
                  "margin 0.00"),
    "spike": ({"spike_at": 150}, 3, "seed 0 has a loss spike at step 150"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_fault_fails_its_gate_only(bench, case):
    runs, number, words = FAILURES[case]
    verdict = bench.pairs(**runs).series().verdict()
    assert outcomes(verdict) == ["fail" if at == number else "pass" for at in (1, 2, 3, 4)]
    assert verdict.decision == "reject" and words in verdict.gates[number - 1].sentence
    assert verdict.decided_by == f"gate {verdict.gates[number - 1].name}"


def test_one_slower_seed_fails_gate_1(bench):
    bench.pair(0), bench.pair(1, gain=-0.02), bench.pair(2)
    assert "not lower in seed 1;" in bench.verdict().gates[0].sentence


def test_a_target_that_only_the_baseline_reached_fails_gate_1(bench):
    bench.pairs(2, gain=-0.05, bpb_shift=0.2)
    assert bench.verdict().gates[0].outcome == "fail"


def test_a_spike_of_the_baseline_too_comes_from_the_data(bench):
    bench.pairs(spike_at=150, baseline={"spike_at": 150})
    assert bench.verdict().gates[2].outcome == "pass"


def test_an_excess_below_the_floor_passes_when_repeats_are_equal(bench):
    for seed in (0, 1):
        own = -0.001 * math.sin(seed)
        bench.pair(seed, bpb_shift=0.00045 + own, baseline={"bpb_shift": own})
    gate = bench.verdict().gates[1]
    assert gate.outcome == "pass" and "margin 0.00050" in gate.sentence


@pytest.mark.parametrize(("noisy_step", "bad_step", "outcome"), [
    (None, 60, "fail"), (20, 20, "pass"), (20, 160, "fail")])
def test_an_excess_in_mid_run_is_judged_by_the_noise_of_its_step(
        bench, monkeypatch, noisy_step, bad_step, outcome):
    plain = synthetic_runs._bpb
    for seed in range(3):
        def noisy(step, *world, seed=seed):
            return plain(step, *world) + (0.2 * seed if step == noisy_step else 0)

        def bad(step, *world, noisy=noisy):
            return noisy(step, *world) + (0.05 if step == bad_step else 0)

        monkeypatch.setattr(synthetic_runs, "_bpb", noisy)
        bench.run(seed=seed)
        monkeypatch.setattr(synthetic_runs, "_bpb", bad)
        bench.run(KERNEL, seed, step_ms=95 + 0.1 * seed)
    gate = bench.verdict().gates[1]
    assert gate.outcome == outcome
    assert outcome == "pass" or f"at step {bad_step}" in gate.sentence


@pytest.mark.parametrize(("probe", "outcome", "words"), [
    (Probe(0, 0.1, 10), "fail", "differ by 0.1 nats"), (Probe(0, None, 10), "fail", "not end well"),
    (Probe(2, 0.0, 10), "fail", "2 graph breaks"), (Probe(None, 0.0, 10), "insufficient", "uncomp"),
    (None, "insufficient", "no save/resume probe")])
def test_the_probe_decides_gate_3(bench, probe, outcome, words):
    bench.pairs(2).probe = probe
    gate = bench.verdict().gates[2]
    assert gate.outcome == outcome and words in gate.sentence


@pytest.mark.parametrize(("steps", "outcome"), [(50, "insufficient"), (60, "pass")])
def test_runs_too_short_to_look_for_a_spike_are_not_called_stable(bench, steps, outcome):
    short = {"steps": steps, "eval_every": 5}
    assert bench.pairs(2, baseline=short, **short).verdict().gates[2].outcome == outcome


@pytest.mark.parametrize(("ends", "words"), [({"nan_at": 99}, "nan"), ({"finished": False}, "fa")])
def test_a_run_that_did_not_end_well_is_rejected_by_gate_3(bench, ends, words):
    bench.pair(0), bench.pair(1, **ends), bench.pair(2)
    verdict = bench.series().verdict()
    assert (verdict.decision, verdict.decided_by) == ("reject", "gate 3 stability")
    assert f"depth 4 seed 1: {words}" in verdict.gates[2].sentence
    assert outcomes(verdict)[0] == "insufficient"


DOUBTS = {
    "the gain has no interval": [{"step_ms": 95.0}] * 3,
    "the gain's interval reaches zero": [{"gain": gain} for gain in (0.001, 0.03, 0.002)],
    "a time to target was extrapolated, not measured": [
        {"row": {"time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": 8 + seed}}
        for seed in (0.0, 0.01, 0.02)],
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_gain_in_doubt_is_optional(bench, doubt):
    for seed, run in enumerate(DOUBTS[doubt]):
        bench.pair(seed, **run)
    verdict = bench.series().verdict()
    assert outcomes(verdict) == ["not shown", "pass", "pass", "pass"]
    assert (verdict.decision, verdict.decided_by) == ("optional", f"gate 1 time: {doubt}")


@pytest.mark.parametrize("lack", ["candidate seed", "baseline seed", "one seed", "failed baseline",
                                  "series", "depths", "val_bpb", "before the clock"])
def test_missing_runs_are_insufficient_never_a_pass(bench, lack):
    bench.pair(0, **({"row": {"min_val_bpb": None}} if lack == "val_bpb" else {}))
    if lack != "one seed":
        untimed = UNTIMED if lack == "before the clock" else {}
        bench.pair(1, **untimed, baseline={"finished": lack != "failed baseline"} | untimed)
    if lack == "candidate seed":
        bench.run(seed=2)
    if lack == "baseline seed":
        bench.run(KERNEL, seed=2, step_ms=95.0)
    if lack == "depths":
        bench.pair(0, depth=2, experiment="series"), bench.pair(0, depth=3, experiment="series")
    elif lack != "series":
        bench.series()
    verdict = bench.verdict()
    number, words = {"series": (3, "no miniseries"), "depths": (3, "2 of 3 depths"),
                     "val_bpb": (1, "1 of 2 seeds; min val_bpb n=1"),
                     "one seed": (0, "1 of 2 seeds"),
                     "candidate seed": (0, "fused-rmsnorm depth 4 seed 2: was not run"),
                     "baseline seed": (0, "baseline depth 4 seed 2: was not run"),
                     "before the clock": (0, "reached before the clock starts in seed 1"),
                     "failed baseline": (0, "baseline depth 4 seed 1: failed")}[lack]
    assert verdict.decision == "insufficient" and "fail" not in outcomes(verdict)
    assert outcomes(verdict)[number] == "insufficient"
    assert words in verdict.gates[number].sentence


def test_missing_records_are_said_and_contradict_no_verdict(bench, tmp_path):
    verdict = bench.pairs().series().verdict(folder=tmp_path / "nowhere")
    assert verdict.decision == "not judged"
    assert verdict.decided_by.startswith("records missing here of 6 of 6 runs; the ledger says: "
                                         "baseline reached the target in 3 of 3 runs after 12 s")
    bench.run(seed=3), bench.run(KERNEL, 3, nan_at=120)
    assert bench.verdict(folder=tmp_path / "nowhere").decision == "reject"  # the ledger suffices


@pytest.mark.parametrize(("worse", "decision"), [({}, "not judged"), ({"nan_at": 120}, "reject"),
                                                 ({"bpb_shift": 0.05}, "reject")])
def test_an_interpreters_times_are_not_judged_but_its_losses_are(bench, worse, decision):
    bench.pairs(step_ms=600.0, baseline=INTERPRETED, **INTERPRETED, **worse)
    verdict = bench.series(step_ms=600.0, baseline=INTERPRETED, **INTERPRETED).verdict()
    assert verdict.decision == decision and verdict.gates[0].outcome == "not judged"
    if not worse:
        assert outcomes(verdict) == ["not judged", "pass", "pass", "not judged"]
        assert "run it on a GPU" in verdict.decided_by


@pytest.mark.parametrize(("series", "outcome", "words"), [
    ({"gain": -0.05}, "fail", "time to target n=3, mean +5"),
    ({"bpb_shift": 0.02, "threshold": 2.5, "baseline": {"threshold": 2.5}}, "fail", "val_bpb n=3"),
    ({}, "pass", "worse at 0 of 3 depths"),
    ({"nan_at": 120}, "fail", "fused-rmsnorm depth 2 seed 0: nan"),
    ({"row": {"min_val_bpb": None}}, "insufficient", "a run has no val_bpb"),
])
def test_gate_4_asks_for_systematic_regressions(bench, series, outcome, words):
    gate = bench.pairs().series(**series).verdict().gates[3]
    assert gate.outcome == outcome and words in gate.sentence


def test_a_regression_at_one_of_four_depths_is_not_systematic(bench):
    bench.pairs().series().pair(0, gain=-0.03, depth=6, experiment="series")
    gate = bench.verdict().gates[3]
    assert gate.outcome == "pass" and "worse at 1 of 4 depths" in gate.sentence


@pytest.mark.parametrize(("change", "word"), [
    ({"dataset_id": "books-2"}, "dataset"), ({"device": "NVIDIA H200"}, "device"),
    ({"row": {"target_metric_threshold": 1.4}}, "target"), ({"steps": 100}, "horizon")])
def test_runs_of_different_worlds_are_not_compared(bench, change, word):
    bench.pair(0), bench.pair(1, **change)
    with pytest.raises(UserError, match=rf"another {word}.*s1"):
        bench.verdict()


def test_a_miniseries_of_another_world_is_not_compared(bench):
    bench.pairs(2).series(baseline={"device": "H200"}, device="H200")
    with pytest.raises(UserError, match=r"another device.*series"):
        bench.verdict()


def test_wrong_tables_are_refused_by_name(bench):
    bench.pair(0)
    table, _ = bench.tables()
    for candidate, runs in (("both", table), (KERNEL, table[table.candidate == KERNEL])):
        with pytest.raises(UserError, match="is judged against the 'baseline' of an experiment"):
            judge(candidate, runs)
    bench.pair(0, depth=2)
    with pytest.raises(UserError, match="depths 2, 4"):
        bench.verdict()


# --- horizons ---------------------------------------------------------------------------------

def test_a_horizon_that_reaches_the_target_sooner_is_promoted(bench):
    """Though each depth has a ratio and a target of its own, and a shorter run ends worse."""
    verdict = bench.horizons(row={"min_val_bpb": 1.49}).horizon_series().verdict()
    assert (verdict.decision, verdict.decided_by) == ("promote", "all four gates")
    assert "target reached in all 3 seeds" in verdict.gates[1].sentence


def test_another_flag_beside_the_horizon_leaves_the_kernels_rules(bench):
    bench.horizons(row={"min_val_bpb": 1.49}, flags="--num-iterations 9 --fused-rmsnorm")
    gate = bench.verdict().gates[1]
    assert gate.outcome == "fail" and "margin" in gate.sentence


def test_times_are_interpolated_steps_whatever_the_load_of_the_machine(bench):
    """Every candidate run met a machine twice as slow, and gains less than an evaluation."""
    bench.horizons(steps=196, step_ms=200.0)
    table, _ = bench.tables()
    timed = on_one_clock(table).set_index("candidate").time_to_target_sec
    assert timed[HORIZON].mean() / timed["baseline"].mean() == pytest.approx(197 / 200, abs=0.004)
    crossing = table.crossing_step[table.candidate == "baseline"].iloc[0]
    assert timed["baseline"].iloc[0] == pytest.approx(crossing * 0.15)  # the median of 0.1 and 0.2
    assert (table.time_to_target_sec[table.candidate == HORIZON] > 20).all()  # by their own clocks
    assert bench.verdict().gates[0].sentence.startswith("gain n=3, mean +1.")


def test_two_seeds_are_not_enough_for_a_horizon(bench):
    verdict = bench.horizons(2).horizon_series().verdict()
    assert outcomes(verdict) == ["insufficient", "insufficient", "pass", "pass"]
    assert "2 of 3 seeds" in verdict.gates[0].sentence


def test_a_seed_that_misses_the_target_fails_gate_2(bench):
    bench.horizons(2).horizon(2, bpb_shift=0.1)
    gate = bench.verdict().gates[1]
    assert gate == ("2 quality", "fail", "target not reached: shorter depth 4 seed 2")
    bench.horizon(3, nan_at=20)
    assert "seed 3" not in bench.verdict().gates[1].sentence.partition(";")[0]


def test_a_run_past_the_baselines_crossing_is_slower_in_steps(bench):
    bench.horizons(2).horizon(2, steps=100, step_ms=900.0, bpb_shift=0.1)
    assert "not lower" not in bench.verdict().gates[0].sentence
    bench.horizon(3, steps=190, bpb_shift=0.1)
    assert "not lower in seed 3" in bench.verdict().gates[0].sentence


@pytest.mark.parametrize("derived", [lambda ends: ends[0], np.median, np.mean,
                                     lambda ends: max(ends) + SLACK_BPB])
def test_a_target_derived_from_the_baselines_ends_is_refused(bench, derived):
    ends = [1.45 + 1.5 * math.exp(-6) + 0.001 * math.sin(seed) for seed in range(3)]
    bench.horizons(threshold=float(derived(ends)), bpb_shift=-0.01)
    gate = bench.verdict().gates[0]
    assert gate.outcome == "insufficient" and "derived from the baseline runs" in gate.sentence


def test_a_target_must_be_recorded_and_batches_equal(bench):
    bench.horizons(row={"target_metric_threshold": None},
                   baseline={"row": {"target_metric_threshold": None}})
    assert [gate.outcome for gate in bench.verdict().gates[:2]] == ["insufficient"] * 2
    assert "none is recorded of baseline depth 4 seed 0" in bench.verdict().gates[0].sentence
    config = runs_dir() / "own.shorter.d4.s1" / "config.json"
    config.write_text(config.read_text().replace('tokens": 2048', 'tokens": 4096'))
    assert "batches of 2048, 4096 tokens" in bench.verdict().gates[0].sentence


@pytest.mark.parametrize(("series", "outcome", "words"), [
    ({"steps": (220, 220, 220)}, "fail", "worse at 3 of 3 depths"),
    ({"bpb_shift": 0.2}, "fail", "target not reached: shorter depth 2 seed 0"),
    ({"steps": (150, 170, 220)}, "pass", "worse at 1 of 3 depths"),
    ({"thresholds": (1.55 + 1.5 * math.exp(-6), 1.55, 1.5), "bpb_shift": -0.01}, "insufficient",
     "at depth 2 was derived"),
])
def test_gate_4_takes_each_depths_own_horizon(bench, series, outcome, words):
    gate = bench.horizons().horizon_series(**series).verdict().gates[3]
    assert gate.outcome == outcome and words in gate.sentence and "val_bpb" not in gate.sentence


def test_a_horizon_is_judged_where_triton_is_interpreted(bench):
    bench.horizons(**INTERPRETED, baseline=INTERPRETED)
    assert outcomes(bench.verdict())[:3] == ["pass"] * 3


# --- against plain loops ----------------------------------------------------------------------

seconds = st.none() | st.just(0.0) | st.floats(0.1, 100)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(seconds, seconds, st.booleans(), st.sampled_from(["ok", "nan"])),
                min_size=1, max_size=5))
def test_gate_1_against_a_loop(seeds):
    rows, pairs, has_failed = [], [], False
    for seed, (before, after, is_extrapolated, status) in enumerate(seeds):
        rows += [{"candidate": name, "depth": 4, "seed": seed, "status": end, "ok": end == "ok",
                  "time_to_target_sec": time, "is_extrapolated": extrapolated, "training_sec": 50.0}
                 for name, time, end, extrapolated in (("baseline", before, "ok", False),
                                                       (KERNEL, after, status, is_extrapolated))]
        has_failed |= status != "ok"
        if status == "ok":
            pairs.append((before, after, is_extrapolated))
    table = pd.DataFrame(rows).astype({"time_to_target_sec": float})
    outcome, sentence = time_gate(table)

    timed = [(before, after, is_extrapolated) for before, after, is_extrapolated in pairs
             if before and after]
    is_slower = any(after >= before for before, after, _ in timed) or any(
        after is None and before is not None and before <= 50 for before, after, _ in pairs)
    if is_slower:
        expected = "fail"
    elif has_failed or len(timed) < max(2, len(pairs)):
        expected = "insufficient"
    else:
        gains = [100 * (1 - after / before) for before, after, _ in timed]
        sd = float(np.std(gains, ddof=1))
        half = stats.t.ppf(0.975, len(gains) - 1) * sd / math.sqrt(len(gains))
        is_equal = sd <= 1e-12 * max(map(abs, gains))
        is_shown = not is_equal and np.mean(gains) - half > 0 and not any(x for *_, x in timed)
        expected = "pass" if is_shown else "not shown"
        assert f"gain n={len(gains)}, mean {np.mean(gains):+.4g} %" in sentence
    assert outcome == expected


@given(st.lists(st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3), min_size=2, max_size=6))
def test_paired_statistics_are_students(differences):
    found = paired(differences, 0.9)
    assert found.mean == pytest.approx(np.mean(differences))
    if np.std(differences) > 1e-6:
        test = stats.ttest_rel(differences, np.zeros(len(differences)))
        assert (found.lo, found.hi) == pytest.approx(tuple(test.confidence_interval(0.9)), rel=1e-6)
        assert found.p == pytest.approx(test.pvalue) and (found.lo > 0) <= (found.p < 0.1)
    if len(set(differences)) == 1:
        assert math.isnan(found.lo) and math.isnan(found.p)


@given(st.lists(st.floats(0, 5), min_size=SPIKE_WINDOW, max_size=120))
def test_spikes_against_a_loop(losses):
    events = [{"kind": "train", "step": step, "tokens": step, "train_time_sec": 0.0, "loss": loss}
              for step, loss in enumerate(losses, start=1)]
    expected = {step for step in range(SPIKE_WINDOW + 1, len(losses) + 1)
                if losses[step - 1] > np.median(losses[step - 1 - SPIKE_WINDOW:step - 1]) + 1}
    assert spikes(types.SimpleNamespace(events=events)) == expected


def test_the_margin_is_two_standard_deviations_or_the_floor(bench):
    bench.pairs()
    ends = [1.45 + 1.5 * math.exp(-6) + 0.001 * math.sin(seed) for seed in range(3)]
    table, _ = bench.tables()
    assert quality_margin(table) == pytest.approx(2 * np.std(ends, ddof=1))
    assert quality_margin(table[table.seed < 1]) is None
    assert quality_margin(table.assign(min_val_bpb=1.0)) == 0.0005


def test_documents_add_their_paired_standard_error(bench):
    """Two seeds of 64 documents with known differences in nats."""
    loss_eval = pytest.importorskip("nanochat.loss_eval")
    if not hasattr(loss_eval, "paired_difference"):
        pytest.skip("the final validation does not store losses per document yet")
    bench.pairs(2)
    rng = np.random.default_rng(0)
    n_bytes, before = rng.integers(50, 500, 64), rng.uniform(50, 500, 64)
    change = rng.normal(1.0, 2.0, 64)
    for seed in range(2):
        for name, nats in (("baseline", before), (KERNEL, before + change)):
            np.savez(runs_dir() / f"own.{name}.d4.s{seed}" / "validation.npz", dataset_id="d",
                     tokenizer_id="t", split="val", documents=np.arange(64), nats=nats,
                     n_bytes=n_bytes)
    mean = change.sum() / n_bytes.sum() / math.log(2)
    words = f"final val_bpb {mean:+.5f} with standard error 0.00"
    assert words in bench.verdict().gates[1].sentence
