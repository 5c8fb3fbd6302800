"""Write a report of an experiment or of runs: python -m scripts.report --experiment lane_c --out report.html

One HTML file without anything to load, or with --markdown the same figures as text; or with --live a page on this
machine's own address that follows the runs: python -m scripts.report --live RUN RUN
"""

import argparse
from pathlib import Path

from nanochat.common import UserError, check_output, command, runs_dir, say, write_text
from nanochat.experiments.live import LiveServer
from nanochat.experiments.report import experiment_report, runs_report


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run ids or folders, instead of --experiment")
    parser.add_argument("--experiment", help="the experiment's name in the ledger")
    parser.add_argument("--miniseries", help="the experiment over depths that gate 4 judges by")
    parser.add_argument("--lane-b-figures", nargs="+", default=[], metavar="FILE", help="images of the lane B tools")
    parser.add_argument("--ledger", default="dev/experiments.csv", help="the CSV file of runs (dev/experiments.csv)")
    parser.add_argument("--markdown", action="store_true", help="Markdown instead of HTML")
    parser.add_argument("--live", action="store_true", help="serve the page on the loopback address until Ctrl-C; "
                        "closing it harms nothing")
    parser.add_argument("--port", type=int, default=0, help="with --live; 0: any that is free")
    parser.add_argument("--out", type=Path, help="the file to write (report.html, report.md)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if bool(args.runs) == bool(args.experiment):
        raise UserError("name either --experiment or runs")
    if args.miniseries and not args.experiment:
        raise UserError("--miniseries goes with --experiment")
    if args.live and (args.markdown or args.out):
        raise UserError("--live serves a page; leave out --out and --markdown, or --live")

    def report():
        return (experiment_report(args.ledger, args.experiment, runs_dir(), args.miniseries, args.lane_b_figures)
                if args.experiment else runs_report(args.runs, runs_dir(), args.lane_b_figures))
    if args.live:
        report()  # what cannot be shown is said here, not in a browser
        server = LiveServer(report, args.port)
        say(f"{server.url} shows the runs' records; Ctrl-C ends the page, not the runs")
        server.run()
        return
    out = args.out or Path("report.md" if args.markdown else "report.html")
    check_output("--out", out)
    page = report()
    write_text(out, page.markdown() if args.markdown else page.html())
    say(f"written: {out} ({out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
