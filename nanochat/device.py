"""The device: its choice, compute dtype, name, peak rate and memory. torch is imported late."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

from nanochat.common import UserError

# Dense bf16 FLOP/s from the vendors' data sheets; the first name that the device's name contains.
_PEAK_BF16_FLOPS = (
    ("GB200", 2.5e15), ("B200", 2.25e15), ("B100", 1.8e15),
    ("H200 NVL", 835e12), ("H200", 989e12),
    ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H100", 989e12), ("H800", 989e12),
    ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12), ("L40", 181e12), ("L4", 121e12),
    ("RTX 5090", 209e12), ("RTX 4090", 165.2e12), ("RTX 3090", 71e12),
)


def choose_device(kind=""):
    """Return the torch.device for cuda, mps or cpu; by default the best available."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    kind = kind or next(name for name, is_there in available.items() if is_there)
    if not available.get(kind):
        raise UserError(f"--device-type {kind} is not available here; use {', '.join(available)}, "
                        "or leave it out to use the best device")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)


def choose_compute_dtype(device):
    """Return (torch dtype of activations and matmuls, the reason in words).

    $NANOCHAT_DTYPE (bfloat16, float16, float32) decides. Otherwise bf16 where the hardware
    multiplies it natively (CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX), and
    fp32 elsewhere.
    """
    import torch

    name = os.environ.get("NANOCHAT_DTYPE")
    names = ("bfloat16", "float16", "float32")
    if name and name not in names:
        raise UserError(f"NANOCHAT_DTYPE={name!r} is unknown; use one of {', '.join(names)}")
    if name:
        return getattr(torch, name), f"NANOCHAT_DTYPE={name}"

    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(capabilities.get(key) for key in ("amx_bf16", "avx512_bf16"))
    reason = f"the device has {'native' if native else 'no native'} bf16 arithmetic"
    return torch.bfloat16 if native else torch.float32, reason


def device_name(device):
    """Return the name of the GPU, or the CPU's model and number of cores."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)", info.read_text(), re.M) if info.exists() else []
    return f"{models[0].strip() if models else 'CPU'} x{os.cpu_count()}"


def peak_bf16_flops(name):
    """Return the dense bf16 FLOP/s of a GPU by its name; None if it is not in the table."""
    return next((flops for part, flops in _PEAK_BF16_FLOPS if part in name), None)


def keep_freed_memory(device):
    """Configure the memory allocator; call it before the first tensor exists.

    On CUDA, let segments grow so that freed blocks of other sizes can be reused. On a CPU, let
    glibc keep freed memory: mapping the same tens of megabytes in every step took 16 % of a step.
    """
    if device.type == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)) if mallopt else ():
            mallopt(option, value)


def memory_bytes(device):
    """Return the memory of the GPU, or the share of the machine's RAM that a rank has."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return ram // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory_mib(device):
    """Return the peak memory of this process in MiB: CUDA's allocator, or the resident set."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
