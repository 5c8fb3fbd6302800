"""Write runs and their inference into lane B's ledger, one row per run.

python -m scripts.lane_b_log_run RUN --inference-json infer.json --decision inferred

A run that is still training gets no row. Its curve so far is compared with the forecast.
"""

from dataclasses import fields, replace
from pathlib import Path

from nanochat.common import Parser, command, print0, runs_dir
from nanochat.experiments.ledger import append_row, parse_cell
from nanochat.lane_b.answer import compare, read_inference
from nanochat.lane_b.ledger import DECISIONS, LaneBRecord, record_of_run
from nanochat.runlog import find_run

LEDGER = Path(__file__).resolve().parents[1] / "ideas" / "lane_b_inference_schema.csv"


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b_log_run", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run ids or folders to log")
    add("--inference-json", required=True, help="from scripts.lane_b_infer_ratio")
    add("--decision", choices=DECISIONS, default="inferred",
        help="fallback: a run at the default ratio 12 (%(default)s)")
    add("--ledger", type=Path, default=LEDGER, help="default: the one in ideas/")
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
    for run in (find_run(name, runs_dir()) for name in args.runs):
        if comparison := compare(run, inference):
            print0(f"{run.run_id}: {comparison}")
        if run.summary is None:
            print0(f"{run.run_id} has not ended and is not logged")
            continue
        record = record_of_run(run, inference, args.decision, notes)
        record = replace(record, **given)
        append_row(args.ledger, record)
        print0(f"{args.ledger}: {record.run_id}, {record.lane_b_decision}, ratio "
               f"{record.chosen_ratio:.4g}")


if __name__ == "__main__":
    main()
