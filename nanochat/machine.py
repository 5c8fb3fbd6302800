"""The device: which one, its compute dtype, name, peak and memory. torch is imported where it is needed."""

import ctypes
import os
import resource
import sys
from pathlib import Path

from nanochat.errors import UserError
from nanochat.ranks import Ranks

# Dense bf16 FLOP/s by the vendors' datasheets; the first name contained in the device's wins.
_PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15), ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H800", 989e12), ("A100", 312e12),
    ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12), ("RTX 5090", 209e12),
    ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)


def choose_device(kind=""):
    """torch.device for `kind` (cuda, mps, cpu; empty: the best there is). UserError when it is not there."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind and kind not in there:
        raise UserError(f"--device-type {kind!r} is unknown; use cuda, mps, cpu, or leave it out")
    if kind and not there[kind]:
        raise UserError(f"--device-type {kind} asked for, but torch finds none here; leave it out to use what there is")
    kind = kind or next(name for name, present in there.items() if present)
    return torch.device(kind, Ranks.from_environment().local_rank) if kind == "cuda" else torch.device(kind)


def choose_compute_dtype(device):
    """(torch dtype of activations and matmuls, the reason in words).

    $NANOCHAT_DTYPE (bfloat16, float16, float32) wins. Otherwise bf16 where the hardware multiplies it
    natively: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX; fp32 elsewhere.
    """
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    asked = os.environ.get("NANOCHAT_DTYPE")
    if asked:
        if asked not in names:
            raise UserError(f"NANOCHAT_DTYPE={asked!r} is unknown; use one of {', '.join(names)}")
        return names[asked], f"NANOCHAT_DTYPE={asked}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        native = major >= 8
        return (torch.bfloat16 if native else torch.float32,
                f"compute capability {major}.{minor} {'has' if native else 'has no'} native bf16")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        found = [name for key, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")) if capabilities.get(key)]
        if found:
            return torch.bfloat16, f"this CPU multiplies bf16 natively ({found[0]})"
        return torch.float32, "this CPU has no native bf16 arithmetic"
    return torch.float32, f"no bf16 rule for {device.type}"


def device_name(device):
    """The device's name for records: the GPU's, or the CPU's model and core count."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = "CPU"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return f"{model} x{os.cpu_count()}"


def peak_bf16_flops(name):
    """Dense bf16 FLOP/s of a GPU by its name, or None where the table has no entry."""
    return next((flops for part, flops in _PEAK_BF16_FLOPS if part in name), None)


def keep_freed_memory(device):
    """On a CPU, let glibc keep what is freed: mapping the same tens of megabytes anew every step cost 16 % of it.

    On CUDA, let the allocator's segments grow, so that freed pieces of other sizes fit; before any tensor is made.
    """
    if device.type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                mallopt(option, value)


def peak_memory_mib(device):
    """Peak memory of this process: the allocator's on CUDA, the resident set's elsewhere; MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
