"""What lane B's inference reads: stats.json, and runs as calibration curves or as the baseline."""

import math
import statistics
from dataclasses import dataclass

import numpy as np

from nanochat.common import UserError, read_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.curve_law import Progress, Run
from nanochat.lane_b.statistics import Estimate, alpha_of
from nanochat.runlog import UNTIMED_STEPS
from nanochat.target import evaluations_of

STATISTICS_VERSION = 1
NUMBER, NUMBER_OR_NONE = (int, float), (int, float, type(None))
SCHEDULE = ("warmup_steps", "warmdown_ratio", "final_lr_frac")
_RATES = ("embedding_lr", "unembedding_lr", "matrix_lr", "scalar_lr", "weight_decay")
_OF_ONE_MODEL = (("datasets", "dataset_id", str), ("tokenizers", "tokenizer_id", str),
                 ("models", "n_scaling_params", int), ("models", "model_config", dict),
                 ("batch sizes", "total_batch_size_tokens", int))


class Fields:
    """Typed access to a JSON object by dotted names; every error is a UserError that names the file and the field."""

    def __init__(self, path, maker, version):
        self.path, self.maker, self.values = path, maker, read_json(path, f"make the file again with {maker}")
        if self.get("schema_version", int) != version:
            raise self.fault(f"schema_version {self.values['schema_version']} (this program reads {version})")

    def get(self, name, *kinds):
        """The value at `name` (a.b.c), which must be there and of one of `kinds`; numbers must be finite."""
        value = self.values
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise self.fault(f"no field {name}")
            value = value[part]
        finite = not isinstance(value, (int, float)) or abs(value) < 1e300
        if isinstance(value, bool) or not isinstance(value, kinds) or not finite:
            raise self.fault(f"{name} is {value!r}")
        return value

    def number(self, name, above=-math.inf):
        """A float above `above`."""
        value = float(self.get(name, int, float))
        if value <= above:
            raise self.fault(f"{name} is {value:g}, not above {above:g}")
        return value

    def optional(self, name):
        """A float or None."""
        value = self.get(name, *NUMBER_OR_NONE)
        return None if value is None else float(value)

    def estimate(self, name):
        """An Estimate: a value with its interval, an interval alone, or nothing."""
        value, se, lo, hi = (self.optional(f"{name}.{part}") for part in ("value", "se", "lo", "hi"))
        if value is None:
            whole = (lo is None) == (hi is None) and (lo is None or lo <= hi)
        else:
            whole = None not in (se, lo, hi) and lo <= value <= hi and value > 0 and se >= 0
        if not whole:
            raise self.fault(f"{name} is no estimate with its interval")
        return Estimate(value, se, lo, hi)

    def fault(self, what):
        return UserError(f"{self.path}: {what}; make the file again with {self.maker}")


@dataclass(frozen=True)
class CorpusStatistics:
    """What lane B's inference takes from stats.json; `alpha` is the theory's."""

    dataset_id: str
    tokenizer_id: str
    alpha: Estimate
    warnings: tuple[str, ...]


def read_statistics(path):
    """CorpusStatistics from the stats.json of scripts.lane_b_stats. Errors: UserError naming file and field."""
    file = Fields(path, "scripts.lane_b_stats", STATISTICS_VERSION)
    file.number("beta.value")  # never a bracket alone
    return CorpusStatistics(file.get("dataset_id", str), file.get("tokenizer_id", str),
                            alpha_of(file.estimate("gamma"), file.estimate("beta")),
                            tuple(map(str, file.get("warnings", list))))


@dataclass(frozen=True)
class Setting:
    """What all calibration runs share: text, model and batch, their schedule's flags, and the clock of a step."""

    dataset_id: str
    tokenizer_id: str
    n_scaling_params: int
    step_tokens: int
    step_sec: float | None  # median over the runs of their median; None: not known
    schedule: dict[str, float]

    def ratio(self, steps):
        """Tokens per scaling parameter of a horizon."""
        return steps * self.step_tokens / self.n_scaling_params

    def seconds(self, steps):
        """On the training clock, which a run's first steps are not on; None: not known."""
        return None if self.step_sec is None else self.step_sec * max(steps - UNTIMED_STEPS, 0)


