"""Write a report of an experiment or of runs: python -m scripts.report --experiment lane_c

The report is one HTML file that works offline. With --live it is a page on this machine that
follows the runs: python -m scripts.report --live RUN RUN
"""

import argparse
import html
import os
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanochat.common import UserError, check_output, command, runs_dir, say, write_text
from nanochat.experiments.report import experiment_page, runs_page

RELOAD_SEC = 10
MAX_LOAD = 0.05  # share of one core that drawing the live page may take


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run ids or folders")
    parser.add_argument("--experiment", help="name of an experiment in the ledger, instead of runs")
    parser.add_argument("--miniseries", help="name of the experiment over depths for gate 4")
    parser.add_argument("--ledger", default="dev/experiments.csv",
                        help="CSV file of the experiments (default: %(default)s)")
    parser.add_argument("--lane-b-figures", nargs="+", default=[], metavar="FILE",
                        help="images to show, for example figures of the lane B tools")
    parser.add_argument("--live", action="store_true",
                        help="serve the page on 127.0.0.1 until Ctrl-C; the runs continue")
    parser.add_argument("--port", type=int, default=0, help="port for --live (0: any free one)")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html)")
    return parser.parse_args(argv)


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
        serve(draw, args.port)
        return
    out = args.out or Path("report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    check_output("--out", out)
    write_text(out, draw())
    say(f"written: {out} ({out.stat().st_size / 1024:.0f} KiB)")


def serve(draw, port):
    """Serve the page draw(live=time) on the loopback address, written anew until Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "index.html"
        write_text(page, draw(live=time.strftime("%H:%M:%S")))
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot use --port {port} ({error}); give another one, or 0") from None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(f"http://127.0.0.1:{server.server_port}/ follows the runs; Ctrl-C ends only this page")
        os.nice(10)  # the runs have priority
        took_sec = 0.0
        try:
            while True:
                time.sleep(max(RELOAD_SEC, took_sec / MAX_LOAD))
                began = time.process_time()
                try:
                    text = draw(live=time.strftime("%H:%M:%S"))
                except (UserError, OSError) as error:  # it may be temporary
                    text = f"<!doctype html><title>error</title><p>{html.escape(str(error))}"
                write_text(page, text)
                took_sec = time.process_time() - began
        except KeyboardInterrupt:
            server.shutdown()


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder to this machine's own names: no other site can read it (DNS rebinding)."""

    def do_GET(self):
        names = [f"{host}:{self.server.server_port}" for host in ("127.0.0.1", "localhost")]
        if self.headers.get("Host") in names:
            super().do_GET()
        else:
            self.send_error(403)

    def end_headers(self):
        self.send_header("Refresh", str(RELOAD_SEC))
        super().end_headers()

    def log_message(self, *_):
        """Print nothing per request."""


if __name__ == "__main__":
    main()
