"""infer.json: what scripts.lane_b_infer_ratio writes and scripts.lane_b_log_run reads. Infinite bounds are null."""

import math
from dataclasses import asdict, dataclass

from nanochat.common import UserError
from nanochat.lane_b.infer.crossing import MAX_EXTRAPOLATION
from nanochat.lane_b.infer.horizon import CONFIRMATION_FACTOR
from nanochat.lane_b.infer.inputs import Fields
from nanochat.lane_b.infer.record import DECISIONS

VERSION = 2
_ROWS = {"quickest": "quickest H*", "neighbour": f"{CONFIRMATION_FACTOR} H*", "shortest_whole": "shortest whole D*",
         "default": "default"}
_SLOPES_SAY = {"longer": "longer than D* is quicker", "shorter": "D* is the quickest", "undecided": "undecided"}


def inference_document(inference, setting, default_ratio):
    """The part of infer.json that an Inference decides, in the units of a Setting."""
    quickest, chosen, law = inference.quickest, inference.chosen, inference.prediction.law
    horizons = (chosen.steps, quickest.chosen_lo, quickest.chosen_hi)
    ratios = [setting.ratio(steps) for steps in horizons]
    tokens = sum(run.horizon for run in inference.runs) * setting.step_tokens
    return _finite({
        "state": "ok", "decision": "inferred", "fallback_reason": None, "alpha_source": "curves",
        "next_num_iterations": inference.next_num_iterations,
        "alpha": _interval(*inference.alpha),
        "law": {"form": law.form.name, "rms_log_loss": law.rms_log_loss, "at_bound": law.at_bound,
                **dict(zip(law.form.parameters, map(float, law.values), strict=True)),
                "lack_of_fit_f": inference.misfit.ratio, "lack_of_fit_p": inference.misfit.p},
        "slopes": asdict(inference.slopes) | {"says": inference.slopes.says},
        "target_tokens": _interval(*(steps * setting.step_tokens for steps in horizons)),
        "target_param_data_ratio": _interval(*ratios), "confirmation_ratio": CONFIRMATION_FACTOR * ratios[0],
        "default_ratio": default_ratio, "chosen_ratio": ratios[0],
        "shortest_whole_steps": _interval(quickest.whole, quickest.whole_lo, quickest.whole_hi),
        "predicted": {name: horizon and _predicted(horizon, setting) for name, horizon in inference.predicted.items()},
        "calibration": {"horizons_steps": sorted({run.horizon for run in inference.runs}), "runs": len(inference.runs),
                        "horizon_left_out": inference.horizon_left_out, "step_sec_median": setting.step_sec,
                        "tokens": tokens, "share_of_chosen_run": tokens / (chosen.steps * setting.step_tokens)},
        "warnings": inference.warnings})


def refused_document(refusal, default_ratio):
    """The same where the inference gave no horizon and --fallback goes on with the default ratio."""
    nothing = dict.fromkeys(("alpha", "law", "slopes", "target_tokens", "target_param_data_ratio", "confirmation_ratio",
                             "shortest_whole_steps", "predicted", "calibration"))
    longer = getattr(refusal, "next_num_iterations", None)
    return {"state": "refused" if longer is None else "too_short", "decision": "fallback",
            "fallback_reason": str(refusal), "alpha_source": "default", "next_num_iterations": longer, **nothing,
            "default_ratio": default_ratio, "chosen_ratio": default_ratio, "warnings": []}


def _interval(value, lo, hi):
    return {"value": value, "lo": lo, "hi": hi}


def _predicted(horizon, setting):
    times = (horizon.time, horizon.lo, horizon.hi)
    return {"steps": horizon.steps, "ratio": setting.ratio(horizon.steps), "reaches": horizon.reaches,
            "time_steps": _interval(*times), "time_sec": _interval(*map(setting.seconds, times))}


