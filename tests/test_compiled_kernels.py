"""The kernels compiled by Triton for GPUs: registers and spills, which the interpreter hides.

This needs no GPU. The compiler also refuses programs that the interpreter accepts.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nanochat.kernels import runtime

# per thread: with 64 an SM holds 1,024 threads, with 80 (RoPE's backward) 768
MOST_REGISTERS = {"rows": 64, "rope": 80, "embedding": 48, "embedding tiles": 48}
POINTERS = {**dict.fromkeys(("ids", "positions", "starts", "targets"), "*i64"),
            **dict.fromkeys(("losses", "scale", "tiles"), "*fp32")}


def kernels():
    """Return {name: (kernel, constants with num_warps)} of the gradients at training sizes."""
    from nanochat.kernels import embedding
    from nanochat.kernels import linear_cross_entropy as loss
    from nanochat.kernels import rms_norm as norm

    cap, vocab_size, columns = loss.SOFTCAP, 50257, 50304  # no power of two: it must cost no masks
    return {
        "rows": (loss._rows_kernel, {
            "VOCAB_SIZE": vocab_size, "N_COLUMNS": columns, "CAP": cap, "INVERSE_CAP": 1 / cap,
            "CAP_LOG2_E": cap * loss.LOG2_E, "GRADIENT": True, "APPROXIMATE": True,
            **loss.rows_tiling(8192, columns)}),
        "rope": (norm._rope_norm_kernel, {
            "HEADS": 6, "HALF": 64, "SCALE": 1.2, "EPS": 1e-7, "BACKWARD": True,
            **norm.tiling(8192, 64)[1]}),
        **{name: (embedding._rows_sum_kernel, {
            "WIDTH": 768, "OF_TILES": of_tiles, **embedding.rows_sum_tiling(768)[1]})
           for name, of_tiles in (("embedding", False), ("embedding tiles", True))},
    }


def compile_for(capability, kernel, constants):
    """Return (registers per thread, spilled bytes) of a bf16 kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**constants, "INTERPRETED": False}
    options = {"num_warps": constants.pop("num_warps")}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        is_number = name.startswith(("n_", "stride"))
        signature[name] = "i32" if is_number else POINTERS.get(name, "*bf16")
        if not name.startswith("n_"):
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True,
                               text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return used["REG"], used["STACK"] + used["LOCAL"]


@pytest.mark.skipif(runtime.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [90, *(
    pytest.param(number, marks=pytest.mark.slow) for number in (80, 89, 100, 120))])
def test_kernels_compile_within_their_registers(tmp_path, capability):
    """In a process of its own, because the interpreter is chosen when Triton is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, __file__, str(capability)], capture_output=True, text=True, cwd=root,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    for name, variant in kernels().items():
        registers, spilled = compile_for(int(sys.argv[1]), *variant)
        assert registers <= MOST_REGISTERS[name] and spilled == 0, (name, registers, spilled)
