"""Time the kernels against eager torch, compiled torch and their peers.

    python -m dev.bench.kernels --out results.csv

On a GPU: loss and RoPE + QK-norm at training sizes. Without one: the chunked loss in torch
against the plain one, which is a measurement, and a dry run of the Triton kernels in the
interpreter, which is not.
Before its times are taken, each variant's result is compared with fp64. Variants are timed in turn;
`share_of_floor` is the time for the data or the FLOP at the rates of this machine, over the median.
Rows are written as they come; the same command continues where it was stopped.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # has to be set before Triton is imported

import argparse
import platform
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import triton

from dev.bench.measure import peak_bytes, percentiles, rates, run_jobs, time_interleaved
from dev.bench.variants import Unavailable, interpreted_losses, losses, qk_norms, sliced_loss
from nanochat.common import UserError, command, git_commit
from nanochat.device import choose_compute_dtype, choose_device, device_name, keep_freed_memory
from nanochat.gpt import GPTConfig

HEAD_DIM = 128
POSITIONS = 2048
KERNELS = ("loss", "qk-norm")
WRONG = 2e-2  # relative error against fp64 that no bf16 result has
DRY_RUN = "dry run in the interpreter"


@dataclass
class Row:
    """One line of the CSV; empty: not measured."""

    kernel: str
    variant: str
    what: str  # forward, forward+backward
    n_tokens: int
    width: int
    vocab_size: int | None
    dtype: str
    device: str
    error: float | None = (
        None  # largest relative error against fp64 among loss or output and gradients
    )
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    repeats: int | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    peak_mib: float | None = None
    note: str = ""
    commit: str | None = field(default_factory=lambda: git_commit()[0])
    dirty: bool | None = field(default_factory=lambda: git_commit()[1])
    versions: str = (
        f"python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {triton.__version__}"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="the CSV file to write")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        help="numbers of tokens (default: 8192 32768 131072 on a GPU)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=32768, help="padded to a multiple of 64, which is masked"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60,
        help="begin no shape after them; exit code 3: some left",
    )
    parser.add_argument("--repeats", type=int, default=15 if torch.cuda.is_available() else 7)
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    device = choose_device()
    keep_freed_memory(device)  # as training does
    dtype, reason = choose_compute_dtype(device)
    print(f"{device_name(device)}; {reason}")
    jobs = gpu_jobs(args, device, dtype) if device.type == "cuda" else cpu_jobs(args, device, dtype)
    failures, left = run_jobs(
        {name: partial(_reported, job) for name, job in jobs.items()},
        args.out,
        args.minutes,
        lambda name, reason: asdict(Row(name, "", "", 0, 0, None, "", "", note=reason)),
    )
    for name, reason in failures.items():
        print(f"{name}: {reason}")
    print(
        f"{args.out}: {len(jobs) - len(left)} of {len(jobs)} shapes"
        + (f"; left: {', '.join(left)}" if left else "")
    )
    return 3 if left else int(bool(failures))


def _reported(job):
    """Print the rows of a job and return them as dicts."""
    for row in job():
        print(describe(row), flush=True)
        yield asdict(row)


def gpu_jobs(args, device, dtype):
    """Return {name: function that yields Rows}, the sizes of training first."""
    jobs = {}
    for n in args.tokens or (32768, 131072, 8192):
        if "loss" in args.kernels:
            for d in (768, 1536):
                jobs[f"loss {n} x {d} x {args.vocab_size}"] = partial(
                    bench_loss, losses(device), n, d, args.vocab_size, dtype, device, args.repeats
                )
        if "qk-norm" in args.kernels:
            if n % POSITIONS:
                raise UserError(
                    f"--tokens {n} is not a multiple of {POSITIONS}, the rows of the benchmark"
                )
            jobs[f"qk-norm {n}"] = partial(bench_qk_norm, n, 768, dtype, device, args.repeats)
    return jobs


def cpu_jobs(args, device, dtype):
    """The loss in torch, measured; the Triton kernels at toy sizes, in the interpreter."""
    print(
        "no CUDA device: nothing is measured of Triton kernels; they run in the interpreter"
    )
    jobs = {}
    if "loss" in args.kernels:
        dtypes = dict.fromkeys((dtype, torch.float32))
        shapes = [
            (n, 256, args.vocab_size, kind) for n in args.tokens or (4096,) for kind in dtypes
        ]
        if not args.tokens:
            shapes += [(2048, 256, 8192, kind) for kind in dtypes] + [
                (2048, 256, 8150, dtype)
            ]  # padded to 8192
        for n, d, vocab, kind in shapes:
            jobs[f"loss {n} x {d} x {vocab} {_name(kind)}"] = partial(
                bench_loss, losses(device), n, d, vocab, kind, device, args.repeats
            )
        jobs["loss, dry run"] = partial(
            bench_loss, interpreted_losses(), 64, 64, 256, dtype, device, 0, DRY_RUN
        )
    if "qk-norm" in args.kernels:
        jobs["qk-norm, dry run"] = partial(bench_qk_norm, 64, 256, dtype, device, 0, DRY_RUN)
    return jobs


# --- the two kernels ------------------------------------------------------------------------------


def bench_loss(table, n_tokens, width, vocab_size, dtype, device, repeats, note=""):
    padded = GPTConfig(vocab_size=vocab_size).padded_vocab_size

    def inputs(n):
        x, weight = (
            _normal(n, width, dtype=dtype, device=device),
            _normal(padded, width, device=device, scale=0.1),
        )
        return [x, weight], [torch.randint(0, vocab_size, (n,), device=device), vocab_size], None

    flop_ms = 2e3 * n_tokens * width * vocab_size / rates(device, dtype).flop_per_sec
    floors = {"forward": flop_ms, "forward+backward": 3 * flop_ms}
    yield from _bench(
        Row(
            "loss",
            "",
            "",
            n_tokens,
            width,
            vocab_size,
            _name(dtype),
            device_name(device),
            note=note,
        ),
        table,
        inputs,
        sliced_loss,
        floors,
        device,
        repeats,
        checked=min(n_tokens, 256),
    )


def bench_qk_norm(n_tokens, width, dtype, device, repeats, note=""):
    heads, positions = width // HEAD_DIM, min(n_tokens, 64 if note else POSITIONS)
    theta = torch.outer(
        torch.arange(positions), 100000 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    ).to(device)
    angles = [f(theta)[None, :, None].to(dtype) for f in (torch.cos, torch.sin)]

    def inputs(n):
        shape = (n // positions, positions, heads, HEAD_DIM)
        q, k, *upstream = (_normal(*shape, dtype=dtype, device=device) for _ in range(4))
        return [q, k], angles, [gradient.detach() for gradient in upstream]

    pass_ms = 1e3 * 2 * n_tokens * width * dtype.itemsize / rates(device, dtype).bytes_per_sec
    floors = {"forward": 2 * pass_ms, "forward+backward": 5 * pass_ms}
    table = qk_norms()
    yield from _bench(
        Row("qk-norm", "", "", n_tokens, width, None, _name(dtype), device_name(device), note=note),
        table,
        inputs,
        table["torch eager"],
        floors,
        device,
        repeats,
        checked=positions,
    )


# --- common to them -------------------------------------------------------------------------------


def _bench(blank, table, make_inputs, reference, floors, device, repeats, checked):
    """Yield the Rows of a shape: errors at `checked` tokens, then times and peaks."""
    torch._dynamo.reset()  # what was compiled for the last shape
    errors, small = {}, make_inputs(checked)
    for variant, function in table.items():
        reason = function
        if not isinstance(function, Unavailable):
            try:
                errors[variant] = _error(function, reference, *small)
            except Exception as failure:  # a peer's: reported, and the others are still measured
                if variant.startswith("ours"):
                    raise
                reason = f"{type(failure).__name__}: {failure}"
            else:
                if variant.startswith("ours") and not errors[variant] < WRONG:
                    raise AssertionError(
                        f"{variant} is wrong: relative error {errors[variant]:.1e}"
                    )
                continue
        yield replace(
            blank, variant=variant, note=f"skipped: {' '.join(str(reason).split())[:200]}"
        )
    if repeats == 0:
        yield from (
            replace(blank, variant=variant, error=error) for variant, error in errors.items()
        )
        return
    inputs = make_inputs(blank.n_tokens)
    for what, run in {"forward": _forward, "forward+backward": _with_gradients}.items():
        runs = {}
        for variant in errors:
            try:
                run(table[variant], *inputs)
                runs[variant] = partial(run, table[variant], *inputs)
            except torch.OutOfMemoryError:
                yield replace(blank, variant=variant, what=what, note="skipped: out of memory")
        times = time_interleaved(runs, repeats, device)
        for variant, function in runs.items():
            median, p20, p80 = percentiles(times[variant])
            yield replace(
                blank,
                variant=variant,
                what=what,
                error=errors[variant],
                median_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                repeats=repeats,
                floor_ms=floors[what],
                share_of_floor=floors[what] / median,
                peak_mib=peak_bytes(function, device) / 2**20,
            )


def _forward(function, differentiable, constants, upstream):
    with torch.no_grad():
        return function(*differentiable, *constants)


def _with_gradients(function, differentiable, constants, upstream):
    outputs = function(*differentiable, *constants)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, differentiable, upstream)]


def _error(function, reference, differentiable, constants, upstream):
    """Return the largest relative error of outputs and gradients against the reference in fp64."""
    dtype = differentiable[0].dtype  # what the matmul sees of an fp32 master weight
    exact = (
        [tensor.detach().to(dtype).double().requires_grad_() for tensor in differentiable],
        [c.double() if torch.is_tensor(c) and c.is_floating_point() else c for c in constants],
        upstream and [gradient.double() for gradient in upstream],
    )
    pairs = zip(
        _with_gradients(function, differentiable, constants, upstream),
        _with_gradients(reference, *exact),
        strict=True,
    )
    return (
        torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs]).max().item()
    )  # max keeps a NaN


def _normal(*shape, dtype=torch.float32, device, scale=1.0):
    return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def describe(row):
    shape = " x ".join(str(size) for size in (row.n_tokens, row.width, row.vocab_size) if size)
    if row.median_ms is None:
        error = "" if row.error is None else f", error {row.error:.1e}"
        return f"{row.kernel} {shape} {row.dtype}: {row.variant}: {row.note}{error}"
    return (
        f"{row.kernel} {shape} {row.dtype} {row.what}: {row.variant}: {row.median_ms:.2f} ms "
        f"[{row.p20_ms:.2f}, {row.p80_ms:.2f}], {row.share_of_floor:.0%} of the floor, "
        f"peak {row.peak_mib:.0f} MiB, error {row.error:.1e} {row.note}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
