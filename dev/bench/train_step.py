"""Time a training step of each lane C candidate, interleaved.

    python -m dev.bench.train_step --out results.csv

Forward, backward and optimizer on one device, compiled, on random tokens that follow Zipf's law.
The default is the micro-batch of the d12 protocol; that of the quickstart on a CPU is
`--depth 4 --head-dim 64 --seq-len 256 --rows 8 --vocab-size 8192`.
A candidate that fails leaves a row that says why; losses of the third step are compared.
"""

import argparse
import statistics
import time

import torch

from dev.bench.measure import append_rows, peak_bytes, percentiles, rates, time_interleaved
from nanochat.attention import BACKENDS, supports_varlen
from nanochat.common import UserError, command, git_commit, versions
from nanochat.device import choose_compute_dtype, choose_device, device_name, keep_freed_memory
from nanochat.fp8 import check_fp8, train_in_fp8
from nanochat.gpt import GPT, GPTConfig, flops_per_token
from nanochat.kernels.linear_cross_entropy import check_linear_cross_entropy
from nanochat.kernels.rms_norm import check_rms_norm
from nanochat.optim import MuonAdamW, parameter_groups, polar_express_flops
from nanochat.schedule import model_shape

CANDIDATES = {
    "baseline": {},
    "fused-rmsnorm": {"fused_rmsnorm": True},
    "chunked-ce": {"chunked_ce": True},
    "both": {"fused_rmsnorm": True, "chunked_ce": True},
}
LANE_C = tuple(CANDIDATES)
CANDIDATES |= {f"attention-{name}": {"attention": name} for name in BACKENDS}
CANDIDATES["fp8"] = {"fp8": True}
COMPARED_STEP = 3  # its loss has seen two updates, and no candidate has drifted off
DIFFERENT = 0.03  # relative difference of losses that no rounding makes


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="train_step",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, text in (
        ("--depth", 12, "layers"),
        ("--head-dim", 128, "channels per head"),
        ("--seq-len", 512, "tokens per row"),
        ("--rows", 16, "rows per step"),
        ("--vocab-size", 32768, "vocabulary"),
        ("--repeats", 20, "timed steps of each"),
        ("--window-pattern", "L", "attention windows"),
        ("--device-type", "", "cuda or cpu"),
        ("--out", "", "CSV to add the rows to"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=text)
    parser.add_argument(
        "--candidates",
        nargs="+",
        choices=CANDIDATES,
        default=LANE_C,
        help="baseline is always there",
    )
    parser.add_argument("--no-compile", action="store_true", help="uncompiled model and updates")
    parser.add_argument(
        "--profile", action="store_true", help="print where the baseline's time goes, by operation"
    )
    return parser.parse_args(argv)


def make_step(candidate, config, dtype, device, args):
    """Return a function that takes a training step on fixed random tokens and returns the loss."""
    flags = dict(CANDIDATES[candidate])
    fp8 = flags.pop("fp8", False)
    model = GPT(config, dtype, **flags)
    model.init_weights(0)
    model.to(device)
    compiled = model
    if not args.no_compile:
        compiled = torch.compile(model, dynamic=False, fullgraph=True)
    optimizer = MuonAdamW(
        parameter_groups(model),
        matmul_dtype=dtype,
        compiled=not args.no_compile,
        casts=model.keep_casts(),
    )
    frequency = 1 / (torch.arange(config.vocab_size) + 2.7)  # the commonest token: 4 % of 32768
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(frequency, args.rows * (args.seq_len + 1), True, generator=generator)
    tokens = drawn.view(args.rows, -1).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if fp8:
        train_in_fp8(model, optimizer, compiled=not args.no_compile)

    def step():
        loss = compiled(inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def step_flops(config, tokens):
    """Return the FLOPs of all matmuls of a step: model forward and backward, and Muon."""
    with torch.device("meta"):
        groups = parameter_groups(GPT(config))
    muon = sum(
        polar_express_flops(*p.shape)
        for group in groups
        if group["kind"] == "muon"
        for p in group["params"]
    )
    return flops_per_token(config) * tokens + muon


def refusal(flags, config, dtype, device, args):
    """Return why a candidate cannot run here, or None."""
    heads = config.n_head, config.n_kv_head, config.head_dim
    if flags.get("attention") == "varlen" and not supports_varlen(device, dtype, heads):
        return "varlen attention cannot run here"
    try:
        if flags.get("fp8"):
            check_fp8(device, dtype, config.n_embd, args.rows * args.seq_len)
        if flags.get("fused_rmsnorm"):
            check_rms_norm(device, dtype)
        if flags.get("chunked_ce"):
            check_linear_cross_entropy(device, dtype)
    except UserError as error:
        return str(error)
    return None


@command
def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device_type)
    keep_freed_memory(device)
    dtype, reason = choose_compute_dtype(device)
    shape = model_shape(args.depth, 64, args.head_dim)
    config = GPTConfig(
        args.seq_len,
        args.vocab_size,
        shape.n_layer,
        shape.n_head,
        shape.n_head,
        shape.n_embd,
        args.window_pattern,
    )
    name = device_name(device)
    print(
        f"{name}, {dtype} ({reason}), d{args.depth} width {config.n_embd}, "
        f"{args.rows} x {args.seq_len} tokens"
    )
    steps, losses, failed = {}, {}, {}
    for candidate in dict.fromkeys(("baseline", *args.candidates)):
        if why := refusal(CANDIDATES[candidate], config, dtype, device, args):
            print(f"{candidate}: skipped: {why}")
            continue
        start = time.perf_counter()
        try:
            step = make_step(candidate, config, dtype, device, args)
            losses[candidate] = [step().item() for _ in range(COMPARED_STEP)][-1]
        except Exception as error:  # the others are worth as much; without the baseline nothing is
            if candidate == "baseline":
                raise
            failed[candidate] = (
                f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            )
            print(f"{candidate}: {failed[candidate]}")
            continue
        steps[candidate] = step
        print(
            f"{candidate}: first {COMPARED_STEP} steps {time.perf_counter() - start:.1f} s, "
            f"loss {losses[candidate]:.4f}"
        )
    for candidate, loss in losses.items():
        if not abs(loss / losses["baseline"] - 1) < DIFFERENT:
            failed[candidate] = (
                f"failed: its loss is {loss:.4f}, the baseline's {losses['baseline']:.4f}"
            )
            print(f"{candidate}: {failed[candidate]}")
            del steps[candidate]
    times = time_interleaved(steps, args.repeats, device)
    peaks = {candidate: peak_bytes(step, device) for candidate, step in steps.items()}
    ceiling = rates(device, dtype).flop_per_sec
    rows = [
        row(candidate, times, peaks, losses, args, config, dtype, name, ceiling)
        for candidate in steps
    ]
    for line in rows:
        print(
            f"{line['candidate']:14} {line['median_ms']:9.2f} ms "
            f"({line['p20_ms']:.2f} to {line['p80_ms']:.2f}), {line['tok_per_sec']:,.0f} tok/s, "
            f"{line['ratio_to_baseline']:.3f} of the baseline's time, "
            f"peak {line['peak_mib']:,.0f} MiB above weights and state, "
            f"{line['tflop_per_sec']:.3f} TFLOP/s in matmuls, "
            f"{line['share_of_matmul']:.2f} of a large matmul's rate"
        )
    if args.out:
        blank = dict.fromkeys(rows[0])
        append_rows(
            args.out,
            rows
            + [
                {**blank, "candidate": candidate, "depth": args.depth, "note": note}
                for candidate, note in failed.items()
            ],
        )
        print(f"rows: {args.out}")
    if args.profile:
        print_profile(steps["baseline"])
    return int(bool(failed))


def row(candidate, times, peaks, losses, args, config, dtype, device_name, ceiling):
    """Return a CSV row: median and percentiles, ratio to the baseline, provenance."""
    median, low, high = percentiles(times[candidate])
    tokens = args.rows * args.seq_len
    flop_per_sec = 1e3 * step_flops(config, tokens) / median
    commit, dirty = git_commit()
    return {
        "candidate": candidate,
        "depth": args.depth,
        "n_embd": config.n_embd,
        "seq_len": args.seq_len,
        "rows": args.rows,
        "vocab_size": args.vocab_size,
        "window_pattern": args.window_pattern,
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": not args.no_compile,
        "median_ms": median,
        "p20_ms": low,
        "p80_ms": high,
        "ratio_to_baseline": median / statistics.median(times["baseline"]),
        "tok_per_sec": 1e3 * tokens / median,
        "peak_mib": peaks[candidate] / 2**20,
        "tflop_per_sec": flop_per_sec / 1e12,
        "share_of_matmul": flop_per_sec / ceiling,
        "loss": losses[candidate],
        "device": device_name,
        "commit": commit,
        "dirty": dirty,
        "note": "",
        **versions(),
    }


def print_profile(step, n_steps=3):
    """Time by operation over a few steps, largest first."""
    with torch.profiler.profile() as profile:
        for _ in range(n_steps):
            step()
    on = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=on, row_limit=15, max_name_column_width=60))


if __name__ == "__main__":
    raise SystemExit(main())
