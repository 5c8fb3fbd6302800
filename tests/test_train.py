"""The training loop, run in this process on a tiny model: events, clock, saving, signals."""

import contextlib
import math
import signal
from types import SimpleNamespace

import pytest
from corpus import TINY_FLAGS
from full_disk import full_disk

from nanochat import checkpoint, schedule, train
from nanochat.checkpoint import checkpoint_folder, checkpoint_steps
from nanochat.common import runs_dir
from nanochat.optim import MuonAdamW
from nanochat.runlog import read_run
from nanochat.train import STOP_SIGNALS
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")
STEP_TOKENS = 256
NEVER = ["--eval-every", "-1", "--save-every", "0"]


def flags(corpus, steps, *more):
    """A run named "run"; later flags win over earlier ones."""
    return [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", str(steps), "--run-id", "run",
            "--model-tag", "run", "--warmup-steps", "1", *more]


def record():
    return read_run(runs_dir() / "run")


def values(kind, name):
    return [event[name] for event in record().of(kind)]


def happened():
    return [(event["kind"], event["step"]) for event in record().events]


def saved_steps():
    return checkpoint_steps(checkpoint_folder("run"))


@pytest.fixture(params=["late", "at once"])
def loss_is_read(request, monkeypatch):
    """Also read losses one step late, as on a GPU."""
    if request.param == "late":
        monkeypatch.setattr(train, "PIPELINED", ("cuda", "cpu"))


@pytest.fixture
def at_step(monkeypatch):
    """Call functions of the optimizer before the steps of those numbers: at_step({3: function})."""

    def install(calls):
        step, done = MuonAdamW.step, []

        def with_call(self):
            done.append(None)
            calls.get(len(done), lambda optimizer: None)(self)
            return step(self)

        monkeypatch.setattr(MuonAdamW, "step", with_call)

    return install


def spoil(optimizer):
    optimizer.param_groups[0]["params"][0].data.fill_(math.nan)


# --- events ---------------------------------------------------------------------------------------

def test_events_come_at_their_steps_and_in_their_order(corpus, loss_is_read):
    main(flags(corpus, 7, "--eval-every", "3", "--sample-every", "4", "--save-every", "3"))
    t = "train"
    assert happened() == [
        ("val", 0), (t, 1), (t, 2), (t, 3), ("checkpoint", 3), ("val", 3), (t, 4), ("sample", 4),
        ("sample", 4), (t, 5), (t, 6), ("checkpoint", 6), ("val", 6), (t, 7), ("checkpoint", 7),
        ("val", 7), ("sample", 7), ("sample", 7)]
    assert values(t, "tokens") == [STEP_TOKENS * step for step in range(1, 8)]
    assert values("val", "tokens") == [STEP_TOKENS * step for step in (0, 3, 6, 7)]


def test_checkpoints_are_saved_by_the_clock(corpus, monkeypatch, at_step):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock.now)
    at_step({step: lambda _: setattr(clock, "now", clock.now + 10) for step in range(1, 13)})
    main(flags(corpus, 12, "--eval-every", "-1", "--save-every", "7", "--save-minutes", "0.58"))
    assert saved_steps() == [4, 7, 11, 12]  # 40 s, by step, 40 s, the end


def test_the_newest_checkpoints_and_the_best_are_kept(corpus):
    main(flags(corpus, 12, "--save-every", "1", "--keep-checkpoints", "2"))
    by_step = dict(zip(values("val", "step"), values("val", "val_bpb"), strict=True))
    best = min((5, 10), key=by_step.get)
    assert saved_steps() == sorted({best, 11, 12})


def test_a_run_stops_at_the_first_evaluation_that_reaches_its_target(corpus):
    assert main(flags(corpus, 40, "--target-metric-threshold", "3.2", "--stop-at-target")) == 0
    summary = record().summary
    assert summary["status"] == "ok" and summary["steps"] < 40
    assert values("val", "val_bpb")[-1] <= 3.2 < values("val", "val_bpb")[-2]
    assert saved_steps() == [summary["steps"]]


