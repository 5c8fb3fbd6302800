"""The study of lane B: in each cell (text x size x learning rates x target) the horizons that it names, tried.

    python -m dev.study.lane_b_cells --books FOLDER --work FOLDER [--cells NAME ...]

A cell: a run of another seed sets the target (its end); two seeds of two horizons calibrate, and of a third where the
inference asks for one; what it says of H*, its neighbour, D* and the default ratio is appended to
dev/lane_b_study_predictions.csv, and only then are they run, with three new seeds (--predict ends before that, for a
commit of the predictions). Results: dev/lane_b_study.csv, one run a row. Everything that is finished is kept: the same
command goes on. --books: parquet shards of English text, split here by how much of it is dialogue.
"""

import argparse
import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from nanochat.common import UserError, command, runs_dir
from nanochat.experiments.lane_b_study import CALIBRATION_SHARES, MAX_CALIBRATION
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.curve_law import Progress, Run
from nanochat.lane_b.infer.horizon import CONFIRMATION_FACTOR, DEFAULT_RATIO, infer_horizon
from nanochat.runlog import read_run
from nanochat.schedule import lr_multipliers
from nanochat.shards import list_shards, read_documents
from nanochat.stdlib_corpus import corpus_documents
from nanochat.target import evaluations_of, first_crossing

PREDICTIONS, RESULTS = Path("dev/lane_b_study_predictions.csv"), Path("dev/lane_b_study.csv")
COLUMNS = ("cell", "target_ratio", "threshold", "n_scaling_params", "decision", "horizon", "horizon_steps",
           "predicted_steps", "predicted_lo", "predicted_hi", "reaches", "slopes", "envelope", "lack_of_fit_p",
           "calibration_steps")
MEASURED = (*COLUMNS, "seed", "measured_steps", "last_val_bpb", "median_step_ms")  # last: where it crossed, or its end
PIECE_CHARS, TEXT_CHARS, VOCABULARY, STEP_TOKENS = 300, 16_000_000, 2048, 2048
TARGET_SEED, CALIBRATION_SEEDS, TEST_SEEDS = 9, (0, 1), (10, 11, 12)
EVALUATIONS = 28  # a run
# width and layers; scaling parameters follow
SIZES = {"d2w64": ("2", "32", "32"), "d3w96": ("3", "32", "32")}
PARAMS = {"d2w64": 229_400, "d3w96": 528_456}
RATES = {"auto": 1, "tuned": 8}  # times the recipe's, which the automatic scale makes too low at 2,048 tokens a step
HORIZONS = ("shortest_whole", "quickest", "neighbour", "default")
RECIPE = {"--matrix-lr": 0.02, "--embedding-lr": 0.3, "--unembedding-lr": 0.008}

multipliers = cache(lr_multipliers)


@dataclass(frozen=True)
class Cell:
    """One situation: which text, size, learning rates, and the ratio whose end is the target."""

    text: str
    size: str
    rates: str
    target_ratio: float

    @property
    def name(self):
        return f"{self.text}-{self.size}-{self.rates}-r{self.target_ratio:g}"

    def steps(self, ratio):
        """Optimizer steps of a ratio (tokens a scaling parameter)."""
        return int(ratio * PARAMS[self.size]) // STEP_TOKENS


CELLS = [Cell(*cell) for cell in (
    ("dialogue", "d2w64", "auto", 8), ("code", "d2w64", "tuned", 8), ("prose", "d2w64", "auto", 8),
    ("dialogue", "d2w64", "tuned", 8), ("code", "d2w64", "auto", 8), ("prose", "d2w64", "tuned", 8),
    ("code", "d3w96", "auto", 4), ("dialogue", "d3w96", "tuned", 4), ("prose", "d2w64", "auto", 12),
    ("code", "d2w64", "tuned", 12))]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder of parquet shards")
    parser.add_argument("--work", type=Path, required=True, help="folder of the texts and consoles")
    parser.add_argument("--predict", action="store_true", help="only calibrate and write the predictions")
    parser.add_argument("--cells", nargs="+", choices=[cell.name for cell in CELLS], help="all when left out")
    return parser.parse_args(argv)


# --- texts -----------------------------------------------------------------------------------------------------------

