"""Run a function, or the training program, on several ranks (processes) over gloo."""

import multiprocessing
import os
import pickle
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Ranks are forked from a process without threads that has imported torch, which takes seconds.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed"])


def run_on_ranks(world_size, function, *args, group=True):
    """Call function(rank, world_size, *args) on every rank; return the list of results by rank.

    `function` must be importable (at the top level of a test module), its result picklable. group:
    start a process group; otherwise only set the environment that torchrun sets.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(sock.getsockname()[1])}
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (world_size, {**os.environ, **address}, group, function, args, folder),
            nprocs=world_size, start_method="forkserver")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def train_on_ranks(world_size, arguments):
    """Run scripts.base_train on several ranks; return the exit code, which they share."""
    [code] = set(run_on_ranks(world_size, _train, arguments, group=False))
    return code


def _train(rank, world_size, arguments):
    from scripts.base_train import main

    return main(arguments)


def _rank(rank, world_size, environment, group, function, args, folder):
    os.environ.clear()
    os.environ.update(
        environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    if group:
        dist.init_process_group("gloo")
    try:
        (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(rank, world_size, *args)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
