"""Write runs and their inference into lane B's ledger, one row per run.

python -m scripts.lane_b_log_run RUN --inference-json infer.json --decision inferred
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from nanochat.common import command, print0, runs_dir
from nanochat.experiments.ledger import parse_cell
from nanochat.lane_b.answer import read_inference
from nanochat.lane_b.ledger import (
    DECISIONS,
    LaneBRecord,
    append_record,
    read_records,
    record_of_run,
)
from nanochat.runlog import find_run

LEDGER = Path(__file__).resolve().parents[1] / "ideas" / "lane_b_inference_schema.csv"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.lane_b_log_run", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run ids or folders to log")
    parser.add_argument("--inference-json", required=True, help="from scripts.lane_b_infer_ratio")
    parser.add_argument("--decision", choices=DECISIONS, help="default: that of the inference")
    parser.add_argument("--skip-logged", action="store_true",
                        help="leave out runs that the ledger has")
    parser.add_argument("--ledger", type=Path, default=LEDGER, help="default: the one in ideas/")
    columns = parser.add_argument_group("columns by hand", "each replaces the value of the run and "
                                        "the inference; notes without alpha_source= are added")
    for field in fields(LaneBRecord):
        if field.name != "lane_b_decision":
            columns.add_argument("--" + field.name.replace("_", "-"), metavar="VALUE",
                                 help=f"the ledger's {field.name}")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    inference = read_inference(args.inference_json)
    given = {field.name: parse_cell(getattr(args, field.name), field)
             for field in fields(LaneBRecord) if getattr(args, field.name, None) is not None}
    notes = "" if "alpha_source=" in given.get("notes", "") else given.pop("notes", "")
    known = read_records(args.ledger) if args.skip_logged and args.ledger.exists() else ()
    logged = {record.run_id for record in known}
    for run in (find_run(name, runs_dir()) for name in args.runs):
        if run.run_id in logged:
            print0(f"{run.run_id} is in {args.ledger} already")
            continue
        record = record_of_run(run, inference, args.decision or inference["decision"], notes)
        record = replace(record, **given)
        append_record(args.ledger, record)
        seconds = record.time_to_target_sec_measured
        reached = "not reached" if seconds is None else f"after {seconds:.1f} s of training"
        print0(f"{args.ledger}: {record.run_id}, {record.lane_b_decision}, ratio "
               f"{record.chosen_ratio:.4g}, val_bpb {record.target_metric_threshold:.4f} {reached}")


if __name__ == "__main__":
    main()
