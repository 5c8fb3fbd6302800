"""What a training loop is told: its horizon with the multipliers that change over it, what is due when, and where."""

import math
from dataclasses import dataclass

import torch

from nanochat import schedule
from nanochat.distributed import Ranks
from nanochat.watchdog import Watchdog


@dataclass(frozen=True)
class Cadence:
    """Every how many steps; -1 or 0 never, but `save_every=-1` still saves at the end."""

    eval_every: int = 250
    core_every: int = -1
    sample_every: int = -1
    save_every: int = -1


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
    """What a run does in each step and when: `step_tokens` tokens in `micro_batches`, which the ranks share out."""

    schedule: Schedule
    cadence: Cadence
    micro_batches: int
    step_tokens: int
    flops_per_token: float = 0.0
    stop_at: tuple[str, float] | None = None  # (metric name, threshold): the run ends where an evaluation reaches it
    save_every_sec: float = math.inf  # besides the cadence: when so much time has passed since the last save
    ends_at_sec: float | None = None  # time.monotonic() before which the run ends, as interrupted
    max_rollbacks: int = 0  # where something is not finite, go back to a checkpoint and on with the rows that come next


@dataclass(frozen=True)
class Place:
    """Where it runs: the device with its name, this process among its peers, and the watch they keep."""

    device: torch.device
    name: str
    ranks: Ranks
    watchdog: Watchdog
