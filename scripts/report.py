"""Write a report about an experiment or about runs as one HTML file that works offline.

python -m scripts.report --experiment lane_c_d12-protocol
python -m scripts.report RUN RUN --out report.html
python -m scripts.report RUN RUN --live             update the page while the runs are trained
"""

import contextlib
import os
import time
from functools import partial
from pathlib import Path

from nanochat.common import (
    Parser,
    UserError,
    check_output,
    command,
    print0,
    runs_dir,
    warn,
    write_text,
)
from nanochat.experiments.report import experiment_page, runs_page

RELOAD_SEC = 10
MAX_LOAD = 0.05  # share of one core that updates of the live page may use


def parse_args(argv=None):
    parser = Parser("python -m scripts.report", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="id or folder of a run")
    add("--experiment", help="instead of runs: name of an experiment")
    add("--miniseries", help="name of the experiment with several depths, for gate 4")
    add("--live", action="store_true",
        help="rewrite the file until Ctrl-C; the browser reloads it by itself")
    add("--out", type=Path, default=Path("report.html"), help="file to write (%(default)s)")
    return parser.parse_args(argv)


@command
def main(argv=None):
    args = parse_args(argv)
    if bool(args.runs) == bool(args.experiment):
        raise UserError("give either --experiment or run ids")
    if args.miniseries and not args.experiment:
        raise UserError("--miniseries needs --experiment")
    draw = partial(runs_page, args.runs, runs_dir())
    if args.experiment:
        draw = partial(experiment_page, args.experiment, runs_dir(), args.miniseries)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_output("--out", args.out)
    write_text(args.out, draw(reload_sec=RELOAD_SEC if args.live else None))
    print0(f"written: {args.out} ({args.out.stat().st_size / 1024:.0f} KiB)")
    if args.live:
        print0("open it in a browser, which reloads it; Ctrl-C ends the updates, not the runs")
        with contextlib.suppress(KeyboardInterrupt):
            update(args.out, draw)
        write_text(args.out, draw())  # a page that does not reload


def update(out, draw):
    """Rewrite the page until Ctrl-C; an error may be temporary and leaves the page as it is."""
    os.nice(10)  # the runs have priority
    took_sec = 0.0
    while True:
        time.sleep(max(RELOAD_SEC, took_sec / MAX_LOAD))
        began = time.process_time()
        try:
            write_text(out, draw(reload_sec=RELOAD_SEC))
        except (UserError, OSError) as error:
            warn(f"the page was not updated: {error}")
        took_sec = time.process_time() - began


if __name__ == "__main__":
    main()
