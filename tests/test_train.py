"""The loop with everything around it replaced by fakes, and its clock turned by hand."""

import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import loop as train
from nanochat import schedule, stopping
from nanochat.common import UserError
from nanochat.distributed import Ranks
from nanochat.loop import Hooks, Trainer
from nanochat.record import close_failed_record, close_record, summarize
from nanochat.run_plan import Cadence, Place, Plan, Schedule
from nanochat.runlog import RunLog, read_run
from nanochat.stopping import STOP_SIGNALS
from nanochat.watchdog import Watchdog

EVALUATION_SEC, SAVING_SEC = 1000.0, 500.0  # must never show on the training clock
STEP_TOKENS = 64


class World:
    """Everything a Trainer needs, faked. `dt_sec(step)`: how long a training step takes; `losses`: by step."""

    def __init__(self, dt_sec=lambda step: 1.0, losses=lambda step: 2.0, accumulation=1):
        self.now, self.happened, self.events = 0.0, [], []
        self.dt_sec, self.losses, self.accumulation = dt_sec, losses, accumulation
        self.epochs, self.distinct_tokens = 0.5, 10
        self.good, self.bad_steps, self.n_owner_checks = True, [], 0
        self.saving, self.save_error, self.has_failed, self.longest_sec, self.n_closed = None, None, False, 0.0, 0
        self.asked_for = []
        self.saving_steps = 0  # how many steps are trained while a checkpoint is written
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.n_batches = self.n_updates = 0
        self.multipliers, self.gradients, self.during = [], [], {}

    # the model, the loader, the optimizer, the log
    def __call__(self, inputs, targets):
        self.now += self.dt_sec(self.n_updates) / self.accumulation
        self.during.get(self.n_updates, lambda: None)()
        return self.weight * (self.losses(self.n_updates) + float(inputs))

    def __iter__(self):
        return self

    def __next__(self):
        self.n_batches += 1
        return torch.tensor(0.25 * ((self.n_batches - 1) % self.accumulation)), None

    def state_dict(self):
        return {"delivered": self.n_batches}

    def schedule(self, *multipliers):
        self.multipliers.append(multipliers)

    def step(self):
        self.gradients.append(self.weight.grad.item())
        self.n_updates += 1

    def accumulate(self):
        pass

    def zero_grad(self, set_to_none):
        assert set_to_none
        self.weight.grad = None

    def before_checkpoint(self):
        self.n_owner_checks += 1

    def event(self, kind, **fields):
        self.now += self.event_sec
        self.events.append({"kind": kind, **fields})
        self.happened.append((kind, fields["step"]))

    # the hooks
    def evaluate(self, last):
        self.now += EVALUATION_SEC
        self.during.get("evaluate", lambda: None)()
        return {"val_bpb": 1.5, **({"position_losses": {"nats_by_position": [3.0]}} if last else {})}

    def core(self):
        self.now += EVALUATION_SEC
        return {"core_metric": 0.1, "tasks": {}}

    def sample(self):
        self.now += EVALUATION_SEC
        return [{"prompt": "a", "text": "b"}, {"prompt": "c", "text": "d"}]

    # the saver
    def save(self, loop_state, prepare):
        assert self.saving is None
        self.now += SAVING_SEC
        prepare()
        self.saved = json.loads(json.dumps(loop_state))
        self.saving = {"path": "folder", "saved_step": loop_state["step"], "good": self.good}
        self.saved_at = self.n_updates
        return self.good

    def collect(self, wait):
        if self.saving is None or not (wait or self.n_updates >= self.saved_at + self.saving_steps):
            return None
        saving, self.saving = self.saving, None
        if self.save_error:
            raise self.save_error
        return saving

    def roll_back(self, steps):
        self.asked_for.append(steps)
        step = max(steps - set(self.bad_steps), default=None)
        if step is None:
            return None
        self.n_updates = step
        return {"step": step, "device": "this"}

    def mark_bad(self, step):
        assert self.saving is None
        self.bad_steps.append(step)

    def close(self):
        self.n_closed += 1

    def trainer(self, num_iterations, cadence=None, loop_state=None, ranks=None, device_name="", flops_per_token=0,
                stop_at=None, in_flight=0, **limits):
        self.n_updates = (loop_state or {}).get("step", 0)
        place = Place(torch.device("cpu"), device_name, ranks or Ranks(), Watchdog(Ranks(), 0))
        plan = Plan(Schedule(num_iterations), cadence or Cadence(-1, -1, -1, 0),
                    self.accumulation * place.ranks.world_size, STEP_TOKENS, flops_per_token, stop_at, **limits)
        hooks = Hooks(self.evaluate, self, self.roll_back, self.core, self.sample)
        trainer = Trainer(self, self, self, plan, hooks, self, place, loop_state)
        trainer._max_in_flight = in_flight
        self.event_sec = 0.01 * in_flight  # steps in flight end one after the other
        return trainer

    def of(self, kind, field):
        return [event[field] for event in self.events if event["kind"] == kind]


