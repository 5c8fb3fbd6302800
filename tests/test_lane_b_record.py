from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.experiments.ledger import columns
from nanochat.lane_b.infer.record import LaneBRecord, append_record, read_records

RECORD = LaneBRecord(
    timestamp_utc="2026-11-23T10:00:00Z", git_commit="abc1234", run_id="d12-inferred-s0", seed=0, dataset_id="d",
    target_metric_name="val_bpb", target_metric_threshold=0.93, n_scaling_params=110_000_000,
    inferred_data_scaling_exponent=0.2, inferred_target_tokens=1_000_000_000, inferred_target_param_data_ratio=9.1,
    confirmation_ratio=9.555, chosen_ratio=9.1, lane_b_decision="inferred", time_to_target_sec_measured=812.5,
    time_to_target_sec_extrapolated=None, min_val_bpb=0.929, tok_per_sec_median=1.2e6, dt_median_ms=437.0,
    status="ok", notes="alpha_source=calibration; second try, \"quoted\"\nnext line")


def test_columns_are_frozen():
    assert columns(LaneBRecord) == [
        "timestamp_utc", "git_commit", "run_id", "seed", "dataset_id", "target_metric_name",
        "target_metric_threshold", "n_scaling_params", "inferred_data_scaling_exponent", "inferred_target_tokens",
        "inferred_target_param_data_ratio", "confirmation_ratio", "chosen_ratio", "lane_b_decision",
        "time_to_target_sec_measured", "time_to_target_sec_extrapolated", "min_val_bpb", "tok_per_sec_median",
        "dt_median_ms", "status", "notes"]


def test_the_committed_ledger_has_this_header():
    path = Path(__file__).parents[1] / "ideas" / "lane_b_inference_schema.csv"
    assert path.read_text().splitlines()[0].split(",") == columns(LaneBRecord)
    read_records(path)  # and every row a person edited parses


def test_a_record_survives_the_ledger(tmp_path):
    append_record(tmp_path / "lane_b.csv", RECORD)
    assert read_records(tmp_path / "lane_b.csv") == [RECORD]


def test_a_record_must_say_whose_exponent_it_used():
    with pytest.raises(UserError, match="notes lack alpha_source="):
        replace(RECORD, notes="looked fine")


def test_an_unknown_decision_in_a_hand_made_row_is_named_by_line(tmp_path):
    path = tmp_path / "lane_b.csv"
    append_record(path, RECORD)
    path.write_text(path.read_text().replace(",inferred,", ",infered,"))
    with pytest.raises(UserError, match="line 2: lane_b_decision is 'infered'"):
        append_record(path, replace(RECORD, run_id="other"))
