"""The training loop: accumulate, update, evaluate, save; its clock counts the training steps alone.

A GPU works while Python is a step ahead: a step's loss is read when the next one has been launched, and before anything
else happens between steps. Nothing else waits for the device.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from nanochat.common import peak_bf16_flops
from nanochat.dataloader import n_batches_of_rank
from nanochat.runlog import UNTIMED_STEPS
from nanochat.saving import Saver
from nanochat.stopping import STOP_SIGNALS, Stopped, StopSignals
from nanochat.target import reaches
from nanochat.watchdog import BUSY, TRAINING, WAITING


@dataclass(frozen=True)
class Hooks:
    """What happens at step boundaries. The functions return the fields of their event; None where it is not wanted."""

    evaluate: Callable[[bool], dict]  # (is this the last one?) -> {val_bpb, ...}, maybe with `position_losses`
    saver: Saver
    # ({steps}): restore the newest good checkpoint of these and tell what the event of a resume from it holds; or None
    roll_back: Callable[[set], dict | None]
    core: Callable[[], dict] | None = None
    sample: Callable[[], list[dict]] | None = None


@dataclass(frozen=True)
class _Launched:
    """A step on its way: its number, and what its event needs. `outcome`, on the host once `arrived` says so: the loss,
    and what any rank asks of all: flags of STOP_SIGNALS, to save, to hear of a save that failed."""

    step: int
    multiplier: float
    outcome: torch.Tensor
    arrived: Callable[[], None]
    epochs: float


class _Diverged(Exception):
    """Something is not finite; its name."""


class Trainer:
    """Runs the loop. `model(inputs, targets)` is the (compiled) mean loss; `log` gets every event.

    log: a RunLog on rank 0, on other ranks anything with the same `event`. `loop_state` is that of the
    checkpoint a run resumes from; the loader must have been restored from it already.
    """

    def __init__(self, model, optimizer, loader, plan, hooks, log, place, loop_state=None):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.plan, self.hooks, self.log = plan, hooks, log
        self.device, self.ranks, self.watchdog = place.device, place.ranks, place.watchdog
        peak = peak_bf16_flops(place.name)
        self.mfu_per_token_sec = plan.flops_per_token / (peak * self.ranks.world_size) if peak else None
        state = loop_state or {}
        self.step = self.first_step = state.get("step", 0)
        self.train_time_sec = state.get("train_time_sec", 0.0)
        self.usual_dt_sec = state.get("usual_dt_sec")  # charged for the step that compiles after a resume
        self.saved_step = self.step if loop_state else None
        self.reached_target = False  # and the run ended by it
        self.repeats = loader.epochs > 1  # the text, and it has been said
        self.n_rollbacks = state.get("n_rollbacks", 0)
        self._checkpoints = {self.step} if loop_state else set()  # steps of this run's course
        self.best_step, self.best_val_bpb = state.get("best_step"), state.get("best_val_bpb") or math.inf
        self.signals = StopSignals(self.ranks.is_main, self.ranks.world_size == 1, plan.ends_at_sec)
        self._stopping = False  # all ranks know of a signal
        self._saved_at_sec = time.monotonic()
        self._must_save = False  # a rank's clock says so
        self._longest_step_sec = 0.0
        self._launched = deque()
        self._max_in_flight = 1 if self.device.type == "cuda" else 0  # when the loop goes on to the next step
        self._mark_sec = 0.0  # when the oldest step in flight began: at the end of the one before, or with none

    def run(self):
        """Train to the horizon, or to the target. Returns how it ended: ok, interrupted or nan."""
        status = None
        try:
            with self.signals:
                while status is None:
                    try:
                        status = self._train()
                    except _Diverged as what:
                        status = None if self._roll_back(str(what)) else "nan"
                self._collect(wait=True)
                return status
        finally:
            gc.unfreeze()
            self.hooks.saver.close()

    def _train(self):
        try:
            while True:
                if self._stopping:
                    self._settle()
                    return self._interrupted()
                if self._is_something_due():
                    self._settle()
                self._at_boundary()
                if self.reached_target or self._is_last():
                    return "ok"
                self._launch_step()
                self._settle(self._max_in_flight)
                if self.step == self.first_step + 1:
                    gc.collect()  # what has been made by now stays: a later collection need not look through it
                    gc.freeze()
        except Stopped:
            return self._interrupted()

    def _roll_back(self, what):
        """After a divergence, go back to the newest good checkpoint of this run's course, with the rows that come next;
        whether that could be done. The clock goes on: the steps that led there were trained."""
        self.watchdog.at(self.step, BUSY)
        self._collect(wait=True)
        if self.saved_step == self.step:
            self.hooks.saver.mark_bad(self.step)
        restored = None
        if self.n_rollbacks < self.plan.max_rollbacks:
            restored = self.hooks.roll_back(self._checkpoints | ({self.best_step} - {None}))
        if restored is None:
            return False
        self.n_rollbacks += 1
        self.log.event("resume", **restored, rollback=f"{what} not finite at step {self.step}",
                       n_rollbacks=self.n_rollbacks, max_rollbacks=self.plan.max_rollbacks)
        self.step = self.saved_step = restored["step"]
        self._checkpoints = {step for step in self._checkpoints if step <= self.step}
        return True

    def loop_state(self):
        """What a resumed run needs besides model and optimizer; JSON-able."""
        best_val_bpb = None if self.best_step is None else self.best_val_bpb
        return {"step": self.step, "train_time_sec": self.train_time_sec, "usual_dt_sec": self.usual_dt_sec,
                "best_step": self.best_step, "best_val_bpb": best_val_bpb, "n_rollbacks": self.n_rollbacks,
                "loader": self.loader.state_dict()}

    def _interrupted(self):
        if self.step > 0 and self.plan.cadence.save_every != 0 and self.saved_step != self.step:
            self._save(wait=True)
        return "interrupted"

    def _evaluation(self, hook, *arguments):
        with self.signals.evaluation():
            return hook(*arguments)

    def _is_last(self):
        return self.step == self.plan.schedule.num_iterations

    def _is_due(self, every):
        return every > 0 and (self._is_last() or self.step % every == 0)

    def _is_something_due(self):
        return self._is_last() or self._must_save or any(map(self._is_due, astuple(self.plan.cadence)))

    def _at_boundary(self):
        step, cadence, hooks, due, last = self.step, self.plan.cadence, self.hooks, self._is_due, self._is_last()
        # before the evaluations: should one of them fail, the weights are safe
        if step > 0 and step != self.saved_step and (
                self._must_save or due(cadence.save_every) or (last and cadence.save_every != 0)):
            self._save(wait=last)
        if due(cadence.eval_every):
            fields = self._evaluation(hooks.evaluate, last)
            positions = fields.pop("position_losses", None)
            self._event("val", step, **fields, train_time_sec=self.train_time_sec)
            if positions:
                self._event("position_losses", step, **positions)
            if not math.isfinite(fields["val_bpb"]):
                raise _Diverged("val_bpb")
            if step == self.saved_step and fields["val_bpb"] < self.best_val_bpb:
                self.best_step, self.best_val_bpb = step, fields["val_bpb"]
            self._check_target("val_bpb", fields["val_bpb"])
        if step > 0 and hooks.core and due(cadence.core_every):
            fields = self._evaluation(hooks.core)
            self._event("core", step, **fields, train_time_sec=self.train_time_sec)
            self._check_target("core", fields["core_metric"])
        if self.reached_target and step != self.saved_step and cadence.save_every != 0:
            self._save(wait=True)
        if step > 0 and hooks.sample and due(cadence.sample_every):
            for sample in self._evaluation(hooks.sample):
                self.log.event("sample", step=step, **sample)

    def _check_target(self, metric_name, value):
        if self.plan.stop_at and self.plan.stop_at[0] == metric_name:
            self.reached_target = reaches(metric_name, value, self.plan.stop_at[1])

    def _launch_step(self):
        """Start one optimizer step; on a CPU it is done when this returns."""
        if not self._launched:
            self._mark_sec = time.perf_counter()
        multiplier = self.plan.schedule.apply(self.optimizer, self.step)
        total = torch.zeros((), device=self.device)
        ranks, micro_batches = self.ranks, self.plan.micro_batches
        compiles = self.step == self.first_step
        for _ in range(n_batches_of_rank(micro_batches, ranks.rank, ranks.world_size)):
            self.watchdog.at(self.step, BUSY if compiles else TRAINING)
            loss = self.model(*next(self.loader))
            (loss / (micro_batches / ranks.world_size)).backward()  # the optimizer takes the mean over ranks
            if micro_batches > ranks.world_size:  # on every rank: what is reduced must be of one dtype
                self.optimizer.accumulate()
            total += loss.detach()
        self.watchdog.at(self.step, BUSY if compiles else WAITING)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._launched.append(_Launched(self.step, multiplier, *self._outcome(total), self.loader.epochs))

    def _outcome(self, total):
        """(outcome, arrived) of a _Launched, from the sum of its micro-batches' losses: one reduction, one read."""
        flags = [number == self.signals.number for number in STOP_SIGNALS]
        flags += [time.monotonic() - self._saved_at_sec >= self.plan.save_every_sec, self.hooks.saver.has_failed]
        outcome = torch.zeros(1 + len(flags), device=self.device)
        outcome[0] = total / self.plan.micro_batches
        for place in (place for place, flag in enumerate(flags, 1) if flag):
            outcome[place] = 1
        if self.ranks.world_size > 1:
            dist.all_reduce(outcome)
        if self.device.type != "cuda":
            return outcome.cpu(), lambda: None
        outcome, arrived = outcome.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        return outcome, arrived.synchronize

    def _settle(self, in_flight=0):
        """Wait until at most so many steps are on their way and record the others.

        Errors: _Diverged at the first loss that is not finite; what came after it is forgotten."""
        while len(self._launched) > in_flight:
            launched = self._launched.popleft()
            launched.arrived()
            self.watchdog.at(launched.step, BUSY)  # until the next step: records, evaluates, saves
            loss, *flags, must_save, save_failed = launched.outcome.tolist()
            now_sec = time.perf_counter()
            dt_sec, self._mark_sec = now_sec - self._mark_sec, now_sec
            self._clock(launched.step, dt_sec)
            self._record(launched, loss, dt_sec)
            if launched.step > self.first_step + 1:  # which compiles
                self._longest_step_sec = max(self._longest_step_sec, dt_sec)
            self._collect(wait=save_failed)
            asked = [number for number, flag in zip(STOP_SIGNALS, flags, strict=True) if flag]
            if asked:
                self.signals.heard(max(asked))
                self._stopping = True
            self._must_save |= must_save > 0
            self.signals.set_alarm(self._longest_step_sec, self.hooks.saver.longest_sec)
            if not math.isfinite(loss):
                self.step = launched.step
                self._launched.clear()
                raise _Diverged("loss")

    def _record(self, launched, loss, dt_sec):
        tok_per_sec = self.plan.step_tokens / dt_sec
        mfu = None if self.mfu_per_token_sec is None else tok_per_sec * self.mfu_per_token_sec
        self._event("train", launched.step, loss=loss, lr_multiplier=launched.multiplier, dt_ms=1000 * dt_sec,
                    tok_per_sec=tok_per_sec, train_time_sec=self.train_time_sec, mfu=mfu)
        if not self.repeats and launched.epochs > 1:
            self.repeats = True
            self._event("repeats", launched.step, distinct_tokens=self.loader.distinct_tokens)

    def _clock(self, step, dt_sec):
        if step <= UNTIMED_STEPS:
            return
        if step == self.first_step + 1:  # this process compiled again: not the training's time
            self.train_time_sec += self.usual_dt_sec or 0.0
            return
        self.train_time_sec += dt_sec
        self.usual_dt_sec = dt_sec if self.usual_dt_sec is None else 0.9 * self.usual_dt_sec + 0.1 * dt_sec

    def _save(self, wait):
        """wait: nothing is trained meanwhile."""
        self._collect(wait=True)
        good = self.hooks.saver.save(self.loop_state(), self.log.before_checkpoint)
        self.saved_step, self._must_save, self._saved_at_sec = self.step, False, time.monotonic()
        self._checkpoints.add(self.step)
        self._collect(wait)
        if not good:
            raise _Diverged("weights")

    def _collect(self, wait):
        """Record a checkpoint that has been saved by now; the events of steps still on their way come later."""
        saved = self.hooks.saver.collect(wait)
        if saved:
            self.log.event("checkpoint", step=self.step - len(self._launched), **saved)

    def _event(self, kind, step, **fields):
        self.log.event(kind, step=step, tokens=step * self.plan.step_tokens, **fields)
