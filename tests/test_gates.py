"""The four gates of lane C on made ledgers with known answers, and against plain loops."""

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
    quality_margin,
    spikes,
    time_gate,
)
from nanochat.experiments.ledger import experiment_table
from nanochat.experiments.runner import Probe

KERNEL = "fused-rmsnorm"
INTERPRETED = {"device": "CPU, Triton interpreted"}


class Bench:
    """A made experiment: seeds of a baseline and a candidate, a miniseries, a probe."""

    def __init__(self):
        self.probe = Probe(graph_breaks=0, resume_difference_nats=0.0)

    def run(self, candidate="baseline", seed=0, experiment="own", **run):
        make_trial(experiment, candidate=candidate, seed=seed, **run)

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

    def tables(self):
        names = ["own", *(["series"] if list(runs_dir().glob("series.*")) else [])]
        return [experiment_table(name, runs_dir()) for name in names]

    def verdict(self):
        table, *series = self.tables()
        return judge(KERNEL, table, *(series or [None]), self.probe)


@pytest.fixture
def bench():
    return Bench()


def outcomes(verdict):
    return [outcome for outcome, _ in verdict.gates.values()]


def sentence(verdict, number):
    return list(verdict.gates.values())[number - 1][1]


def ends(seeds=range(3)):
    """Return the final losses of the baseline's seeds."""
    return [1.45 + 1.5 * math.exp(-6) + 0.001 * math.sin(seed) for seed in seeds]


def different(bench, runs):
    for seed, run in enumerate(runs):
        bench.pair(seed, **run)
    return bench


def failed_baseline(bench):
    bench.pair(0), bench.pair(1, baseline={"summary": {"status": "error"}})
    return bench


EASY = {"threshold": 2.5, "baseline": {"threshold": 2.5}}  # reached although the losses are worse
NO_TIME = {"time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": None}
NO_BPB = {"summary": {"min_val_bpb": None}}
BEFORE = {"summary": NO_TIME | {"time_to_target_sec_measured": 0.0}}  # the clock starts
LATER = [{"summary": NO_TIME | {"time_to_target_sec_extrapolated": 8 + 0.01 * s}} for s in range(3)]

