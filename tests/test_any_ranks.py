"""Any number of ranks gives the losses of one and resumes from another number's checkpoint."""

import shutil

import pytest
import torch
from corpus import TINY_FLAGS
from ranks import train_on_ranks

from nanochat.common import base_dir, runs_dir
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import SMALL_NUMEL, MuonAdamW, parameter_groups
from nanochat.runlog import read_run
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")

# 5 micro-batches of 4 rows, which 2, 3 and 4 ranks share unevenly; 3 does not divide the vocabulary
STEPS = 20
FLAGS = [*TINY_FLAGS, "--depth", "1", "--aspect-ratio", "64", "--max-seq-len", "32",
         "--device-batch-size", "4", "--total-batch-size", "640", "--eval-every", "10",
         "--eval-tokens", "1664", "--warmup-steps", "5", "--device-type", "cpu",
         "--num-iterations", str(STEPS)]
LANE_C = ["--fused-rmsnorm", "--chunked-ce"]


def train(world_size, corpus, name, *more):
    """Train on that many ranks; return the losses and the validations."""
    arguments = [*FLAGS, "--dataset", corpus, "--run-id", name, "--model-tag", name, *more]
    assert (main(arguments) if world_size == 1 else train_on_ranks(world_size, arguments)) == 0
    record = read_run(runs_dir() / name)
    return ([event["loss"] for event in record.of("train")],
            [event["val_bpb"] for event in record.of("val")])


def resume(world_size, corpus, name, step, copy, *more):
    """Resume a copy of the run `name` from the checkpoint of `step`; return the same."""
    for folder in (runs_dir(), base_dir() / "base_checkpoints"):
        shutil.rmtree(folder / copy, ignore_errors=True)
        shutil.copytree(folder / name, folder / copy)
    return train(world_size, corpus, copy, "--resume-from-step", str(step), *more)


def assert_same(found, expected):
    for losses, others in zip(found, expected, strict=True):
        assert losses == pytest.approx(others, rel=1e-5)


def test_two_and_three_ranks_train_as_one_and_resume_each_others_checkpoints(corpus):
    whole = train(1, corpus, "one")
    assert len(whole[0]) == STEPS and whole[0][-1] < whole[0][0] - 0.1
    assert_same(train(2, corpus, "two", "--save-every", "7"), whole)
    folder = base_dir() / "base_checkpoints"
    full, *shares = ((folder / name / f"optim_{STEPS:06d}_rank{rank}.pt").stat().st_size
                     for name, rank in (("one", 0), ("two", 0), ("two", 1)))
    assert all(0.4 < share / full < 0.7 for share in shares)  # of the optimizer state, per rank
    assert_same(resume(3, corpus, "two", 7, "three"), whole)
    assert_same(resume(1, corpus, "two", 14, "one-again"), whole)
    assert_same(resume(1, corpus, "three", STEPS, "evaluated"), whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], LANE_C], ids=["plain", "lane C"])
def test_every_number_of_ranks(corpus, flags):
    whole = train(1, corpus, "1", *flags)
    for world_size in (2, 3, 4):
        assert_same(train(world_size, corpus, str(world_size), "--save-every", "6", *flags), whole)
    for saved_by in (2, 3, 4):
        for world_size in (1, 2, 3, 4):
            copy = f"{saved_by}-{world_size}"
            assert_same(resume(world_size, corpus, str(saved_by), 12, copy, *flags), whole)


def shares(value, n_ranks):
    """Return each rank's rows: shares of (padded) stacks and of tables that divide, else all."""
    if value.dim() == 3:
        value = torch.cat([value, value.new_zeros(-len(value) % n_ranks, *value.shape[1:])])
    elif value.numel() < SMALL_NUMEL or len(value) % n_ranks:
        return [value] * n_ranks
    return value.chunk(n_ranks)


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_state_shared_out_anew_is_the_whole_state(saved_by, world_size):
    model = GPT(GPTConfig(32, 300, 3, 2, 2, 48, "L"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    whole = {}
    for group in parameter_groups(model):
        values = [torch.stack(group["params"])] if group["kind"] == "muon" else group["params"]
        for p, value in zip(group["params"], values, strict=False):
            whole[p] = torch.randn(value.shape, generator=generator)

    def optimizer(rank, n_ranks):
        return MuonAdamW(parameter_groups(model), Ranks(rank, rank, n_ranks))

    def saved(rank):
        saving = optimizer(rank, saved_by)
        for p, value in whole.items():
            saving.state[p] = {"step": 3, "moment": shares(value, saved_by)[rank]}
        return saving.state_dict()

    for rank in range(world_size):
        resumed = optimizer(rank, world_size)
        resumed.load_shards(map(saved, range(saved_by)), saved_by)
        assert resumed.state.keys() == whole.keys()
        for p, value in whole.items():
            assert resumed.state[p]["step"] == 3
            assert torch.equal(resumed.state[p]["moment"], shares(value, world_size)[rank])
