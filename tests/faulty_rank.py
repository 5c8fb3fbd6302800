"""scripts.base_train with a fault: torchrun ... tests/faulty_rank.py FAULT RANK STEP flags...

On its first start the rank dies, sleeps or is stopped when it asks for the first batch of the step after STEP.
"""

import os
import signal
import sys
import time

from nanochat.loop import Trainer
from scripts.base_train import main

FAULTS = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "asleep": lambda: time.sleep(600),
}


class Faulty:
    """The training stream until the step comes."""

    def __init__(self, trainer, loader, fault, step):
        self.trainer, self.loader, self.fault, self.step = trainer, loader, fault, step

    def __next__(self):
        if self.trainer.step == self.step:
            self.fault()
        return next(self.loader)

    def __getattr__(self, name):
        return getattr(self.loader, name)


if __name__ == "__main__":
    fault, rank, step, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        run = Trainer.run

        def run_until(trainer):
            trainer.loader = Faulty(trainer, trainer.loader, FAULTS[fault], int(step))
            return run(trainer)

        Trainer.run = run_until
    raise SystemExit(main(arguments))
