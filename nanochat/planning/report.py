"""An Estimate in words, and the table of a run on more and more nodes."""

import dataclasses
import math
import os

import torch

from nanochat.common import UserError
from nanochat.gpt import flops_per_token, parameter_counts, scaling_params
from nanochat.planning.estimate import Estimate, with_fitting_rows
from nanochat.planning.gpus import USABLE_SHARE, gpu_of_device
from nanochat.planning.memory import memory_of
from nanochat.planning.step_time import step_time


def describe(estimate, price_per_gpu_hour=0.0):
    """What a run will need: its horizon, memory by part, time by kind of work, hours and, at a price, cost."""
    model, horizon, memory, time, gpu = (estimate.model, estimate.horizon, estimate.memory, estimate.time,
                                         estimate.gpu)
    counts = parameter_counts(model)
    usable = USABLE_SHARE * gpu.memory_bytes
    kinds = (f"{kind} {1e3 * seconds:.0f}" for kind, seconds in dataclasses.asdict(time).items() if seconds)
    price = price_per_gpu_hour
    cost = f", {estimate.cost(price):,.2f} at {price:g} a GPU hour" if price else ""
    return "\n".join([
        f"model: {model.n_layer} layers, width {model.n_embd}, {counts['total'] / 1e6:.1f}M parameters, "
        f"{scaling_params(model) / 1e6:.1f}M of them scaling ones, {flops_per_token(model) / 1e9:.3f} GFLOP a token",
        f"horizon: {horizon.num_iterations} steps of {horizon.total_batch_size_tokens} tokens, "
        f"{horizon.target_tokens / 1e9:.3f}B tokens, {horizon.target_tokens / scaling_params(model):.2f} per scaling "
        f"parameter, {estimate.flops:.3g} FLOPs",
        f"on {estimate.world_size} x {gpu.name}: --device-batch-size {estimate.rows}, {estimate.accumulation} "
        "micro-batch(es) a step",
        f"memory of a GPU: {in_gb(memory.peak)} at its peak, {in_gb(usable)} of {in_gb(gpu.memory_bytes)} usable: "
        f"{'fits' if estimate.fits else 'DOES NOT FIT'}", f"  {memory_in_words(memory)}",
        f"step: {1e3 * time.total:.0f} ms ({', '.join(kinds)})",
        f"speed: {estimate.tok_per_sec:,.0f} tok/s, MFU {estimate.mfu:.1%} of bf16's peak",
        f"training: {estimate.train_sec / 3600:.2f} hours, "
        f"{estimate.train_sec / 3600 * estimate.world_size:,.1f} GPU hours{cost}"])


def at_start(config, model, horizon, micro_batches, place, dtype):
    """Two lines for the training program: memory, and time where the device's peaks are known.

    A TrainingConfig, its GPTConfig and Horizon, micro-batches of all ranks in a step, a Place, the compute dtype.
    """
    world_size = place.ranks.world_size
    accumulation = math.ceil(micro_batches / world_size)
    memory = memory_of(config, model, dtype, place.device, accumulation, world_size)
    lines = [f"plan: memory {'at least ' if config.no_compile else ''}{in_gb(memory.peak)} a rank: "
             f"{memory_in_words(memory)}"]
    gpu = gpu_of_device(place.name)
    if gpu and dtype == torch.bfloat16 and not config.no_compile:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # torchrun's
        nodes = math.ceil(world_size / per_node)
        time = step_time(config, model, dtype, gpu, horizon.total_batch_size_tokens, accumulation, nodes, per_node)
        found = Estimate(model, horizon, config.device_batch_size, accumulation, nodes, per_node, memory, gpu, time)
        lines.append(f"plan: {1e3 * time.total:,.0f} ms a step, {found.tok_per_sec:,.0f} tok/s, MFU {found.mfu:.0%}, "
                     f"{found.train_sec / 3600:.2f} hours of training")
    return "\n".join(lines)


def memory_in_words(memory):
    """The parts of a Memory, in the order in which they are made."""
    parts = {"gradients": memory.gradients + memory.micro_batch_gradients + memory.embedding_sums}
    names = ("weights", "copies", "optimizer_state", "gradients", "activations", "logits", "update")
    return ", ".join(f"{name.replace('_', ' ')} {in_gb(parts.get(name) or getattr(memory, name))}" for name in names)


def logits_in_words(config, vocab_size, gpu, **where):
    """What --chunked-ce changes: the logits' memory and the device batch that fits, without and with it."""
    found = []
    for chunked in (False, True):
        estimate = with_fitting_rows(dataclasses.replace(config, chunked_ce=chunked), vocab_size, gpu, **where)
        found.append(f"{'with' if chunked else 'without'} --chunked-ce {in_gb(estimate.memory.logits)} at "
                     f"--device-batch-size {estimate.rows}")
    return f"logits at the largest device batch that fits: {', '.join(found)}"


def nodes_table(config, vocab_size, gpu, gpus_per_node, nodes, price_per_gpu_hour=0.0):
    """Lines: the run on 1, 2, 4, ... `nodes` nodes, each at its largest device batch that fits."""
    lines = [f"{'nodes':>5} {'GPUs':>5} {'rows':>5} {'ms a step':>10} {'communication':>14} {'tok/s':>12} {'hours':>7} "
             f"{'GPU hours':>10}" + (f" {'cost':>10}" if price_per_gpu_hour else "")]
    for count in (2**power for power in range(nodes.bit_length())):
        try:
            found = with_fitting_rows(config, vocab_size, gpu, gpus_per_node=gpus_per_node, nodes=count)
        except UserError as error:
            lines.append(f"{count:>5} {count * gpus_per_node:>5} {error}")
            continue
        share = found.time.communication / found.time.total
        hours = found.train_sec / 3600
        lines.append(f"{count:>5} {found.world_size:>5} {found.rows:>5} {1e3 * found.time.total:>10.0f} "
                     f"{share:>13.0%}{'*' if share > 0.5 else ' '} {found.tok_per_sec:>12,.0f} {hours:>7.2f} "
                     f"{hours * found.world_size:>10,.1f}"
                     + (f" {found.cost(price_per_gpu_hour):>10,.2f}" if price_per_gpu_hour else ""))
    if any("*" in line for line in lines):
        lines.append("* communication takes more than half of the step")
    return lines


def in_gb(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
