"""Write a report about an experiment or about runs as one HTML file that works offline.

python -m scripts.report --experiment lane_c_d12
python -m scripts.report RUN RUN --out report.html
python -m scripts.report --live RUN RUN             a page in the browser that follows the runs
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

from nanochat.common import UserError, check_output, command, print0, runs_dir, write_text
from nanochat.experiments.report import experiment_page, runs_page

RELOAD_SEC = 10
MAX_LOAD = 0.05  # share of one core that updates of the live page may use


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="id or folder of a run")
    parser.add_argument("--experiment", help="instead of runs: name of an experiment in the ledger")
    parser.add_argument("--miniseries",
                        help="name of the experiment with several depths, for gate 4")
    parser.add_argument("--ledger", default="dev/experiments.csv",
                        help="path of the ledger, the CSV file of runs (default: %(default)s)")
    parser.add_argument("--lane-b-figures", nargs="+", default=[], metavar="FILE",
                        help="images to include, for example figures of scripts.lane_b_*")
    parser.add_argument("--live", action="store_true",
                        help="serve the report on 127.0.0.1 until Ctrl-C and update it")
    parser.add_argument("--port", type=int, default=0, help="port for --live (0: any free port)")
    parser.add_argument("--out", type=Path, help="file to write (default: report.html)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if bool(args.runs) == bool(args.experiment):
        raise UserError("give either --experiment or run ids")
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
    print0(f"written: {out} ({out.stat().st_size / 1024:.0f} KiB)")


def serve(draw, port):
    """Serve the page draw(live=time) on the loopback address; update it until Ctrl-C."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "index.html"
        write_text(page, draw(live=time.strftime("%H:%M:%S")))
        try:
            server = ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=folder))
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot use --port {port} ({error}); give another one, or 0") from None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print0(f"http://127.0.0.1:{server.server_port}/ follows the runs; Ctrl-C ends this page, "
               "not the runs")
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
    """Serve a folder under the names of this machine only, against DNS rebinding by other sites."""

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
