"""This process among its peers: torchrun's ranks. torch is imported where it is needed."""

import contextlib
import multiprocessing
import os
import socket
import sys
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


def start_ranks(device=None):
    """Ranks of this process, with a process group (nccl on CUDA, gloo elsewhere) when there are several.

    Without a device there is no torch either, unless there are several.
    """
    ranks = Ranks.from_environment()
    if device is None and ranks.world_size == 1:
        return ranks
    import torch
    import torch.distributed as dist

    device = device or torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if ranks.world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                device_id=device if device.type == "cuda" else None)
    return ranks


@contextlib.contextmanager
def helped_by(n_helpers, main, argv):
    """In the block this process is rank 0 of 1 + n_helpers on this machine; the others were started to run main(argv).

    main: importable, of a module. Errors: UserError when a helper died.
    """
    before = dict(os.environ)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(1 + n_helpers), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    helpers = []
    try:
        for rank in range(1, 1 + n_helpers):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            helpers.append(multiprocessing.get_context("spawn").Process(target=main, args=(argv,), daemon=True))
            helpers[-1].start()
        os.environ.update(RANK="0", LOCAL_RANK="0")
        yield
    except RuntimeError:  # of a collective whose peer is gone
        if any(helper.exitcode for helper in helpers):
            raise UserError("a process was killed, most likely for lack of memory; use fewer --processes or a smaller "
                            "--max-tokens") from None
        raise
    finally:
        stop_ranks()
        for helper in helpers:
            helper.join(5)
            helper.kill()
        os.environ.clear()
        os.environ.update(before)


def on_main(ranks, function):
    """function() on rank 0 while the others wait; its result there, None elsewhere. Every rank calls it.

    A UserError of it ends them all with its exit code: rank 0 says why, the others leave in silence.
    """
    result = error = None
    if ranks.is_main:
        try:
            result = function()
        except UserError as raised:
            error = raised
    if ranks.world_size > 1:
        import torch.distributed as dist

        exit_codes = [error and error.exit_code]
        dist.broadcast_object_list(exit_codes, src=0)
        if exit_codes[0] and not ranks.is_main:
            raise SystemExit(exit_codes[0])
    if error:
        raise error
    return result


def add_up(ranks, array):
    """The sum of all ranks' arrays (numpy, of one shape and dtype, not bool or unsigned) on every rank."""
    if ranks.world_size > 1:
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(array.copy())
        dist.all_reduce(total)
        return total.numpy()
    return array


def add_up_at(ranks, owner, value):
    """The sum of all ranks' values (anything with + that pickles) on rank `owner`, None elsewhere. It takes them one
    at a time: two are in its memory."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        if ranks.rank != owner:
            dist.send_object_list([value], owner)
            return None
        for other in range(ranks.world_size):
            if other != owner:
                received = [None]
                dist.recv_object_list(received, other)
                value = value + received[0]
    return value


def gather(ranks, value):
    """The list of all ranks' values (anything that pickles) on rank 0, None elsewhere."""
    if ranks.world_size > 1:
        import torch.distributed as dist

        values = [None] * ranks.world_size if ranks.is_main else None
        dist.gather_object(value, values)
        return values
    return [value]


def stop_ranks():
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        sys.modules["torch.distributed"].destroy_process_group()
