"""Lane B's ledger: one row per run, 21 columns in a fixed order, filled by the tools or by hand."""

from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.lane_b.inference import DEFAULT_RATIO
from nanochat.target import evaluations_of, time_to_target

DECISIONS = ("inferred", "confirmation", "fallback")


@dataclass(frozen=True)
class LaneBRecord:
    """One run that lane B decided on. None (an empty cell): not inferred or not measured.

    `notes` always has `alpha_source=`, the source of the exponent.
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
            raise UserError(f"lane_b_decision is {self.lane_b_decision!r}, not one of "
                            f"{', '.join(DECISIONS)}")
        if "alpha_source=" not in self.notes:
            raise UserError("notes lack alpha_source=")


def record_of_run(run, inference, decision, notes=""):
    """Return the row of a run that was trained as infer.json (a dict) says.

    Raise UserError if the run has another text, size or ratio than the decision.
    """
    config, summary, named = run.config, run.summary or {}, inference["named"]
    ratio = {"inferred": named["ratio"], "confirmation": inference["confirmation"]["ratio"],
             "fallback": DEFAULT_RATIO}[decision]
    n_params, tokens = config["n_scaling_params"], config["target_tokens"]
    same = ["dataset_id", "tokenizer_id", *(["n_scaling_params"] if decision != "fallback" else [])]
    for name in same:
        if config.get(name) != inference[name]:
            raise UserError(f"run {run.run_id} has {name} {config.get(name)}, the inference "
                            f"{inference[name]}; log it with the inference that it was trained for")
    if abs(tokens - ratio * n_params) > max(0.01 * tokens, config["total_batch_size_tokens"]):
        raise UserError(f"run {run.run_id} was trained at ratio {tokens / n_params:.4g}, the "
                        f"{decision} ratio is {ratio:.4g}; give another --decision")

    threshold = inference["target_metric_threshold"]
    time = time_to_target(evaluations_of(run.events, "val_bpb"), "val_bpb", threshold)
    given = f"alpha_source=law; state={inference['state']}"
    return LaneBRecord(
        config["created_utc"], config["git_commit"] or "", run.run_id, config["seed"],
        config["dataset_id"], "val_bpb", threshold, n_params, inference["alpha"],
        named["horizon"] * inference["total_batch_size_tokens"], named["ratio"],
        inference["confirmation"]["ratio"], ratio, decision, time.measured_sec,
        time.extrapolated_sec, summary.get("min_val_bpb"), summary.get("tok_per_sec_median"),
        summary.get("dt_median_ms"), run.status, f"{given}; {notes}" if notes else given)