def pieces(text):
    """Sentences joined to pieces of at most PIECE_CHARS characters: packing drops little and nothing repeats."""
    piece = ""
    for sentence in re.split(r"(?<=[.!?\n])(?=\s)", text):
        while len(sentence) > PIECE_CHARS:
            cut = max(sentence.rfind(" ", 1, PIECE_CHARS), 0) or PIECE_CHARS
            yield from (part for part in (piece, sentence[:cut]) if part)
            piece, sentence = "", sentence[cut:]
        if len(piece) + len(sentence) > PIECE_CHARS:
            yield piece
            piece = ""
        piece += sentence
    yield piece


def is_dialogue(document):
    """Whether quotation marks are frequent: about half of the books' documents."""
    return len(re.findall(r"[\"“”]", document)) > len(document) / 250


def write_text(folder, documents):
    """A folder of one jsonl file of shuffled pieces, about TEXT_CHARS characters; and a tokenizer of it."""
    if not folder.exists():
        found, n_chars = [], 0
        for document in documents:
            new = [piece.strip("\n") for piece in pieces(document) if len(piece.strip()) > PIECE_CHARS / 5]
            found, n_chars = found + new, n_chars + sum(map(len, new))
            if n_chars > TEXT_CHARS:
                break
        random.Random(0).shuffle(found)
        folder.mkdir(parents=True)
        with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": piece}) + "\n" for piece in found)
    tokenizer = folder.with_name(f"tokenizer_{folder.name}")
    if not tokenizer.exists():
        subprocess.run([sys.executable, "-m", "scripts.tok_train", "--dataset", folder, "--vocab-size",
                        str(VOCABULARY), "--tokenizer-dir", tokenizer], check=True)


