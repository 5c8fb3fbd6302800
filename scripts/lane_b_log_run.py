"""Runs and their inference -> rows of lane B's ledger, one a run; any column can be given by hand instead.

python -m scripts.lane_b_log_run RUN --inference-json infer.json --decision inferred
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from nanochat.common import command, runs_dir
from nanochat.experiments.ledger import parse_cell
from nanochat.lane_b import Refusal
from nanochat.lane_b.infer.inference_file import read_inference
from nanochat.lane_b.infer.inputs import NUMBER_OR_NONE, recorded
from nanochat.lane_b.infer.record import (
    DECISIONS,
    LaneBRecord,
    append_record,
    read_records,
    record_of_run,
)
from nanochat.runlog import find_run
from nanochat.target import evaluations_of, time_to_target

LEDGER = Path(__file__).resolve().parents[1] / "ideas" / "lane_b_inference_schema.csv"


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b_log_run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run ids or folders to log")
    parser.add_argument("--run", nargs="+", default=[], help=argparse.SUPPRESS)  # their place before
    parser.add_argument("--inference-json", required=True, help="from scripts.lane_b_infer_ratio")
    parser.add_argument("--decision", choices=DECISIONS, help="default: the inference's")
    parser.add_argument("--skip-logged", action="store_true", help="leave out runs that the ledger has")
    parser.add_argument("--ledger", "--csv", type=Path, default=LEDGER, help="default: the one in ideas/")
    columns = parser.add_argument_group("columns by hand", "each replaces what the run and the inference say; "
                                        "notes without alpha_source= are added to theirs")
    for field in fields(LaneBRecord):
        if field.name != "lane_b_decision":
            columns.add_argument("--" + field.name.replace("_", "-"), metavar="VALUE",
                                 help=f"the ledger's {field.name}")
    args = parser.parse_args(argv)
    args.runs += args.run
    if not args.runs:
        parser.error("name runs to log")
    return args


def seconds_to_target(run, inference):
    """(measured, extrapolated) training seconds of the run to the inference's threshold.

    A whole schedule that ended short of it is extrapolated as a schedule: its seconds times how much longer
    it must be by the calibration curve. The curve within the run says nothing: its learning rate is spent.
    """
    evaluations = evaluations_of(run.events, inference.target_metric_name)
    found = time_to_target(evaluations, inference.target_metric_name, inference.target_metric_threshold)
    if found.measured_sec is not None or run.status != "ok":
        return found.measured_sec, None
    metric = recorded(run, "summary", "final_val_bpb", *NUMBER_OR_NONE)
    if metric is None:
        raise Refusal(f"run {run.run_id} was not evaluated at its end (final_val_bpb): it reached nothing that can be "
                      "logged; repeat it with --eval-every")
    factor = inference.horizon_factor(metric)
    return None, None if factor is None else recorded(run, "summary", "train_time_sec", int, float) * factor


def by_hand(args):
    """{column: typed value} of the columns given as flags."""
    given = {field: getattr(args, field.name, None) for field in fields(LaneBRecord)}
    return {field.name: parse_cell(text, field) for field, text in given.items() if text is not None}


def log(args, inference):
    """Append one row a run: what run and inference say, and what was given by hand."""
    given = by_hand(args)
    notes = "" if "alpha_source=" in given.get("notes", "") else given.pop("notes", "")
    known = read_records(args.ledger) if args.skip_logged and args.ledger.exists() else ()
    logged = {record.run_id for record in known}
    for run in (find_run(name, runs_dir()) for name in args.runs):
        if run.run_id in logged:
            print(f"{run.run_id} is in {args.ledger} already")
            continue
        record = record_of_run(run, inference, args.decision or inference.decision, seconds_to_target(run, inference),
                               given.get("chosen_ratio"), notes)
        record = replace(record, **given)
        append_record(args.ledger, record)
        reached = record.time_to_target_sec_measured
        print(f"{args.ledger}: {record.run_id}, {record.lane_b_decision}, ratio {record.chosen_ratio:.4g}, "
              f"{record.target_metric_name} {record.target_metric_threshold:.4f} "
              f"{'not reached' if reached is None else f'after {reached:.1f} s of training'}")


@command
def main(argv=None):
    args = parse_args(argv)
    log(args, read_inference(args.inference_json))


if __name__ == "__main__":
    main()
