"""The stability probe of gate 3: a short run resumed from its middle, and its graph breaks while compiling."""

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from nanochat.common import UserError, print0, read_json, write_json
from nanochat.experiments.launch import CONSOLE, experiment_lock, run_training
from nanochat.experiments.profiles import BASELINE
from nanochat.experiments.runner import check_asked, plan, training_command
from nanochat.runlog import read_run

STEPS, RESUME_STEP = 20, 10
RESULT = "probe.json"
GRAPH_BREAK = "Graph break in user code"  # torch's words for each one under TORCH_LOGS=graph_breaks


@dataclass(frozen=True)
class Probe:
    """What the probe saw: the largest loss difference over the resumed steps, nats/token.

    None: one of the two runs did not get to the end with finite losses, or the second did not resume.
    graph_breaks None: the model ran uncompiled, so there were none to see.
    """

    graph_breaks: int | None
    resume_difference_nats: float | None
    steps_compared: int


def probe_candidates(experiment, runs_dir, command=training_command, report=print0):
    """Probe each candidate but the baseline, at the first depth and seed, where no result is there yet.

    Errors: UserError as run_training, and for a result that is damaged or was made under other flags.
    """
    with experiment_lock(runs_dir, experiment.name, report) as lock:
        for run in plan(experiment):
            first = (run.depth, run.seed) == (experiment.depths[0], experiment.seeds[0])
            if not first or run.candidate == BASELINE:
                continue
            folder = Path(runs_dir) / _probe_id(experiment.name, run.candidate)
            flags = [*run.flags, "--run-id", folder.name, "--model-tag", folder.name, "--num-iterations", str(STEPS),
                     "--eval-every", "-1", "--save-every", str(RESUME_STEP)]
            if (folder / RESULT).exists():
                check_asked(folder, flags)
            else:
                _probe(folder, flags, command, lock)
            report(f"{folder.name}: {_describe(read_probe(runs_dir, experiment.name, run.candidate))}")


def read_probe(runs_dir, experiment_name, candidate):
    """The Probe of a candidate, or None when it was not made. Errors: UserError when its file is damaged."""
    path = Path(runs_dir) / _probe_id(experiment_name, candidate) / RESULT
    if not path.exists():
        return None
    remedy = "delete it and probe again (scripts.experiment --probe)"
    value = read_json(path, remedy)
    numbers = all(isinstance(number, (int, float, type(None))) for number in value.values())
    if set(value) != {field.name for field in fields(Probe)} or not numbers:
        raise UserError(f"{path}: not a probe's result; {remedy}")
    return Probe(**value)


def _probe(folder, flags, command, lock):
    run_training(folder, command(flags), lock, f"{folder.name} straight", flags=flags,
                 environment={"TORCH_LOGS": "graph_breaks"})
    graph_breaks = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").count(GRAPH_BREAK)
    first = read_run(folder)
    if first.config.get("flags", {}).get("no_compile"):
        graph_breaks = None
    resume = [*flags, "--resume-from-step", str(RESUME_STEP)]
    run_training(folder, command(resume), lock, f"{folder.name} resumed", fresh=False)
    second = read_run(folder)
    straight, resumed = _losses(first), _losses(second)
    steps = range(RESUME_STEP + 1, STEPS + 1)
    difference = None
    # a second process that never came to resume leaves the first one's losses, which agree with themselves
    took_up = second.status == "ok" and any(event["step"] == RESUME_STEP for event in second.of("resume"))
    if took_up and all(losses.get(step) is not None for losses in (straight, resumed) for step in steps):
        difference = max(abs(straight[step] - resumed[step]) for step in steps)
    for path in {event["path"] for event in (*first.of("checkpoint"), *second.of("checkpoint"))}:
        shutil.rmtree(path, ignore_errors=True)
    write_json(folder / RESULT, asdict(Probe(graph_breaks, difference, len(steps))))


def _losses(record):
    return {event["step"]: event["loss"] for event in record.of("train")}


def _describe(probe):
    difference = probe.resume_difference_nats
    resumed = "no losses to compare" if difference is None else f"losses within {difference:.2g} nats"
    breaks = "unknown (uncompiled)" if probe.graph_breaks is None else probe.graph_breaks
    return f"{breaks} graph breaks; {resumed} after a resume"


def _probe_id(experiment_name, candidate):
    return f"{experiment_name}.{candidate}.probe"
