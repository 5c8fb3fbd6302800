"""The plan of a run: its horizon, memory, time and cost from its flags, before any GPU is paid for."""

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch

from nanochat import config as config_module
from nanochat import schedule
from nanochat.common import UserError
from nanochat.gpt import GPTConfig, flops_per_token
from nanochat.planning.gpus import USABLE_SHARE, Gpu
from nanochat.planning.memory import Memory, memory_of
from nanochat.planning.step_time import StepTime, step_time
from nanochat.schedule import Horizon

LARGEST_ROWS = 256
MAX_NODES = 128


@dataclass(frozen=True)
class Estimate:
    """What a run will need; memory is one rank's, time one step's."""

    model: GPTConfig
    horizon: Horizon
    rows: int  # device batch
    accumulation: int  # micro-batches of the ranks that have the most
    nodes: int
    gpus_per_node: int
    memory: Memory
    gpu: Gpu
    time: StepTime

    @property
    def world_size(self):
        return self.nodes * self.gpus_per_node

    @property
    def flops(self):
        return flops_per_token(self.model) * self.horizon.target_tokens

    @property
    def train_sec(self):
        """Of all steps; evaluation, checkpoints and compilation are outside."""
        return self.time.total * self.horizon.num_iterations

    @property
    def tok_per_sec(self):
        return self.horizon.total_batch_size_tokens / self.time.total

    @property
    def mfu(self):
        """Model FLOPs over bf16's peak, as the training program counts them (in fp8 too)."""
        return (self.tok_per_sec * flops_per_token(self.model)
                / (self.gpu.bf16_flop_per_sec * self.world_size))

    @property
    def fits(self):
        return self.memory.peak <= USABLE_SHARE * self.gpu.memory_bytes

    def cost(self, price_per_gpu_hour):
        """Of the training alone, in the price's currency."""
        return self.train_sec / 3600 * self.world_size * price_per_gpu_hour


def estimate(config, vocab_size, gpu, *, gpus_per_node=8, nodes=1):
    """The Estimate of a TrainingConfig in bf16 on `nodes` x `gpus_per_node` of a Gpu, at its own device batch.

    Errors: UserError for fp8 where there is none, and where batch and ranks do not divide.
    """
    if gpus_per_node < 1 or not 1 <= nodes <= MAX_NODES:
        raise UserError(f"--gpus {gpus_per_node} and --nodes {nodes} must be at least 1, and nodes at most {MAX_NODES}")
    if config.fp8 and gpu.fp8_flop_per_sec is None:
        raise UserError(f"--fp8: the {gpu.name} has none; leave the flag out")
    model = config_module.model_config(config, vocab_size)
    horizon = config_module.run_horizon(config, model)
    world_size, dtype = nodes * gpus_per_node, torch.bfloat16
    accumulation = math.ceil(schedule.count_micro_batches(
        horizon.total_batch_size_tokens, config.device_batch_size, config.max_seq_len, world_size) / world_size)
    memory = memory_of(config, model, dtype, torch.device("cuda"), accumulation, world_size)
    time = step_time(config, model, dtype, gpu, horizon.total_batch_size_tokens, accumulation, nodes, gpus_per_node)
    return Estimate(model, horizon, config.device_batch_size, accumulation, nodes, gpus_per_node, memory, gpu, time)


def with_fitting_rows(config, vocab_size, gpu, **where):
    """The Estimate at the largest device batch, a power of two, that divides the step's rows and fits the memory.

    Arguments and errors as `estimate`; UserError also when not even one row a GPU fits.
    """
    rows = LARGEST_ROWS
    while rows > 1:
        with contextlib.suppress(UserError):  # of batches that do not divide; the last one's is raised
            found = estimate(dataclasses.replace(config, device_batch_size=rows), vocab_size, gpu, **where)
            if found.fits:
                return found
        rows //= 2
    found = estimate(dataclasses.replace(config, device_batch_size=1), vocab_size, gpu, **where)
    if not found.fits:
        raise UserError(f"one row needs {found.memory.peak / 1e9:.0f} GB, and a {gpu.name} has "
                        f"{USABLE_SHARE * gpu.memory_bytes / 1e9:.0f} GB for it; lower --depth or --max-seq-len")
    return found
