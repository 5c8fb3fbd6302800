"""Saving in the background: what is saved is what was there, failures end all ranks at one step, old ones go late."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from full_disk import full_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nanochat import checkpoint
from nanochat.checkpoint import (
    checkpoint_steps,
    load_model_state,
    load_optimizer_state,
    mark_bad,
    read_meta,
    remove_old,
    save_checkpoint,
)
from nanochat.common import UserError
from nanochat.distributed import Ranks
from nanochat.saving import Saver


class Trained:
    """A model and its optimizer of two tensors, the weights a view of a larger one."""

    def __init__(self, value):
        self.storage = torch.full((2, 5), float(value))
        self.moments = torch.full((3,), float(value))

    def saver(self, folder, ranks=None, keep=0):
        optimizer = SimpleNamespace(complete_weights=lambda: None, state_dict=self.optimizer_state)
        return Saver(folder, {"model_config": {}}, SimpleNamespace(state_dict=lambda: {"w": self.storage[0]}),
                     optimizer, ranks or Ranks(), keep)

    def optimizer_state(self):
        return {"state": {0: {"step": 3, "m": self.moments}}, "param_groups": [{"betas": (0.8, 0.95), "params": [0]}]}


@pytest.fixture
def slow_disk(monkeypatch):
    """torch.save waits until the returned event is set."""
    go, save = threading.Event(), torch.save

    def waiting(*arguments):
        assert go.wait(30)
        save(*arguments)

    monkeypatch.setattr(torch, "save", waiting)
    yield go
    go.set()


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path, slow_disk):
    trained = Trained(1)
    saver = trained.saver(tmp_path)
    assert saver.save({"step": 7}, lambda: None)
    assert saver.collect(wait=False) is None and not saver.has_failed and checkpoint_steps(tmp_path) == []
    trained.storage += 1
    trained.moments += 1
    slow_disk.set()
    assert saver.collect(wait=True) == {"path": str(tmp_path), "saved_step": 7, "good": True}
    assert saver.collect(wait=True) is None and saver.longest_sec > 0
    saver.close()
    meta = read_meta(tmp_path, 7)
    weights = load_model_state(tmp_path, 7, meta, "cpu")["w"]
    assert weights.tolist() == [1.0] * 5 and weights.untyped_storage().nbytes() == 20
    state = load_optimizer_state(tmp_path, 7, meta, "cpu")
    assert state["state"][0]["m"].tolist() == [1.0] * 3 and state["state"][0]["step"] == 3
    assert state["param_groups"] == trained.optimizer_state()["param_groups"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said_at_once_and_in_the_checkpoint(tmp_path, value):
    saver = Trained(value).saver(tmp_path)
    assert saver.save({"step": 1}, lambda: None) is False
    assert saver.collect(wait=True)["good"] is False and read_meta(tmp_path, 1)["good"] is False


def test_weights_that_are_huge_but_finite_are_good(tmp_path):
    assert Trained(3e38).saver(tmp_path).save({"step": 1}, lambda: None) is True


def test_a_failure_waits_until_it_is_collected_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", full_disk)
    saver = Trained(1).saver(tmp_path / "d4")
    saver.save({"step": 1}, lambda: None)
    saver._saving.exception()  # until it is done
    assert saver.has_failed and saver.collect(wait=False) is None and saver.has_failed
    with pytest.raises(UserError, match="No space left on device"):
        saver.collect(wait=True)
    assert not saver.has_failed and list((tmp_path / "d4").iterdir()) == []


def save_on_two_ranks(rank, world_size, folder):
    """What became of saves of steps 1 to 3 on one of two ranks, while the ranks reduce something all the time."""
    ranks, folder, report = Ranks(rank, rank, world_size), Path(folder), {}
    trained = Trained(rank)
    saver = trained.saver(folder, ranks)

    def taken():
        raise UserError("taken by another")

    def attempt(step, prepare=lambda: None):
        saver.save({"step": step}, prepare)
        for _ in range(200):
            dist.all_reduce(torch.ones(10))
        try:
            report[step] = saver.collect(wait=True)["saved_step"]
        except (UserError, SystemExit) as error:
            report[step] = f"{type(error).__name__}: {error}"

    attempt(1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "save", full_disk)
        attempt(2)
    attempt(3, taken)
    attempt(4)
    saver.close()
    dist.barrier()
    return report, sorted(path.name for path in folder.iterdir())


def test_ranks_save_beside_the_collectives_of_training_and_fail_together(tmp_path):
    (zero, names), (one, _) = run_on_ranks(2, save_on_two_ranks, str(tmp_path / "d4"))
    assert zero[1] == one[1] == 1 and zero[4] == one[4] == 4
    assert zero[2] == one[2] and zero[2].startswith("UserError: checkpoint of step 2 not saved")
    assert (zero[3], one[3]) == ("UserError: taken by another", "SystemExit: 2")
    assert names == sorted(f"{name}_00000{step}{end}" for name, end in (
        ("meta", ".json"), ("model", ".pt"), ("optim", "_rank0.pt"), ("optim", "_rank1.pt")) for step in (1, 4))


# --- what is kept ----------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.sets(st.integers(1, 30), min_size=1, max_size=8), bad=st.sets(st.integers(1, 30), max_size=8),
       keep=st.integers(1, 4), at=st.integers(1, 30), data=st.data())
def test_the_newest_good_ones_and_the_best_are_kept(tmp_path_factory, steps, bad, keep, at, data):
    folder, best = tmp_path_factory.mktemp("d4"), data.draw(st.sampled_from([None, *sorted(steps)]))
    for step in steps:
        save_checkpoint(folder, step, {"w": torch.zeros(2)}, {}, {"model_config": {}})
    for step in bad & steps:
        mark_bad(folder, step)
    remove_old(folder, at, keep, best)
    newest = sorted(step for step in steps - bad if step <= at)[-keep:]
    expected = {step for step in steps if step > at or step in bad or step in newest or step == best}
    assert checkpoint_steps(folder) == sorted(expected)
    assert {int(path.name.split("_")[1][:6]) for path in folder.iterdir()} == expected


def test_nothing_is_removed_when_the_new_one_fails(tmp_path, monkeypatch):
    trained = Trained(1)
    saver = trained.saver(tmp_path, keep=1)
    for step in (1, 2):
        saver.save({"step": step}, lambda: None)
        saver.collect(wait=True)
    assert checkpoint_steps(tmp_path) == [2]
    monkeypatch.setattr(checkpoint, "_write_meta", lambda *_: "No space left on device")
    saver.save({"step": 3}, lambda: None)
    with pytest.raises(UserError, match="newest usable checkpoint is step 2"):
        saver.collect(wait=True)
    assert checkpoint_steps(tmp_path) == [2]
