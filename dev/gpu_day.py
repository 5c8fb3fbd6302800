"""The first measurements on a GPU: is it right, how fast is a step, where does the time go.

    python -m dev.gpu_day --out OUT               # first command, at most 9 minutes
    python -m dev.gpu_day --out OUT --minutes 4   # second: what is left, once more what failed
    python -m dev.gpu_day --out OUT --dry-run     # every piece at toy sizes on a CPU

Each piece is a process with a time limit. It appends rows (piece, name, value, unit, note) to one
CSV file as they come; after each piece, OUT/gpu_day.tar.gz has this file and the logs. The state is
in the temporary folder; on another machine, continue with --resume-from ARCHIVE. dev/GPU_DAY.md
says which constant of nanochat/plan.py each row replaces. A dry run measures nothing.

Needs only torch and this checkout: tokens are drawn from a Zipf distribution.
Exit code: 0 all pieces finished, 1 some failed, 3 some are left: call it again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dev import gpu_checks
from dev.bench.measure import append_rows, peak_bytes, percentiles
from dev.bench.variants import Unavailable, losses, plain_loss, triton_chunks
from dev.gpu_checks import NOT_ON_CPU, Lab, in_one_line, loss_case, with_gradients
from nanochat import build, plan
from nanochat.attention import causal_attention, plan_attention
from nanochat.common import UserError, atomic_path, command, git_commit, versions
from nanochat.config import TrainingConfig, model_config, run_horizon
from nanochat.device import device_name
from nanochat.distributed import Ranks
from nanochat.fp8 import E4M3
from nanochat.gpt import GPT, flops_per_token
from nanochat.kernels.embedding import lookup

ROOT = Path(__file__).resolve().parents[1]
MIN_SHARE = 0.5  # a piece starts only if this share of its time limit is left


# --- versions and rates ---------------------------------------------------------------------------

def machine(lab):
    for name, value in {**versions(), "commit": git_commit()[0]}.items():
        yield name, "", "", str(value)
    yield "device", "", "", device_name(lab.device)
    yield "CUDA, cuDNN", "", "", f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
    q = lab.normal(2, *lab.pick((12, 2048, 128), (2, 32, 16)))
    choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
    yield "choice of SDPA, eager", choice, "", str(SDPBackend(choice))

    length = lab.pick(2**30, 2**20)
    source, target = (torch.ones(length, dtype=torch.uint8, device=lab.device) for _ in range(2))
    ms = lab.median_ms({"copy": lambda: target.copy_(source)})["copy"]
    copy_rate = 2e3 * length / ms
    yield "copy, read and write", copy_rate / 1e12, "TB/s", "1 GiB"
    share = copy_rate / lab.gpu.memory_bytes_per_sec
    yield "BANDWIDTH_SHARE, upper limit", share, "share", f"of the {lab.gpu.name}'s datasheet"
    for shape in lab.pick([(8192,) * 3, (32768, 1536, 1536), (32768, 1536, 6144)], [(64,) * 3]):
        m, k, n = shape
        a, b = lab.normal(m, k).detach(), lab.normal(n, k).detach()
        one = torch.ones((), device=lab.device)
        products = {"bf16": partial(torch.mm, a, b.t()), "fp8": partial(
            torch._scaled_mm, a.to(E4M3), b.to(E4M3).t(), one, one, out_dtype=lab.dtype,
            use_fast_accum=True)}
        for kind, ms in lab.median_ms(products).items():
            peak = lab.gpu.fp8_flop_per_sec if kind == "fp8" else lab.gpu.bf16_flop_per_sec
            rate = 2e3 * m * k * n / ms
            yield f"{kind} matmul {shape}", rate / 1e12, "TFLOP/s", f"{rate / peak:.2f} of the peak"


# --- attention and the loss head ------------------------------------------------------------------

def attention(lab):
    rows, length, heads, channels = shape = lab.pick((16, 2048, 12, 128), (1, 64, 2, 16))
    q, k, v, upstream = (lab.normal(*shape, seed=seed) for seed in range(4))

    def run(backend, window):
        if isinstance(backend, str):
            out = causal_attention(q, k, v, window, backend)
        else:
            with sdpa_kernel(backend):
                heads_first = (x.transpose(1, 2) for x in (q, k, v))
                out = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
        return torch.autograd.grad(out, (q, k, v), upstream)

    arms = {"blockwise": ("blockwise", length), "flash": (SDPBackend.FLASH_ATTENTION, length),
            "cuDNN": (SDPBackend.CUDNN_ATTENTION, length), "varlen": ("varlen", length),
            "varlen, window": ("varlen", length // 4)}
    runs = {name: partial(run, *arm) for name, arm in arms.items()}
    for name in lab.pick(["blockwise"], ["cuDNN", "varlen", "varlen, window"]):
        del runs[name]
    for name in list(runs):
        try:
            runs[name]()
        except Exception as reason:  # a backend that cannot run here
            del runs[name]
            yield name, "", "", in_one_line(reason)
    for name, ms in lab.median_ms(runs).items():
        keys = arms[name][1]
        flops = 12 * rows * length * heads * channels * keys  # as the plan counts them
        share = 1e3 * flops / ms / lab.gpu.bf16_flop_per_sec
        yield name, ms, "ms", f"forward + backward, {shape}"
        yield f"ATTENTION_SHARE, {name}", share, "share", f"{keys} keys per query"


def head(lab):
    n_tokens, width, vocab_size = lab.pick((32768, 1536, 32768), (16, 32, 64))
    x, weight, targets = loss_case(lab, n_tokens, width, vocab_size)
    arms = {"plain loss, compiled": lab.compiled(plain_loss), "chunked loss": triton_chunks,
            "Liger's loss": losses(lab.device)["liger"]}
    runs = {}
    for name, loss in arms.items():
        if isinstance(loss, Unavailable):
            yield name, "", "", f"not run: {loss}"
            continue
        run = partial(with_gradients, loss, x, weight, targets, vocab_size)
        run()
        runs[name] = run
        if not lab.dry_run:
            yield f"{name}: peak", peak_bytes(run, lab.device) / 1e9, "GB", "without its inputs"
    ids, table = lab.zipf(1, n_tokens, vocab_size=vocab_size), lab.normal(vocab_size, width)
    upstream, n_rows = lab.normal(1, n_tokens, width), len(table)
    lookups = {"embedding gradient, torch": lambda table: F.embedding(ids, table),
               "embedding gradient, ours": lambda table: lookup(ids, n_rows)(table)}
    for name, look_up in lookups.items():
        compiled = lab.compiled(look_up)
        runs[name] = lambda form=compiled: torch.autograd.grad(form(table), table, upstream)
    for name, ms in lab.median_ms(runs).items():
        yield name, ms, "ms", f"forward + backward, {n_tokens} x {width}, V {vocab_size}"


# --- training steps -------------------------------------------------------------------------------

class Step:
    """Training steps of a model on made tokens, built as base_train builds them."""

    def __init__(self, lab, micro_batches=1, recompute=False, depth=12, rows=16, length=512,
                 pattern="L", **flags):
        depth, rows, length = lab.pick((depth, rows, length), (2, 2, 32))
        self.micro_batches, self.recompute = micro_batches, recompute
        self.config = TrainingConfig(
            depth=depth, head_dim=lab.pick(128, 64), device_batch_size=rows, max_seq_len=length,
            window_pattern=pattern, total_batch_size=rows * length * micro_batches,
            num_iterations=1, no_compile=lab.dry_run, **flags)
        self.shape = model_config(self.config, lab.pick(32768, 256))
        with lab.device:  # torch's own initial values, drawn on the device
            self.model = GPT(self.shape, lab.dtype, fused_rmsnorm=self.config.fused_rmsnorm,
                             chunked_ce=self.config.chunked_ce)
        self.backends = plan_attention("auto", lab.device, lab.dtype, self.shape)
        horizon = run_horizon(self.config, self.shape)
        self.optimizer = build.build_optimizer(self.config, self.model, horizon, Ranks(), lab.dtype)
        self.compiled = build.compile_model(
            self.config, self.model, self.optimizer, recompute)
        tokens = lab.zipf(rows, length + 1, vocab_size=self.shape.vocab_size)
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def micro_batch(self):
        loss = self.compiled(*self.batch) / self.micro_batches
        loss.backward()
        if self.micro_batches > 1:
            self.optimizer.accumulate()

    def __call__(self):
        for _ in range(self.micro_batches):
            self.micro_batch()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# Kernels by name, the first pattern that matches; no match: other.
KINDS = {"attention": r"flash|fmha|sdpa|attention|mha|cudnn|dot_do_o",
         "matmul": r"gemm|nvjet|cutlass|cublas|xmma|gemv|split.?k",
         "Triton": r"^triton_|^_\w+_kernel"}


def kind_of(kernel):
    """Return attention, matmul, Triton or other."""
    matching = (kind for kind, names in KINDS.items() if re.search(names, kernel, re.I))
    return next(matching, "other")


# The constant of the plan that each kind of work replaces.
CONSTANTS = {"matmul": "MATMUL_SHARE", "attention": "ATTENTION_SHARE",
             "orthogonalisation": "POLAR_SHARE", "elementwise": "BANDWIDTH_SHARE"}


def kernel_times(lab, function, n_calls=3):
    """Return ({kind: ms per call}, {kernel: ms per call}) of GPU kernels, by torch's profiler."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[lab.pick(activity.CUDA, activity.CPU)]) as profiler:
        for _ in range(n_calls):
            function()
        lab.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    counted = lab.pick(("kernel", "gpu_memcpy", "gpu_memset"), ("cpu_op",))
    kinds, kernels = Counter(), Counter()
    for event in events:
        if event.get("cat") in counted:
            ms = event["dur"] / 1e3 / n_calls
            kinds[kind_of(event["name"])] += ms
            kernels[event["name"]] += ms
    return kinds, kernels


