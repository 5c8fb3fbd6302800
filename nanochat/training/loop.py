"""The training loop: accumulate, update, evaluate, save; its clock counts the training steps alone."""

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.machine import peak_bf16_flops
from nanochat.ranks import Ranks
from nanochat.runlog import UNTIMED_STEPS
from nanochat.target import reaches
from nanochat.training import schedule

# of a person, a scheduler (SLURM warns with USR1 or USR2 before its time limit), a terminal that closes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_SEC = 1.0  # a scheduler's signal comes twice within it: from the scheduler, and passed on by torchrun


@dataclass(frozen=True)
class Cadence:
    """Every how many steps; -1 or 0 never, but `save_every=-1` still saves at the end."""

    eval_every: int = 250
    core_every: int = -1
    sample_every: int = -1
    save_every: int = -1


@dataclass(frozen=True)
class Hooks:
    """What happens at step boundaries. Each returns the fields of its event; None where it is not wanted."""

    evaluate: Callable[[bool], dict]  # (is this the last one?) -> {val_bpb, ...}, maybe with `position_losses`
    save: Callable[[dict], dict]  # (loop state) -> {path, good: are the weights finite?}
    mark_bad: Callable[[int], None]  # (step): should there be a checkpoint of it, it is of a run that diverged
    core: Callable[[], dict] | None = None
    sample: Callable[[], list[dict]] | None = None


@dataclass(frozen=True)
class Schedule:
    """The horizon and the multipliers that change over it."""

    num_iterations: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05

    def apply(self, optimizer, step):
        """Set the optimizer for update number `step` (from 0); returns the learning-rate multiplier."""
        multiplier = schedule.lr_multiplier(step, self.num_iterations, warmup_steps=self.warmup_steps,
                                            warmdown_ratio=self.warmdown_ratio, final_lr_frac=self.final_lr_frac)
        momentum = schedule.muon_momentum(step, self.num_iterations, warmdown_ratio=self.warmdown_ratio)
        optimizer.schedule(multiplier, momentum, schedule.muon_weight_decay(step, self.num_iterations, 1.0))
        return multiplier


@dataclass(frozen=True)
class Plan:
    """What a run does in each step and when: `step_tokens` tokens in `accumulation` micro-batches a rank."""

    schedule: Schedule
    cadence: Cadence
    accumulation: int
    step_tokens: int
    flops_per_token: float = 0.0
    stop_at: tuple[str, float] | None = None  # (metric name, threshold): the run ends where an evaluation reaches it


@dataclass(frozen=True)
class Place:
    """Where it runs: the device with its name, and this process among its peers."""

    device: torch.device
    name: str
    ranks: Ranks


class _Stopped(BaseException):
    """Ends an evaluation when a signal asks to stop; no Exception, so that nothing on its way takes it for an error."""


