"""Run a function on several ranks over gloo, each a process of its own."""

import os
import pickle
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(world_size, function, *args):
    """Call function(rank, world_size, *args) on every rank; returns the list of results by rank.

    `function` must be importable (defined at a test module's top level) and its result picklable.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (world_size, port, function, args, folder), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _rank(rank, world_size, port, function, args, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, world_size, *args)))
    finally:
        dist.destroy_process_group()
