"""This process among its peers: torchrun's ranks. torch is imported where it is needed."""

import os
from dataclasses import dataclass

from nanochat.errors import UserError, say


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as torchrun's environment says; one process without torchrun."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls):
        """What torchrun's RANK, LOCAL_RANK and WORLD_SIZE say. UserError when RANK is set without the others."""
        if "RANK" not in os.environ:
            return cls()
        try:
            return cls(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
        except (KeyError, ValueError):
            raise UserError("RANK is set, but RANK, LOCAL_RANK and WORLD_SIZE are not three whole numbers; "
                            "start several ranks with torchrun, or unset RANK") from None

    @property
    def is_main(self):
        return self.rank == 0


def print0(*values, **options):
    """Print on rank 0 alone, at once; see errors.say."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(*values, **options)


def start_ranks(device):
    """Ranks of this process, with a process group (nccl on CUDA, gloo elsewhere) when there are several."""
    import torch
    import torch.distributed as dist

    ranks = Ranks.from_environment()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return ranks


def on_main(ranks, function, group=None):
    """function() on rank 0 while the others of a group (default: all) wait; its result there, None elsewhere. Every
    rank calls it.

    A UserError of it ends them all with its exit code: rank 0 says why, the others leave in silence.
    """
    import torch.distributed as dist

    result = error = None
    if ranks.is_main:
        try:
            result = function()
        except UserError as raised:
            error = raised
    if ranks.world_size > 1:
        exit_codes = [error and error.exit_code]
        dist.broadcast_object_list(exit_codes, src=0, group=group)
        if exit_codes[0] and not ranks.is_main:
            raise SystemExit(exit_codes[0])
    if error:
        raise error
    return result


def stop_ranks():
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
