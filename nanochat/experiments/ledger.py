"""The experiments' ledger, dev/experiments.csv: one row a run, appended by the runner, edited by people."""

from dataclasses import dataclass
from functools import partial

from nanochat import csv_ledger
from nanochat.common import UserError
from nanochat.target import METRICS, check_target

STATUSES = ("ok", "nan", "interrupted", "error", "failed")
_POSITIVE = ("depth", "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "peak_memory_mib")
# a target may be reached before the first step, and a run may end in it
_NOT_NEGATIVE = ("seed", "time_to_target_sec_measured", "time_to_target_sec_extrapolated", "total_tokens")


@dataclass(frozen=True)
class ExperimentRow:
    """One run of an experiment. Empty cells (None) are quantities that were not measured.

    `candidate_flags` are the flags that set the candidate apart from the baseline (empty: the baseline).
    Errors: UserError for what no run can have: no seed, a negative time, an unknown status ...
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

    def __post_init__(self):
        for name in ("seed", "depth", "dataset_id", "device"):
            if str(getattr(self, name)).strip() in ("", "None"):
                raise UserError(f"{name} is empty")
        for name, known in (("status", STATUSES), ("target_metric_name", METRICS)):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(known)}")
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            value = getattr(self, name)
            if value is not None and not (value > 0 if name in _POSITIVE else value >= 0):
                raise UserError(f"{name} is {value}, {'not above' if name in _POSITIVE else 'below'} 0")
        if self.target_metric_threshold is not None:
            check_target(self.target_metric_name, self.target_metric_threshold)


read_experiments = partial(csv_ledger.read_rows, row_type=ExperimentRow)
append_experiment = csv_ledger.append_row
