import json
import os
import resource
import subprocess
import sys
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
    mark_bad,
    n_optimizer_shards,
    read_meta,
    remove_old,
    save_checkpoint,
)
from nanochat.common import UserError
from nanochat.distributed import Ranks, on_main
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, parameter_groups

ROOT = Path(__file__).parent.parent
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
    save(folder, 12)
    save(folder, 1_234_567)
    assert names(folder) == [
        "meta_000012.json", "meta_1234567.json", "model_000012.pt", "model_1234567.pt",
        "optim_000012_rank0.pt", "optim_1234567_rank0.pt"]
    for step in checkpoint_steps(folder):
        assert_holds(folder, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_continues_from_a_checkpoint_bit_for_bit(tmp_path, dtype):
    idx, targets = batch()

    def take_steps(model, optimizer):
        for _ in range(2):
            model(idx, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    def build():
        model = golden_model(compute_dtype=dtype)
        return model, MuonAdamW(parameter_groups(model), matmul_dtype=dtype)

    model, optimizer = build()
    take_steps(model, optimizer)
    save_checkpoint(tmp_path, 2, model.state_dict(), optimizer.state_dict(), META)
    resumed, resumed_optimizer = build()
    _, state, optimizer_state = load(tmp_path, 2)
    checkpoint.load_state(resumed, state, tmp_path, 2)
    resumed_optimizer.load_state_dict(optimizer_state)
    take_steps(model, optimizer)
    take_steps(resumed, resumed_optimizer)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_is_saved_again_has_the_new_values(tmp_path):
    save_checkpoint(tmp_path, 3, weights(8), moments(8), META)
    (tmp_path / "optim_000003_rank1.pt").write_bytes(b"left by a killed run of two ranks")
    save(tmp_path, 3)
    assert_holds(tmp_path, 3)


@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.sets(st.integers(1, 30), min_size=1, max_size=8),
       bad=st.sets(st.integers(1, 30), max_size=8), keep=st.integers(1, 4),
       at=st.integers(1, 30), data=st.data())
def test_the_newest_good_checkpoints_and_the_best_are_kept(tmp_path_factory, steps, bad, keep, at,
                                                           data):
    folder = tmp_path_factory.mktemp("d4")
    best = data.draw(st.sampled_from([None, *sorted(steps)]))
    for step in steps:
        save_checkpoint(folder, step, {"w": torch.zeros(2)}, {}, {"model_config": {}})
    for step in bad & steps:
        mark_bad(folder, step)
    remove_old(folder, at, keep, best)
    newest = sorted(step for step in steps - bad if step <= at)[-keep:]
    expected = {step for step in steps
                if step > at or step in bad or step in newest or step == best}
    assert checkpoint_steps(folder) == sorted(expected)
    assert {int(path.name.split("_")[1][:6]) for path in folder.iterdir()} == expected


# --- kills and full disks -------------------------------------------------------------------------

def test_a_kill_at_any_moment_of_saving_leaves_the_newest_checkpoint_valid(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests" / "crashes.py", tmp_path], text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("saved_before", [False, True], ids=["new", "again"])
def test_whichever_write_fails_nothing_of_the_step_is_left(tmp_path, monkeypatch, saved_before):
    folder = tmp_path / "d4"
    save(folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for at_call in range(1, 100):
        if saved_before:
            save(folder, 2)
        n_calls = 0

        def failing(call, at_call=at_call):
            def counted(*arguments, **options):
                nonlocal n_calls
                n_calls += 1
                if n_calls == at_call:
                    full_disk()
                return call(*arguments, **options)
            return counted

        with monkeypatch.context() as patch:
            for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
                patch.setattr(owner, name, failing(getattr(owner, name)))
            try:
                save(folder, 2)
                break  # there were fewer calls
            except UserError as error:
                message = str(error)
        assert "step 2 was not saved" in message and "(No space left on device)" in message
        assert message.endswith("the newest valid checkpoint is step 1")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert n_calls > 8
    assert_holds(folder, 2)


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


def test_temporary_files_of_a_killed_save_are_removed_by_the_next(tmp_path):
    torn = [f".{name}.0123456789abcdef.tmp" for name in (
        "model_000007.pt", "meta_000007.json", "optim_000007_rank0.pt", "optim_000007_rank1.pt")]
    for name in (*torn, "mine.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    save(tmp_path, 9)
    left = [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert left == [torn[-1], "mine.tmp"]  # the former may be being written by rank 1


# --- several ranks --------------------------------------------------------------------------------

def save_with_failures(rank, world_size, folder):
    """Return, on one of two ranks, what became of the saves of steps 1 to 3."""
    ranks, folder = Ranks(rank, rank, world_size), Path(folder)
    report = {}

    def attempt(name, function, *arguments):
        try:
            report[name] = function(*arguments)
        except (UserError, SystemExit) as error:
            report[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
        if rank == 0:
            report[f"files after {name}"] = names(folder)
        dist.barrier()

    def refuse():
        raise UserError("taken")

    def save_own(step):
        return save_checkpoint(
            folder, step, weights(step), moments(10 * step + rank), META, ranks)

    attempt("good", save_own, 1)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(torch, "save", full_disk)
        attempt("rank 1 full", save_own, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full_disk)
        attempt("meta full", save_own, 3)
    state = load_optimizer_state(folder, 1, read_meta(folder, 1), "cpu", rank)
    report["own state"] = state["state"][0]["step"]
    attempt("refused on rank 0", on_main, ranks, refuse)
    return report


def test_ranks_save_together_or_not_at_all(tmp_path):
    folder = tmp_path / "d4"
    zero, one = run_on_ranks(2, save_with_failures, str(folder))
    saved = ["meta_000001.json", "model_000001.pt", "optim_000001_rank0.pt",
             "optim_000001_rank1.pt"]
    assert zero["files after good"] == saved and zero["good"] is one["good"] is True
    for name, step in (("rank 1 full", 2), ("meta full", 3)):
        assert zero[name] == one[name]
        assert f"step {step} was not saved in {folder} (No space left on device)" in zero[name]
        assert zero[f"files after {name}"] == saved
    assert (zero["own state"], one["own state"]) == (10, 11)
    assert zero["refused on rank 0"] == "UserError: taken"
    assert one["refused on rank 0"] == "SystemExit: 2"
    assert n_optimizer_shards(read_meta(folder, 1)) == 2


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
def test_every_flipped_bit_is_noticed(tmp_path, data):
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
        if path.suffix == ".json" and json_or_none(flipped) == json.loads(original):
            assert_holds(folder, 2)  # white space
        else:
            assert "newest valid checkpoint is step 1" in refusal(load, folder, 2)
    finally:
        path.write_bytes(original)


def json_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


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
    (3, "no checkpoint of step 3 in"), ("last", "neither a number nor 'latest'"),
    ("-4", "neither a number"), ("²", "neither a number"), ("", "neither a number")])
def test_a_step_that_does_not_exist_is_refused(tmp_path, step, words):
    for saved in (1, 4):
        save(tmp_path, saved)
    DAMAGES["truncated"](tmp_path / "model_000004.pt")
    message = refusal(find_checkpoint, tmp_path, step)
    assert words in message
    if step == 3:  # the hint names a checkpoint that can be loaded
        assert message.endswith("the newest valid checkpoint is step 1")


def test_a_folder_without_checkpoints_says_what_to_do(base_dir):
    folder = checkpoint_folder("d4")
    assert folder == base_dir / "base_checkpoints" / "d4"
    for step in ("latest", 3):
        message = refusal(find_checkpoint, folder, step)
        assert str(folder) in message and "--model-tag" in message


# --- upstream -------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_upstreams_checkpoint_gives_the_golden_logits(tmp_path, prefix):
    folder = write_upstream(tmp_path / "d4", prefix)
    model, meta = load_model(folder, find_checkpoint(folder), "cpu", torch.float32)
    assert meta == UPSTREAM_META
    idx, targets = batch()
    with torch.no_grad():
        assert torch.equal(model(idx, targets, "none"), golden_model()(idx, targets, "none"))


def test_upstreams_embeddings_in_bfloat16_load_into_fp32(tmp_path):
    folder = write_upstream(tmp_path)
    state = torch.load(folder / "model_000100.pt")
    state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
    torch.save(state, folder / "model_000100.pt")
    model, _ = load_model(folder, 100, "cpu", torch.float32)
    loaded = model.transformer.wte.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, state["transformer.wte.weight"].float())


def test_upstreams_configuration_without_a_window_pattern_is_full_attention(tmp_path):
    folder = write_upstream(tmp_path, window_pattern=None)
    model, _ = load_model(folder, 100, "cpu", torch.float32)
    assert model.config.windows == [CONFIG.sequence_len] * CONFIG.n_layer


@pytest.mark.parametrize(("config", "words"), [
    ({"window_size": 3}, "window_size"), ({"n_head": 0}, "n_head"),
    ({"n_embd": "32"}, "n_embd"), ({"n_layer": 5}, "of another model"),
    ({"vocab_size": 1000}, "of another model")], ids=str)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, config, words):
    folder = write_upstream(tmp_path, **config)
    assert words in refusal(load_model, folder, 100, "cpu", torch.float32)


@pytest.mark.parametrize("damage", ["missing", "truncated", "other bytes"])
def test_damage_of_upstreams_model_is_one_line_too(tmp_path, damage):
    DAMAGES[damage](write_upstream(tmp_path) / "model_000100.pt")
    message = refusal(load_model, tmp_path, 100, "cpu", torch.float32)
    assert "model_000100.pt is damaged or missing" in message


def test_upstream_can_read_ours(tmp_path):
    """It reads `model_config` and loads the state dict unchanged."""
    config = GPTConfig(64, 100, 2, 2, 2, 32, "SL")
    model = GPT(config)
    model.init_weights(0)
    meta = {**META, "model_config": config.to_dict()}
    save_checkpoint(tmp_path, 1, model.state_dict(), {}, meta)
    meta = json.loads((tmp_path / "meta_000001.json").read_text())
    assert meta["step"] == 1 and meta["model_config"] == config.to_dict()
    state = torch.load(tmp_path / "model_000001.pt", weights_only=True)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
