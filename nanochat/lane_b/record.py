"""Lane B's ledger: one row a run, 21 columns in a fixed order, filled in by the tools or by hand."""

from dataclasses import dataclass

from nanochat import csv_ledger
from nanochat.errors import UserError

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
            raise UserError("notes lack alpha_source= (theory, calibration or default)")


def read_records(path):
    """Every LaneBRecord of the ledger. Errors: see csv_ledger.read_rows."""
    return csv_ledger.read_rows(path, LaneBRecord)


def append_record(path, record):
    """Add one LaneBRecord, refusing a run_id that is there already. Errors: see csv_ledger.append_row."""
    csv_ledger.append_row(path, record)
