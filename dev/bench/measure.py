"""How the benchmarks measure: interleaved timings with percentiles, peak memory, provenance of a row."""

import ctypes
import statistics
import time
from pathlib import Path

import torch


def time_interleaved(functions, repeats, device, warmup=2):
    """{name: [milliseconds of each repeat]}: every repeat runs all functions in turn, so drift hits all alike."""
    times = {name: [] for name in functions}
    for repeat in range(warmup + repeats):
        for name, function in functions.items():
            elapsed = _cuda_ms(function) if device.type == "cuda" else _cpu_ms(function)
            if repeat >= warmup:
                times[name].append(elapsed)
    return times


def percentiles(times):
    """(median, 20th, 80th percentile)."""
    ordered = sorted(times)
    return statistics.median(ordered), ordered[int(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]


def peak_bytes(function, device):
    """Most memory `function` held above what was held before, in bytes."""
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
    """Growth of the process's peak resident memory while `function` runs a second time (Linux)."""
    function()  # libraries and compiled code are loaded in the first
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from the present size
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _cpu_ms(function):
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(function):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