@pytest.fixture
def start(monkeypatch):
    """Make a World whose clock is the trainer's."""
    def make(**options):
        world = World(**options)
        monkeypatch.setattr(train.time, "perf_counter", lambda: world.now)
        return world

    return make


# --- cadence ---------------------------------------------------------------------------------------------------------

def test_everything_happens_at_its_step_and_in_its_order(start):
    world = start()
    assert world.trainer(7, Cadence(eval_every=3, core_every=2, sample_every=4, save_every=3)).run() == "ok"
    t = "train"
    assert world.happened == [
        ("val", 0), (t, 1), (t, 2), ("core", 2), (t, 3), ("checkpoint", 3), ("val", 3), (t, 4), ("core", 4),
        ("sample", 4), ("sample", 4), (t, 5), (t, 6), ("checkpoint", 6), ("val", 6), ("core", 6), (t, 7),
        ("checkpoint", 7), ("val", 7), ("position_losses", 7), ("core", 7), ("sample", 7), ("sample", 7)]
    assert world.of("train", "tokens") == [STEP_TOKENS * step for step in range(1, 8)]
    assert world.of("val", "tokens") == [0, 3 * STEP_TOKENS, 6 * STEP_TOKENS, 7 * STEP_TOKENS]
    assert "position_losses" not in world.events[-4]


@pytest.mark.parametrize(("save_every", "steps"), [
    (0, []), (-1, [5]), (2, [2, 4, 5]), (5, [5]), (100, [5]), (1, [1, 2, 3, 4, 5])])
def test_checkpoints_come_as_asked_and_the_last_one_unless_never(start, save_every, steps):
    world = start()
    world.trainer(5, Cadence(-1, -1, -1, save_every)).run()
    assert world.of("checkpoint", "step") == steps


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(-1, 5), st.integers(-1, 5), st.integers(0, 12))
def test_a_resumed_run_does_what_the_whole_one_does_after_its_checkpoint(n, eval_every, save_every, resumed_at):
    resumed_at = min(resumed_at, n)
    cadence = Cadence(eval_every, -1, -1, save_every)
    whole, rest = World(), World()
    whole.trainer(n, cadence).run()
    assert rest.trainer(n, cadence, {"step": resumed_at, "train_time_sec": 0.0, "usual_dt_sec": None}).run() == "ok"
    assert rest.happened == [
        (kind, step) for kind, step in whole.happened
        if step > resumed_at or (step == resumed_at and kind in ("val", "position_losses"))]


def test_what_is_saved_says_where_the_run_stands(start):
    world = start(accumulation=2)
    world.trainer(20, Cadence(-1, -1, -1, 13)).run()
    assert world.saved == {"step": 20, "train_time_sec": 9.0, "usual_dt_sec": 1.0, "best_step": None,
                           "best_val_bpb": None, "n_rollbacks": 0, "loader": {"delivered": 40}}


def test_an_evaluation_that_fails_has_its_checkpoint_already(start):
    world = start()
    trainer = world.trainer(3, Cadence(eval_every=3, save_every=-1))

    def fail():
        if trainer.step:
            raise UserError("out of memory")

    world.during["evaluate"] = fail
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError):
        trainer.run()
    assert world.happened[-1] == ("checkpoint", 3)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("save_every", "saved"), [(-1, [6]), (2, [2, 4, 6]), (0, [])])
