"""This process among its peers: torchrun's ranks. torch is imported where it is needed."""

import contextlib
import multiprocessing
import os
import secrets
import socket
import sys
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta

from nanochat.common import UserError

# of a collective, gloo's and NCCL's: ranks may wait so long for one that evaluates or compiles; who is gone or hangs in
# training is found by nanochat.watchdog
GROUP_TIMEOUT = timedelta(hours=1)
START_TIMEOUT = timedelta(minutes=10)  # for the last rank to have begun


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as torchrun's environment says; one process without torchrun. store: what the ranks
    of a started group say to each other outside of collectives (torch.distributed.Store)."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    store: object = field(default=None, repr=False, compare=False)

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


def start_ranks(device=None, timeout_minutes=60):
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
        ranks = replace(ranks, store=_store_of_this_start(ranks))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=GROUP_TIMEOUT, store=ranks.store,
                                rank=ranks.rank, world_size=ranks.world_size,
                                device_id=device if device.type == "cuda" else None)
    return ranks


def _store_of_this_start(ranks):
    """The rendezvous' store under a name that rank 0 draws. torchrun's outlives a restart: it holds addresses of ranks
    that are gone, which would be taken for those of their successors.

    Rank 0 answers every greeting, of whatever start, until all have used the name it gives out. Errors: UserError.
    """
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
    name = secrets.token_hex(8)
    if ranks.is_main:
        missing, deadline_sec = set(range(1, ranks.world_size)), time.monotonic() + START_TIMEOUT.total_seconds()
        while missing:
            for rank in sorted(missing):
                if store.check([f"greeting/{rank}"]):
                    store.set(f"name/{store.get(f'greeting/{rank}').decode()}", name)
                if store.check([f"{name}/here/{rank}"]):
                    missing.remove(rank)
            if time.monotonic() > deadline_sec:
                raise UserError(f"ranks {sorted(missing)} of {ranks.world_size} have not begun within "
                                f"{START_TIMEOUT.total_seconds():.0f} s; see what they, or their machines, say")
            time.sleep(0.02)
    else:
        greeting = name
        store.set(f"greeting/{ranks.rank}", greeting)
        name = store.get(f"name/{greeting}").decode()  # waits
        store.set(f"{name}/here/{ranks.rank}", "")
    store.set_timeout(GROUP_TIMEOUT)
    return PrefixStore(name, store)


def broadcast_from_rank0(ranks, function):
    """function() of rank 0, its result on every rank. Every rank calls it."""
    import torch.distributed as dist

    results = [function() if ranks.is_main else None]
    if ranks.world_size > 1:
        dist.broadcast_object_list(results, src=0)
    return results[0]


@contextlib.contextmanager
def spawn_workers(n_helpers, main, argv):
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
        if any(helper.join(5) or helper.exitcode for helper in helpers):  # it closes its connections before it is gone
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


def on_main(ranks, function, group=None):
    """function() on rank 0 while the others of a group (default: all) wait; its result there, None elsewhere. Every
    rank calls it.

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
        dist.broadcast_object_list(exit_codes, src=0, group=group)
        if exit_codes[0] and not ranks.is_main:
            raise SystemExit(exit_codes[0])
    if error:
        raise error
    return result


def all_reduce_sum(ranks, array):
    """The sum of all ranks' arrays (numpy, of one shape and dtype, not bool or unsigned) on every rank."""
    if ranks.world_size > 1:
        import torch
        import torch.distributed as dist

        total = torch.from_numpy(array.copy())
        dist.all_reduce(total)
        return total.numpy()
    return array


def reduce_sum_to(ranks, owner, value):
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
