"""Write runs and their inference into lane B's ledger, one row per run.

python -m scripts.lane_b_log_run RUN --inference-json infer.json --decision inferred

A run that is still training gets no row. Its curve so far is compared with the forecast.
"""

from pathlib import Path

from nanochat.common import Parser, command, print0, runs_dir
from nanochat.experiments.ledger import append_row
from nanochat.lane_b.answer import compare, read_inference
from nanochat.lane_b.ledger import DECISIONS, record_of_run
from nanochat.runlog import find_run

LEDGER = Path(__file__).resolve().parents[1] / "ideas" / "lane_b_inference_schema.csv"


def parse_args(argv=None):
    parser = Parser("python -m scripts.lane_b_log_run", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run ids or folders to log")
    add("--inference-json", required=True, help="infer.json of scripts.lane_b_infer_ratio")
    add("--decision", choices=DECISIONS, default="inferred",
        help="ratio of the runs: inferred (the named ratio), "
        "confirmation (its neighbour), or fallback (the default ratio 12) (%(default)s)")
    add("--ledger", type=Path, default=LEDGER, help="path of the ledger (default: "
        "ideas/lane_b_inference_schema.csv)")
    add("--notes", default="", help="text to add to the notes of the row")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    inference = read_inference(args.inference_json)
    for run in (find_run(name, runs_dir()) for name in args.runs):
        if comparison := compare(run, inference):
            print0(f"{run.run_id}: {comparison}")
        if run.summary is None:
            print0(f"{run.run_id} has not ended and is not logged")
            continue
        record = record_of_run(run, inference, args.decision, args.notes)
        append_row(args.ledger, record)
        print0(f"{args.ledger}: {record.run_id}, {record.lane_b_decision}, ratio "
               f"{record.chosen_ratio:.4g}")


if __name__ == "__main__":
    main()
