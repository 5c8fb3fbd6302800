"""What the study of lane B showed: python -m dev.study.lane_b_results

Reads dev/lane_b_study.csv (dev.study.lane_b_cells), writes the page dev/lane_b_study.md and its figure beside it. Times
are optimizer steps to the target. A run that ended short of it is counted as the schedule that would have reached it,
by the slope of the calibration's ends (~), and as missed.
"""

import argparse
import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from dev.study.lane_b_cells import HORIZONS, RESULTS
from nanochat.common import UserError, command

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE, FIGURE = Path("dev/lane_b_study.md"), Path("dev/lane_b_study.png")
TITLES = dict(zip(HORIZONS, ("D*", "H*", "1.05 H*", "ratio 12"), strict=True))
WITHIN, SLOWER = 0.07, 0.03


@dataclass(frozen=True)
class Tried:
    """One horizon of a cell: its predicted time (nan: none) with bounds, and the time of each seed, steps."""

    steps: int
    predicted: float
    lo: float
    hi: float
    times: np.ndarray
    reached: np.ndarray

    @property
    def covered(self):
        """Of the runs: inside the interval; a miss is, where it has no upper bound."""
        measured = np.where(self.reached, self.times, math.inf)
        return (measured >= self.lo) & (measured <= self.hi)

    @property
    def error(self):
        """Of the predicted time, relative to the median of the measured ones."""
        return self.predicted / float(np.median(self.times)) - 1


def number(text):
    return float(text) if text else math.nan


def read_cells(path):
    """{cell: ({horizon: Tried}, its first row)}."""
    rows = defaultdict(lambda: defaultdict(list))
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows[row["cell"]][row["horizon"]].append(row)
    return {cell: ({name: tried(found) for name, found in horizons.items()}, horizons["quickest"][0])
            for cell, horizons in rows.items()}


def tried(rows):
    head, measured = rows[0], np.array([float(row["measured_steps"]) for row in rows])
    short_by = np.array([float(row["last_val_bpb"]) for row in rows]) - float(head["threshold"])
    longer = int(head["horizon_steps"]) * np.exp(short_by / number(head["envelope"]))
    reached = np.isfinite(measured)
    return Tried(int(head["horizon_steps"]), *(number(head[f"predicted_{part}"]) for part in ("steps", "lo", "hi")),
                 np.where(reached, measured, longer), reached)


def ratio(cell, one, other):
    """(mean, smallest, largest) over seeds of one horizon's time by another's."""
    ratios = cell[one].times / cell[other].times
    return ratios.mean(), ratios.min(), ratios.max()


def shown(tried):
    missed = "" if tried.reached.all() else f" ({(~tried.reached).sum()} missed)"
    return f"{tried.steps}: {'' if tried.reached.all() else '~'}{np.median(tried.times):.0f}{missed}"


def table(cells):
    """Lines of the table, a cell a line."""
    yield ("| cell | slopes | D*: time | H*: time | predicted (95 %) | error | 1.05 H* | ratio 12 | H*/D* | "
           "H*/ratio 12 (seeds) | calibration | pays back |")
    yield "|" + "---|" * 12
    for name, (cell, head) in cells.items():
        best = cell["quickest"]
        mean, low, high = ratio(cell, "quickest", "default")
        cost = float(head["calibration_steps"])
        saved = float(np.mean(cell["default"].times - best.times))
        yield (f"| {name} | {head['slopes'] or 'fallback'} | {shown(cell['shortest_whole'])} | {shown(best)} | "
               f"{best.predicted:.0f} ({best.lo:.0f} to {best.hi:.0f}) | {best.error:+.1%} | "
               f"{shown(cell['neighbour'])} | {shown(cell['default'])} | "
               f"{ratio(cell, 'quickest', 'shortest_whole')[0]:.3f} | "
               f"{mean:.3f} ({low:.3f} to {high:.3f}) | {cost / np.median(best.times):.1f} runs | "
               f"{f'{cost / saved:.0f} runs' if saved > 0 else 'never'} |")


