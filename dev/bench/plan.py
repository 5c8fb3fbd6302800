"""The planner against what happened: its times against published records, its memory against peaks measured on a CPU.

    python -m dev.bench.plan records                            # a table; nothing runs
    python -m dev.bench.plan memory --out dev/plan_memory_cpu.csv    # three shapes, a process each; minutes

Memory is what one whole optimizer step holds above what was there before it, from the process's resident set, and the
bytes of the tensors that stay (weights, copies, optimizer state).
"""

import argparse
import dataclasses
import subprocess
import sys
from typing import NamedTuple

import torch

from dev.bench.measure import append_rows, cpu_peak_bytes
from nanochat import build, schedule
from nanochat.common import choose_compute_dtype, command
from nanochat.config import TrainingConfig
from nanochat.distributed import Ranks
from nanochat.planning.estimate import estimate
from nanochat.planning.gpus import GPUS
from nanochat.planning.memory import memory_of


class Record(NamedTuple):
    """A published run on 8xH100: minutes of training and flags; `assumed`: which of them were not published with it."""

    name: str
    minutes: float
    flags: dict
    assumed: str
    vocab_size: int


def _record(name, minutes, depth, ratio, assumed="", vocab_size=32768, fp8=True, **flags):
    return Record(name, minutes, {"depth": depth, "target_param_data_ratio": ratio, "fp8": fp8, **flags}, assumed,
                  vocab_size)


RECORDS = [
    _record("d24", 182.4, 24, 12.0, "ratio, batch of 524,288", fp8=False, total_batch_size=2**19),
    _record("d26, fp8", 174.6, 26, 8.5, "ratio, batch of 524,288", total_batch_size=2**19),
    _record("1M-token batch", 165.6, 26, 8.25, "d26, ratio", total_batch_size=2**20),
    _record("ClimbMix", 121.2, 24, 9.5, "d24, ratio"),
    _record("1.80 hours", 108.0, 24, 8.7, "d24, ratio"),
    _record("d24, ratio 8, fp8", 99.0, 24, 8.0),
    _record("d24 tuned", 94.6, 24, 8.0, "ratio 8, fp8"),
    _record("d22, ratio 11.05", 88.2, 22, 11.05, "fp8"),
    _record("d22, ratio 9.4, chunked loss, 32 rows", 81.8, 22, 9.4, "fp8", 49152, chunked_ce=True,
            device_batch_size=32),
]

CPU = torch.device("cpu")
_CPU = {"device_type": "cpu", "target_param_data_ratio": 1.0}
SHAPES = {  # activations; several micro-batches with windows; weights and the optimizer
    "d4 w256, 32x256, blockwise": (8192, dict(
        depth=4, head_dim=64, max_seq_len=256, window_pattern="L", device_batch_size=32,
        total_batch_size=8192, **_CPU)),
    "d2 w384, 4x1024 twice, SL": (8192, dict(
        depth=2, aspect_ratio=192, head_dim=128, max_seq_len=1024, window_pattern="SL", device_batch_size=4,
        total_batch_size=8192, **_CPU)),
    "d2 w512, 2x1024, chunked loss": (32768, dict(
        depth=2, aspect_ratio=256, head_dim=128, max_seq_len=1024, window_pattern="L", device_batch_size=2,
        total_batch_size=2048, chunked_ce=True, **_CPU)),
}


def record_rows():
    """A dict for each record: planned and published minutes."""
    for record in RECORDS:
        config = TrainingConfig(**{"device_batch_size": 16, **record.flags})
        planned = estimate(config, record.vocab_size, GPUS["h100"])
        yield {"record": record.name, "minutes": record.minutes, "planned": round(planned.train_sec / 60, 1),
               "off": f"{planned.train_sec / 60 / record.minutes - 1:+.1%}", "steps": planned.horizon.num_iterations,
               "ms_a_step": round(1e3 * planned.time.total), "peak_gb": round(planned.memory.peak / 1e9, 1),
               "fits": planned.fits, "assumed": record.assumed}


def setting_of(shape):
    """(TrainingConfig, GPTConfig, Horizon, compute dtype, micro-batches) of one of SHAPES."""
    vocab_size, flags = SHAPES[shape]
    config = TrainingConfig(**flags)
    model = build.model_config(config, vocab_size)
    horizon = build.plan(config, model)
    dtype, _ = choose_compute_dtype(CPU)
    return config, model, horizon, dtype, schedule.count_micro_batches(
        horizon.total_batch_size_tokens, config.device_batch_size, config.max_seq_len, 1)


def planned_memory(shape):
    config, model, _, dtype, micro_batches = setting_of(shape)
    return memory_of(config, model, dtype, CPU, micro_batches, 1)


def memory_row(shape):
    """Planned and measured bytes of one of SHAPES, measured in this process, which should do nothing else."""
    config, model_config, horizon, dtype, micro_batches = setting_of(shape)
    model = build.build_model(config, model_config, CPU, dtype)
    optimizer = build.build_optimizer(config, model, horizon, Ranks(), dtype)
    compiled = build.compile_model(config, model, optimizer)
    ids = torch.randint(model_config.vocab_size, (config.device_batch_size, config.max_seq_len))

    def step():
        for _ in range(micro_batches):
            (compiled(ids, ids) / micro_batches).backward()
            if micro_batches > 1:
                optimizer.accumulate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # makes the optimizer's state
    above = cpu_peak_bytes(step)
    stays = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [
        *model.parameters(), *model.buffers(), *optimizer.casts.values(),
        *(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))]}
    measured = sum(stays.values()) + above
    planned = planned_memory(shape)
    parts = {f"planned_{name}_mb": round(size / 1e6, 1) for name, size in dataclasses.asdict(planned).items()}
    return {"shape": shape, "dtype": str(dtype).removeprefix("torch."), **parts,
            "stays_mb": round(sum(stays.values()) / 1e6, 1), "step_mb": round(above / 1e6, 1),
            "planned_peak_mb": round(planned.peak / 1e6, 1), "measured_peak_mb": round(measured / 1e6, 1),
            "off": f"{planned.peak / measured - 1:+.1%}", "torch": torch.__version__}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("records", "memory"))
    parser.add_argument("--out", default="dev/plan_memory_cpu.csv", help="CSV that memory adds to")
    parser.add_argument("--shape", choices=SHAPES, help="this one alone, in this process")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if args.what == "records":
        for row in record_rows():
            print(", ".join(f"{name} {value}" for name, value in row.items()))
    elif args.shape:
        row = memory_row(args.shape)
        append_rows(args.out, [row])
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    else:
        for shape in SHAPES:
            subprocess.run([sys.executable, "-m", "dev.bench.plan", "memory", "--out", args.out, "--shape", shape],
                           check=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
