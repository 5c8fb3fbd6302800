"""Follow a run by its record: the loss curve and the time left on a terminal, a line every 10 % elsewhere."""

import shutil
import sys
import time

import numpy as np

from nanochat.common import say
from nanochat.experiments.runs.listing import duration, number, printable
from nanochat.runlog import numbers_of

INTERVAL_SEC = 2.0
SHARE_OF_A_CORE = 0.05  # that looking at runs may take from them: a long run's record takes its time to read
CURVE_LINES = 12
_TO_START = "\x1b[{}F\x1b[J"  # the cursor to the beginning of the frame, and what is below it erased


def watch(read, interval_sec=INTERVAL_SEC):
    """Show the run that read() gives until it is over. Returns the exit code: 0 where it finished, else 1.

    Ctrl-C ends the watching, not the run. Errors: UserError as read()."""
    is_terminal, drawn, tenth = sys.stdout.isatty(), 0, -1
    while True:
        began = time.thread_time()
        run = read()
        if is_terminal:
            lines = frame(run, *shutil.get_terminal_size())
            say((_TO_START.format(drawn) if drawn else "") + "\n".join(lines))
            drawn = len(lines)
        elif run.is_over or int(10 * share_done(run)) > tenth:
            tenth = int(10 * share_done(run))
            say(headline(run))
        if run.is_over:
            return 0 if run.state == "finished" else 1
        time.sleep(max(interval_sec, (time.thread_time() - began) / SHARE_OF_A_CORE))


def frame(run, columns, rows):
    """The lines of a terminal of that size: headline, curve of the losses, the last evaluations."""
    losses = [(step, loss) for step, loss in numbers_of(run.record.events, "train", "step", "loss") if loss is not None]
    bits = [(step, bpb) for step, bpb in numbers_of(run.record.events, "val", "step", "val_bpb") if bpb is not None]
    lines = [headline(run), *curve(losses, columns - 1, min(CURVE_LINES, max(2, rows - 5)), run.num_iterations),
             "val_bpb  " + "  ".join(f"{bpb:.4f} ({step:,})" for step, bpb in bits[-5:]) if bits else "no val_bpb yet"]
    return [line[:columns - 1] for line in lines]


def headline(run):
    """The run in one line, which a narrow terminal cuts at its end: steps, time left, loss, val_bpb, speed."""
    train = run.record.of("train")
    loss = number(train[-1].get("loss")) if train else None
    bits, speed = run.figure("final_val_bpb"), run.figure("tok_per_sec_median")
    parts = [f"{run.run_id}: {run.state}", *progress(run),
             train and ("loss not finite" if loss is None else f"loss {loss:.4f}"),
             bits is not None and f"val_bpb {bits:.4f}", speed is not None and f"{speed:,.0f} tok/s"]
    return printable(", ".join(part for part in parts if part))


def progress(run):
    """In words: how many steps of how many, and, where it is known, the time left."""
    of, left = run.num_iterations, seconds_left(run)
    return [f"step {run.figure('steps') or 0:,}" + (f"/{of:,}" if of else ""),
            *([] if left is None else [f"about {duration(left)} left"])]


def share_done(run):
    """Steps so far over all steps; 0 where these are not known."""
    return min(1.0, (run.figure("steps") or 0) / run.num_iterations) if run.num_iterations else 0.0


def seconds_left(run):
    """Wall-clock seconds to the last step, evaluations included, at the pace since the run began or was resumed; None
    for a run that is over or too young."""
    if run.is_over or not run.num_iterations:
        return None
    stamps = [(event["step"], stamp) for event in _since_resume(run.record.events)
              if event["kind"] == "train" and (stamp := number(event.get("time_unix_sec"))) is not None]
    if len(stamps) < 2:
        return None
    (first, began), (last, now) = stamps[0], stamps[-1]
    return max(0.0, (run.num_iterations - last) * (now - began) / (last - first)) if last > first else None


def curve(points, columns, rows, last_step=None):
    """A falling curve in characters: the means of (step, value) in each of as many columns; its scale to the left.

    What the first tenth of the steps has above the rest is at the top edge: it does not flatten the rest."""
    if len(points) < 2:
        return ["(no curve yet)"]
    steps, values = np.array(points, dtype=np.float64).T
    width = max(2, columns - 10)
    column = np.minimum((steps / max(last_step or 0, steps[-1]) * width).astype(int), width - 1)
    n = np.bincount(column, minlength=width)
    drawn = np.flatnonzero(n)
    means = np.bincount(column, values, width)[drawn] / n[drawn]
    shown = values[steps >= 0.1 * steps[-1]]
    low, high = float(shown.min()), float(shown.max())
    height = np.round((means - low) / ((high - low) or 1.0) * (rows - 1)).clip(0, rows - 1).astype(int)
    grid = np.full((rows, width), " ")
    grid[rows - 1 - height, drawn] = "*"
    scale = {0: f"{high:.4f}", rows - 1: f"{low:.4f}"}
    return [f"{scale.get(row, ''):>9}|" + "".join(grid[row]).rstrip() for row in range(rows)]


def _since_resume(events):
    at = max((index for index, event in enumerate(events) if event["kind"] == "resume"), default=-1)
    return events[at + 1:]
