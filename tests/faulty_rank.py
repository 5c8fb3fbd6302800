"""scripts.base_train with a fault: torchrun ... tests/faulty_rank.py RANK STEP RECORD flags...

In the first start of the job, the rank kills itself once the record has the event of the step.
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from scripts.base_train import main


def die_at(step, record):
    while not record.exists() or record.read_text().count('"kind": "train"') < step:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    rank, step, record, *arguments = sys.argv[1:]
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(target=die_at, args=(int(step), Path(record)), daemon=True).start()
    raise SystemExit(main(arguments))
