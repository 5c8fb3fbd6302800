"""The training loop: accumulate, update, evaluate, save; its clock counts the training steps alone."""

import math
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanochat.errors import UserError
from nanochat.machine import peak_bf16_flops
from nanochat.runlog import read_run
from nanochat.target import evaluations_of, time_to_target
from nanochat.training import schedule

UNTIMED_STEPS = 11  # the first ones compile; they are not on the clock
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
    save: Callable[[dict], dict]  # (loop state) -> {path}
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


class _Stopped(BaseException):
    """Ends an evaluation when a signal asks to stop; no Exception, so that nothing on its way takes it for an error."""


class Trainer:
    """Runs the loop. `model(inputs, targets)` is the (compiled) mean loss; `log` gets every event.

    log: a RunLog on rank 0, on other ranks anything with the same `event`. `loop_state` is that of the
    checkpoint a run resumes from; the loader must have been restored from it already.
    """

    def __init__(self, model, optimizer, loader, *, schedule, accumulation, step_tokens, cadence, hooks, log, ranks,
                 device, device_name="", flops_per_token=0, loop_state=None):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.schedule, self.accumulation, self.step_tokens = schedule, accumulation, step_tokens
        self.cadence, self.hooks, self.log, self.ranks, self.device = cadence, hooks, log, ranks, device
        peak = peak_bf16_flops(device_name)
        self.mfu_per_token_sec = flops_per_token / (peak * ranks.world_size) if peak else None
        state = loop_state or {}
        self.step = self.first_step = state.get("step", 0)
        self.train_time_sec = state.get("train_time_sec", 0.0)
        self.usual_dt_sec = state.get("usual_dt_sec")  # charged for the step that compiles after a resume
        self.saved_step = self.step if loop_state else None
        self._stop_signal = 0
        self._asked_at = 0.0
        self._in_hook = False

    def run(self):
        """Train to the horizon. Returns how it ended: ok, interrupted or nan."""
        previous = {number: signal.signal(number, self._request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                self._at_boundary()
                if self.step == self.schedule.num_iterations:
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
                os.write(2, b"\nstopping cleanly; ask again to stop at once\n")
            if self._in_hook:
                raise _Stopped
        elif now - self._asked_at > REPEAT_SEC:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _interrupted(self):
        if self.step > 0 and self.cadence.save_every != 0 and self.saved_step != self.step:
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
        step, cadence, hooks = self.step, self.cadence, self.hooks
        last = step == self.schedule.num_iterations

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
        if step > 0 and hooks.core and due(cadence.core_every):
            self._event("core", **self._evaluation(hooks.core), train_time_sec=self.train_time_sec)
        if step > 0 and hooks.sample and due(cadence.sample_every):
            for sample in self._evaluation(hooks.sample):
                self.log.event("sample", step=step, **sample)

    def _train_step(self):
        """One optimizer step: (mean loss over ranks, a stop signal any rank received or 0)."""
        self._synchronize()
        start = time.perf_counter()
        multiplier = self.schedule.apply(self.optimizer, self.step)
        total = torch.zeros((), device=self.device)
        for _ in range(self.accumulation):
            loss = self.model(*next(self.loader))
            (loss / self.accumulation).backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss, stop_signal = self._agree(total / self.accumulation)
        self._synchronize()
        dt_sec = time.perf_counter() - start
        self._clock(dt_sec)
        self.step += 1
        tok_per_sec = self.step_tokens / dt_sec
        mfu = None if self.mfu_per_token_sec is None else tok_per_sec * self.mfu_per_token_sec
        self._event("train", loss=loss, lr_multiplier=multiplier, dt_ms=1000 * dt_sec, tok_per_sec=tok_per_sec,
                    train_time_sec=self.train_time_sec, mfu=mfu)
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
        self.log.event("checkpoint", step=self.step, **self.hooks.save(self.loop_state()))
        self.saved_step = self.step

    def _event(self, kind, **fields):
        self.log.event(kind, step=self.step, tokens=self.step * self.step_tokens, **fields)

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def close_record(log, status, device, target, started):
    """Write the summary and close the log with its sinks; returns the summary. `started`: time.monotonic() then.

    target: (metric name, threshold or None). Errors: UserError when the disk is full.
    """
    try:
        summary = summarize(log.folder, status, device, *target)
        if target[1] is not None:
            reached = time_to_target(evaluations_of(read_run(log.folder).events, target[0]), *target)
            log.event("target", step=summary["steps"], **reached.summary_fields(), description=reached.describe())
        log.finish(**summary, wall_time_sec=time.monotonic() - started)
    finally:
        log.close()
        for sink in log.sinks:
            sink.close()
    return summary


def close_failed_record(log, device, target, started):
    """The same for a run that an exception ended: whatever goes wrong now must not hide it."""
    try:
        close_record(log, "error", device, target, started)
    except UserError as error:
        print(f"no summary: {error}", file=sys.stderr)


def summarize(folder, status, device, target_metric_name=None, target_metric_threshold=None):
    """The fields of summary.json, computed from the run's own record (every segment of it)."""
    events = read_run(folder).events
    train = [event for event in events if event["kind"] == "train"]
    timed = [event for event in train if event["step"] > UNTIMED_STEPS]
    bits = [event["val_bpb"] for event in events if event["kind"] == "val"]
    finite_bits = [value for value in bits if value is not None]
    core = [event["core_metric"] for event in events if event["kind"] == "core"]
    target = {"target_metric_name": None, "target_metric_threshold": None,
              "time_to_target_sec_measured": None, "time_to_target_sec_extrapolated": None}
    if target_metric_threshold is not None:
        target = time_to_target(evaluations_of(events, target_metric_name), target_metric_name,
                                target_metric_threshold).summary_fields()
    return {
        "status": status,
        "steps": train[-1]["step"] if train else 0,
        "tokens": train[-1]["tokens"] if train else 0,
        "min_val_bpb": min(finite_bits, default=None),
        "final_val_bpb": bits[-1] if bits else None,
        "core_metric": core[-1] if core else None,
        "tok_per_sec_median": statistics.median(e["tok_per_sec"] for e in timed) if timed else None,
        "dt_median_ms": statistics.median(e["dt_ms"] for e in timed) if timed else None,
        "train_time_sec": train[-1]["train_time_sec"] if train else 0.0,
        "peak_memory_mib": peak_memory_mib(device),
        **target,
    }


def peak_memory_mib(device):
    """Peak memory of this process: the allocator's on CUDA, the resident set's elsewhere; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
