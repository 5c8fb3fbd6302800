"""Compile our kernels for GPUs that this machine does not have, and count resources.

    python -m dev.bench.compiled_kernels --targets sm_90 gfx942

Compiles each kernel for each target with the tiles that its host code would launch. Prints one JSON
line per variant: registers per thread, spilled bytes, memory instructions of 128 bits and narrower;
on NVIDIA also instructions and special functions per element in the loops over a row. No time is
measured.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)  # decided when a kernel is decorated

import argparse
import itertools
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanochat.common import command
from nanochat.gpt import GPTConfig
from nanochat.kernels import embedding
from nanochat.kernels import linear_cross_entropy as loss
from nanochat.kernels import rms_norm as norm

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
N_ROWS = 8192
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {
    "positions": "*i64",
    "starts": "*i64",
    "targets": "*i64",
    "losses": "*fp32",
    "scale": "*fp32",
}
DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def variants(few=False):
    """Yield (name, kernel, dtype, constants with num_warps); few: one variant per kernel."""
    directions = (True,) if few else (True, False)
    dtypes = (torch.bfloat16,) if few else tuple(DTYPES)
    vocabularies = (50257,) if few else (1000, 32768, 50257)
    for vocab, gradient, dtype in itertools.product(vocabularies, directions, dtypes):
        columns = GPTConfig(vocab_size=vocab).padded_vocab_size
        cap, name = loss.SOFTCAP, f"rows V={vocab} {'gradient' if gradient else 'loss'}"
        yield (
            name,
            loss._rows_kernel,
            dtype,
            {
                "VOCAB_SIZE": vocab,
                "N_COLUMNS": columns,
                "CAP": cap,
                "INVERSE_CAP": 1 / cap,
                "CAP_LOG2_E": cap * loss.LOG2_E,
                "GRADIENT": gradient,
                "APPROXIMATE": gradient and dtype == torch.bfloat16,
                **loss.rows_tiling(N_ROWS, columns),
            },
        )
    for width, backward, dtype in itertools.product(
        (768,) if few else (768, 1536, 2048), directions, dtypes
    ):
        yield (
            f"norm d={width} {'backward' if backward else 'forward'}",
            norm._norm_kernel,
            dtype,
            {"WIDTH": width, "EPS": 1e-7, "BACKWARD": backward, **norm._tiling(N_ROWS, width)[1]},
        )
    for head_dim, backward, dtype in itertools.product(
        (128,) if few else (64, 128), directions, dtypes
    ):
        yield (
            f"rope head={head_dim} {'backward' if backward else 'forward'}",
            norm._rope_norm_kernel,
            dtype,
            {
                "HEADS": 6,
                "HALF": head_dim // 2,
                "SCALE": 1.2,
                "EPS": 1e-7,
                "BACKWARD": backward,
                **norm._tiling(N_ROWS, head_dim // 2)[1],
            },
        )
    for width, dtype in itertools.product((768,) if few else (768, 1536), dtypes):
        yield (
            f"embedding d={width}",
            embedding._rows_sum_kernel,
            dtype,
            {"WIDTH": width, **embedding.rows_sum_tiling(width)[1]},
        )


def compiled(kernel, dtype, constants, target):
    """Return a variant compiled for sm_NN or a gfx name."""
    options = {"num_warps": constants["num_warps"]}
    constants = {name: value for name, value in constants.items() if name != "num_warps"} | {
        "INTERPRETED": False
    }
    is_amd = target.startswith("gfx")
    if is_amd and "APPROXIMATE" in constants:
        constants["APPROXIMATE"] = False  # as the host decides: it is an NVIDIA instruction
    is_number = [name.startswith(("n_", "stride")) for name in kernel.arg_names]
    signature = {
        name: "constexpr"
        if name in constants
        else "i32"
        if number
        else POINTERS.get(name, DTYPES[dtype])
        for name, number in zip(kernel.arg_names, is_number, strict=True)
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and not name.startswith("n_")
    }
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        aligned,
    )
    gpu = (
        GPUTarget("hip", target, 64)
        if is_amd
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    return triton.compile(source, target=gpu, options=options)


def resources(binary, target, elements_per_thread):
    """Return {registers, spilled, wide, narrow, ...} of a compiled kernel."""
    if target.startswith("gfx"):
        code = binary.asm["amdgcn"]
        found = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)", code)}
        memory = re.findall(r"(?:global|buffer|flat)_(?:load|store)_(\w+)", code)
        wide = sum(kind == "dwordx4" for kind in memory)
        return {
            "registers": found["vgpr_count"],
            "wide": wide,
            "narrow": len(memory) - wide,
            "spilled": found["vgpr_spill_count"] + found["private_segment_fixed_size"],
        }
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage, code = (
            subprocess.run(
                [TOOLS / tool, option, cubin], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    memory = re.findall(r"\b(?:LDG|STG)\.(\S+)", code)
    wide = sum(".128" in f".{kind}" for kind in memory)
    return {
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "wide": wide,
        "narrow": len(memory) - wide,
        "loops": loops(code, elements_per_thread),
    }


def loops(code, elements_per_thread):
    """Return [instructions, special functions] per element of the loops with special functions.

    code: a SASS listing.
    """
    starts, is_special, found = {}, [], []
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            starts[label[1]] = len(is_special)
        if re.search(r"/\*[0-9a-f]{4,}\*/ ", line):
            is_special.append("MUFU" in line)
            jump = re.search(r"BRA.*`\((\.L_\w+)\)", line)
            if jump and jump[1] in starts:
                body = is_special[starts[jump[1]] :]
                found.append([len(body) / elements_per_thread, sum(body) / elements_per_thread])
    return [loop for loop in found if loop[1]]


@command
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--few", action="store_true", help="one variant of each kernel")
    args = parser.parse_args(argv)
    for target in args.targets:
        for name, kernel, dtype, constants in variants(args.few):
            tile = constants["ROWS"] * constants["BLOCK"]
            elements = tile // (32 * constants["num_warps"])
            found = resources(compiled(kernel, dtype, constants, target), target, elements)
            print(
                json.dumps({"target": target, "kernel": name, "dtype": DTYPES[dtype][1:], **found}),
                flush=True,
            )


if __name__ == "__main__":
    raise SystemExit(main())
