"""Nothing: torchrun and the time limit of the process group end a job whose rank died or hangs.

Delete this file when the training loop does not import it any more.
"""

import contextlib

BUSY, TRAINING, WAITING = "busy", "training", "waiting"


class Watchdog(contextlib.nullcontext):
    def __init__(self, ranks, timeout_sec):
        super().__init__()
        self.ranks = ranks

    def at(self, step, doing):
        pass

    def wait_for_all(self, name):
        import torch.distributed

        if self.ranks.world_size > 1:
            torch.distributed.barrier()