CASES = {  # runs of the experiment, gate, its outcome, words of its sentence
    "slower": (lambda b: b.pairs(gain=-0.02), 1, "fail", "not lower in seed 0, 1, 2"),
    "equal": (lambda b: b.pairs(step_ms=100.0), 1, "fail", "gain n=3, mean +0 % (no interval)"),
    "one slower, one misses": (
        lambda b: different(b, [{}, {"gain": -0.02}, {"gain": -0.05, "bpb_shift": 0.2}]),
        1, "fail", "not lower in seed 1, 2;"),
    "worse end": (lambda b: b.pairs(bpb_shift=0.0028, **EASY), 2, "fail", "margin 0.00"),
    "spike": (lambda b: b.pairs(spike_at=150), 3, "fail", "0 has a loss spike at step 150"),
    "spike of the data": (lambda b: b.pairs(spike_at=150, baseline={"spike_at": 150}), 3, "pass",
                          "without NaN"),
    "nan": (lambda b: different(b, [{}, {"nan_at": 99}]), 3, "fail", "d4.s1: nan"),
    "crash": (lambda b: different(b, [{}, {"summary": {"status": "error"}}]), 3, "fail",
              "d4.s1: error"),
    **{status: (lambda b, run=run: different(b, [{}, {}, run]), 1, "insufficient", f"2: {status}")
       for status, run in (("running", {"finished": False}),
                           ("interrupted", {"summary": {"status": "interrupted"}}))},
    "no interval": (lambda b: b.pairs(step_ms=95.0), 1, "not shown", "the gain has no interval"),
    "wide interval": (lambda b: different(b, [{"gain": gain} for gain in (0.001, 0.03, 0.002)]),
                      1, "not shown", "the gain's interval reaches zero"),
    "extrapolated": (lambda b: different(b, LATER), 1, "not shown", "extrapolated, not measured"),
    "one seed": (lambda b: b.pairs(1), 1, "insufficient", "1 of 2 seeds"),
    "no candidate": (lambda b: b.pairs(2).run(seed=2), 1, "insufficient", "seed 2: was not run"),
    "no baseline": (failed_baseline, 1, "insufficient", "baseline depth 4 seed 1: error"),
    "no val_bpb": (lambda b: different(b, [NO_BPB, {}]), 2, "insufficient",
                   "1 of 2 seeds; min val_bpb n=1"),
    "before the clock": (lambda b: different(b, [{}, BEFORE | {"baseline": BEFORE}]), 1,
                         "insufficient", "or before the clock starts, in seed 1"),
    "no series": (lambda b: b.pairs(), 4, "insufficient", "no miniseries"),
    "slower series": (lambda b: b.pairs().series(gain=-0.05), 4, "fail", "step time n=3"),
    "worse series": (lambda b: b.pairs().series(bpb_shift=0.02, **EASY), 4, "fail", "val_bpb n=3"),
    "failed series": (lambda b: b.pairs().series(nan_at=120), 4, "fail", "d2.s0: nan"),
    "no end in series": (lambda b: b.pairs().series(**NO_BPB), 4, "insufficient",
                         "a run has no val_bpb"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_fault_and_each_lack_shows_in_its_gate(bench, case):
    runs, number, outcome, words = CASES[case]
    runs(bench)
    verdict = bench.verdict()
    assert outcomes(verdict)[number - 1] == outcome and words in sentence(verdict, number)
    decisions = {"fail": "reject", "insufficient": "insufficient", "pass": "promote"}
    assert verdict.decision == next(decisions[o] for o in decisions if o in outcomes(verdict))
    if outcome == "fail":
        assert list(verdict.gates)[number - 1] in verdict.decided_by


@pytest.mark.parametrize(("step_ms", "outcome", "decision"), [
    ({}, "pass", ("promote", "all gates")),
    ({"step_ms": 95.0}, "not shown", ("optional", "gate 1 time"))])
def test_a_shown_gain_is_promoted_and_one_in_doubt_is_optional(bench, step_ms, outcome, decision):
    verdict = bench.pairs(**step_ms).series().verdict()
    assert (verdict.decision, verdict.decided_by) == decision
    assert outcomes(verdict) == [outcome, "pass", "pass", "pass"]


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
    verdict = bench.verdict()
    assert outcomes(verdict)[1] == outcome
    assert outcome == "pass" or f"at step {bad_step}" in sentence(verdict, 2)


@pytest.mark.parametrize(("probe", "outcome", "words"), [
    (Probe(0, 0.1), "fail", "differ by 0.1 nats"), (Probe(0, None), "fail", "not end well"),
    (Probe(None, 0.0), "insufficient", "uncompiled"),
    (None, "insufficient", "no save/resume probe")])
def test_the_probe_decides_gate_3(bench, probe, outcome, words):
    bench.pairs(2).probe = probe
    verdict = bench.verdict()
    assert outcomes(verdict)[2] == outcome and words in sentence(verdict, 3)


def test_a_smoke_test_shows_stability_and_gets_no_verdict(bench):
    bench.pairs(2, steps=60, nan_at=20, baseline={"steps": 60})
    verdict = bench.verdict()
    assert verdict.decision == "not judged" and verdict.decided_by.startswith("smoke test: ")
    assert list(verdict.gates) == ["3 stability"] and outcomes(verdict) == ["fail"]


@pytest.mark.parametrize(("worse", "decision"), [({}, "not judged"), ({"nan_at": 120}, "reject"),
                                                 ({"bpb_shift": 0.05}, "reject")])
def test_an_interpreters_times_are_not_judged_but_its_losses_are(bench, worse, decision):
    bench.pairs(step_ms=600.0, baseline=INTERPRETED, **INTERPRETED, **worse)
    verdict = bench.series(step_ms=600.0, baseline=INTERPRETED, **INTERPRETED).verdict()
    assert verdict.decision == decision and outcomes(verdict)[0] == "not judged"
    if not worse:
        assert outcomes(verdict) == ["not judged", "pass", "pass", "not judged"]
        assert "run it on a GPU" in sentence(verdict, 1)


@pytest.mark.parametrize(("change", "word"), [
    ({"dataset_id": "books-2"}, "dataset"), ({"device": "NVIDIA H200"}, "device"),
    ({"summary": {"target_metric_threshold": 1.4}}, "target"), ({"steps": 100}, "horizon")])
def test_runs_of_different_worlds_are_not_compared(bench, change, word):
    bench.pair(0), bench.pair(1, **change)
    with pytest.raises(UserError, match=rf"another {word}.*s1"):
        bench.verdict()


def test_wrong_tables_are_refused_by_name(bench):
    bench.pair(0)
    [table] = bench.tables()
    for candidate, runs in (("both", table), (KERNEL, table[table.candidate == KERNEL])):
        with pytest.raises(UserError, match="is judged against the 'baseline' of an experiment"):
            judge(candidate, runs)
    bench.pair(0, depth=2)
    with pytest.raises(UserError, match="several depths as --miniseries"):
        bench.verdict()


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
    outcome, words = time_gate(table)

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
        assert f"gain n={len(gains)}, mean {np.mean(gains):+.4g} %" in words
    assert outcome == expected


@given(st.lists(st.floats(0, 5), min_size=SPIKE_WINDOW, max_size=120))
def test_spikes_against_a_loop(losses):
    events = [{"kind": "train", "step": step, "tokens": step, "train_time_sec": 0.0, "loss": loss}
              for step, loss in enumerate(losses, start=1)]
    expected = {step for step in range(SPIKE_WINDOW + 1, len(losses) + 1)
                if losses[step - 1] > np.median(losses[step - 1 - SPIKE_WINDOW:step - 1]) + 1}
    assert spikes(types.SimpleNamespace(events=events)) == expected


def test_the_margin_is_two_standard_deviations_or_the_floor(bench):
    [table] = bench.pairs().tables()
    assert quality_margin(table) == pytest.approx(2 * np.std(ends(), ddof=1))
    assert quality_margin(table[table.seed < 1]) is None
    assert quality_margin(table.assign(min_val_bpb=1.0)) == 0.0005


def test_documents_add_their_paired_standard_error(bench):
    """Two seeds of 64 documents with known differences in nats."""
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
    assert words in sentence(bench.verdict(), 2)
