"""Whether a long run's memory, open files and threads stay as they are: many tiny steps, watched from outside.

    nice python -m dev.bench.endurance --steps 20000

The training program with evaluations, samples and checkpoints, on made text; Linux, where /proc says what a process
holds. A tenth's figure is its median. The last tenth should be within 2 % of the second: the first warms up.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nanochat.common import UserError, command, parse_json, say
from nanochat.runlog import METRICS
from nanochat.tokenizer import MIN_VOCAB_SIZE, train_tokenizer

FLAGS = ("--depth 1 --aspect-ratio 64 --head-dim 16 --max-seq-len 32 --device-batch-size 2 --total-batch-size 64 "
         "--window-pattern L --core-metric-every -1 --eval-tokens 512 --eval-every 250 --sample-every 1000 "
         "--save-every 500 --keep-checkpoints 2 --no-compile --device-type cpu --run-id r --model-tag r")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every-sec", type=float, default=1.0, help="how often to look")
    return parser.parse_args(argv)


def make_text(folder):
    """Files of made words, and a tokenizer for them; returns the two flags that name them."""
    source = random.Random(0)
    words = ["".join(source.choices("abcdefghijklmnop", k=source.randint(2, 8))) for _ in range(500)]
    texts = ["\n\n".join(" ".join(source.choices(words, k=60)) for _ in range(400)) for _ in range(3)]
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i}.txt").write_text(text)
    train_tokenizer(texts, MIN_VOCAB_SIZE + 128).save(folder / "tokenizer")
    return ["--dataset", str(folder / "text"), "--tokenizer-dir", str(folder / "tokenizer")]


def last_step(metrics):
    """The step of the last whole event of a record, or None."""
    if not metrics.exists():
        return None
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 20_000))
        lines = file.read().split(b"\n")
    return parse_json(lines[-2]).get("step") if len(lines) > 2 else None


def holdings(pid):
    """(resident MiB, open files, threads) of a process, or None when it has ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(status["VmRSS"].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"])
    except (OSError, KeyError):
        return None


@command
def main(argv=None):
    args = parse_args(argv)
    looks = [[] for _ in range(10)]  # of each tenth
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.monotonic()
        environment = {**os.environ, "NANOCHAT_BASE_DIR": f"{folder}/cache"}
        process = subprocess.Popen(
            [sys.executable, "-m", "scripts.base_train", *FLAGS.split(), "--num-iterations", str(args.steps),
             *make_text(folder)], env=environment, stdout=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                time.sleep(args.every_sec)
                step, found = last_step(folder / "cache" / "runs" / "r" / METRICS), holdings(process.pid)
                if step is not None and step < args.steps and found:
                    looks[10 * step // args.steps].append(found)
        finally:
            process.kill()
        elapsed_sec = time.monotonic() - started
    if process.returncode or not all(looks):
        raise UserError("the training failed, or a tenth of it was not looked at: take more --steps")
    say("tenth  looks      MiB  files  threads")
    medians = [[statistics.median(column) for column in zip(*tenth, strict=True)] for tenth in looks]
    for i, (tenth, (mib, n_files, n_threads)) in enumerate(zip(looks, medians, strict=True), 1):
        say(f"{i:5}  {len(tenth):5}  {mib:7.1f}  {n_files:5.0f}  {n_threads:7.0f}")
    say(f"{args.steps:,} steps in {elapsed_sec:.0f} s; memory of the last tenth over the second: "
        f"{medians[9][0] / medians[1][0]:.4f}")


if __name__ == "__main__":
    main()