class Trainer:
    """Runs the loop. `model(inputs, targets)` is the (compiled) mean loss; `log` gets every event.

    log: a RunLog on rank 0, on other ranks anything with the same `event`. `loop_state` is that of the
    checkpoint a run resumes from; the loader must have been restored from it already.
    """

    def __init__(self, model, optimizer, loader, plan, hooks, log, place, loop_state=None):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.plan, self.hooks, self.log = plan, hooks, log
        self.device, self.ranks = place.device, place.ranks
        peak = peak_bf16_flops(place.name)
        self.mfu_per_token_sec = plan.flops_per_token / (peak * self.ranks.world_size) if peak else None
        state = loop_state or {}
        self.step = self.first_step = state.get("step", 0)
        self.train_time_sec = state.get("train_time_sec", 0.0)
        self.usual_dt_sec = state.get("usual_dt_sec")  # charged for the step that compiles after a resume
        self.saved_step = self.step if loop_state else None
        self.reached_target = False  # and the run ended by it
        self.repeats = loader.epochs > 1  # the text, and it has been said
        self.diverged = False  # a validation or a weight is not finite
        self._stop_signal = 0
        self._asked_at = 0.0
        self._in_hook = False

    def run(self):
        """Train to the horizon, or to the target. Returns how it ended: ok, interrupted or nan."""
        previous = {number: signal.signal(number, self._request_stop) for number in STOP_SIGNALS}
        try:
            while True:
                self._at_boundary()
                if self.diverged:
                    self.hooks.mark_bad(self.step)
                    return "nan"
                if self.reached_target or self.step == self.plan.schedule.num_iterations:
                    return "ok"
                loss, stop_signal = self._train_step()
                if not math.isfinite(loss):
                    return "nan"
                if stop_signal:
                    self._stop_signal = stop_signal  # perhaps another rank's
                    return self._interrupted()
        except _Stopped:
            return self._interrupted()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @property
    def stop_signal(self):
        """The number of the signal that interrupted the run, or 0."""
        return self._stop_signal

    def loop_state(self):
        """What a resumed run needs besides model and optimizer; JSON-able."""
        return {"step": self.step, "train_time_sec": self.train_time_sec, "usual_dt_sec": self.usual_dt_sec,
                "loader": self.loader.state_dict()}

    def _request_stop(self, number, _frame):
        now = time.monotonic()
        if not self._stop_signal:
            self._stop_signal, self._asked_at = number, now
            if self.ranks.is_main:  # not print: it may be what the signal interrupted
                with contextlib.suppress(OSError):
                    os.write(2, b"\nstopping cleanly; ask again to stop at once\n")
            if self._in_hook:
                raise _Stopped
        elif now - self._asked_at > REPEAT_SEC:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _interrupted(self):
        if self.step > 0 and self.plan.cadence.save_every != 0 and self.saved_step != self.step:
            self._save()
        return "interrupted"

    def _evaluation(self, hook, *arguments):
        """The hook's result. It may take long: alone, a signal ends it; several ranks end together after a step."""
        self._in_hook = self.ranks.world_size == 1
        try:
            if self._in_hook and self._stop_signal:
                raise _Stopped
            return hook(*arguments)
        finally:
            self._in_hook = False

    def _at_boundary(self):
        step, cadence, hooks = self.step, self.plan.cadence, self.hooks
        last = step == self.plan.schedule.num_iterations

        def due(every):
            return every > 0 and (last or step % every == 0)

        # before the evaluations: should one of them fail, the weights are safe
        if step > 0 and step != self.saved_step and (due(cadence.save_every) or (last and cadence.save_every != 0)):
            self._save()
        if due(cadence.eval_every):
            fields = self._evaluation(hooks.evaluate, last)
            positions = fields.pop("position_losses", None)
            self._event("val", **fields, train_time_sec=self.train_time_sec)
            if positions:
                self._event("position_losses", **positions)
            self.diverged |= not math.isfinite(fields["val_bpb"])
            self._check_target("val_bpb", fields["val_bpb"])
        if self.diverged:
            return
        if step > 0 and hooks.core and due(cadence.core_every):
            fields = self._evaluation(hooks.core)
            self._event("core", **fields, train_time_sec=self.train_time_sec)
            self._check_target("core", fields["core_metric"])
        if self.reached_target and step != self.saved_step and cadence.save_every != 0:
            self._save()
        if step > 0 and hooks.sample and due(cadence.sample_every):
            for sample in self._evaluation(hooks.sample):
                self.log.event("sample", step=step, **sample)

    def _check_target(self, metric_name, value):
        if self.plan.stop_at and self.plan.stop_at[0] == metric_name:
            self.reached_target = reaches(metric_name, value, self.plan.stop_at[1])

    def _train_step(self):
        """One optimizer step: (mean loss over ranks, a stop signal any rank received or 0)."""
        self._synchronize()
        start = time.perf_counter()
        multiplier = self.plan.schedule.apply(self.optimizer, self.step)
        total = torch.zeros((), device=self.device)
        for _ in range(self.plan.accumulation):
            loss = self.model(*next(self.loader))
            (loss / self.plan.accumulation).backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, stop_signal = self._agree(total / self.plan.accumulation)
        self._synchronize()
        dt_sec = time.perf_counter() - start
        self._clock(dt_sec)
        self.step += 1
        tok_per_sec = self.plan.step_tokens / dt_sec
        mfu = None if self.mfu_per_token_sec is None else tok_per_sec * self.mfu_per_token_sec
        self._event("train", loss=loss, lr_multiplier=multiplier, dt_ms=1000 * dt_sec, tok_per_sec=tok_per_sec,
                    train_time_sec=self.train_time_sec, mfu=mfu)
        if not self.repeats and self.loader.epochs > 1:
            self.repeats = True
            self._event("repeats", distinct_tokens=self.loader.distinct_tokens)
        return loss, stop_signal

    def _clock(self, dt_sec):
        if self.step < UNTIMED_STEPS:
            return
        if self.step == self.first_step:  # this process compiled again: not the training's time
            self.train_time_sec += self.usual_dt_sec or 0.0
            return
        self.train_time_sec += dt_sec
        self.usual_dt_sec = dt_sec if self.usual_dt_sec is None else 0.9 * self.usual_dt_sec + 0.1 * dt_sec

    def _agree(self, loss):
        if self.ranks.world_size > 1:
            both = torch.stack((loss / self.ranks.world_size, torch.zeros_like(loss)))
            both[1] = self._stop_signal
            dist.all_reduce(both[:1])
            dist.all_reduce(both[1:], op=dist.ReduceOp.MAX)
            return both[0].item(), int(both[1].item())
        return loss.item(), self._stop_signal

    def _save(self):
        self.log.before_checkpoint()
        saved = self.hooks.save(self.loop_state())
        self.diverged |= not saved["good"]
        self.log.event("checkpoint", step=self.step, **saved)
        self.saved_step = self.step

    def _event(self, kind, **fields):
        self.log.event(kind, step=self.step, tokens=self.step * self.plan.step_tokens, **fields)

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
