"""Pretrain a model. Its width, the horizon and the batch size follow from --depth.

python -m scripts.base_train --depth 12
torchrun --standalone --nproc-per-node=8 -m scripts.base_train --depth 24

The horizon is the number of optimizer steps that the learning-rate schedule is laid out for.
<cache> is $NANOCHAT_BASE_DIR, or ~/.cache/nanochat if that is not set.
"""

import os
import shlex
import sys
import time

from nanochat.checkpoint import newest_valid_in_words
from nanochat.common import UserError, command, print0, set_quiet
from nanochat.config import parse_config
from nanochat.device import choose_device, keep_freed_memory
from nanochat.distributed import start_ranks, stop_ranks
from nanochat.train import train


def parse_args(argv=None):
    return parse_config(argv, description=__doc__)


@command
def main(argv=None):
    """Run the program; return its exit code."""
    started_sec = time.monotonic()
    config = parse_args(argv)
    set_quiet(config.quiet)
    device = choose_device(config.device_type)
    keep_freed_memory(device)
    ranks = start_ranks(device, config.rank_timeout_minutes)
    try:
        status, run = train(config, device, ranks, started_sec)
    finally:
        stop_ranks()

    if status == "nan":
        raise UserError(
            f"the run diverged: loss, validation or weights are not finite at step "
            f"{run.step}; start again with lower learning rates "
            f"({newest_valid_in_words(run.folder)})")
    if status == "interrupted":
        if run.saved_step:
            launcher = ["python"]
            if "TORCHELASTIC_RUN_ID" in os.environ:
                launcher = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
            flags = [*(sys.argv[1:] if argv is None else argv), "--resume-from-step", "latest"]
            command_line = shlex.join([*launcher, "-m", "scripts.base_train", *flags])
            print0(f"continue with: {command_line}")
        return 128 + (run.signal_number or 15)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
