"""Small whole runs for a study of loss curves: cells (text x learning rates) x horizons x seeds, two at a time.

    python -m dev.study.curve_runs --out DIR [--texts DIR] [--cells books-auto ...] [--ratios 8 12 ...]

`--texts` holds one folder of short documents (300 characters, so that packing repeats nothing) for each text, and a
tokenizer beside each, tok_<text>. Finished runs are kept; the curves of all of them land in <out>/curves.csv, one
evaluation a row.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nanochat.common import UserError, command, runs_dir
from nanochat.runlog import read_run
from nanochat.target import evaluations_of

CELLS = {f"{text}-{rates}": (text, rates) for text in ("books", "code") for rates in ("auto", "tuned")}
LEARNING_RATES = {"--matrix-lr": 0.02, "--embedding-lr": 0.3, "--unembedding-lr": 0.008}  # base_train's
TUNED_FACTOR = 8  # the automatic scale is this much too low at 2,048 tokens a step
STEPS_PER_RATIO, EVALUATIONS = 112, 28  # 2,048 tokens a step over 229k scaling parameters; evaluations a run
SIZE = ["--depth", "2", "--head-dim", "32", "--aspect-ratio", "32", "--max-seq-len", "128", "--window-pattern", "L",
        "--device-batch-size", "16", "--total-batch-size", "2048", "--eval-tokens", "65536",
        "--core-metric-every", "-1", "--sample-every", "-1", "--save-every", "0"]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of curves.csv and of the consoles")
    parser.add_argument("--texts", type=Path, required=True, help="folder of the texts and of their tokenizers")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=["books-auto", "books-tuned", "code-tuned"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[8, 12, 4, 6, 16, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--at-once", type=int, default=2)
    return parser.parse_args(argv)


def run_id(cell, ratio, seed):
    return f"{cell}-r{ratio:g}-s{seed}"


def train(args, cell, ratio, seed):
    """One run, unless its record is complete already."""
    name, (text, rates) = run_id(cell, ratio, seed), CELLS[cell]
    if (runs_dir() / name / "summary.json").exists():
        return
    factor = TUNED_FACTOR if rates == "tuned" else 1
    steps = round(ratio * STEPS_PER_RATIO)
    flags = [f"{flag}={rate * factor}" for flag, rate in LEARNING_RATES.items()]
    line = [sys.executable, "-m", "scripts.base_train", "--dataset", str(args.texts / text),
            "--tokenizer-dir", str(args.texts / f"tok_{text}"), "--run-id", name, "--model-tag", name,
            "--seed", str(seed), "--num-iterations", str(steps), "--eval-every", str(steps // EVALUATIONS),
            *SIZE, *flags]
    with open(args.out / f"{name}.log", "w") as console:
        subprocess.run(["nice", "-n", "5", *line], stdout=console, stderr=subprocess.STDOUT, check=False,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})


def write_curves(path):
    """Every evaluation of every complete run in the cache, as (cell, seed, steps of the horizon, step, val_bpb)."""
    rows = []
    for folder in sorted(runs_dir().iterdir()):
        cell, _, rest = folder.name.partition("-r")
        if cell not in CELLS or not (folder / "summary.json").exists():
            continue
        record = read_run(folder)
        horizon, seed = record.config["num_iterations"], int(rest.rpartition("-s")[2])
        rows += [(cell, seed, horizon, e.step, e.metric) for e in evaluations_of(record.events, "val_bpb")]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("cell", "seed", "horizon_steps", "step", "val_bpb"), *rows])
    print(f"{len(rows)} evaluations in {path}")


@command
def main(argv=None):
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for cell in args.cells:
        if not (args.texts / CELLS[cell][0]).is_dir():
            raise UserError(f"no text {args.texts / CELLS[cell][0]}; make the folder or leave {cell} out of --cells")
    with ThreadPoolExecutor(args.at_once) as pool:
        list(pool.map(lambda run: train(args, *run), [(cell, ratio, seed) for ratio in args.ratios
                                                      for cell in args.cells for seed in args.seeds]))
    write_curves(args.out / "curves.csv")


if __name__ == "__main__":
    raise SystemExit(main())
