"""The plan against measurements: time against published records, memory against peaks on a CPU.

python -m dev.bench.plan records > dev/plan_records.csv      # nothing is trained
python -m dev.bench.plan memory >> dev/plan_memory_cpu.csv   # three shapes; minutes

The measured peak is the size of the tensors that stay (weights, copies, optimizer state), plus the
growth of the process's resident memory during one optimizer step.
"""

import argparse
import csv
import subprocess
import sys
from typing import NamedTuple

import torch

from dev.bench.measure import cpu_peak_bytes
from nanochat import build, schedule
from nanochat.common import command
from nanochat.config import TrainingConfig, model_config, run_horizon
from nanochat.device import choose_compute_dtype
from nanochat.distributed import Ranks
from nanochat.plan import GPUS, Estimate, memory_of

CPU = torch.device("cpu")


class Record(NamedTuple):
    """A published run on 8 x H100; `assumed` names the flags that were not published with it."""

    name: str
    minutes: float
    flags: dict
    assumed: str
    vocab_size: int = 32768


def _record(name, minutes, depth, ratio, assumed="", vocab_size=32768, **flags):
    flags = {"fp8": True, "device_batch_size": 16, **flags}
    flags |= {"depth": depth, "target_param_data_ratio": ratio}
    return Record(name, minutes, flags, assumed, vocab_size)


RECORDS = [
    _record("d24", 182.4, 24, 12.0, "ratio, batch of 524,288", fp8=False, total_batch_size=2**19),
    _record("d26, fp8", 174.6, 26, 8.5, "ratio, batch of 524,288", total_batch_size=2**19),
    _record("1M-token batch", 165.6, 26, 8.25, "d26, ratio", total_batch_size=2**20),
    _record("ClimbMix", 121.2, 24, 9.5, "d24, ratio"),
    _record("1.80 hours", 108.0, 24, 8.7, "d24, ratio"),
    _record("d24, ratio 8, fp8", 99.0, 24, 8.0),
    _record("d24 tuned", 94.6, 24, 8.0, "ratio 8, fp8"),
    _record("d22, ratio 11.05", 88.2, 22, 11.05, "fp8"),
    _record("d22, ratio 9.4, chunked loss, 32 rows", 81.8, 22, 9.4, "fp8", 49152,
            chunked_ce=True, device_batch_size=32),
]

_CPU = {"device_type": "cpu", "target_param_data_ratio": 1.0}
SHAPES = {  # name: (vocabulary, flags)
    "d4 w256, 32x256, blockwise": (8192, dict(
        depth=4, head_dim=64, max_seq_len=256, window_pattern="L", device_batch_size=32,
        total_batch_size=8192, **_CPU)),
    "d2 w384, 4x1024 twice, SL": (8192, dict(
        depth=2, aspect_ratio=192, head_dim=128, max_seq_len=1024, window_pattern="SL",
        device_batch_size=4, total_batch_size=8192, **_CPU)),
    "d2 w512, 2x1024, chunked loss": (32768, dict(
        depth=2, aspect_ratio=256, head_dim=128, max_seq_len=1024, window_pattern="L",
        device_batch_size=2, total_batch_size=2048, chunked_ce=True, **_CPU)),
}


def record_rows():
    """Yield the rows of dev/plan_records.csv, with a header; minutes are published and planned."""
    yield "record", "minutes", "planned", "deviation", "assumed"
    for record in RECORDS:
        found = Estimate(TrainingConfig(**record.flags), record.vocab_size, GPUS["h100"])
        minutes = 60 * found.train_hours
        deviation = f"{minutes / record.minutes - 1:+.1%}"
        yield record.name, str(record.minutes), f"{minutes:.1f}", deviation, record.assumed


def setting_of(name):
    """Return (TrainingConfig, GPTConfig, Horizon, compute dtype, micro-batches) of a shape."""
    vocab_size, flags = SHAPES[name]
    config = TrainingConfig(**flags)
    shape = model_config(config, vocab_size)
    horizon = run_horizon(config, shape)
    dtype, _ = choose_compute_dtype(CPU)
    micro_batches = schedule.count_micro_batches(
        horizon.total_batch_size_tokens, config.device_batch_size, config.max_seq_len, 1)
    return config, shape, horizon, dtype, micro_batches


def planned_peak_mb(shape):
    config, sizes, _, dtype, micro_batches = setting_of(shape)
    return memory_of(config, sizes, dtype, CPU, micro_batches, 1)[1] / 1e6


def measured_peak_mb(shape):
    """Return the peak of one optimizer step of this process, which should do nothing else."""
    config, sizes, horizon, dtype, micro_batches = setting_of(shape)
    model = build.build_model(config, sizes, CPU, dtype)
    optimizer = build.build_optimizer(config, model, horizon, Ranks(), dtype)
    compiled = build.compile_model(config, model, optimizer)
    rows = config.device_batch_size, config.max_seq_len
    ids = torch.randint(sizes.vocab_size, rows)

    def step():
        for _ in range(micro_batches):
            (compiled(ids, ids) / micro_batches).backward()
            if micro_batches > 1:
                optimizer.accumulate()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()  # creates the optimizer's state
    growth = cpu_peak_bytes(step)
    state = [value for values in optimizer.state.values() for value in values.values()]
    tensors = [*model.parameters(), *model.buffers(), *optimizer.casts.values(), *state]
    storages = [tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor)]
    stays = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return (sum(stays.values()) + growth) / 1e6


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m dev.bench.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("records", "memory"))
    parser.add_argument("--shape", choices=SHAPES, help="measure one shape in this process")
    args = parser.parse_args(argv)
    if args.what == "records":
        csv.writer(sys.stdout, lineterminator="\n").writerows(record_rows())
    elif args.shape:
        planned, measured = planned_peak_mb(args.shape), measured_peak_mb(args.shape)
        print(f'"{args.shape}",{planned:.1f},{measured:.1f},{torch.__version__}')
    else:
        for shape in SHAPES:
            command = [sys.executable, "-m", "dev.bench.plan", "memory", "--shape", shape]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
