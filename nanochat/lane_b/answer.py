"""The answer of lane B as a file (infer.json) and as text on the console."""

from nanochat.common import UserError, read_json, utc_now
from nanochat.lane_b.inference import DEFAULT_RATIO, MARGIN, NEIGHBOUR

VERSION = 3


def document_of(setup, threshold, inference=None, refusal=None, alpha_theory=None):
    """Return infer.json of an Inference, or of a Refusal: then the decision is the default ratio.

    alpha_theory: gamma / 2 beta of stats.json, recorded beside the law's exponent.
    """
    document = {
        "schema_version": VERSION, "created_utc": utc_now(), "dataset_id": setup.dataset_id,
        "tokenizer_id": setup.tokenizer_id, "total_batch_size_tokens": setup.step_tokens,
        "target_metric_name": "val_bpb", "target_metric_threshold": threshold,
        "alpha_theory": alpha_theory, "default_ratio": DEFAULT_RATIO}
    if refusal is not None:
        return document | {"state": refusal.state, "reasons": {refusal.state: str(refusal)},
                           "decision": "fallback", "alpha_source": "default", "warnings": [],
                           "chosen_depth": None, "chosen_ratio": DEFAULT_RATIO}
    named, forecast, default = inference.named, inference.forecast, inference.default
    options = {"named": named, "confirmation": inference.neighbour, "default": default}
    slope, exponent = inference.slopes()
    return document | {
        "state": next(iter(inference.reasons), "ok"), "reasons": inference.reasons,
        "warnings": inference.warnings, "decision": "inferred",
        "alpha_source": "law", "alpha": exponent, "bpb_per_log_tokens": slope,
        "chosen_depth": named.depth, "chosen_ratio": named.ratio,
        "confirmation_ratio": inference.neighbour.ratio, "margin": MARGIN - 1,
        "n_scaling_params": setup.n_params(named.depth),
        **{name: option and option.to_dict() for name, option in options.items()},
        "saving": default and 1 - named.sec / default.sec,
        "calibration_cost": inference.cost(), "law": forecast.law.values,
        "n_smallest": forecast.law.n_smallest, "seed_sd": forecast.seed_sd,
        "interval_width": forecast.width}


def describe(document):
    """Return the console's summary of an infer.json."""
    lines = [f"target: val_bpb {document['target_metric_threshold']:g}"]
    if document["decision"] == "inferred":
        law = ", ".join(f"{name} {value:.3g}" for name, value in document["law"].items())
        lines += [f"law: {law}; seeds differ by {document['seed_sd']:.2%} (sd)",
                  f"{'':<14}{'depth':>5}{'ratio':>7}{'horizon':>9}   "
                  "steps to target (95 %)   seconds"]
        titles = {"named": "named", "confirmation": f"{NEIGHBOUR} x horizon",
                  "default": "default ratio"}
        lines += [_row(title, document[name]) for name, title in titles.items()]
        if document["saving"] is not None:
            lines.append(f"forecast saving against the default: {document['saving']:.0%}")
        cost, theory = document["calibration_cost"], document["alpha_theory"] or {}
        lines += [f"calibration: {cost['flops']:.0%} of the FLOPs and {cost['seconds']:.0%} of the "
                  "seconds of the named run",
                  f"local exponent of tokens {document['alpha']:.3g}; the theory's gamma/2beta "
                  f"{_interval(theory)} is not used"]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    lines += [f"{state}: {reason}" for state, reason in document["reasons"].items()]
    depth = document["chosen_depth"] or "not named"
    return "\n".join([*lines, f"state {document['state']}, decision {document['decision']}: depth "
                      f"{depth}, --target-param-data-ratio={document['chosen_ratio']:.4g}"])


def _row(title, option):
    if option is None:
        return f"{title:<14} no depth in reach is forecast to reach the target"
    steps = option["steps_to_target"]
    time = ("not reached" if steps["steps"] is None else
            f"{steps['steps']:.0f} ({steps['lo']:.0f} to {_or(steps['hi'], '.0f', 'no bound')})")
    return (f"{title:<14}{option['depth']:>5}{option['ratio']:>7.3g}{option['horizon_steps']:>9}"
            f"   {time:<24} {_or(option['sec_to_target'], '.1f', '-')}")


def _interval(theory):
    lo, hi = theory.get("lo"), theory.get("hi")
    return "(not given)" if lo is None else f"({lo:.3g} to {_or(hi, '.3g', 'no bound')})"


def _or(value, form, otherwise):
    return otherwise if value is None else format(value, form)


def read_inference(path):
    """Return infer.json as a dict. Raise UserError for another version or a missing field."""
    remedy = "make the file again with scripts.lane_b_infer_ratio"
    document = read_json(path, remedy)
    if document.get("schema_version") != VERSION:
        raise UserError(f"{path}: schema_version is {document.get('schema_version')!r}, not "
                        f"{VERSION}; {remedy}")
    needed = ("state", "decision", "dataset_id", "tokenizer_id", "target_metric_threshold",
              "chosen_ratio", "default_ratio", "alpha_source")
    missing = [name for name in needed if document.get(name) is None]
    if missing:
        raise UserError(f"{path}: no field {missing[0]}; {remedy}")
    return document