def test_each_step_gets_its_learning_rate_momentum_and_decay(corpus, monkeypatch):
    given = []
    original = MuonAdamW.schedule

    def noted(self, *multipliers):
        given.append(multipliers)
        original(self, *multipliers)

    monkeypatch.setattr(MuonAdamW, "schedule", noted)
    main(flags(corpus, 20, *NEVER, "--warmup-steps", "4"))
    assert given == [(schedule.lr_multiplier(step, 20, warmup_steps=4),
                      schedule.muon_momentum(step, 20),
                      schedule.muon_weight_decay(step, 20, 1.0)) for step in range(20)]
    assert values("train", "lr_multiplier") == [multipliers[0] for multipliers in given]


def test_text_that_repeats_is_reported_once_also_after_a_resume(corpus):
    main(flags(corpus, 120, "--eval-every", "-1", "--save-every", "100"))
    [step] = values("repeats", "step")
    assert 1 < step < 100
    main(flags(corpus, 120, "--eval-every", "-1", "--resume-from-step", "100"))
    assert values("repeats", "step") == [step]
    assert record().summary["epochs"] > 1


def test_a_lengthened_run_continues_with_the_new_schedule(corpus, refusal):
    main(flags(corpus, 4))
    longer = flags(corpus, 8, "--resume-from-step", "latest")
    assert "num_iterations was 4, is 8" in refusal(main, longer)
    assert main([*longer, "--allow-changed"]) == 0
    multipliers = dict(zip(values("train", "step"), values("train", "lr_multiplier"), strict=True))
    expected = [schedule.lr_multiplier(step, 4 if step < 4 else 8, warmup_steps=1)
                for step in range(8)]
    assert [multipliers[step + 1] for step in range(8)] == expected
    [resume] = record().of("resume")
    assert resume["changed"] == [["num_iterations", 4, 8]] and resume["step"] == 4
    assert record().config["num_iterations"] == 8 and record().status == "ok"
    assert "belongs to another run" in refusal(main, [
        *flags(corpus, 6, "--resume-from-step", "latest"), "--allow-changed"])


# --- the clock ------------------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """Every optimizer step takes 1 s, each validation 1,000 s; `slow` gives other durations."""
    clock = SimpleNamespace(now=0.0, slow={}, n_steps=0)
    step, evaluate = MuonAdamW.step, train.evaluate_split

    def timed_step(self):
        clock.n_steps += 1
        clock.now += clock.slow.get(clock.n_steps, 1.0)
        return step(self)

    def timed_evaluation(*arguments, **options):
        clock.now += 1000.0
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(MuonAdamW, "step", timed_step)
    monkeypatch.setattr(train, "evaluate_split", timed_evaluation)
    return clock


def test_the_clock_counts_steps_after_the_first_eleven_and_nothing_else(corpus, clock):
    clock.slow = {1: 100.0, 14: 3.0}
    main(flags(corpus, 16, "--eval-every", "2", "--save-every", "3"))
    expected = [0.0] * 11 + [1.0, 2.0, 5.0, 6.0, 7.0]
    assert values("train", "train_time_sec") == pytest.approx(expected)
    assert values("train", "dt_ms")[0] == pytest.approx(100_000)
    assert values("train", "tok_per_sec")[-1] == pytest.approx(STEP_TOKENS)
    at = dict(zip(range(1, 17), expected, strict=True))
    for step, seconds in zip(values("val", "step"), values("val", "train_time_sec"), strict=True):
        assert seconds == pytest.approx(at.get(step, 0.0))


@pytest.mark.parametrize(("saved_at", "expected"), [(5, 9.0), (11, 8.0), (12, 9.0)])
def test_the_step_that_compiles_after_a_resume_costs_the_mean_time(corpus, clock, saved_at,
                                                                  expected):
    """A resume right after the last untimed step knows no mean time: that step costs nothing."""
    main(flags(corpus, 20, "--eval-every", "-1", "--save-every", str(saved_at)))
    clock.n_steps, clock.slow = 0, {1: 60.0}
    main(flags(corpus, 20, "--eval-every", "-1", "--resume-from-step", str(saved_at)))
    assert values("train", "train_time_sec")[-1] == pytest.approx(expected)
    assert values("train", "dt_ms")[saved_at] == pytest.approx(60_000)  # recorded as measured


# --- divergence -----------------------------------------------------------------------------------

def test_a_loss_that_is_not_finite_is_recorded_and_ends_the_run(corpus, at_step, refusal,
                                                               loss_is_read):
    at_step({6: spoil})
    assert "not finite at step 7" in refusal(main, flags(corpus, 30, "--save-every", "4"))
    run = record()
    assert run.status == "nan" and happened()[-1] == ("train", 7)
    assert run.of("train")[-1]["loss"] is None
    assert saved_steps() == [4]