def step(lab, recompute=False, **size):
    """Yield compile time, ms, profile and memory of a training step, next to the plan's."""
    with torch._functorch.config.patch(ban_recompute_materialized_backward=not recompute):
        run = Step(lab, recompute=recompute, **size)
        yield "attention backends", "", "", run.backends
        start = time.perf_counter()
        run()
        lab.synchronize()
        yield "first step, compilation included", time.perf_counter() - start, "s", ""
        run()
    yield from _times(lab, run)
    yield from _memory(lab, run)


def _times(lab, run):
    """Yield ms per step and by kind of work, and the constants of the plan that follow."""
    micro_batches, shape, launches = run.micro_batches, run.shape, []
    for _ in range(lab.pick(5, 1)):
        lab.synchronize()
        start = time.perf_counter()
        run()
        launches.append(1e3 * (time.perf_counter() - start))
    lab.synchronize()
    n_steps, start = lab.pick(15, 1), time.perf_counter()
    for _ in range(n_steps):
        run()
    lab.synchronize()
    step_ms = 1e3 * (time.perf_counter() - start) / n_steps
    tokens = micro_batches * run.batch[0].numel()
    yield "step", step_ms, "ms", f"mean of {n_steps}, {tokens} tokens"
    flop_rate = 1e3 * tokens * flops_per_token(shape) / step_ms
    yield "MFU", flop_rate / lab.gpu.bf16_flop_per_sec, "share", "of the bf16 peak"
    yield "CPU time to launch a step", percentiles(launches)[0], "ms", "idle if near the step's"

    def micro_batch():
        run.micro_batch()
        run.optimizer.zero_grad()

    model, model_kernels = kernel_times(lab, micro_batch)
    run.micro_batch()
    update, update_kernels = kernel_times(lab, run.optimizer.step)
    run.optimizer.zero_grad()
    measured = {"matmul": micro_batches * model["matmul"],
                "attention": micro_batches * model["attention"],
                "elementwise": micro_batches * (model["Triton"] + model["other"]),
                "orthogonalisation": update["matmul"],
                "update": update["Triton"] + update["other"]}
    measured["gaps"] = step_ms - sum(measured.values())
    planned = plan.step_time(
        run.config, shape, lab.dtype, lab.gpu, tokens, micro_batches, 1, run.recompute)
    planned["elementwise"] += planned["quantisation"]
    for kind, ms in measured.items():
        yield kind, ms, "ms", f"planned {1e3 * planned[kind]:.2f} ms"
    yield "of elementwise: not Triton", micro_batches * model["other"], "ms", ""
    for kind, name in CONSTANTS.items():
        if measured[kind]:
            today = getattr(plan, name)
            yield name, today * 1e3 * planned[kind] / measured[kind], "share", f"today {today}"
    gap_sec = measured["gaps"] / 1e3 / shape.n_layer / micro_batches
    yield "GAP_SEC", gap_sec, "s", f"today {plan.GAP_SEC:.2g}"
    for part, times in (("model", model_kernels), ("optimizer", update_kernels)):
        for name, ms in times.most_common(lab.pick(10, 1)):
            yield f"kernel of the {part}: {name[:90]}", ms, "ms", "per micro-batch or update"


