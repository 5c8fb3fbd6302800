"""Write a report of an experiment or of runs: python -m scripts.report --experiment lane_c

The report is one HTML file that works offline. With --live it is a page on this machine that
follows the runs: python -m scripts.report --live RUN RUN
"""

import argparse
import html
import os
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from nanochat.common import UserError, check_output, command, runs_dir, say, write_text
from nanochat.experiments.report import experiment_page, runs_page

RELOAD_SEC = 10
MAX_LOAD = 0.05  # share of one core that drawing the page may take
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run ids or folders")
    parser.add_argument("--experiment", help="name of an experiment in the ledger, instead of runs")
    parser.add_argument("--miniseries", help="name of the experiment over depths for gate 4")
    parser.add_argument("--ledger", default="dev/experiments.csv",
                        help="CSV file of the experiments (default: %(default)s)")
    parser.add_argument("--lane-b-figures", nargs="+", default=[], metavar="FILE",
                        help="images to show, for example of the lane B tools")
    parser.add_argument("--live", action="store_true",
                        help="serve the page on 127.0.0.1 until Ctrl-C; the runs continue after it")
    parser.add_argument("--port", type=int, default=0, help="port of --live (0: any free port)")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html)")
    return parser.parse_args(argv)


def live_server(draw, port):
    """Return a server of the page draw(live=note) on the loopback address.

    The page is drawn when a browser asks, at most every RELOAD_SEC and within MAX_LOAD.
    """
    page, expires_sec = "", 0.0

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_GET(self):
            nonlocal page, expires_sec
            names = [f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")]
            if self.headers.get("Host") not in names:  # DNS rebinding by another site
                return self.send_error(403)
            if self.path != "/":
                return self.send_error(404)
            began = time.monotonic()
            if began >= expires_sec:
                note = f"written at {time.strftime('%H:%M:%S')}, updates every {RELOAD_SEC} seconds"
                try:
                    page = draw(live=note)
                except (UserError, OSError) as error:  # may be temporary
                    page = f"<!doctype html><title>error</title><p>{html.escape(str(error))}"
                took = time.monotonic() - began
                expires_sec = began + max(RELOAD_SEC - 1, took / MAX_LOAD)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("Refresh", str(RELOAD_SEC))
            self.end_headers()
            self.wfile.write(page.encode())
            return None

        def log_message(self, *_):
            """Print nothing per request."""

    try:
        return HTTPServer(("127.0.0.1", port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot use --port {port} ({error}); give another one, or 0") from None


@command
def main(argv=None):
    args = parse_args(argv)
    if bool(args.runs) == bool(args.experiment):
        raise UserError("give either --experiment or runs")
    if args.miniseries and not args.experiment:
        raise UserError("--miniseries needs --experiment")
    if args.live and args.out:
        raise UserError("--live writes no file; leave out --out or --live")
    draw = partial(runs_page, args.runs, runs_dir(), images=args.lane_b_figures)
    if args.experiment:
        draw = partial(experiment_page, args.ledger, args.experiment, runs_dir(),
                       miniseries=args.miniseries, images=args.lane_b_figures)
    if args.live:
        draw()  # raises UserError here instead of in the browser
        with live_server(draw, args.port) as server:
            say(f"http://127.0.0.1:{server.server_port}/ shows the runs; Ctrl-C stops the page only")
            os.nice(10)  # the runs have priority
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return
    out = args.out or Path("report.html")
    check_output("--out", out)
    write_text(out, draw())
    say(f"written: {out} ({out.stat().st_size / 1024:.0f} KiB)")


if __name__ == "__main__":
    main()