def make_texts(args, names):
    """Make the texts that are asked for. Errors: UserError when there are no books."""
    books = list_shards(args.books)
    if not books and set(names) != {"code"}:
        raise UserError(f"--books {args.books} holds no parquet shards")
    later = [document for shard in books[len(books) // 2:] for document in read_documents(shard)]
    for name in names:
        documents = (corpus_documents() if name == "code" else
                     (document for document in later if is_dialogue(document) == (name == "dialogue")))
        write_text(args.work / name, documents)


# --- runs ------------------------------------------------------------------------------------------------------------

def train(args, cell, steps, seed, *more, what=""):
    """The record of a run of the cell, made now where it is not there."""
    run_id = f"study.{cell.name}.h{steps}{what}.s{seed}"
    folder = runs_dir() / run_id
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what a killed study left
        depth, head_dim, aspect_ratio = SIZES[cell.size]
        rates = [f"{flag}={rate * RATES[cell.rates]}" for flag, rate in RECIPE.items()]
        with open(args.work / f"{run_id}.log", "w") as console:
            subprocess.run(
                [sys.executable, "-m", "scripts.base_train", "--dataset", args.work / cell.text, "--tokenizer-dir",
                 args.work / f"tokenizer_{cell.text}", f"--run-id={run_id}", f"--model-tag={run_id}", f"--seed={seed}",
                 f"--num-iterations={steps}", f"--depth={depth}", f"--head-dim={head_dim}",
                 f"--aspect-ratio={aspect_ratio}", "--max-seq-len=128", "--window-pattern=L",
                 "--device-batch-size=16", f"--total-batch-size={STEP_TOKENS}", "--eval-tokens=65536",
                 f"--eval-every={max(1, steps // EVALUATIONS)}", "--core-metric-every=-1", "--sample-every=-1",
                 "--save-every=0", "--crop=drop", *rates, *more],
                stdout=console, stderr=subprocess.STDOUT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return read_run(folder)


def curve(record, seed=0):
    """The Run of curve_law of a record: its evaluations after step 0."""
    found = [e for e in evaluations_of(record.events, "val_bpb") if e.step]
    return Run(Progress(multipliers(record.config["num_iterations"]), np.array([e.step for e in found])),
               np.array([e.metric for e in found]), seed)


def calibrate(args, cell, pool, steps):
    """(seed, record) of the calibration runs of these horizons."""
    jobs = [(seed, pool.submit(train, args, cell, horizon, seed)) for horizon in reversed(steps)
            for seed in CALIBRATION_SEEDS]
    return [(seed, job.result()) for seed, job in jobs]


def infer(cell, calibration, threshold):
    """(the Inference or None, the horizon by which it asks to extend the calibration or None)."""
    runs = [curve(record, seed) for seed, record in calibration]
    try:
        found = infer_horizon(runs, threshold, multipliers, cell.steps(DEFAULT_RATIO))
        return found, found.next_num_iterations
    except Refusal as refusal:
        return None, getattr(refusal, "next_num_iterations", None)


def predictions(cell, calibration, threshold):
    """Rows of what lane B says of each horizon that will be run; the default ratio takes H*'s place where none is."""
    inference, _ = infer(cell, calibration, threshold)
    head = {"cell": cell.name, "target_ratio": cell.target_ratio, "threshold": threshold, "decision": "fallback",
            "n_scaling_params": calibration[0][1].config["n_scaling_params"],
            "calibration_steps": sum(record.config["num_iterations"] for _, record in calibration)}
    if inference is None:
        yield from ({**head, "horizon": name, "horizon_steps": cell.steps(DEFAULT_RATIO)} for name in HORIZONS)
        return
    head |= {"decision": "inferred", "lack_of_fit_p": inference.misfit.p, "slopes": inference.slopes.says,
             "envelope": inference.slopes.envelope}
    beyond = {"neighbour": round(CONFIRMATION_FACTOR * inference.chosen.steps), "default": cell.steps(DEFAULT_RATIO)}
    for name in HORIZONS:
        at = inference.predicted[name]
        yield {**head, "horizon": name, "horizon_steps": at.steps if at else beyond[name]} | (
            {"predicted_steps": at.time, "predicted_lo": at.lo, "predicted_hi": at.hi, "reaches": at.reaches}
            if at else {})


def study(args, cell, pool):
    """The cell's prediction, written before the runs that test it, then their rows."""
    if any(row["cell"] == cell.name for row in rows_of(RESULTS)):
        return
    target_steps = cell.steps(cell.target_ratio)
    target = pool.submit(train, args, cell, target_steps, TARGET_SEED)
    horizons = [round(share * target_steps) for share in CALIBRATION_SHARES]
    calibration = calibrate(args, cell, pool, horizons)
    threshold = target.result().summary["final_val_bpb"]
    known = [row for row in rows_of(PREDICTIONS) if row["cell"] == cell.name]
    if not known:
        longer = infer(cell, calibration, threshold)[1]
        while longer and sum(horizons) <= MAX_CALIBRATION * target_steps:
            horizons.append(longer)
            calibration += calibrate(args, cell, pool, [longer])
            longer = infer(cell, calibration, threshold)[1]
        append(PREDICTIONS, COLUMNS, predictions(cell, calibration, threshold))
        known = [row for row in rows_of(PREDICTIONS) if row["cell"] == cell.name]
    if args.predict:
        return
    test = partial(train, args, cell)
    asked = [(row, int(row["horizon_steps"]), seed) for seed in TEST_SEEDS for row in known if row["horizon_steps"]]
    stop = ("--stop-at-target", f"--target-metric-threshold={threshold!r}")
    jobs = [pool.submit(test, steps, seed, *stop, what="t") for steps, seed in dict.fromkeys(
        (steps, seed) for _, steps, seed in asked)]
    made = dict(zip(dict.fromkeys((steps, seed) for _, steps, seed in asked), [job.result() for job in jobs],
                    strict=True))
    measured = []
    for row, steps, seed in asked:
        run = curve(made[steps, seed])
        measured.append({**row, "seed": seed, "median_step_ms": made[steps, seed].summary["dt_median_ms"],
                         "last_val_bpb": run.loss[-1],
                         "measured_steps": first_crossing(run.progress.steps, run.loss, threshold)})
    append(RESULTS, MEASURED, measured)


def rows_of(path):
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path, columns, rows):
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


@command
def main(argv=None):
    args = parse_args(argv)
    cells = [cell for cell in CELLS if not args.cells or cell.name in args.cells]
    args.work.mkdir(parents=True, exist_ok=True)
    make_texts(args, dict.fromkeys(cell.text for cell in cells))
    with ThreadPoolExecutor(2) as pool:
        for cell in cells:
            print(f"{cell.name} ...", flush=True)
            study(args, cell, pool)
    print(f"predictions: {PREDICTIONS}, results: {RESULTS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