def test_a_run_that_stops_at_its_target_ends_at_the_first_evaluation_that_reaches_it(start, save_every, saved):
    world = start()
    world.evaluate = lambda last: {"val_bpb": 3.0 - 0.25 * world.n_updates}  # 1.5 after six updates
    trainer = world.trainer(20, Cadence(eval_every=3, save_every=save_every), stop_at=("val_bpb", 1.6))
    assert trainer.run() == "ok" and trainer.reached_target
    assert world.of("val", "step") == [0, 3, 6] and world.of("train", "step")[-1] == 6
    assert world.of("checkpoint", "step") == saved


def test_a_target_in_another_metric_or_never_reached_does_not_end_the_run(start):
    for stop_at in (("core", 0.5), ("val_bpb", 0.1)):
        trainer = start().trainer(6, Cadence(eval_every=3, core_every=3, save_every=0), stop_at=stop_at)
        assert trainer.run() == "ok" and trainer.step == 6 and not trainer.reached_target


# --- saving while training goes on ------------------------------------------------------------------------------------

def test_a_checkpoint_is_recorded_when_it_is_whole_and_waited_for_where_nothing_is_trained(start):
    world = start()
    world.saving_steps = 2
    world.trainer(7, Cadence(-1, -1, -1, save_every=4)).run()
    assert list(zip(world.of("checkpoint", "step"), world.of("checkpoint", "saved_step"), strict=True)) == [
        (6, 4), (7, 7)]
    slower = start()
    slower.saving_steps = 5
    slower.trainer(7, Cadence(-1, -1, -1, save_every=4)).run()
    assert slower.of("checkpoint", "step") == [7, 7] and slower.of("checkpoint", "saved_step") == [4, 7]
    assert world.n_closed == slower.n_closed == 1


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_save_that_failed_ends_the_run_after_the_step_in_which_it_is_known(start, in_flight):
    world = start()
    world.saving_steps, world.save_error = 99, UserError("no space")
    world.during[3] = lambda: setattr(world, "has_failed", True)
    trainer = world.trainer(9, Cadence(-1, -1, -1, save_every=3), in_flight=in_flight)
    with pytest.raises(UserError, match="no space"):
        trainer.run()
    assert world.happened[-1] == ("train", 4) and not world.of("checkpoint", "step") and world.n_closed == 1


def test_a_save_that_failed_on_another_rank_ends_this_one_at_the_same_step(start, monkeypatch):
    world = start()
    world.saving_steps, world.save_error = 99, UserError("no space")

    def all_reduce(outcome):
        outcome[-1] += world.n_updates == 5

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    with pytest.raises(UserError, match="no space"):
        world.trainer(9, Cadence(-1, -1, -1, save_every=3), ranks=Ranks(1, 1, 2)).run()
    assert world.happened[-1] == ("train", 5)