def describe(document):
    """The summary of an infer.json for the console."""
    lines = [f"threshold: val_bpb {document['target_metric_threshold']:.4f} ({document['threshold_source']})"]
    if document["law"]:
        law, slopes, cost = document["law"], document["slopes"], document["calibration"]
        p = "not tested" if law["lack_of_fit_p"] is None else f"p {law['lack_of_fit_p']:.2g}"
        lines += [
            f"curves of {cost['runs']} runs ({' '.join(map(str, cost['horizons_steps']))} steps): {law['form']}, "
            f"L_inf {law['floor']:.4f}, rms {law['rms_log_loss']:.2g} of log L, lack of fit {p}",
            f"alpha {_numbers(document['alpha'])}; the statistics say {_numbers(document['alpha_theory'])}, "
            "which enters nothing",
            f"slope test: ends fall {slopes['envelope']:.3f} per ln of steps, runs land at {slopes['landing']:.3f}: "
            f"{_SLOPES_SAY[slopes['says']]}",
            f"{'horizon':<18}{'steps':>7}{'ratio':>8}  steps to target (95 %)       seconds"]
        lines += [_row(title, document["predicted"][name]) for name, title in _ROWS.items()]
        lines.append(f"calibration: {cost['tokens']:.3g} tokens, {cost['share_of_chosen_run']:.2f} of a chosen run")
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    if document["fallback_reason"]:
        lines.append(f"falling back to the default ratio: {document['fallback_reason']}")
    lines.append(f"state {document['state']}, decision {document['decision']}, ratio {document['chosen_ratio']:.4g}")
    return "\n".join(lines)


def _row(title, predicted):
    if predicted is None:
        return f"{title:<18}beyond {MAX_EXTRAPOLATION} times the longest calibration run: not predicted"
    if predicted["time_steps"]["value"] is None:
        return f"{title:<18}{predicted['steps']:>7}{predicted['ratio']:>8.4g}  ends short of the target"
    return (f"{title:<18}{predicted['steps']:>7}{predicted['ratio']:>8.4g}  {_numbers(predicted['time_steps']):<28} "
            f"{_numbers(predicted['time_sec'])}")


def _numbers(interval):
    """value (lo to hi) of a dict of those; what is not known is left out."""
    if interval is None or interval["value"] is interval["lo"] is None:
        return "nothing"
    value, lo, hi = (None if interval[part] is None else f"{interval[part]:.4g}" for part in ("value", "lo", "hi"))
    if value is None:
        return f"{lo} to {hi or 'no bound'}"
    return value if lo is None else f"{value} ({lo} to {hi or 'no bound'})"


@dataclass(frozen=True)
class RecordedInference:
    """What a row of the ledger takes from infer.json."""

    dataset_id: str
    tokenizer_id: str
    target_metric_name: str
    target_metric_threshold: float
    n_scaling_params: int
    decision: str
    state: str
    alpha_source: str
    alpha: float | None
    target_tokens: float | None
    target_param_data_ratio: float | None
    confirmation_ratio: float | None
    default_ratio: float
    envelope: float | None
    ratio_lo: float | None = None  # of target_param_data_ratio's interval; None: no bound
    ratio_hi: float | None = None

    def horizon_factor(self, metric):
        """How many times longer a schedule that ended at `metric` (bits per byte) must be to end at the threshold.

        By the slope of the calibration's ends; None without one, and for more than a factor e.
        """
        log_factor = (metric - self.target_metric_threshold) / self.envelope if self.envelope else math.inf
        return math.exp(log_factor) if abs(log_factor) <= 1 else None

    def ratio_of(self, decision):
        """The ratio that a run of this decision trains at. Errors: UserError when the inference gave none."""
        ratio = {"inferred": self.target_param_data_ratio, "confirmation": self.confirmation_ratio,
                 "fallback": self.default_ratio}[decision]
        if ratio is None:
            raise UserError(f"--decision {decision}: the inference gave no such ratio (state {self.state})")
        return ratio


def read_inference(path):
    """RecordedInference from infer.json. Errors: UserError naming the file and the line or field."""
    file = Fields(path, "scripts.lane_b_infer_ratio", VERSION)
    for name, known in (("decision", DECISIONS), ("target_metric_name", ("val_bpb",))):
        if file.get(name, str) not in known:
            raise file.fault(f"{name} is {file.get(name, str)!r}, not {' or '.join(known)}")
    texts = ("dataset_id", "tokenizer_id", "target_metric_name", "decision", "state", "alpha_source")
    nullable = ("alpha", "target_tokens", "target_param_data_ratio")
    is_inferred = file.get("target_param_data_ratio", dict, type(None)) is not None
    lo, hi = (file.optional(f"target_param_data_ratio.{end}") if is_inferred else None for end in ("lo", "hi"))
    return RecordedInference(
        **{name: file.get(name, str) for name in texts},
        **{name: None if file.get(name, dict, type(None)) is None else file.number(f"{name}.value")
           for name in nullable},
        target_metric_threshold=file.number("target_metric_threshold"),
        n_scaling_params=file.get("n_scaling_params", int),
        confirmation_ratio=file.optional("confirmation_ratio"), default_ratio=file.number("default_ratio"),
        envelope=None if file.get("slopes", dict, type(None)) is None else file.number("slopes.envelope", above=0),
        ratio_lo=lo, ratio_hi=hi)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
