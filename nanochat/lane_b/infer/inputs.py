"""What lane B's inference reads: stats.json, and runs as calibration points or as the baseline."""

import math
import statistics

from nanochat.errors import UserError
from nanochat.files import read_json
from nanochat.lane_b import Refusal
from nanochat.lane_b.exponents import Estimate
from nanochat.lane_b.infer.calibration import BitsPerByte, CalibrationPoint
from nanochat.lane_b.infer.horizon import CorpusStatistics, CorrelationLaw

STATISTICS_VERSION = 1
NUMBER_OR_NONE = (int, float, type(None))
_OF_ONE_MODEL = (("models", "n_scaling_params", int), ("models", "model_config", dict),
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


def read_statistics(path):
    """CorpusStatistics from the stats.json of scripts.lane_b_stats. Errors: UserError naming file and field."""
    file = Fields(path, "scripts.lane_b_stats", STATISTICS_VERSION)
    file.number("beta.value")  # never a bracket alone
    return CorpusStatistics(
        dataset_id=file.get("dataset_id", str), tokenizer_id=file.get("tokenizer_id", str),
        vocab_size=file.get("vocab_size", int), beta=file.estimate("beta"),
        beta_max_data_tokens=file.number("beta.max_data_tokens", above=0), gamma=file.estimate("gamma"),
        gamma_refusal=file.get("gamma.refusal", str, type(None)), law=_correlation_law(file),
        context_tokens=file.get("context_tokens", int, type(None)),
        warnings=tuple(map(str, file.get("warnings", list))))


def _correlation_law(file):
    lags = [lag.get("lag") if isinstance(lag, dict) else None for lag in file.get("lags", list)]
    if not lags or not all(type(lag) is int for lag in lags):
        raise file.fault("lags is not a list of lags")
    law = {"null_coefficient": file.number("null_coefficient", above=0), "longest_lag": max(lags)}
    fit = "fits.op.single"
    if file.optional("n_break") is None:
        return CorrelationLaw(file.number(f"{fit}.log_intercept"), file.number(f"{fit}.slope"), None, None, **law)
    fit = "fits.op.broken"
    return CorrelationLaw(file.number(f"{fit}.log_intercept"), file.number(f"{fit}.slope_before"),
                          file.number("n_break", above=0), file.number(f"{fit}.slope_after"), **law)


def parse_point(text):
    """A CalibrationPoint from TOKENS:METRIC as typed on the command line, the metric in bits per byte."""
    tokens, _, metric = text.partition(":")
    try:
        tokens, metric = float(tokens), float(metric)
        if not tokens.is_integer():
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"--calibration {text!r} is neither a run nor TOKENS:METRIC, like 8388608:1.0372") from None
    return CalibrationPoint(int(tokens), BitsPerByte(metric), "given")


def point_of_run(run, corpus):
    """A CalibrationPoint: the val_bpb at the end of a run's complete schedule.

    Errors: Refusal for a run that did not end well, stopped or was last evaluated before its schedule's
    end, or was trained on another dataset or tokenizer than the statistics of `corpus`.
    """
    _check_run(run, corpus)
    tokens, target = recorded(run, "summary", "tokens", int), recorded(run, "config", "target_tokens", int)
    if tokens != target:
        raise Refusal(f"run {run.run_id} ended after {tokens} of {target} tokens: not the end of its schedule; "
                      "finish it or leave it out")
    evaluations = run.of("val")
    steps, metric = recorded(run, "summary", "steps", int), recorded(run, "summary", "final_val_bpb", *NUMBER_OR_NONE)
    if metric is None or not evaluations or evaluations[-1].get("step") != steps:
        raise Refusal(f"run {run.run_id} was not evaluated at the end of its schedule (step {steps}); "
                      "repeat it with --eval-every")
    return CalibrationPoint(tokens, BitsPerByte(metric), run.run_id)


def threshold_of_baseline(runs, corpus):
    """The default threshold: the median over seeds of the baseline runs' lowest val_bpb, as BitsPerByte.

    Errors: Refusal for one run given twice, a run without validation, or one that point_of_run would refuse.
    """
    check_different([run.run_id for run in runs])
    lowest = []
    for run in runs:
        _check_run(run, corpus)
        lowest.append(recorded(run, "summary", "min_val_bpb", *NUMBER_OR_NONE))
        if lowest[-1] is None:
            raise Refusal(f"run {run.run_id} has no validation (min_val_bpb); repeat it with --eval-every")
    return BitsPerByte(statistics.median(lowest))


def common_model(runs):
    """(scaling parameters, tokens a step, context length in tokens) of runs of one model. Errors: Refusal when they
    differ in that, or one run is given twice."""
    check_different([run.run_id for run in runs])
    found = [[recorded(run, "config", name, kind) for _, name, kind in _OF_ONE_MODEL] for run in runs]
    for run, values in zip(runs, found, strict=True):
        for (what, *_), value, first in zip(_OF_ONE_MODEL, values, found[0], strict=True):
            if value != first:
                raise Refusal(f"runs {runs[0].run_id} and {run.run_id} are of different {what}; calibrate with one")
    params, config, step_tokens = found[0]
    return params, step_tokens, config.get("sequence_len")


def check_baseline(runs, n_scaling_params, step_tokens):
    """Errors: Refusal for a baseline of another size of model or batch (None: not known) than the calibration's."""
    for run in runs:
        for what, name, wanted in (("scaling parameters", "n_scaling_params", n_scaling_params),
                                   ("tokens a step", "total_batch_size_tokens", step_tokens)):
            found = recorded(run, "config", name, int)
            if wanted is not None and found != wanted:
                raise Refusal(f"baseline run {run.run_id} has {found} {what}, the calibration {wanted}; "
                              "give a baseline of the model that was calibrated")


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


def _check_run(run, corpus):
    if run.status != "ok":
        raise Refusal(f"run {run.run_id} did not end well (status {run.status}); repeat it or leave it out")
    for name, found in (("dataset", corpus.dataset_id), ("tokenizer", corpus.tokenizer_id)):
        trained_on = recorded(run, "config", f"{name}_id", str)
        if trained_on != found:
            raise Refusal(f"run {run.run_id} was trained on {name} {trained_on}, the statistics are of {found}; "
                          f"make the statistics again with that {name}")
