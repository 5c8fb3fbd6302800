"""The study of lane B: predictions that are committed before the runs they are about.

The texts are folders of FOLDER: narrative, dialogue (books) and code. See runs/lane_b_study.sh.
"""

from typing import NamedTuple

# A target is a share of the final val_bpb of depth 3 at ratio 4 (constant batch, seed 0), rounded
# to three decimals. The shares were fixed before any run: 0.94 is about what depth 4 reaches at
# ratio 5 in shared measurements of another text, 0.925 at ratio 7.
SHARES = {"constant": 0.94, "automatic": 0.925}
BATCH = 2048  # tokens per step: constant, and the unit of progress


class Cell(NamedTuple):
    """A text and a rule of the batch. reference: tokens per step at depth 2 before rounding.

    The automatic batch is reference (N / N_depth2)^0.383 to the nearest power of two, as in the
    recipe. 1351: 1,024 at depth 2, 2,048 at depths 3 and 4, 4,096 at depth 5. 1664: 2,048 at depths
    2 and 3, 4,096 at depths 4 and 5: no calibration run shows the batch of the target.
    """

    text: str
    rule: str
    reference: int = BATCH


CELLS = (Cell("narrative", "constant"), Cell("dialogue", "constant"), Cell("code", "constant"),
         Cell("narrative", "automatic", 1351), Cell("dialogue", "automatic", 1664),
         Cell("code", "automatic", 1351))
