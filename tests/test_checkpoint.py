"""Checkpoints: saved completely or not at all, verified when loaded, in upstream's layout."""

import json
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import DAMAGES, META, UPSTREAM_META, write_upstream
from full_disk import full_disk
from golden_figures import CONFIG, batch, golden_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_on_ranks

from nanochat import checkpoint
from nanochat.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    find_checkpoint,
    load_model,
    load_model_state,
    load_optimizer_state,
    read_meta,
    remove_old,
    save_checkpoint,
)
from nanochat.common import UserError
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig

FILES = ("model_000002.pt", "optim_000002_rank0.pt", "meta_000002.json")


def weights(step):
    return {"w": torch.full((7, 5), float(step)),
            "embedding": torch.full((9,), float(step), dtype=torch.bfloat16)}


def moments(step):
    return {"state": {0: {"step": step, "exp_avg": torch.full((4,), step / 3)}},
            "param_groups": [{"lr": step / 7, "betas": (0.8, 0.95), "params": [0]}]}


def save(folder, step, ranks=None):
    save_checkpoint(folder, step, weights(step), moments(step), META, ranks)


def load(folder, step):
    """Load everything, or raise the UserError of the first part that cannot be read."""
    meta = read_meta(folder, step)
    model_state = load_model_state(folder, step, meta, "cpu")
    return meta, model_state, load_optimizer_state(folder, step, meta, "cpu")


def assert_holds(folder, step):
    meta, model, optimizer = load(folder, step)
    assert {name: meta[name] for name in META} == META and meta["step"] == step
    for name, value in weights(step).items():
        assert torch.equal(model[name], value) and model[name].dtype == value.dtype
    state, expected = optimizer["state"][0], moments(step)["state"][0]
    assert torch.equal(state["exp_avg"], expected["exp_avg"])
    assert state["step"] == step and type(state["step"]) is int
    assert optimizer["param_groups"] == moments(step)["param_groups"]