def _memory(lab, run):
    memory, peak = plan.memory_of(
        run.config, run.shape, lab.dtype, torch.device("cuda"), run.micro_batches, 1,
        run.recompute)
    if lab.dry_run:
        yield "peak memory", "", "", f"{NOT_ON_CPU}; planned {peak / 1e9:.2f} GB"
        return
    lab.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = run.compiled(*run.batch)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    del loss
    run.optimizer.zero_grad()
    run()
    free, total = torch.cuda.mem_get_info()
    measured, used = torch.cuda.max_memory_allocated(), total - free
    yield "peak memory", measured / 1e9, "GB", f"planned {peak / 1e9:.2f} GB"
    yield "memory in use", used / 1e9, "GB", f"{measured / used:.3f} of it is the peak of tensors"
    yield "kept for the backward pass", kept / 1e9, "GB", (
        f"planned {(memory['activations'] + memory['logits']) / 1e9:.2f} GB, logits included")
    widths = (kept - memory["logits"]) / run.batch[0].numel() / run.shape.n_embd / 2
    name = "KEPT_RECOMPUTED" if run.recompute else "KEPT_PER_LAYER"
    yield (name, (widths - plan.KEPT_OUTSIDE) / run.shape.n_layer, "widths",
           f"today {getattr(plan, name)}; fp32 rows of norms included")


