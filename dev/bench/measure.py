"""Measurements of the benchmarks: interleaved timings, peak memory, the rates of the machine."""

import csv
import ctypes
import functools
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from nanochat.common import atomic_path

FLUSHED_BYTES = 256 << 20  # more than any GPU's L2 cache


def time_interleaved(functions, repeats, device, warmup=1):
    """Return {name: [milliseconds per repeat]}; a repeat runs all functions in turn.

    On a GPU each begins with nothing of its own in the L2 cache.
    """
    times = {name: [] for name in functions}
    others = torch.empty(
        FLUSHED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device
    )
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            elapsed = _cuda_ms(function, others) if device.type == "cuda" else cpu_ms(function)
            if repeat >= warmup:
                times[name].append(elapsed)
    return times


def percentiles(times):
    """Return (median, 20th, 80th percentile)."""
    ordered = sorted(times)
    return (
        statistics.median(ordered),
        ordered[int(0.2 * (len(ordered) - 1))],
        ordered[round(0.8 * (len(ordered) - 1))],
    )


class Rates(NamedTuple):
    """Rates that this machine reaches in simple programs."""

    flop_per_sec: float  # of a large square matmul
    bytes_per_sec: float  # read plus written by a large copy


@functools.cache
def rates(device, dtype):
    """Return the Rates of a device in a dtype: the best of a few runs."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**27)
    a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
    source, target = (
        torch.empty(length, dtype=torch.uint8, device=device).fill_(1) for _ in range(2)
    )
    programs = {"matmul": lambda: torch.mm(a, b, out=out), "copy": lambda: target.copy_(source)}
    times = time_interleaved(programs, 10, device)
    return Rates(1e3 * 2 * size**3 / min(times["matmul"]), 1e3 * 2 * length / min(times["copy"]))


def peak_bytes(function, device):
    """Return the peak memory of `function` in bytes, without the memory in use before the call."""
    if device.type == "cuda":
        function()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return cpu_peak_bytes(function)


def cpu_peak_bytes(function):
    """Return the growth of peak resident memory during a second call of `function` (Linux)."""
    function()  # libraries and compiled code are loaded in the first
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the high-water mark starts again from the present size
    before = status_bytes("VmRSS")
    function()
    return status_bytes("VmHWM") - before


def append_rows(path, rows):
    """Append dicts to a CSV file; columns that only some rows have are empty in the others."""
    before = []
    if Path(path).exists():
        with open(path, newline="", encoding="utf-8") as file:
            before = list(csv.DictReader(file))
    with (
        atomic_path(path) as unfinished,
        open(unfinished, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, {column: None for row in (*before, *rows) for column in row})
        writer.writeheader()
        writer.writerows((*before, *rows))


def run_jobs(jobs, path, minutes, failed):
    """Run {name: function that yields rows (dicts)}; append each row to the CSV at `path` at once.

    Jobs that an earlier call finished (listed in `path`.done) are skipped, and none begins after
    `minutes`. A failed job leaves the row `failed(name, reason)`. Return {name: reason} of the
    failed jobs, and the names still to run.
    """
    end, finished, failures = time.monotonic() + 60 * minutes, Path(f"{path}.done"), {}
    done = finished.read_text(encoding="utf-8").splitlines() if finished.exists() else []
    left = [name for name in jobs if name not in done]
    while left and time.monotonic() < end:
        name = left.pop(0)
        try:
            for row in jobs[name]():
                append_rows(path, [row])
        except Exception as error:  # the others are worth as much
            failures[name] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            append_rows(path, [failed(name, failures[name])])
        with open(finished, "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
    return failures, left


def status_bytes(field):
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def cpu_ms(function):
    """Return the wall-clock milliseconds of a call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(function, others):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    others.zero_()
    torch.cuda._sleep(
        1_000_000
    )  # about 0.5 ms, in which the work is queued: the GPU's time, not Python's, is taken
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