def refusal(function, *arguments):
    """Return the message of the UserError that a call must end with: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- save and load --------------------------------------------------------------------------------

def test_what_is_loaded_is_what_was_saved_under_upstreams_file_names(tmp_path):
    folder = tmp_path / "d4"
    save_checkpoint(folder, 12, weights(8), moments(8), META)
    save(folder, 12)  # again: the new values count
    save(folder, 1_234_567)
    assert names(folder) == [
        "meta_000012.json", "meta_1234567.json", "model_000012.pt", "model_1234567.pt",
        "optim_000012_rank0.pt", "optim_1234567_rank0.pt"]
    for step in checkpoint_steps(folder):
        assert_holds(folder, step)


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "d4"
    for step in (1, 3, 5, 7, 9):
        save(folder, step)
    (folder / "model_000004.pt").write_bytes(b"of a save that was killed")
    (folder / "model_notes.pt").write_bytes(b"mine")
    remove_old(folder, keep=2, best_step=3)
    assert checkpoint_steps(folder) == [3, 7, 9] and len(names(folder)) == 10
    assert (folder / "model_notes.pt").exists()


def test_a_full_disk_is_reported_in_the_systems_words(tmp_path):
    save(tmp_path, 1)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        message = refusal(save_checkpoint, tmp_path, 2, {"w": torch.zeros(100_000)}, {}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "(File too large); free some space; the newest valid checkpoint is step 1" in message
    assert names(tmp_path) == before


def save_with_failures(rank, world_size, folder):
    """Save step 1; fail to save steps 2 and 3; return the messages, the files and the state."""
    ranks, folder, messages = Ranks(rank, rank, world_size), Path(folder), []
    save_checkpoint(folder, 1, weights(1), moments(10 + rank), META, ranks)
    for step, owner, name in ((2, torch, "save"), (3, checkpoint, "write_json")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1 or step == 3:
                patch.setattr(owner, name, full_disk)
            try:
                save(folder, step, ranks)
            except (UserError, SystemExit) as error:
                messages.append(str(error))
        dist.barrier()
    state = load_optimizer_state(folder, 1, read_meta(folder, 1), "cpu", rank)
    return messages, names(folder), state["state"][0]["step"]


def test_ranks_save_together_or_not_at_all(tmp_path):
    folder = tmp_path / "d4"
    zero, one = run_on_ranks(2, save_with_failures, str(folder))
    saved = ["meta_000001.json", "model_000001.pt", "optim_000001_rank0.pt",
             "optim_000001_rank1.pt"]
    for step, message in zip((2, 3), zero[0], strict=True):
        assert f"step {step} was not saved in {folder} (No space left on device)" in message
    assert zero[1:] == (saved, 10) and one == (["2", "2"], saved, 11)  # SystemExit with code 2


# --- damage ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_with_the_file_and_the_newest_valid_step(tmp_path, name, damage):
    for step in (1, 2):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / name)
    if (name, damage) == ("meta_000002.json", "missing"):  # then there is no such checkpoint
        assert find_checkpoint(tmp_path) == 1
        return
    message = refusal(load, tmp_path, 2)
    assert message.startswith(f"{tmp_path / name} is damaged")
    assert message.endswith("the newest valid checkpoint is step 1")
    assert_holds(tmp_path, 1)


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_flipped_bit_is_noticed_or_harmless(tmp_path, data):
    folder = tmp_path / "d4"
    if not folder.exists():
        for step in (1, 2):
            save(folder, step)
    path = folder / data.draw(st.sampled_from(FILES))
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[data.draw(st.integers(0, len(original) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        assert_holds(folder, 2)
    except UserError as error:
        assert "newest valid checkpoint is step 1" in str(error)
    finally:
        path.write_bytes(original)


# --- find -----------------------------------------------------------------------------------------

def test_the_newest_complete_checkpoint_is_the_latest(tmp_path):
    for step in (5, 40, 9):
        save(tmp_path, step)
    (tmp_path / "model_000077.pt").write_bytes(b"no meta: never finished")
    for name in ("meta_x.json", "meta_.json", "meta_²2.json", "meta_000041.json.tmp"):
        (tmp_path / name).write_text("{}")
    assert checkpoint_steps(tmp_path) == [5, 9, 40]
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "latest") == 40
    assert find_checkpoint(tmp_path, 9) == find_checkpoint(tmp_path, "000009") == 9


@pytest.mark.parametrize(("step", "words"), [
    (3, "the newest valid checkpoint is step 1"), ("last", "neither a number nor 'latest'"),
    ("-4", "neither a number"), ("²", "neither a number"), ("", "neither a number")])
def test_a_step_that_does_not_exist_is_refused(base_dir, step, words):
    folder = checkpoint_folder("d4")
    assert folder == base_dir / "base_checkpoints" / "d4"
    assert str(folder) in refusal(find_checkpoint, folder, step)
    for saved in (1, 4):
        save(folder, saved)
    DAMAGES["truncated"](folder / "model_000004.pt")
    assert words in refusal(find_checkpoint, folder, step)


# --- upstream -------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_upstreams_checkpoint_gives_the_golden_logits(tmp_path, prefix):
    folder = write_upstream(tmp_path / "d4", prefix)
    model, meta = load_model(folder, find_checkpoint(folder), "cpu", torch.float32)
    assert meta == UPSTREAM_META
    idx, targets = batch()
    with torch.no_grad():
        assert torch.equal(model(idx, targets, "none"), golden_model()(idx, targets, "none"))


def test_upstreams_older_checkpoints_load(tmp_path):
    """Embeddings in bfloat16; no window pattern: full attention."""
    folder = write_upstream(tmp_path, window_pattern=None)
    state = torch.load(folder / "model_000100.pt")
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    torch.save(state, folder / "model_000100.pt")
    model, _ = load_model(folder, 100, "cpu", torch.float32)
    loaded = model.transformer.wte.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, state["transformer.wte.weight"].float())
    assert model.config.windows == [CONFIG.sequence_len] * CONFIG.n_layer


@pytest.mark.parametrize("config", [
    {"window_size": 3}, {"n_head": 0}, {"n_embd": "32"}, {"n_layer": 5}, {"vocab_size": 1000},
    {"vocab_size": 1 << 29}, {"n_embd": None}], ids=str)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, config):
    folder = write_upstream(tmp_path, **config)
    assert "is of another model" in refusal(load_model, folder, 100, "cpu", torch.float32)
    for damage in ("missing", "truncated", "other bytes"):
        DAMAGES[damage](write_upstream(tmp_path) / "model_000100.pt")
        message = refusal(load_model, tmp_path, 100, "cpu", torch.float32)
        assert "model_000100.pt is damaged or missing" in message


def test_upstream_can_read_ours(tmp_path):
    """It reads `model_config` and loads the state dict unchanged."""
    config = GPTConfig(64, 100, 2, 2, 2, 32, "SL")
    model = GPT(config)
    model.init_weights(0)
    save_checkpoint(tmp_path, 1, model.state_dict(), {}, {**META, "model_config": config.to_dict()})
    meta = json.loads((tmp_path / "meta_000001.json").read_text())
    assert meta["step"] == 1 and meta["model_config"] == config.to_dict()
    state = torch.load(tmp_path / "model_000001.pt", weights_only=True)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