def compare(lab, arms):
    """Yield ms per step of several settings, timed in turn, and the ratio to the first."""
    runs = {}
    for name, options in arms.items():
        runs[name] = Step(lab, **options)
        for _ in range(2):
            runs[name]()
    times = lab.median_ms(runs)
    for name, ms in times.items():
        yield name, ms, "ms", f"{ms / times[next(iter(arms))]:.3f} of the first"


# --- pieces, most valuable first ------------------------------------------------------------------

D24 = {"depth": 24, "length": 2048, "pattern": "SSSL"}
PIECES = {  # name: (limit in minutes, a function from a Lab to rows)
    "machine": (0.5, machine),
    "correctness": (2.0, gpu_checks.correctness),
    "attention": (0.7, attention),
    "d12 16x512": (1.7, step),
    "d24 16x2048": (2.5, partial(step, **D24)),
    "d24 16x2048 fp8": (2.5, partial(step, fp8=True, **D24)),
    "d24 32x2048 recompute": (2.0, partial(step, recompute=True, rows=32, **D24)),
    "loss head": (1.3, head),
    "trainer": (1.0, gpu_checks.trainer),
    "d12 micro-batches": (1.3, partial(compare, arms={
        "two of 16 rows": {"micro_batches": 2}, "one of 32 rows": {"rows": 32}})),
    "d12 fused-rmsnorm": (1.3, partial(compare, arms={
        "no flags": {}, "--fused-rmsnorm": {"fused_rmsnorm": True}})),
}


def append_row(path, *row):
    columns = "piece", "name", "value", "unit", "note"
    append_rows(path, [dict(zip(columns, row, strict=True))])


def run_piece(name, path, dry_run):
    """Run one piece here and append its rows to the CSV file as they come; return the exit code."""
    is_wrong = False
    for row in PIECES[name][1](Lab(dry_run)):
        append_row(path, name, *row)
        is_wrong |= str(row[-1]).startswith(("WRONG", "failed"))
    return int(is_wrong)