def summary(cells):
    """Lines: what was asked of the study, and what was measured."""
    tried_cells = {name: cell for name, (cell, _) in cells.items()}
    by_whole, by_default = ({name: ratio(cell, "quickest", other) for name, cell in tried_cells.items()}
                            for other in ("shortest_whole", "default"))
    automatic = [mean for name, (mean, _, _) in by_whole.items() if "-auto-" in name]
    errors = {name: cell["quickest"].error for name, cell in tried_cells.items()}
    covered, every = (
        np.concatenate([one.covered for cell in tried_cells.values() for name, one in cell.items()
                        if name in names and not math.isnan(one.lo)]) for names in (["quickest"], HORIZONS))
    good = sum(abs(error) <= WITHIN for error in errors.values())
    slower = [f"{name} {mean - 1:+.1%}" for name, (mean, _, _) in by_whole.items() if mean > 1 + SLOWER]
    beaten = [f"{name} {mean - 1:+.1%}" for name, (mean, low, _) in by_default.items() if low > 1]
    yield "| asked | measured |"
    yield "|---|---|"
    yield (f"| H* at least 8 % below D* on average at the automatic scale | {np.mean(automatic) - 1:+.1%} over "
           f"{len(automatic)} cells |")
    yield f"| no cell more than 3 % slower than D* | slower: {', '.join(slower) or 'none'} |"
    yield (f"| no slower than ratio 12's own first crossing, within noise | slower in every seed: "
           f"{', '.join(beaten) or 'none'}; mean {np.mean([mean for mean, _, _ in by_default.values()]) - 1:+.1%} |")
    yield f"| time to target predicted within 7 % in 80 % of cells | {good} of {len(errors)} |"
    yield (f"| 95 % intervals cover 90 % of runs | H*: {covered.sum()} of {len(covered)}; all horizons predicted: "
           f"{every.sum()} of {len(every)} |")
    missed = sum(int((~cell["quickest"].reached).sum()) for cell in tried_cells.values())
    yield f"| (H* reaches the target) | missed by {missed} of {3 * len(cells)} runs |"


def draw(cells, path):
    """Each cell a row: the measured times of the four horizons, and H*'s predicted interval."""
    figure, axes = plt.subplots(figsize=(9, 0.6 * len(cells) + 1.4))
    colors = dict(zip(HORIZONS, ("tab:gray", "tab:blue", "tab:cyan", "tab:orange"), strict=True))
    for at, (cell, _) in enumerate(cells.values()):
        unit = np.median(cell["shortest_whole"].times)
        best = cell["quickest"]
        if not math.isnan(best.lo):
            hi = best.hi if math.isfinite(best.hi) else best.steps
            axes.plot([best.lo / unit, hi / unit], [at + 0.24] * 2, color="tab:blue", lw=3, alpha=0.35,
                      solid_capstyle="butt", label="H* predicted, 95 %" if at == 0 else None)
        for offset, (name, one) in zip((0.12, 0, -0.12, -0.24), ((name, cell[name]) for name in HORIZONS), strict=True):
            for reached, marker in ((True, "o"), (False, "x")):
                mask = one.reached == reached
                axes.plot(one.times[mask] / unit, [at + offset] * mask.sum(), marker, color=colors[name], ms=5,
                          label=TITLES[name] if at == 0 and reached == one.reached.any() else None)
    axes.axvline(1, color="0.8", zorder=0)
    axes.set_yticks(range(len(cells)), cells)
    axes.invert_yaxis()
    axes.set_xlabel("steps to the target, by the median of D*'s (x: ended short; the schedule that would reach it)")
    axes.legend(fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.45, 1.0), frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


@command
def main(argv=None):
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    if not RESULTS.exists():
        raise UserError(f"no {RESULTS}; run dev.study.lane_b_cells first")
    cells = read_cells(RESULTS)
    intro = """# The study of lane B

Made by `python -m dev.study.lane_b_results` from `dev/lane_b_study.csv`; what was tried and how:
`dev/study/lane_b_cells.py`. "steps: time" is a horizon and its steps to the target, the median of three seeds that
nothing was chosen by; ~: a seed ended short of it and is counted as the longer schedule that would reach it, by the
slope of the calibration's ends. Predictions: `dev/lane_b_study_predictions.csv`, committed before the runs. D* is the
shortest whole schedule that reaches the target, H* the horizon that the lane names, slopes what the slope test says of
horizons beyond D* ([theory](../ideas/lane_b_data_horizon_theory.md)). Calibration: its cost in runs at H*; it pays back
after so many runs at H* in place of ratio 12.
"""
    PAGE.write_text("\n".join([intro, *summary(cells), "", *table(cells), "", f"![]({FIGURE.name})", ""]),
                    encoding="utf-8")
    draw(cells, FIGURE)
    print("\n".join([*summary(cells), "", *table(cells)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
