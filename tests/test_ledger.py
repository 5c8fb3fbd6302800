from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.csv_ledger import columns
from nanochat.experiments.ledger import ExperimentRow, append_experiment, read_experiments

ROW = ExperimentRow(
    timestamp="2026-11-23T10:00:00Z", git_commit="abc1234", experiment_name="lane_c", seed=0, depth=12,
    target_metric_name="val_bpb", target_metric_threshold=None, time_to_target_sec_measured=None,
    time_to_target_sec_extrapolated=901.25, tok_per_sec_median=37_000.0, dt_median_ms=440.0, wall_time_sec=700.5,
    min_val_bpb=1.01, status="ok", candidate_flags="--chunked-ce --fused-rmsnorm", dataset_id="d",
    total_tokens=24_576_000, device="CPU x2", peak_memory_mib=None, run_id="lane_c-both-s0")


def test_columns_are_frozen():
    assert columns(ExperimentRow) == [
        "timestamp", "git_commit", "experiment_name", "seed", "depth", "target_metric_name",
        "target_metric_threshold", "time_to_target_sec_measured", "time_to_target_sec_extrapolated",
        "tok_per_sec_median", "dt_median_ms", "wall_time_sec", "min_val_bpb", "status", "candidate_flags",
        "dataset_id", "total_tokens", "device", "peak_memory_mib", "run_id"]


def test_the_committed_ledger_has_this_header():
    path = Path(__file__).parents[1] / "dev" / "experiments.csv"
    assert path.read_text().splitlines()[0].split(",") == columns(ExperimentRow)
    read_experiments(path)  # and every row a person edited parses


def test_a_row_survives_the_ledger_and_its_run_id_is_unique(tmp_path):
    path = tmp_path / "experiments.csv"
    append_experiment(path, ROW)
    with pytest.raises(UserError, match="line 2: run_id 'lane_c-both-s0' is already there"):
        append_experiment(path, replace(ROW, seed=1))
    assert read_experiments(path) == [ROW]


@pytest.mark.parametrize(("cells", "message"), [
    ({"seed": None}, "seed is empty"), ({"depth": None}, "depth is empty"), ({"depth": 0}, "depth is 0, not above 0"),
    ({"dataset_id": ""}, "dataset_id is empty"), ({"device": " "}, "device is empty"),
    ({"status": "fine"}, "status is 'fine', not one of ok"), ({"target_metric_name": "loss"}, "not one of val_bpb"),
    ({"min_val_bpb": 0.0}, "min_val_bpb is 0.0, not above 0"), ({"target_metric_threshold": -1.0}, "above 0"),
    ({"time_to_target_sec_measured": -1.0}, "time_to_target_sec_measured is -1.0, below 0"),
])
def test_a_row_that_no_run_can_have_is_refused(cells, message):
    with pytest.raises(UserError, match=message):
        replace(ROW, **cells)


def test_a_hand_made_mistake_is_named_by_line(tmp_path):
    path = tmp_path / "experiments.csv"
    append_experiment(path, ROW)
    path.write_text(path.read_text().replace(",ok,", ",fine,"))
    with pytest.raises(UserError, match=r"experiments\.csv, line 2: status is 'fine'"):
        read_experiments(path)
