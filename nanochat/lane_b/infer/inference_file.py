"""infer.json: what scripts.lane_b_infer_ratio writes and scripts.lane_b_log_run reads. Infinite bounds are null."""

import math
from dataclasses import asdict, dataclass

from nanochat.errors import UserError
from nanochat.lane_b.infer.inputs import Fields
from nanochat.lane_b.infer.record import DECISIONS

VERSION = 1


def inference_document(inference, default_ratio, fallback_reason=None):
    """The part of infer.json that the inference decides; `inference` None and a reason: it was refused.

    decision is `inferred`, or `fallback` to the default ratio where a reason for that is given; alpha_source
    is that of the alpha beside it, `default` only without one.
    """
    nothing = dict.fromkeys(("alpha", "alpha_theory", "alpha_calibration", "calibration", "target_tokens",
                             "target_param_data_ratio", "confirmation_ratio", "regime"))
    return _finite({
        "state": "low_quality", "decision": "fallback" if fallback_reason else "inferred",
        "fallback_reason": fallback_reason, "alpha_source": "default", "policy": None, **nothing,
        "default_ratio": default_ratio, "chosen_ratio": default_ratio if fallback_reason else inference.ratio.value,
        "faults": [], "warnings": [], **(_of(inference) if inference else {})})


def _of(inference):
    own, fit = inference.own, inference.calibration
    return {
        "state": inference.state, "alpha_source": inference.alpha_source, "policy": inference.policy,
        "alpha": asdict(inference.alpha), "alpha_theory": asdict(inference.alpha_theory),
        "alpha_calibration": own and {"value": own.curve.alpha, "lo": own.alpha_lo, "hi": own.alpha_hi},
        "calibration": {
            "L_inf_bits_per_byte": fit.curve.asymptote, "A_bits_per_byte": fit.curve.scale, "alpha": fit.curve.alpha,
            "rms_residual_bits_per_byte": fit.rms_residual_bits_per_byte, "degrees_of_freedom": fit.degrees_of_freedom,
            "points": [{"tokens": point.tokens, "bits_per_byte": point.metric.value, "source": point.source}
                       for point in inference.points]},
        "target_tokens": inference.target_tokens and asdict(inference.target_tokens),
        "target_param_data_ratio": inference.ratio and asdict(inference.ratio),
        "confirmation_ratio": inference.confirmation_ratio,
        "regime": inference.regime and asdict(inference.regime),
        "faults": list(inference.faults), "warnings": list(inference.warnings)}


def describe(document):
    """The summary of an infer.json for the console."""
    lines = []
    if document["alpha"]:
        lines.append(f"alpha {_numbers(document['alpha'])} from the {document['alpha_source']} ({document['policy']})")
        lines.append(f"  the statistics say {_numbers(document['alpha_theory'])}, "
                     f"the calibration alone {_numbers(document['alpha_calibration'])}")
        fit = document["calibration"]
        lines.append(f"calibration: L(D) = {fit['L_inf_bits_per_byte']:.4f} + {fit['A_bits_per_byte']:.4g} D^-"
                     f"{fit['alpha']:.4f} bits per byte, {len(fit['points'])} points, "
                     f"rms residual {fit['rms_residual_bits_per_byte']:.4f}")
    lines.append(f"threshold: val_bpb {document['target_metric_threshold']:.4f} ({document['threshold_source']})")
    if document["target_tokens"]:
        lines.append(f"target: {_numbers(document['target_tokens'])} tokens, "
                     f"ratio {_numbers(document['target_param_data_ratio'])}, "
                     f"confirmation {document['confirmation_ratio']:.4g}")
    if document["regime"]:
        regime = document["regime"]
        usable = regime["usable_context_tokens"]
        reach = "all lags" if usable is None else f"lags up to {usable:.3g}"
        lines.append(f"regime: {regime['data_tokens']:.3g} tokens resolve {reach}, context "
                     f"{regime['context_tokens'] or 'not given'}: {regime['name']}"
                     + (" (extrapolated past the measured lags)" if regime["beyond_measured_lags"] else ""))
    lines += [f"low quality: {fault}" for fault in document["faults"]]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    if document["fallback_reason"]:
        lines.append(f"falling back to the default ratio: {document['fallback_reason']}")
    lines.append(f"state {document['state']}, decision {document['decision']}, ratio {document['chosen_ratio']:.4g}")
    return "\n".join(lines)


def _numbers(estimate):
    """value (lo to hi) of a dict of those; what is not known is left out."""
    if estimate is None or (estimate["value"] is None and estimate["lo"] is None):
        return "nothing"
    value, lo, hi = (None if estimate[part] is None else f"{estimate[part]:.4g}" for part in ("value", "lo", "hi"))
    if value is None:
        return f"{lo} to {hi}"
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
    asymptote: float | None
    curve_alpha: float | None

    def horizon_factor(self, metric):
        """How many times longer a schedule that ended at `metric` (bits per byte) must be to end at the threshold.

        By the calibration curve; None without one, or where the curve does not reach the threshold.
        """
        if self.asymptote is None or not self.asymptote < min(metric, self.target_metric_threshold):
            return None
        gaps = (metric - self.asymptote) / (self.target_metric_threshold - self.asymptote)
        log_factor = math.log(gaps) / self.curve_alpha
        return math.exp(log_factor) if log_factor < 700 else None

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
    fitted = file.get("calibration", dict, type(None)) is not None
    return RecordedInference(
        **{name: file.get(name, str) for name in texts},
        **{name: None if file.get(name, dict, type(None)) is None else file.number(f"{name}.value")
           for name in nullable},
        target_metric_threshold=file.number("target_metric_threshold"),
        n_scaling_params=file.get("n_scaling_params", int),
        confirmation_ratio=file.optional("confirmation_ratio"), default_ratio=file.number("default_ratio"),
        asymptote=file.number("calibration.L_inf_bits_per_byte") if fitted else None,
        curve_alpha=file.number("calibration.alpha", above=0) if fitted else None)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