class Day:
    """The state of the pieces, in a folder that a later command continues."""

    def __init__(self, folder, out, dry_run):
        self.folder, self.out, self.dry_run = folder, out, dry_run
        self.csv, self.status_file = folder / "gpu_day.csv", folder / "status.json"
        folder.mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        self.status = {}  # piece: ok, failed (a later command tries once more) or failed twice
        if self.status_file.exists():
            self.status = json.loads(self.status_file.read_text(encoding="utf-8"))

    def run(self, pieces, minutes):
        """Run pieces that are left, then those that failed before, while there is time."""
        end = time.monotonic() + 60 * minutes
        left = [name for name in pieces if name not in self.status]
        again = [name for name in pieces if self.status.get(name) == "failed"]
        for name in left + again:
            limit_sec, left_sec = 60 * PIECES[name][0], end - time.monotonic()
            if left_sec >= MIN_SHARE * limit_sec:
                self.run_one(name, min(limit_sec, left_sec), left_sec < limit_sec)
                self.archive()

    def run_one(self, name, limit_sec, is_cut_short):
        """Run a piece in a process; if the end of this command stops it, it is still left."""
        start, cache = time.monotonic(), self.folder / "cache"
        shown = self.csv.stat().st_size if self.csv.exists() else 0
        words = [sys.executable, "-m", "dev.gpu_day", "--piece", name, "--state", self.folder]
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "TRITON_INTERPRET": str(int(self.dry_run))}
        with open(self.folder / f"{name.replace(' ', '_')}.log", "a", encoding="utf-8") as log:
            try:
                code = subprocess.run(
                    [*words, *["--dry-run"] * self.dry_run], cwd=ROOT, stdout=log, stderr=log,
                    env=environment, timeout=limit_sec).returncode
                result = f"failed: exit code {code}, see its rows and log" if code else "ok"
            except subprocess.TimeoutExpired:
                result = f"stopped after {limit_sec:.0f} s"
        append_row(self.csv, name, "piece", time.monotonic() - start, "s", result)
        print(self.csv.read_bytes()[shown:].decode(), end="", flush=True)
        if is_cut_short and result.startswith("stopped"):
            return
        failed = "failed twice" if name in self.status else "failed"
        self.status[name] = "ok" if result == "ok" else failed
        with atomic_path(self.status_file) as temporary:
            temporary.write_text(json.dumps(self.status), encoding="utf-8")

    def archive(self):
        with (atomic_path(self.out / "gpu_day.tar.gz") as temporary,
              tarfile.open(temporary, "w:gz") as archive):
            for path in sorted(self.folder.iterdir()):
                if path.is_file():
                    archive.add(path, path.name)


@command
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m dev.gpu_day", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the archive")
    parser.add_argument("--minutes", type=float, default=9.0, help="end after N minutes (9)")
    parser.add_argument("--pieces", nargs="+", choices=PIECES, default=list(PIECES))
    parser.add_argument("--state", type=Path, help="folder of the state; default: temporary")
    parser.add_argument("--resume-from", type=Path, metavar="ARCHIVE", help="an earlier archive")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--piece", choices=PIECES, help=argparse.SUPPRESS)  # runs in this process
    args = parser.parse_args(argv)
    folder = "nanochat_dry_day" if args.dry_run else "nanochat_gpu_day"
    state = args.state or Path(tempfile.gettempdir()) / folder
    if args.piece:
        return run_piece(args.piece, state / "gpu_day.csv", args.dry_run)
    if args.out is None:
        raise UserError("--out is missing; give a folder for the archive")
    if args.resume_from and not (state / "status.json").exists():
        try:
            with tarfile.open(args.resume_from) as archive:
                archive.extractall(state, filter="data")
        except (OSError, tarfile.TarError) as error:
            raise UserError(f"--resume-from {args.resume_from} cannot be read ({error}); give the "
                            "gpu_day.tar.gz of an earlier command, or omit the flag") from None
    day = Day(state, args.out, args.dry_run)
    day.run(args.pieces, args.minutes)
    left = [name for name in args.pieces if name not in day.status]
    failed = [name for name in args.pieces if day.status.get(name, "ok") != "ok"]
    print(f"{args.out}/gpu_day.tar.gz; left: {', '.join(left) or 'nothing'}; "
          f"failed: {', '.join(failed) or 'nothing'}")
    return 3 if left else int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
