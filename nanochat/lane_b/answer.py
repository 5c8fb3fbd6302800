"""The answer of lane B as a file (infer.json), as text, and compared with the target run."""

import math

import numpy as np

from nanochat.common import UserError, check_output, print0, read_json, utc_now, write_json
from nanochat.lane_b import Refusal, Uncertain
from nanochat.lane_b.calibration import curve_of, losses_of, of, setup_of
from nanochat.lane_b.figures import check_plot, draw_inference
from nanochat.lane_b.inference import NEIGHBOUR, infer
from nanochat.target import check_target, first_crossing

VERSION = 4
REMEDY = "make the file again with scripts.lane_b_infer_ratio"


def conclude(records, threshold, out, *, timing=(), half_rates=(), depth=None, stats_json=None,
             plot=None):
    """Infer from calibration runs, write infer.json to `out` and print the answer.

    timing, half_rates: further records, see setup_of. Raise Refusal if the runs give no answer (no
    file is written), and Uncertain at the end if a check of the answer failed.
    """
    check_output("--out", out)
    check_plot(plot)
    check_target("val_bpb", threshold)
    setup = setup_of(records, timing, half_rates)
    theory = _theory_of(stats_json, setup)
    curves, halves = ([curve_of(record, setup) for record in some]
                      for some in (records, half_rates))
    found = infer(curves, setup, threshold, depth, half_rates=halves)
    document = document_of(found)
    document["calibration_runs"] = [run.run_id for run in [*records, *timing, *half_rates]]
    write_json(out, document)
    print0(describe(document, theory))
    if plot:
        draw_inference(found, plot)
    if found.reasons:
        raise Uncertain(f"uncertain ({', '.join(found.reasons)}); the reasons are above and in "
                        f"{out}")


def document_of(found):
    """Return infer.json of an Inference."""
    setup, named, law = found.setup, found.named, found.forecast.law
    options = {"named": named, "confirmation": found.neighbour, "default": found.default}
    steps, loss, replicates = found.forecast.curves(setup.n_params(named.depth),
                                                    setup.multipliers(named.horizon))
    batch = setup.batch(named.depth)
    return {
        "schema_version": VERSION, "created_utc": utc_now(), "dataset_id": setup.dataset_id,
        "tokenizer_id": setup.tokenizer_id, "total_batch_size_tokens": batch,
        "target_metric_threshold": found.threshold, "state": next(iter(found.reasons), "ok"),
        "reasons": found.reasons, "warnings": found.warnings,
        "chosen_depth": named.depth, "chosen_ratio": named.ratio,
        "n_scaling_params": setup.n_params(named.depth), "alpha": found.exponent(),
        **{name: option and option.to_dict(setup) for name, option in options.items()},
        "forecast_curve": {"steps": (steps * setup.step_tokens / batch).tolist(),
                           "val_bpb": loss.tolist(),
                           "hi": np.quantile(replicates, 0.975, axis=0).tolist()},
        "calibration_cost": found.cost(), "law": law.values, "n_smallest": law.n_smallest}


def _theory_of(stats_json, setup):
    """Return the interval of gamma / 2 beta as text. Raise Refusal if it is of another text."""
    if not stats_json:
        return "not given"
    statistics = read_json(stats_json, "make the file again with scripts.lane_b_stats")
    if statistics.get("dataset_id") != setup.dataset_id:
        raise Refusal(f"{stats_json} is about the text {statistics.get('dataset_id')}, the runs "
                      f"about {setup.dataset_id}; leave out --stats-json", "mixed_setup")
    bounds = [statistics["alpha_theory"][name] for name in ("lo", "hi")]
    return " to ".join("no bound" if bound is None else f"{bound:.3g}" for bound in bounds)


def describe(document, theory="not given"):
    """Return infer.json as text. theory: the interval of gamma / 2 beta."""
    lines = [f"target: val_bpb {document['target_metric_threshold']:g}",
             f"{'':<14}{'depth':>5}{'ratio':>7}{'horizon':>9}   steps to target (95 %)   seconds"]
    titles = {"named": "named", "confirmation": f"{NEIGHBOUR} x horizon", "default": "ratio 12"}
    for name, title in titles.items():
        if (option := document[name]) is None:
            lines.append(f"{title:<14} no depth in reach is forecast to reach the target")
            continue
        times = {key: "-" if option[key] is None else f"{option[key]:.0f}"
                 for key in ("steps", "lo", "hi", "sec")}
        interval = "{steps} ({lo} to {hi})".format(**times)
        lines.append(f"{title:<14}{option['depth']:>5}{option['ratio']:>7.3g}"
                     f"{option['horizon']:>9}   {interval:<24} {times['sec']}")
    if document["default"]:
        saving = 1 - document["named"]["sec"] / document["default"]["sec"]
        lines.append(f"forecast saving against ratio 12: {saving:.0%}")
    flops, seconds = document["calibration_cost"]
    lines += [f"calibration: {flops:.0%} of the FLOPs and {seconds:.0%} of the seconds of the "
              "named run",
              f"local exponent of tokens {document['alpha']:.3g}; the theory's gamma/2beta "
              f"({theory}) is not used"]
    lines += [f"warning: {warning}" for warning in document["warnings"]]
    lines += [f"{state}: {reason}" for state, reason in document["reasons"].items()]
    return "\n".join([*lines, f"state {document['state']}: depth {document['chosen_depth']}, "
                      f"--target-param-data-ratio={document['chosen_ratio']:.4g}"])


def read_inference(path):
    """Return infer.json as a dict. Raise UserError if it was not made by this version."""
    document = read_json(path, REMEDY)
    if document.get("schema_version") != VERSION:
        raise UserError(f"{path}: schema_version is {document.get('schema_version')!r}, not "
                        f"{VERSION}; {REMEDY}")
    return document


def compare(record, document):
    """Return a sentence that compares a run of the named size and horizon with its forecast.

    None: the run has another size or horizon. A run is slower if its loss is above the 95 % limit
    of the forecast; its expected crossing assumes that the relative excess stays. A run that is
    ahead is on track: in the runs that were measured, a lead at half of the horizon did not last.
    """
    named, forecast = document["named"], document["forecast_curve"]
    horizon, n_params = of(record, "num_iterations"), of(record, "n_scaling_params")
    if n_params != document["n_scaling_params"] or abs(horizon / named["horizon"] - 1) > 0.01:
        return None
    threshold, expected = document["target_metric_threshold"], f"step {named['steps']:.0f}"
    steps, loss = losses_of(record)
    crossing = first_crossing(steps, loss, threshold)
    if math.isfinite(crossing):
        return f"target reached at step {crossing:.0f}; forecast: {expected}"
    if len(steps) and steps[-1] >= horizon:
        return f"target not reached at the end; forecast: {expected}"
    if not len(steps) or steps[-1] < horizon / 2:
        return f"the comparison with the forecast needs step {horizon / 2:.0f}"

    late = steps >= horizon / 4
    middle, hi = (np.interp(steps[late], forecast["steps"], forecast[name])
                  for name in ("val_bpb", "hi"))
    excess, limit = (np.log(one / middle).mean() for one in (loss[late], hi))
    text = f"val_bpb is {excess:+.2%} from the forecast (limit {limit:+.2%}), expected crossing:"
    if excess <= limit:
        return f"on track: {text} {expected}"
    later = first_crossing(forecast["steps"], np.array(forecast["val_bpb"]) * np.exp(excess),
                           threshold)
    later = f"step {later:.0f}" if math.isfinite(later) else "not within the horizon"
    return f"slower: {text} {later} instead of {expected}"
