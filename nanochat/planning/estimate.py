"""The plan of a run: its horizon, memory, time and cost from its flags, before any GPU is paid for."""

import dataclasses
from dataclasses import dataclass

import torch

from nanochat.errors import UserError
from nanochat.model.gpt import GPTConfig, flops_per_token
from nanochat.planning.gpus import USABLE_SHARE, Gpu, gpu_of_device
from nanochat.planning.memory import Memory, memory_of
from nanochat.planning.step_time import StepTime, step_time
from nanochat.training import build, schedule
from nanochat.training.schedule import Horizon

LARGEST_ROWS = 256
MAX_NODES = 128


@dataclass(frozen=True)
class Estimate:
    """What a run will need. memory is None where it is not known, gpu and time where the device is not."""

    model: GPTConfig
    horizon: Horizon
    rows: int  # device batch
    accumulation: int  # micro-batches a rank
    nodes: int
    gpus_per_node: int
    memory: Memory
    gpu: Gpu | None = None
    time: StepTime | None = None

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
    model = build.model_config(config, vocab_size)
    horizon = build.plan(config, model)
    world_size, dtype = nodes * gpus_per_node, torch.bfloat16
    accumulation = schedule.accumulation_steps(horizon.total_batch_size_tokens, config.device_batch_size,
                                               config.max_seq_len, world_size)
    memory = memory_of(config, model, dtype, torch.device("cuda"), accumulation, world_size)
    time = step_time(config, model, dtype, gpu, horizon.total_batch_size_tokens, accumulation, nodes, gpus_per_node)
    return Estimate(model, horizon, config.device_batch_size, accumulation, nodes, gpus_per_node, memory, gpu, time)


def with_fitting_rows(config, vocab_size, gpu, **where):
    """The Estimate at the largest device batch, a power of two, that divides the batch and fits the memory.

    Arguments and errors as `estimate`; UserError also when not even one row fits.
    """
    rows, refused = LARGEST_ROWS, None
    while rows:
        try:
            found = estimate(dataclasses.replace(config, device_batch_size=rows), vocab_size, gpu, **where)
            if found.fits:
                return found
        except UserError as error:
            refused = error
            if rows == 1:
                raise
        rows //= 2
    raise refused or AssertionError


def _gb(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def at_start(config, model, horizon, accumulation, device, device_name, dtype, ranks):
    """What the training program says of memory and, where the device's peaks are known, of time: one or two lines."""
    memory = memory_of(config, model, dtype, device, accumulation, ranks.world_size)
    bound = "at least " if config.no_compile else ""
    lines = [f"plan: memory {bound}{_gb(memory.peak)} a rank: {memory_in_words(memory)}"]
    gpu = gpu_of_device(device_name)
    if gpu and dtype == torch.bfloat16 and not config.no_compile:
        time = step_time(config, model, dtype, gpu, horizon.total_batch_size_tokens, accumulation,
                         ranks.n_nodes, ranks.world_size // ranks.n_nodes)
        found = Estimate(model, horizon, config.device_batch_size, accumulation, ranks.n_nodes,
                         ranks.world_size // ranks.n_nodes, memory, gpu, time)
        lines.append(f"plan: {1e3 * time.total:.0f} ms a step, {found.tok_per_sec:,.0f} tok/s, MFU {found.mfu:.0%}, "
                     f"{found.train_sec / 3600:.2f} hours of training")
    return "\n".join(lines)


def memory_in_words(memory):
    """The parts of a Memory, in the order in which they are made."""
    parts = (("weights", memory.weights), ("copies", memory.copies), ("optimizer state", memory.optimizer_state),
             ("gradients", memory.gradients + memory.micro_batch_gradients), ("activations", memory.activations),
             ("logits", memory.logits), ("update", memory.update))
    return ", ".join(f"{name} {_gb(size)}" for name, size in parts)