def common_setting(runs):
    """The Setting of calibration runs. Errors: Refusal when they differ in it, or one is given twice."""
    check_different([run.run_id for run in runs])
    for run in runs:
        flags = recorded(run, "config", "flags", dict)
        for name in SCHEDULE:
            if type(flags.get(name)) not in NUMBER:
                raise UserError(f"{run.folder}/config.json: flags.{name} is {flags.get(name)!r}; mend the record or "
                                "repeat the run")
        first = runs[0].config["flags"]
        pairs = [(name, flags.get(name), first.get(name)) for name in SCHEDULE + _RATES]
        pairs += [(what, recorded(run, "config", name, kind), recorded(runs[0], "config", name, kind))
                  for what, name, kind in _OF_ONE_MODEL]
        for what, value, wanted in pairs:
            if value != wanted:
                raise Refusal(f"runs {runs[0].run_id} and {run.run_id} are of different {what}; calibrate with one")
    config = runs[0].config
    dts_ms = [ms for run in runs if (ms := (run.summary or {}).get("dt_median_ms")) is not None]
    if any(type(ms) not in NUMBER for ms in dts_ms):
        raise UserError(f"dt_median_ms is {dts_ms} in the calibration runs' summaries; mend the records")
    return Setting(config["dataset_id"], config["tokenizer_id"], config["n_scaling_params"],
                   config["total_batch_size_tokens"], statistics.median(dts_ms) / 1e3 if dts_ms else None,
                   {name: config["flags"][name] for name in SCHEDULE})


def curve_of_run(run, schedule):
    """A whole run's evaluations as the laws read them; schedule: from its horizon to its multipliers.

    Errors: Refusal for a run that did not end well, stopped or was last evaluated before its schedule's end.
    """
    _check_status(run)
    horizon, steps = recorded(run, "config", "num_iterations", int), recorded(run, "summary", "steps", int)
    if steps != horizon:
        raise Refusal(f"run {run.run_id} ended after {steps} of {horizon} steps: not the end of its schedule; finish "
                      "it or leave it out")
    found = [e for e in evaluations_of(run.events, "val_bpb") if e.step > 0]
    if not found or found[-1].step != horizon:
        raise Refusal(f"run {run.run_id} was not evaluated at the end of its schedule (step {horizon}); repeat it with "
                      "--eval-every")
    for e in found:
        if e.metric is None or not 0 < e.metric < math.inf:
            raise Refusal(f"run {run.run_id} has a val_bpb of {e.metric} at step {e.step}; repeat it or leave it out")
    return Run(Progress(schedule(horizon), np.array([e.step for e in found])), np.array([e.metric for e in found]))


def repeated_text(runs, planned_tokens):
    """Warnings where calibration or plan read the same text again: that measures repetition, not data."""
    found = [f"run {run.run_id} read its text {epochs:.2f} times: its curve is of repetition too"
             for run in runs if (epochs := (run.summary or {}).get("epochs") or 0) > 1]
    train_tokens = runs[0].config.get("train_tokens")
    if train_tokens and planned_tokens > train_tokens:
        found.append(f"the plan of {planned_tokens:.3g} tokens is longer than the text of {train_tokens:.3g}: it will "
                     "read it again, which no calibration run shows")
    return found


def threshold_of_baseline(runs, setting):
    """The default threshold: the median over seeds of the baseline runs' lowest val_bpb.

    Errors: Refusal for one run given twice, without validation, not ended well, or of another text, model or batch.
    """
    check_different([run.run_id for run in runs])
    lowest = []
    for run in runs:
        _check_status(run)
        for what, name, wanted in (("dataset", "dataset_id", setting.dataset_id),
                                   ("tokenizer", "tokenizer_id", setting.tokenizer_id),
                                   ("scaling parameters", "n_scaling_params", setting.n_scaling_params),
                                   ("tokens a step", "total_batch_size_tokens", setting.step_tokens)):
            found = recorded(run, "config", name, type(wanted))
            if found != wanted:
                raise Refusal(f"baseline run {run.run_id} has {what} {found}, the calibration {wanted}; give a "
                              "baseline of what was calibrated")
        lowest.append(recorded(run, "summary", "min_val_bpb", *NUMBER_OR_NONE))
        if lowest[-1] is None:
            raise Refusal(f"run {run.run_id} has no validation (min_val_bpb); repeat it with --eval-every")
    return statistics.median(lowest)


def check_different(names):
    """Errors: Refusal where one name is there twice: the same run again carries no evidence."""
    for name in names:
        if names.count(name) > 1:
            raise Refusal(f"{name} is given {names.count(name)} times; give each run once")


def recorded(run, part, name, *kinds):
    """The value of `name` in a run's `part` (config or summary). Errors: UserError where it is none of `kinds`."""
    values = getattr(run, part) or {}
    if name not in values:
        raise UserError(f"{run.folder}: its record has no {name}; it was not written by scripts.base_train")
    if isinstance(values[name], bool) or not isinstance(values[name], kinds):
        raise UserError(f"{run.folder}/{part}.json: {name} is {values[name]!r}; mend the record or repeat the run")
    return values[name]


def _check_status(run):
    if run.status != "ok":
        raise Refusal(f"run {run.run_id} did not end well (status {run.status}); repeat it or leave it out")
