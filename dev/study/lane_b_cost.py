"""What a cheaper calibration would have predicted in the study's cells: python -m dev.study.lane_b_cost

From the study's runs (dev.study.lane_b_cells, same NANOCHAT_BASE_DIR): the law fitted to one seed or two, two horizons
or all; its first crossing of every horizon that was tried but D*, which half of its runs miss, against the median of
the three seeds tried. Horizons beyond MAX_EXTRAPOLATION times the longest run count as not predicted.
"""

import argparse
import math
from collections import defaultdict

import numpy as np

from dev.study.lane_b_cells import CALIBRATION_SEEDS, CALIBRATION_SHARES, CELLS, curve, multipliers
from dev.study.lane_b_results import HORIZONS, RESULTS, read_cells
from nanochat.common import command, runs_dir
from nanochat.lane_b.infer.crossing import MAX_EXTRAPOLATION, lack_of_fit, time_to
from nanochat.lane_b.infer.curve_law import fit
from nanochat.lane_b.infer.horizon import FORM
from nanochat.runlog import read_run

VARIANTS = [(n_seeds, n_horizons) for n_horizons in (2, 3) for n_seeds in (1, 2)]


def calibration_runs(cell, n_seeds, n_horizons):
    """The Runs of so many seeds and horizons, shortest first; None where the cell was not calibrated so far."""
    target = cell.steps(cell.target_ratio)
    horizons = [round(share * target) for share in (*CALIBRATION_SHARES, 1)][:n_horizons]
    folders = [runs_dir() / f"study.{cell.name}.h{horizon}.s{seed}"
               for horizon in horizons for seed in CALIBRATION_SEEDS[:n_seeds]]
    return [curve(read_run(folder)) for folder in folders] if all(folder.exists() for folder in folders) else None


def errors(runs, tried, threshold):
    """Relative errors of the predicted first crossing of the horizons tried; infinite: one of the two has none."""
    law = fit(FORM, [run.late() for run in runs])
    reach = MAX_EXTRAPOLATION * max(run.horizon for run in runs)
    for one in tried:
        if one.reached.any() and one.steps <= reach:
            yield time_to(law, multipliers, one.steps, threshold) / float(np.median(one.times)) - 1


@command
def main(argv=None):
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    cells, found = {cell.name: cell for cell in CELLS}, defaultdict(list)
    print("cell, lack of fit (p) of all runs, then per variant the errors of the horizons tried, %")
    for name, (tried, head) in read_cells(RESULTS).items():
        line, fit_p = [], math.nan
        for variant in VARIANTS:
            runs = calibration_runs(cells[name], *variant)
            if runs is None:
                line.append("-")
                continue
            late = [run.late() for run in runs]
            fit_p = lack_of_fit(fit(FORM, late), late).p
            others = [tried[horizon] for horizon in HORIZONS if horizon != "shortest_whole"]
            of_cell = list(errors(runs, others, float(head["threshold"])))
            cost = sum(run.horizon for run in runs) / np.median(tried["quickest"].times)
            found[variant].append((cost, of_cell))
            line.append(" ".join(f"{100 * error:+.1f}" for error in of_cell))
        print(f"{name}, p {fit_p:.2g}: {' | '.join(line)}")
    print("\n| seeds | horizons | cells | cost, runs at H* | predicted | within 7 % | median error | largest |")
    print("|---|---|---|---|---|---|---|---|")
    for (n_seeds, n_horizons), of_cells in found.items():
        size = np.abs([error for _, of_cell in of_cells for error in of_cell])
        print(f"| {n_seeds} | {n_horizons} | {len(of_cells)} | {np.mean([cost for cost, _ in of_cells]):.1f} | "
              f"{len(size)} | {np.mean(size <= 0.07):.0%} | {np.median(size):.1%} | {size.max():.1%} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
