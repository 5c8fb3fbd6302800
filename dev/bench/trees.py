"""Time the training step of two checkouts, in turn.

    python -m dev.bench.trees OTHER [arguments of dev.bench.train_step]

Runs this tree and OTHER in one process each; one steps while the other waits. Prints both medians
and the ratio of this tree's to OTHER's, pair by pair, so that a machine that slows down slows both.
"""

import contextlib
import os
import statistics
import subprocess
import sys
from pathlib import Path

from dev.bench.measure import percentiles
from nanochat.common import UserError, command

PAIRS = 40
# both trees have these names since the first benchmark of the step
WORKER = """
import sys, time
from dev.bench import train_step
try:
    from nanochat.device import choose_compute_dtype, choose_device, keep_freed_memory
except ImportError:  # before 2026-11-29
    from nanochat.common import choose_compute_dtype, choose_device, keep_freed_memory
from nanochat.gpt import GPTConfig
from nanochat.schedule import model_shape
args = train_step.parse_args(sys.argv[1:])
device = choose_device("cpu")
keep_freed_memory(device)
shape = model_shape(args.depth, 64, args.head_dim)
config = GPTConfig(args.seq_len, args.vocab_size, shape.n_layer, shape.n_head, shape.n_head,
                   shape.n_embd, args.window_pattern)
step = train_step.make_step("baseline", config, choose_compute_dtype(device)[0], device, args)
for _ in range(5):
    loss = step()
print(float(loss), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    step()
    print(1e3 * (time.perf_counter() - start), flush=True)
"""


def start(folder, arguments):
    """Start a process for a checkout; it runs one training step per line that it receives."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )


def read(process):
    line = process.stdout.readline()
    if not line:
        raise UserError("a step failed: its traceback is above")
    return float(line)


def step_ms(process):
    print(file=process.stdin, flush=True)
    return read(process)


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    here, other = Path(__file__).resolve().parents[2], Path(argv[0]).resolve()
    if not (other / "dev/bench/train_step.py").exists():
        raise UserError(
            f"{other} is no checkout of this project: name the folder of one (git worktree add)"
        )
    with contextlib.ExitStack() as stack:
        trees = [stack.enter_context(start(folder, argv[1:])) for folder in (here, other)]
        losses = [read(tree) for tree in trees]
        pairs = [[step_ms(tree) for tree in trees] for _ in range(PAIRS)]
    for folder, loss, times in zip(
        ("this tree", other), losses, zip(*pairs, strict=True), strict=True
    ):
        print(f"{folder}: median {statistics.median(times):.1f} ms, loss after 5 steps {loss:.6f}")
    median, low, high = percentiles([mine / others for mine, others in pairs])
    print(
        f"time of this tree over the other: {median:.3f} ({low:.3f} to {high:.3f}, {PAIRS} pairs)"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