def test_a_validation_that_is_not_finite_moves_its_checkpoint_away(corpus, monkeypatch, refusal):
    evaluate = train.evaluate_split

    def spoiled(model, *arguments, **options):
        result = evaluate(model, *arguments, **options)
        if saved_steps() == [5, 10]:
            object.__setattr__(result, "bits_per_byte", math.nan)
        return result

    monkeypatch.setattr(train, "evaluate_split", spoiled)
    assert "checkpoint is step 5" in refusal(main, flags(corpus, 20, "--save-every", "5"))
    assert record().status == "nan" and happened()[-1] == ("val", 10)
    assert saved_steps() == [5]
    [aside] = checkpoint_folder("run").parent.glob("run.before-*")
    assert checkpoint_steps(aside) == [10]


def test_weights_that_are_not_finite_are_not_saved_and_end_the_run(corpus, at_step, refusal):
    at_step({2: spoil})
    assert "checkpoint is step 1" in refusal(main, flags(
        corpus, 2, "--eval-every", "-1", "--save-every", "1"))
    assert record().status == "nan" and saved_steps() == [1]


def test_a_save_that_fails_ends_the_run_with_its_reason(corpus, monkeypatch, refusal):
    save = checkpoint.torch.save
    monkeypatch.setattr(
        checkpoint.torch, "save", lambda *a: full_disk() if saved_steps() else save(*a))
    message = refusal(main, flags(corpus, 9, "--save-every", "3"))
    assert "(No space left on device)" in message and "valid checkpoint is step 3" in message
    assert record().status == "error" and saved_steps() == [3]


def test_an_evaluation_that_fails_has_its_checkpoint_already(corpus, monkeypatch):
    evaluate = train.evaluate_split

    def fail(*arguments, **options):
        if saved_steps():
            raise ZeroDivisionError
        return evaluate(*arguments, **options)

    monkeypatch.setattr(train, "evaluate_split", fail)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError):
        main(flags(corpus, 5))
    assert saved_steps() == [5] and record().status == "error"
    assert signal.getsignal(signal.SIGTERM) is before


# --- signals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(corpus, at_step, capsys, number):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    at_step({3: lambda _: signal.raise_signal(number)})
    assert main(flags(corpus, 10, "--eval-every", "3")) == 128 + number
    assert record().status == "interrupted"
    assert happened()[-2:] == [("train", 3), ("checkpoint", 3)]  # evaluating may take minutes
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("continue with: python -m scripts.base_train")
    assert last_line.endswith("--resume-from-step latest")


def test_a_signal_without_checkpoints_saves_none(corpus, at_step, capsys):
    at_step({3: lambda _: signal.raise_signal(signal.SIGTERM)})
    main(flags(corpus, 10, *NEVER))
    assert happened()[-1] == ("train", 3) and not saved_steps()
    assert "continue with" not in capsys.readouterr().out


def test_a_second_signal_ends_the_process_but_an_echo_of_the_first_does_not(
        corpus, at_step, monkeypatch, capfd):
    clock, killed = SimpleNamespace(now=50.0), []
    monkeypatch.setattr(train.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(train.os, "kill", lambda pid, number: killed.append(number))

    def send(_):
        signal.raise_signal(signal.SIGTERM)
        clock.now += 0.5  # torchrun passes on what the scheduler sent to every process
        signal.raise_signal(signal.SIGTERM)
        assert not killed
        clock.now += 0.6
        signal.raise_signal(signal.SIGTERM)

    at_step({1: send})
    with contextlib.suppress(SystemExit):
        main(flags(corpus, 3, *NEVER))
    assert killed == [signal.SIGTERM]
    assert capfd.readouterr().err.count("repeat the signal to stop at once") == 1


def test_a_short_horizon_is_warned_of(corpus, capsys):
    main(flags(corpus, 10, *NEVER, "--warmup-steps", "4"))
    assert "shorter than warm-up plus decay" not in capsys.readouterr().err
    main(flags(corpus, 10, *NEVER, "--warmup-steps", "5", "--run-id", "other"))
    assert "shorter than warm-up plus decay (5 + 6 steps)" in capsys.readouterr().err
