"""The ranks of a job, as torchrun starts them, and their process group.

torch is imported by the functions that need it.
"""

import os
import secrets
import sys
import time
from dataclasses import dataclass
from datetime import timedelta

from nanochat.common import UserError

START_TIMEOUT = timedelta(minutes=10)  # until the last rank of a job has started


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job; by default the only one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls):
        """Return the ranks that torchrun's environment variables describe. Raise UserError."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        values = [os.environ.get(name, "") for name in names]
        if not any(values):
            return cls()
        if all(value.isdecimal() for value in values):
            ranks = cls(*map(int, values))
            if ranks.world_size == 1 or (os.environ.get("MASTER_ADDR") and
                                         os.environ.get("MASTER_PORT")):
                return ranks
        raise UserError(f"{', '.join(names)} ({values}) or MASTER_ADDR and MASTER_PORT are "
                        "incomplete; start several ranks with torchrun, or unset them")

    @property
    def is_main(self):
        return self.rank == 0


def start_ranks(device, timeout_minutes=60):
    """Return the Ranks of this process, with a process group (NCCL or gloo) if there are several.

    A collective that takes longer than timeout_minutes ends the job.
    """
    import torch
    import torch.distributed as dist

    ranks, is_cuda = Ranks.from_environment(), device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    if ranks.world_size > 1:
        timeout = timedelta(minutes=timeout_minutes)
        dist.init_process_group(
            "nccl" if is_cuda else "gloo", store=_store_of_this_start(ranks, timeout),
            timeout=timeout, rank=ranks.rank, world_size=ranks.world_size,
            device_id=device if is_cuda else None)
    return ranks


def _store_of_this_start(ranks, timeout):
    """Return torchrun's store under a prefix that rank 0 draws for this start of the job.

    The store outlives a restart by torchrun and still holds the addresses of ranks that died. So
    every other rank asks for the prefix under a new key, and rank 0 answers until all have it.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
    prefix = secrets.token_hex(8)
    if ranks.is_main:
        for rank in range(1, ranks.world_size):
            while not store.check([f"{prefix}/has/{rank}"]):
                if store.check([f"ask/{rank}"]):
                    store.set(store.get(f"ask/{rank}").decode(), prefix)
                time.sleep(0.02)
    else:
        answer = f"answer/{prefix}"
        store.set(f"ask/{ranks.rank}", answer)
        prefix = store.get(answer).decode()  # waits
        store.set(f"{prefix}/has/{ranks.rank}", "")
    store.set_timeout(timeout)
    return PrefixStore(prefix, store)


def on_main(ranks, function):
    """Return rank 0's function() on every rank; every rank calls this.

    The result must be picklable. A UserError ends all ranks; only rank 0 prints it.
    """
    result = error = None
    if ranks.is_main:
        try:
            result = function()
        except UserError as raised:
            error = raised
    if ranks.world_size > 1:
        import torch.distributed as dist

        outcome = [result, error and error.exit_code]
        dist.broadcast_object_list(outcome, src=0)
        result, exit_code = outcome
        if exit_code and not ranks.is_main:
            raise SystemExit(exit_code)
    if error:
        raise error
    return result


def stop_ranks():
    """Destroy the process group, if there is one."""
    dist = sys.modules.get("torch.distributed")
    if dist and dist.is_initialized():
        dist.destroy_process_group()
