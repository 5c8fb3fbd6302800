"""The stability probe of gate 3: a short run resumed from its middle, and its graph breaks while compiling."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.common import print0
from nanochat.experiments.launch import CONSOLE, experiment_lock, run_training
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.runner import plan, training_command
from nanochat.files import write_json
from nanochat.runlog import read_run

STEPS, RESUME_STEP = 20, 10
RESULT = "probe.json"
GRAPH_BREAK = "Graph break in user code"  # torch's words for each one under TORCH_LOGS=graph_breaks


@dataclass(frozen=True)
class Probe:
    """What the probe saw: the largest loss difference over the resumed steps, nats/token.

    None: one of the two runs did not get to the end with finite losses.
    """

    graph_breaks: int
    resume_difference_nats: float | None
    steps_compared: int


def probe_candidates(experiment, runs_dir, command=training_command, report=print0):
    """Probe each candidate but the baseline, at the first depth and seed, where no result is there yet."""
    with experiment_lock(runs_dir, experiment.name, report) as lock:
        for run in plan(experiment):
            first = (run.depth, run.seed) == (experiment.depths[0], experiment.seeds[0])
            if not first or run.candidate == BASELINE:
                continue
            folder = Path(runs_dir) / _probe_id(experiment.name, run.candidate)
            if not (folder / RESULT).exists():
                _probe(folder, run, command, lock)
            report(f"{folder.name}: {_describe(read_probe(runs_dir, experiment.name, run.candidate))}")


def read_probe(runs_dir, experiment_name, candidate):
    """The Probe of a candidate, or None when it was not made."""
    path = Path(runs_dir) / _probe_id(experiment_name, candidate) / RESULT
    return Probe(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _probe(folder, run, command, lock):
    flags = [*run.flags, "--run-id", folder.name, "--model-tag", folder.name, "--num-iterations", str(STEPS),
             "--eval-every", "-1", "--save-every", str(RESUME_STEP)]
    run_training(folder, command(flags), lock, f"{folder.name} straight", environment={"TORCH_LOGS": "graph_breaks"})
    graph_breaks = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").count(GRAPH_BREAK)
    straight = _losses(folder)
    resume = [*flags, "--resume-from-step", str(RESUME_STEP)]
    run_training(folder, command(resume), lock, f"{folder.name} resumed", fresh=False)
    resumed = _losses(folder)
    steps = range(RESUME_STEP + 1, STEPS + 1)
    difference = None
    if all(losses.get(step) is not None for losses in (straight, resumed) for step in steps):
        difference = max(abs(straight[step] - resumed[step]) for step in steps)
    for path in {event["path"] for event in read_run(folder).of("checkpoint")}:
        shutil.rmtree(path, ignore_errors=True)
    write_json(folder / RESULT, asdict(Probe(graph_breaks, difference, len(steps))))


def _losses(folder):
    return {event["step"]: event["loss"] for event in read_run(folder).of("train")}


def _describe(probe):
    difference = probe.resume_difference_nats
    resumed = "no losses to compare" if difference is None else f"losses within {difference:.2g} nats"
    return f"{probe.graph_breaks} graph breaks; {resumed} after a resume"


def _probe_id(experiment_name, candidate):
    return f"{experiment_name}.{candidate}.probe"
