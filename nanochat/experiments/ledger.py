"""The experiments' ledger, dev/experiments.csv: one row a run, appended by the runner, edited by people."""

from dataclasses import dataclass

from nanochat import csv_ledger


@dataclass(frozen=True)
class ExperimentRow:
    """One run of an experiment. Empty cells (None) are quantities that were not measured.

    `candidate_flags` are the flags that set the candidate apart from the baseline (empty: the baseline).
    """

    timestamp: str
    git_commit: str
    experiment_name: str
    seed: int | None
    depth: int | None
    target_metric_name: str
    target_metric_threshold: float | None
    time_to_target_sec_measured: float | None
    time_to_target_sec_extrapolated: float | None
    tok_per_sec_median: float | None
    dt_median_ms: float | None
    wall_time_sec: float | None
    min_val_bpb: float | None
    status: str
    candidate_flags: str
    dataset_id: str
    total_tokens: int | None
    device: str
    peak_memory_mib: float | None
    run_id: str


def read_experiments(path):
    """Every ExperimentRow of the ledger. Errors: see csv_ledger.read_rows."""
    return csv_ledger.read_rows(path, ExperimentRow)


def append_experiment(path, row):
    """Add one ExperimentRow, refusing a run_id that is there already. Errors: see csv_ledger.append_row."""
    csv_ledger.append_row(path, row)
