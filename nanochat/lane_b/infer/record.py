"""Lane B's ledger: one row a run, 21 columns in a fixed order, filled in by the tools or by hand."""

import math
from dataclasses import dataclass
from functools import partial

from nanochat.common import UserError
from nanochat.experiments.ledger import append_row, read_rows
from nanochat.lane_b.infer.inputs import NUMBER_OR_NONE, recorded

DECISIONS = ("inferred", "confirmation", "fallback")


@dataclass(frozen=True)
class LaneBRecord:
    """One run that lane B decided on. Empty cells (None) are quantities that were not inferred or measured.

    `notes` always carries `alpha_source=`: a row must say whose exponent its horizon came from.
    """

    timestamp_utc: str
    git_commit: str
    run_id: str
    seed: int | None
    dataset_id: str
    target_metric_name: str
    target_metric_threshold: float | None
    n_scaling_params: int | None
    inferred_data_scaling_exponent: float | None
    inferred_target_tokens: int | None
    inferred_target_param_data_ratio: float | None
    confirmation_ratio: float | None
    chosen_ratio: float | None
    lane_b_decision: str
    time_to_target_sec_measured: float | None
    time_to_target_sec_extrapolated: float | None
    min_val_bpb: float | None
    tok_per_sec_median: float | None
    dt_median_ms: float | None
    status: str
    notes: str

    def __post_init__(self):
        if self.lane_b_decision not in DECISIONS:
            raise UserError(f"lane_b_decision is {self.lane_b_decision!r}, not one of {', '.join(DECISIONS)}")
        if "alpha_source=" not in self.notes:
            raise UserError("notes lack alpha_source= (curves or default)")


read_records = partial(read_rows, row_type=LaneBRecord)
append_record = append_row


def record_of_run(run, inference, decision, reached, ratio=None, notes=""):
    """The row of a run (RunRecord) that was trained at the ratio of `decision` from `inference` (RecordedInference).

    `reached`: (measured, extrapolated) training seconds to the inference's threshold, None where not known.
    A `ratio` given replaces the decision's. Errors: UserError when the run did not train at the ratio, or on
    another dataset, tokenizer or model.
    """
    config, ratio = run.config, ratio or inference.ratio_of(decision)
    _check_trained_as_decided(run, inference, decision, ratio)
    measured = {name: recorded(run, "summary", name, *NUMBER_OR_NONE) if name in (run.summary or {}) else None
                for name in ("min_val_bpb", "tok_per_sec_median", "dt_median_ms")}
    source = "default" if decision == "fallback" else inference.alpha_source
    given = f"alpha_source={source}; state={inference.state}"
    return LaneBRecord(
        timestamp_utc=config.get("created_utc", ""), git_commit=config.get("git_commit") or "", run_id=run.run_id,
        seed=config.get("seed"), dataset_id=inference.dataset_id, target_metric_name=inference.target_metric_name,
        target_metric_threshold=inference.target_metric_threshold, n_scaling_params=inference.n_scaling_params,
        inferred_data_scaling_exponent=inference.alpha,
        inferred_target_tokens=None if inference.target_tokens is None else math.ceil(inference.target_tokens),
        inferred_target_param_data_ratio=inference.target_param_data_ratio,
        confirmation_ratio=inference.confirmation_ratio, chosen_ratio=ratio, lane_b_decision=decision,
        time_to_target_sec_measured=reached[0], time_to_target_sec_extrapolated=reached[1], status=run.status,
        notes=f"{given}; {notes}" if notes else given, **measured)


def _check_trained_as_decided(run, inference, decision, ratio):
    config, run_id = run.config, run.run_id
    for name in ("dataset_id", "tokenizer_id", "n_scaling_params"):
        if config.get(name) != getattr(inference, name):
            raise UserError(f"run {run_id} has {name} {config.get(name)}, the inference {getattr(inference, name)}; "
                            "log it with the inference it was trained for")
    tokens, step_tokens = (recorded(run, "config", name, int) for name in ("target_tokens", "total_batch_size_tokens"))
    wanted = ratio * inference.n_scaling_params
    if abs(tokens - wanted) > max(step_tokens, 0.01 * wanted):
        trained = tokens / inference.n_scaling_params
        raise UserError(f"run {run_id} was trained at ratio {trained:.4g} ({tokens} tokens), the {decision} ratio is "
                        f"{ratio:.4g}; give the --decision or --chosen-ratio it was trained for")