def test_a_run_saves_by_the_clock_of_any_rank(start, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(train.time, "monotonic", lambda: clock.now)
    world = start()
    world.during = {step: lambda: setattr(clock, "now", clock.now + 10) for step in range(12)}
    world.trainer(12, Cadence(-1, -1, -1, save_every=7), save_every_sec=35.0).run()
    assert world.of("checkpoint", "saved_step") == [4, 7, 11, 12]  # 40 s, by step, 40 s, the end
    other = start()
    monkeypatch.setattr(train.dist, "all_reduce", lambda outcome: outcome[-2].add_(other.n_updates == 2))
    other.trainer(5, Cadence(-1, -1, -1, save_every=-1), save_every_sec=1e9, ranks=Ranks(1, 1, 2)).run()
    assert other.of("checkpoint", "saved_step") == [2, 5]


def test_the_best_checkpoint_is_known_by_the_next(start):
    world = start()
    world.evaluate = lambda last: {"val_bpb": {2: 1.9, 4: 1.1, 6: 1.7}.get(world.n_updates, 1.0)}  # 1.0 is not saved
    world.trainer(7, Cadence(eval_every=1, save_every=2)).run()
    assert (world.saved["step"], world.saved["best_step"], world.saved["best_val_bpb"]) == (7, 4, 1.1)
    rest = start()
    rest.evaluate = lambda last: {"val_bpb": 1.2}
    rest.trainer(9, Cadence(eval_every=1, save_every=1), world.saved).run()
    assert (rest.saved["best_step"], rest.saved["best_val_bpb"]) == (4, 1.1)


# --- one step --------------------------------------------------------------------------------------------------------

def test_loss_and_gradient_are_means_over_the_micro_batches(start):
    world = start(losses=lambda step: 3.0 + step, accumulation=4)
    world.trainer(2).run()
    assert world.n_batches == 8
    assert world.of("train", "loss") == world.gradients == [3.0 + 0.375, 4.0 + 0.375]


def test_the_optimizer_gets_the_multipliers_of_each_update_from_0(start):
    world = start()
    world.trainer(50).run()
    expected = [(schedule.lr_multiplier(step, 50), schedule.muon_momentum(step, 50),
                 schedule.muon_weight_decay(step, 50, 1.0)) for step in range(50)]
    assert world.multipliers == expected
    assert world.of("train", "lr_multiplier") == [lr for lr, _, _ in expected]


def test_throughput_counts_the_tokens_of_all_ranks_and_mfu_their_peak(start, monkeypatch):
    monkeypatch.setattr(train.dist, "all_reduce", lambda *_, **__: None)
    world = start(dt_sec=lambda step: 0.5)
    world.trainer(1, ranks=Ranks(0, 0, 4), device_name="NVIDIA H100 80GB HBM3", flops_per_token=1e12).run()
    [event] = world.events
    assert (event["dt_ms"], event["tok_per_sec"]) == (500.0, STEP_TOKENS / 0.5)
    assert event["mfu"] == pytest.approx(STEP_TOKENS / 0.5 * 1e12 / (4 * 989e12))
    other = start()
    other.trainer(1, device_name="an unknown CPU", flops_per_token=1e12).run()
    assert other.events[0]["mfu"] is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_recorded_and_nothing_follows(start, loss):
    world = start(losses=lambda step: loss if step == 3 else 2.0)
    assert world.trainer(10, Cadence(4, 4, 4, 4)).run() == "nan"
    assert world.happened[-1] == ("train", 4)
    assert world.of("train", "loss")[-1] is not None and not math.isfinite(world.of("train", "loss")[-1])
    assert world.of("checkpoint", "step") == []


def test_a_validation_that_is_not_finite_ends_the_run_and_marks_its_checkpoint(start):
    world = start()
    world.evaluate = lambda last: {"val_bpb": math.nan if world.n_updates >= 6 else 2.0}
    assert world.trainer(9, Cadence(eval_every=3, core_every=3, sample_every=3, save_every=3)).run() == "nan"
    assert world.bad_steps == [6] and world.happened[-1] == ("val", 6)


def test_weights_that_are_not_finite_end_the_run_after_its_last_step_too(start):
    world = start()
    world.good = False
    assert world.trainer(3, Cadence(-1, -1, -1, save_every=-1)).run() == "nan"
    assert world.bad_steps == [3] and world.n_owner_checks == 1


@pytest.mark.parametrize("in_flight", [0, 1])
def test_a_run_rolls_back_and_goes_on_with_the_rows_that_come_next(start, in_flight):
    world = start()
    world.losses = lambda step: math.nan if world.n_batches == 5 else 2.0
    cadence = Cadence(eval_every=2, core_every=-1, sample_every=-1, save_every=2)
    trainer = world.trainer(9, cadence, max_rollbacks=1, in_flight=in_flight)
    assert trainer.run() == "ok" and trainer.n_rollbacks == world.saved["n_rollbacks"] == 1
    assert world.asked_for == [{2, 4}] and world.bad_steps == []
    [event] = [event for event in world.events if event["kind"] == "resume"]
    assert event == {"kind": "resume", "step": 4, "device": "this", "rollback": "loss not finite at step 5",
                     "n_rollbacks": 1, "max_rollbacks": 1}
    at = world.happened.index(("resume", 4))
    assert world.happened[at - 1:at + 3] == [("train", 5), ("resume", 4), ("val", 4), ("train", 5)]
    assert world.n_batches == 5 + in_flight + 5  # none is served twice


def test_the_clock_counts_what_a_rollback_threw_away(start):
    world = start()
    world.losses = lambda step: math.nan if world.n_batches == 17 else 2.0
    world.trainer(20, Cadence(-1, -1, -1, save_every=15), max_rollbacks=1).run()
    assert world.of("train", "train_time_sec")[-1] == 20 - 11 + 2


def test_after_too_many_rollbacks_the_run_ends_also_across_resumes(start):
    world = start(losses=lambda step: math.nan if step == 5 else 2.0)
    assert world.trainer(9, Cadence(-1, -1, -1, save_every=2), max_rollbacks=2).run() == "nan"
    assert world.of("train", "step") == [1, 2, 3, 4, 5, 6, 5, 6, 5, 6] and world.n_closed == 1
    rest = start(losses=lambda step: math.nan if step == 5 else 2.0)
    state = {"step": 4, "n_rollbacks": 1}
    assert rest.trainer(9, Cadence(-1, -1, -1, save_every=2), state, max_rollbacks=2).run() == "nan"
    assert rest.of("train", "step") == [5, 6, 5, 6] and rest.asked_for == [{4}]


def test_bad_checkpoints_are_passed_over_and_without_a_good_one_the_run_ends(start):
    world = start()
    world.evaluate = lambda last: {"val_bpb": math.nan if world.n_updates == 6 and world.n_batches < 12 else 2.0}
    assert world.trainer(9, Cadence(eval_every=3, save_every=3), max_rollbacks=5).run() == "ok"
    assert world.bad_steps == [6, 6] and world.asked_for == [{3, 6}] * 2 and world.of("resume", "step") == [3, 3]
    early = start(losses=lambda step: math.nan)
    assert early.trainer(9, Cadence(eval_every=3, save_every=3), max_rollbacks=5).run() == "nan"
    assert early.asked_for == [set()] and early.happened == [("val", 0), ("train", 1)]


def test_a_run_that_rolled_back_while_it_was_asked_to_stop_stops(start):
    world = start()
    world.losses = lambda step: math.nan if world.n_batches == 6 else 2.0
    world.during[5] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.trainer(9, Cadence(-1, -1, -1, save_every=2), max_rollbacks=1).run() == "interrupted"
    assert world.happened[-2:] == [("train", 6), ("resume", 4)]


def test_text_that_begins_to_repeat_is_said_once(start):
    world = start()
    world.during[3] = lambda: setattr(world, "epochs", 1.01)
    world.trainer(6).run()
    assert world.of("repeats", "step") == [4] and world.of("repeats", "distinct_tokens") == [10]
    world.trainer(9, loop_state={"step": 6}).run()
    assert world.of("repeats", "step") == [4]


# --- the clock -------------------------------------------------------------------------------------------------------

def test_the_clock_counts_training_steps_after_the_first_eleven_and_nothing_else(start):
    world = start(dt_sec=lambda step: 100.0 if step == 0 else 1.0 + step / 100)
    world.trainer(20, Cadence(eval_every=2, core_every=5, sample_every=5, save_every=3)).run()
    expected, clock = [], 0.0
    for step in range(20):
        clock += 1.0 + step / 100 if step >= 11 else 0.0
        expected.append(clock)
    assert world.of("train", "train_time_sec") == pytest.approx(expected)
    assert world.of("train", "dt_ms")[0] == pytest.approx(100_000)
    at = dict(zip(world.of("train", "step"), expected, strict=True))
    for kind in ("val", "core"):
        for step, clock in zip(world.of(kind, "step"), world.of(kind, "train_time_sec"), strict=True):
            assert clock == pytest.approx(at.get(step, 0.0))


def test_the_step_that_compiles_after_a_resume_costs_the_usual_time(start):
    whole = start()
    whole.trainer(30, Cadence(-1, -1, -1, 20)).run()
    first = start()
    first.during[24] = lambda: signal.raise_signal(signal.SIGTERM)
    assert first.trainer(30, Cadence(-1, -1, -1, -1)).run() == "interrupted"
    assert first.saved["step"] == 25
    rest = start(dt_sec=lambda step: 60.0 if step == 25 else 1.0)
    rest.trainer(30, loop_state=first.saved).run()
    assert rest.of("train", "train_time_sec") == whole.of("train", "train_time_sec")[25:]
    assert rest.of("train", "dt_ms")[0] == pytest.approx(60_000)  # what was measured is recorded as it was


@pytest.mark.parametrize("resumed_at", [5, 10, 11, 12])
def test_a_resume_around_the_first_timed_step_never_charges_a_compilation(start, resumed_at):
    first = start()
    first.during[resumed_at - 1] = lambda: signal.raise_signal(signal.SIGTERM)
    first.trainer(20, Cadence(-1, -1, -1, -1)).run()
    rest = start(dt_sec=lambda step: 60.0 if step == resumed_at else 1.0)
    rest.trainer(20, loop_state=first.saved).run()
    clock = rest.of("train", "train_time_sec")[-1]
    assert clock == {5: 9.0, 10: 9.0, 11: 8.0, 12: 9.0}[resumed_at]  # at 11 no usual time is known yet


def test_the_usual_time_follows_slowly(start):
    world = start(dt_sec=lambda step: 2.0 if step == 13 else 1.0)
    world.trainer(14, Cadence(-1, -1, -1, -1)).run()
    assert world.saved["usual_dt_sec"] == pytest.approx(1.1)


# --- signals ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(start, number):
    before = [signal.getsignal(n) for n in STOP_SIGNALS]
    world = start()
    world.during[2] = lambda: signal.raise_signal(number)
    trainer = world.trainer(10, Cadence(eval_every=3, save_every=-1))
    assert trainer.run() == "interrupted"
    assert trainer.signals.number == number
    assert world.happened[-2:] == [("train", 3), ("checkpoint", 3)]  # no evaluation, which may take minutes
    assert [signal.getsignal(n) for n in STOP_SIGNALS] == before


def test_a_signal_without_checkpoints_saves_none(start):
    world = start()
    world.during[2] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.trainer(10, Cadence(-1, -1, -1, save_every=0)).run() == "interrupted"
    assert world.happened[-1] == ("train", 3)


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_a_resumed_run(start):
    world = start()
    world.during[4] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.trainer(5, Cadence(eval_every=5, save_every=-1)).run() == "interrupted"
    assert world.happened[-2:] == [("train", 5), ("checkpoint", 5)]
    rest = start()
    assert rest.trainer(5, Cadence(eval_every=5, save_every=-1), world.saved).run() == "ok"
    assert rest.happened == [("val", 5), ("position_losses", 5)]


@pytest.mark.parametrize("at", ["first", "later", "last"])
def test_a_signal_ends_an_evaluation_at_once(start, at):
    """It may take an hour on a CPU: whoever asks to stop would lose patience, and the steps since the last save."""
    world, before = start(), signal.getsignal(signal.SIGINT)
    trainer = world.trainer(9, Cadence(eval_every=3, save_every=-1))
    step = {"first": 0, "later": 6, "last": 9}[at]

    def evaluate():
        if trainer.step == step:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the evaluation went on")

    world.during["evaluate"] = evaluate
    assert trainer.run() == "interrupted"
    assert trainer.signals.number == signal.SIGINT
    assert world.happened[-2:] == {
        "first": [], "later": [("train", 6), ("checkpoint", 6)], "last": [("train", 9), ("checkpoint", 9)]}[at]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_ends_the_run_as_a_signal_does_with_room_for_step_and_save(start, monkeypatch):
    alarms = []
    monkeypatch.setattr(train.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(stopping.signal, "setitimer", lambda _, sec: alarms.append(sec))
    world = start(dt_sec=lambda step: 2.0 + (step == 13))
    world.during[15] = lambda: signal.raise_signal(signal.SIGALRM)
    world.longest_sec = 5.0
    trainer = world.trainer(30, Cadence(eval_every=3, save_every=-1), ends_at_sec=200.0)
    assert trainer.run() == "interrupted" and trainer.signals.number == signal.SIGALRM
    assert world.happened[-2:] == [("train", 16), ("checkpoint", 16)]
    left = [100 - 30 - 2 * (longest + 5) for longest in (0, 2, 3)]  # the first step, which compiles, does not count
    assert alarms == [70.0, left[0], *[left[1]] * 12, *[left[2]] * 2, 0]  # the last unsets it


def test_several_ranks_finish_an_evaluation_because_they_must_end_together(start, monkeypatch):
    monkeypatch.setattr(train.dist, "all_reduce", lambda *_, **__: None)
    world = start()
    world.during["evaluate"] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.trainer(9, Cadence(eval_every=3, save_every=-1), ranks=Ranks(0, 0, 2)).run() == "interrupted"
    assert world.happened == [("val", 0), ("train", 1), ("checkpoint", 1)]


def test_a_second_signal_ends_the_process_at_once_but_an_echo_of_the_first_does_not(start, monkeypatch, capfd):
    clock, killed = SimpleNamespace(now=50.0), []
    monkeypatch.setattr(train.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(stopping.os, "kill", lambda pid, number: killed.append((number, signal.getsignal(number))))

    def signals():
        signal.raise_signal(signal.SIGTERM)
        clock.now += 0.5  # torchrun passes on what the scheduler sent to every process
        signal.raise_signal(signal.SIGTERM)
        assert not killed
        clock.now += 0.6
        signal.raise_signal(signal.SIGALRM)  # the time limit asks for nothing new
        assert not killed
        signal.raise_signal(signal.SIGTERM)
        assert killed == [(signal.SIGTERM, signal.SIG_DFL)]

    world = start()
    world.during[0] = signals
    world.trainer(3).run()
    assert len(killed) == 1
    assert capfd.readouterr().err.count("ask again to stop at once") == 1


def test_all_ranks_stop_when_one_of_them_is_asked_to(start, monkeypatch):
    """The other rank's half of the collectives, played by hand: its loss is 4, its signal comes in step 3."""
    world = start()

    reduced = []

    def all_reduce(outcome):
        outcome[0] += 4.0 / 2
        outcome[1 + STOP_SIGNALS.index(signal.SIGTERM)] += world.n_updates == 3
        reduced.append(len(outcome))

    monkeypatch.setattr(train.dist, "all_reduce", all_reduce)
    trainer = world.trainer(10, Cadence(-1, -1, -1, -1), ranks=Ranks(1, 1, 2))
    assert trainer.run() == "interrupted"
    assert trainer.signals.number == signal.SIGTERM
    assert world.of("train", "loss") == [3.0, 3.0, 3.0]
    assert world.happened[-1] == ("checkpoint", 3)
    assert reduced == [3 + len(STOP_SIGNALS)] * 3  # one collective a step


# --- a device that works while Python is a step ahead ----------------------------------------------------------------

@pytest.mark.parametrize("cadence", [Cadence(3, 2, 4, 3), Cadence(-1, -1, -1, 0)], ids=["busy", "quiet"])
def test_a_loss_read_late_changes_no_event_but_the_times(start, cadence):
    events, times = [], ("dt_ms", "tok_per_sec", "train_time_sec")
    for in_flight in (0, 1):
        world = start(losses=lambda step: 3.0 + step)
        assert world.trainer(7, cadence, in_flight=in_flight).run() == "ok"
        events.append([{name: value for name, value in event.items() if name not in times}
                       for event in world.events])
    assert events[0] == events[1]


def test_the_next_step_is_launched_before_a_loss_is_read(start):
    world, read = start(), []
    world.during = {step: lambda: read.append(len(world.of("train", "loss"))) for step in range(7)}
    world.trainer(7, Cadence(eval_every=4, save_every=0), in_flight=1).run()
    assert read == [0, 0, 1, 2, 4, 4, 5]  # at the evaluation of step 4 nothing is on its way


def test_a_loss_that_is_not_finite_ends_the_run_one_step_late_and_leaves_no_trace_of_it(start):
    world = start(losses=lambda step: math.nan if step == 3 else 2.0)
    trainer = world.trainer(10, Cadence(-1, -1, -1, -1), in_flight=1)
    assert trainer.run() == "nan" and trainer.step == 4 and world.n_updates == 5
    assert world.happened[-1] == ("train", 4) and not world.of("checkpoint", "step")


def test_a_signal_ends_a_run_that_is_a_step_ahead_with_every_step_recorded(start):
    world = start()
    world.during[2] = lambda: signal.raise_signal(signal.SIGTERM)
    assert world.trainer(10, Cadence(-1, -1, -1, -1), in_flight=1).run() == "interrupted"
    assert world.happened[-2:] == [("train", 4), ("checkpoint", 4)] and world.n_updates == 4


# --- the summary -----------------------------------------------------------------------------------------------------

def record(tmp_path):
    """A run killed after step 16 and resumed at step 14, by hand: (train_time_sec, val_bpb) differ by segment."""
    log = RunLog.create(tmp_path, "r", {})

    def steps(numbers, dt_ms, clock):
        for step in numbers:
            clock += dt_ms / 1000 if step > 11 else 0.0
            log.event("train", step=step, tokens=100 * step, loss=2.0, dt_ms=dt_ms, tok_per_sec=1e5 / dt_ms,
                      train_time_sec=clock)
        return clock

    def val(step, bits, clock):
        log.event("val", step=step, tokens=100 * step, val_bpb=bits, train_time_sec=clock)

    val(0, 8.0, 0.0)
    clock = steps(range(1, 13), 1000, 0.0)
    val(12, 4.0, clock)
    saved = clock = steps([13, 14], 1000, clock)
    log.event("checkpoint", step=14, path="p")
    clock = steps([15, 16], 5000, clock)
    val(16, 0.5, clock)  # superseded: neither the best value nor the target's time
    log.event("core", step=16, tokens=1600, core_metric=0.9, train_time_sec=clock, tasks={})
    log.close()
    log = RunLog.resume(tmp_path, "r", 14)
    clock = steps([15, 16], 2000, saved)
    val(16, 1.5, clock)
    clock = steps([17, 18], 2000, clock)
    val(18, 2.0, clock)
    return log


def test_the_summary_is_that_of_the_effective_run(tmp_path):
    log = record(tmp_path)
    summary = summarize(log.folder, "ok", torch.device("cpu"), "val_bpb", 1.75)
    log.close()
    assert summary.pop("peak_memory_mib") > 50
    assert {name: value for name, value in summary.items() if not name.startswith("time_to_target")} == {
        "status": "ok", "steps": 18, "stopped_at_target": False, "tokens": 1800,
        "min_val_bpb": 1.5, "final_val_bpb": 2.0, "core_metric": None,
        "tok_per_sec_median": 50.0, "dt_median_ms": 2000.0, "train_time_sec": 3.0 + 8.0,
        "target_metric_name": "val_bpb", "target_metric_threshold": 1.75}  # timed: 3 steps of 1 s, 4 of 2 s
    assert summary["time_to_target_sec_measured"] == 3.0 + 4.0
    assert summary["time_to_target_sec_extrapolated"] is None


def test_a_run_without_target_or_steps_has_a_summary_too(tmp_path):
    log = RunLog.create(tmp_path, "r", {})
    log.event("val", step=0, tokens=0, val_bpb=math.nan, train_time_sec=0.0)
    log.close()
    summary = summarize(log.folder, "interrupted", torch.device("cpu"))
    assert summary.pop("peak_memory_mib") > 50
    assert summary == {
        "status": "interrupted", "steps": 0, "stopped_at_target": False, "tokens": 0,
        "min_val_bpb": None, "final_val_bpb": None,
        "core_metric": None, "tok_per_sec_median": None, "dt_median_ms": None, "train_time_sec": 0.0,
        "target_metric_name": None, "target_metric_threshold": None, "time_to_target_sec_measured": None,
        "time_to_target_sec_extrapolated": None}


class Sink:
    closed = 0

    def __call__(self, kind, event):
        pass

    def close(self):
        self.closed += 1


def test_closing_the_record_writes_the_summary_and_closes_the_sinks(tmp_path):
    log = record(tmp_path)
    log.sinks.append(Sink())
    summary = close_record(log, "ok", torch.device("cpu"), ("val_bpb", None), 0.0, World())
    assert log.sinks[0].closed == 1
    written = read_run(log.folder).summary
    assert written["wall_time_sec"] > 0 and written["status"] == "ok"
    assert {name: written[name] for name in summary} == summary


def test_a_full_disk_at_the_end_is_said_but_never_hides_what_ended_the_run(tmp_path, monkeypatch, capsys):
    log = record(tmp_path)
    log.sinks.append(Sink())
    monkeypatch.setattr("nanochat.runlog.os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        close_record(log, "ok", torch.device("cpu"), (None, None), 0.0, World())
    log = RunLog(log.folder, [Sink()])
    close_failed_record(log, torch.device("cpu"), (None, None), 0.0, World())
    assert log.sinks[0].closed == 1
    assert capsys.readouterr().err.startswith("no summary: the run's record in ")
    assert read_run(log.folder).status == "unfinished"
