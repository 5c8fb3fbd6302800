"""Make a torch without CUDA report one H100 to fake tensors and Inductor.

Call `pretend(folder)` before anything imports torch. Nothing can run on the device: fake tensors
have no data, and kernels are generated but never compiled.
"""

import contextlib
import ctypes
import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

# what Inductor reads of torch.cuda.get_device_properties; H100 SXM
H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 << 30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    is_integrated=0,
    gcnArchName="",
    uuid="",
    clock_rate=1_755_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)


def pretend(folder):
    """Load the no-op device (compiled into `folder` on first use, by g++) and answer for the H100.

    Raise RuntimeError if torch is imported already or has CUDA.
    """
    if "torch" in sys.modules:
        raise RuntimeError("the faked device must be there before torch is imported")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"), TORCHINDUCTOR_FORCE_DISABLE_CACHES="1"
    )
    ctypes.CDLL(str(_no_op_device(folder)), mode=ctypes.RTLD_GLOBAL)
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    import torch

    if torch.backends.cuda.is_built() and torch.version.cuda:
        raise RuntimeError("this torch has CUDA: nothing needs to be faked")
    _answer_for_the_device(torch)
    answer_for_triton(torch)
    _skip_what_needs_data()


def _no_op_device(folder):
    """Return the shared library of no_op_device.cpp, compiled against the installed torch."""
    source, root = (
        Path(__file__).with_name("no_op_device.cpp"),
        Path(importlib.util.find_spec("torch").origin).parent,
    )
    library = folder / "no_op_device.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        headers = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        libraries = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        subprocess.run(
            [
                "g++",
                "-std=c++20",
                "-shared",
                "-fPIC",
                "-O1",
                *headers,
                str(source),
                *libraries,
                "-o",
                str(library),
            ],
            check=True,
        )
    return library


class _NoDeviceGuard(contextlib.nullcontext):
    def __init__(self, *_):
        super().__init__()


def _constant(value):
    return lambda *_, **__: value


def _answer_for_the_device(torch):
    from torch._dynamo.device_interface import CudaInterface

    stream = SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    answers = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "current_device": 0,
        "_lazy_init": None,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "get_device_name": H100.name,
        "is_bf16_supported": True,
        "mem_get_info": (70 << 30, 80 << 30),
        "current_stream": stream,
        "synchronize": None,
        "get_rng_state_all": [],
        "set_rng_state": None,
        "set_rng_state_all": None,
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _constant(value))
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.device = torch.cuda._DeviceGuard = CudaInterface.device = _NoDeviceGuard
    torch.version.cuda = "12.8"
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_compute_capability": 90,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
        "is_bf16_supported": True,
        "get_raw_stream": 0,
        "synchronize": None,
    }.items():
        setattr(CudaInterface, name, staticmethod(_constant(value)))
    CudaInterface.Worker.get_device_properties = staticmethod(_constant(H100))
    CudaInterface.Worker.current_device = staticmethod(_constant(0))
    for name in (
        "getCurrentRawStream",
        "getDevice",
        "setDevice",
        "exchangeDevice",
        "maybeExchangeDevice",
    ):
        setattr(torch._C, f"_cuda_{name}", _constant(0))


def answer_for_triton(torch):
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    properties = {
        "max_shared_mem": H100.shared_memory_per_block_optin,
        "max_num_regs": H100.regs_per_multiprocessor,
        "multiprocessor_count": H100.multi_processor_count,
        "warpSize": H100.warp_size,
    }
    driver.set_active(
        SimpleNamespace(
            get_current_target=_constant(GPUTarget("cuda", 90, 32)),
            get_current_device=_constant(0),
            get_current_stream=_constant(0),
            get_device_interface=_constant(torch.cuda),
            get_benchmarker=_constant(None),
            get_active_torch_device=_constant(torch.device("cuda", 0)),
            is_active=_constant(True),
            map_python_to_cpp_type=_constant("void*"),
            utils=SimpleNamespace(get_device_properties=_constant(properties)),
        )
    )


def _skip_what_needs_data():
    """Disable passes of Inductor that trace or time real tensors on the device."""
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    fuse_attention._sfdp_init = pad_mm._pad_mm_init = misc_patterns._misc_patterns_init = _constant(
        None
    )
    inductor.compile_threads = 1
    inductor.shape_padding = inductor.joint_graph_constant_folding = False
    functorch.force_non_lazy_backward_lowering = True
