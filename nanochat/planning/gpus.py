"""The planner's constants: what GPUs can do by their datasheets, and what share of it a training step reaches.

The shares are estimates of one step (depth 12, and the matmuls and attention of depth 24) made before the planner was
compared with any record; none is tuned to one.
"""

from dataclasses import dataclass

from nanochat.common import UserError, peak_bf16_flops


@dataclass(frozen=True)
class Gpu:
    """One GPU by its vendor's datasheet, and the network of the vendor's own 8-GPU system; dense rates, bytes = 8 bits.

    Links and network count one direction of one GPU.
    """

    name: str  # as a device reports it, in part
    fp8_flop_per_sec: float | None  # None: it has no fp8
    memory_bytes: float
    bytes_per_sec: float
    link_bytes_per_sec: float
    network_bytes_per_sec: float

    @property
    def bf16_flop_per_sec(self):
        return peak_bf16_flops(self.name)


GPUS = {
    "a100": Gpu("A100", None, 80e9, 2.04e12, 300e9, 25e9),  # SXM 80 GB, NVLink 3, 200 Gb/s
    "h100": Gpu("H100", 1979e12, 80e9, 3.35e12, 450e9, 50e9),  # SXM, NVLink 4, 400 Gb/s
    "h200": Gpu("H200", 1979e12, 141e9, 4.8e12, 450e9, 50e9),  # SXM, NVLink 4, 400 Gb/s
    "b200": Gpu("B200", 4500e12, 180e9, 8.0e12, 900e9, 50e9),  # SXM, NVLink 5, 400 Gb/s
}

# Shares of the peaks above. Estimated for the H100 and taken for all.
MATMUL_SHARE = 0.66  # of bf16's peak in bf16's matmuls, of fp8's in fp8's: 574 TFLOP in 880 ms
ATTENTION_SHARE = 0.47  # of bf16's peak, full layers counted as T keys a query: 51.9 TFLOP in 112 ms (FlashAttention 3)
POLAR_SHARE = 0.50  # of bf16's peak in Muon's orthogonalisation: 1.63 TFLOP in 3.3 ms
BANDWIDTH_SHARE = 0.81  # of the memory's: 16.8 GB in 6.2 ms
LINK_SHARE = 0.82  # of links and network: 370 of 450 GB/s

GAP_SEC = 2e-3 / 12  # between kernels, a layer and micro-batch: 2 ms at depth 12
LINK_ALPHA_SEC, NETWORK_ALPHA_SEC = 3.4e-6, 14e-6  # a hop of a ring: NCCL's tuning table, protocol Simple
USABLE_SHARE = 0.90  # of the memory: the rest is for CUDA, NCCL's buffers and fragments; an assumption


def find_gpu(name):
    """The Gpu that --gpu names. Errors: UserError naming those there are."""
    if name not in GPUS:
        raise UserError(f"--gpu {name!r} is not in the planner's table; use one of {', '.join(GPUS)}")
    return GPUS[name]


def gpu_of_device(device_name):
    """The Gpu that a device's name belongs to; None for one that the table lacks, other variants included."""
    return next((gpu for gpu in GPUS.values() if gpu.name in device_name
                 and peak_bf16_flops(device_name) == gpu.bf16_flop_per_sec), None)
