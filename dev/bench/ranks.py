"""What a rank keeps of the optimizer's state and puts into a step's collectives, counted in a step over gloo.

    python -m dev.bench.ranks --depth 4 --ranks 1 2 3 4

bf16 with copies of the weights, as on a GPU; no step is timed. README, Several GPUs and nodes, has the formulas.
"""

import argparse
import socket
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dev.bench.measure import append_rows
from nanochat import optim
from nanochat.common import command
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.schedule import model_shape

MIB = 2**20


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--out", help="append the figures to this CSV file")
    return parser.parse_args(argv)


def count_step(model, ranks, micro_batches=1):
    """{state: bytes of this rank's optimizer state, and for each kind of collective the bytes it puts in} of a step.

    The gradients are zeros: of one micro-batch a rank in the copies' bf16, of several in fp32."""
    optimizer = optim.MuonAdamW(optim.parameter_groups(model), ranks, torch.bfloat16, casts=model.keep_casts())
    for _ in range(micro_batches):
        for p in model.parameters():
            owner = optimizer.casts.get(p, p)
            owner.grad = torch.zeros_like(owner)
        if micro_batches > 1:
            optimizer.accumulate()
    counts = {"reduce_scatter": 0, "all_gather": 0, "all_reduce": 0}

    def counted(name, function, which):
        def call(*args, **options):
            counts[name] += args[which].nbytes
            return function(*args, **options)
        return call

    with (mock.patch.object(optim, "_reduce_scatter", counted("reduce_scatter", optim._reduce_scatter, 1)),
          mock.patch.object(optim, "_all_gather", counted("all_gather", optim._all_gather, 0)),
          mock.patch.object(optim.dist, "all_reduce", counted("all_reduce", dist.all_reduce, 0))):
        optimizer.step()
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return {"state": sum(value.nbytes for value in tensors), **counts}


def sent_bytes(counts, world_size):
    """What a rank sends in a step where rings carry the collectives."""
    return (counts["reduce_scatter"] + counts["all_gather"] + 2 * counts["all_reduce"]) * (world_size - 1) / world_size


def _rank(rank, world_size, port, config, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for micro_batches in (1, 2):
        counts = count_step(GPT(config, torch.bfloat16), Ranks(rank, rank, world_size), micro_batches)
        if rank == world_size - 1:
            results.put(counts)
    dist.destroy_process_group()


@command
def main(argv=None):
    args = parse_args(argv)
    shape, rows = model_shape(args.depth), []
    config = GPTConfig(128, args.vocab_size, shape.n_layer, shape.n_head, shape.n_head, shape.n_embd, "L")
    for world_size in args.ranks:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        results = mp.get_context("spawn").SimpleQueue()
        mp.spawn(_rank, (world_size, port, config, results), nprocs=world_size)
        one, several = results.get(), results.get()
        rows.append({"ranks": world_size, "state_mib": one["state"] / MIB,
                     "sent_mib": sent_bytes(one, world_size) / MIB,
                     "sent_mib_several_micro_batches": sent_bytes(several, world_size) / MIB})
        print(", ".join(f"{name} {value:,.4g}" for name, value in rows[-1].items()))
    if args.out:
        append_rows(args.out, rows)


if __name__ == "__main__":
    raise SystemExit(main())
