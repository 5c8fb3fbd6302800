import json
import os
import re
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
    n_optimizer_shards,
    read_meta,
    save_checkpoint,
    set_aside,
)
from nanochat.common import UserError
from nanochat.distributed import Ranks, on_main
from nanochat.gpt import GPT, GPTConfig
from nanochat.optim import MuonAdamW, parameter_groups

ROOT = Path(__file__).parent.parent


def weights(step):
    return {"w": torch.full((7, 5), float(step)), "embedding": torch.full((9,), float(step), dtype=torch.bfloat16)}


def moments(step):
    return {"state": {0: {"step": step, "exp_avg": torch.full((4,), step / 3)}},
            "param_groups": [{"lr": step / 7, "betas": (0.8, 0.95), "params": [0]}]}


def save(folder, step, ranks=None):
    save_checkpoint(folder, step, weights(step), moments(step), META, ranks)


def load(folder, step):
    """Everything a checkpoint holds, or the UserError of the first part that cannot be read."""
    meta = read_meta(folder, step)
    return meta, load_model_state(folder, step, meta, "cpu"), load_optimizer_state(folder, step, meta, "cpu")


def assert_holds(folder, step):
    meta, model, optimizer = load(folder, step)
    assert {name: meta[name] for name in META} == META and meta["step"] == step
    assert all(torch.equal(model[name], value) and model[name].dtype == value.dtype
               for name, value in weights(step).items())
    assert torch.equal(optimizer["state"][0]["exp_avg"], moments(step)["state"][0]["exp_avg"])
    assert optimizer["state"][0]["step"] == step and type(optimizer["state"][0]["step"]) is int
    assert optimizer["param_groups"] == moments(step)["param_groups"]


def refusal(function, *arguments):
    """The message of the UserError that a call ends with; one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- round trip ------------------------------------------------------------------------------------------------------

def test_what_is_loaded_is_what_was_saved_under_upstreams_file_names(tmp_path):
    save(tmp_path / "d4", 12)
    save(tmp_path / "d4", 1_234_567)
    assert names(tmp_path / "d4") == [
        "meta_000012.json", "meta_1234567.json", "model_000012.pt", "model_1234567.pt", "optim_000012_rank0.pt",
        "optim_1234567_rank0.pt"]
    assert checkpoint_steps(tmp_path / "d4") == [12, 1_234_567]
    for step in (12, 1_234_567):
        assert_holds(tmp_path / "d4", step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_goes_on_from_loaded_model_and_optimizer_bit_for_bit(tmp_path, dtype):
    idx, targets = batch()

    def take_steps(model, optimizer, n):
        for _ in range(n):
            model(idx, targets).backward()
            optimizer.step()
            optimizer.zero_grad()

    def build():
        model = golden_model(compute_dtype=dtype)
        return model, MuonAdamW(parameter_groups(model), matmul_dtype=dtype)

    model, optimizer = build()
    take_steps(model, optimizer, 2)
    save_checkpoint(tmp_path, 2, model.state_dict(), optimizer.state_dict(), META)
    saved = optimizer.state_dict()["state"]

    resumed, resumed_optimizer = build()
    _, state, optimizer_state = load(tmp_path, 2)
    checkpoint.load_state(resumed, state, tmp_path, 2)
    resumed_optimizer.load_state_dict(optimizer_state)
    loaded = resumed_optimizer.state_dict()["state"]
    assert saved.keys() == loaded.keys()
    for index in saved:
        for name, value in saved[index].items():
            other = loaded[index][name]
            assert type(other) is type(value), name  # AdamW's step stays an int
            assert torch.equal(other, value) and other.dtype == value.dtype if torch.is_tensor(value) \
                else other == value, (index, name)

    take_steps(model, optimizer, 2)
    take_steps(resumed, resumed_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_a_step_saved_again_holds_the_new_values(tmp_path):
    save_checkpoint(tmp_path, 3, weights(8), moments(8), META)
    save(tmp_path, 3)
    assert_holds(tmp_path, 3)


def test_a_model_of_another_shape_is_refused(tmp_path):
    save(tmp_path, 1)
    message = refusal(checkpoint.load_state, golden_model(), weights(1), tmp_path, 1)
    assert "of another model" in message and "step 1" in message


# --- crashes and full disks ------------------------------------------------------------------------------------------

def test_killed_at_any_moment_of_saving_the_newest_checkpoint_is_whole_and_earlier_ones_stay(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", ROOT / "tests" / "crashes.py", tmp_path], text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("saved_before", [False, True], ids=["new", "again"])
def test_whichever_write_fails_nothing_of_the_step_is_left_and_the_newest_usable_is_named(
        tmp_path, monkeypatch, saved_before):
    folder = tmp_path / "d4"
    save(folder, 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for at_call in range(1, 100):
        if saved_before:
            save(folder, 2)
        n_calls = 0

        def attempt(call, at_call=at_call):
            def counted(*arguments, **options):
                nonlocal n_calls
                n_calls += 1
                if n_calls == at_call:
                    full_disk()
                return call(*arguments, **options)
            return counted

        with monkeypatch.context() as patch:
            for owner, name in ((torch, "save"), (os, "fsync"), (os, "replace")):
                patch.setattr(owner, name, attempt(getattr(owner, name)))
            if at_call > 11:  # two states: save, fsync, rename, fsync of the folder; the meta: the last three
                save(folder, 2)
                break
            message = refusal(save, folder, 2)
        assert "step 2 not saved" in message and "(No space left on device); free some space" in message
        assert message.endswith("the newest usable checkpoint is step 1")
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert n_calls == 11
    assert_holds(folder, 2)


@pytest.mark.parametrize("limit", [0, 100, 700, 5000, 100_000])
def test_a_full_disk_is_said_in_the_systems_words(tmp_path, limit):
    save(tmp_path, 1)
    before = names(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        message = refusal(save_checkpoint, tmp_path, 2, {"w": torch.zeros(100_000)}, {}, META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "(File too large); free some space; the newest usable checkpoint is step 1" in message
    assert names(tmp_path) == before
    assert_holds(tmp_path, 1)


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("enforce fail\nframe #0"), OSError()], ids=repr)
def test_whatever_torch_says_of_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(torch, "save", refuse)
    message = refusal(save, tmp_path / "d4", 1)
    assert "free some space; there is no usable checkpoint here" in message
    assert f"({str(error).partition(chr(10))[0] or type(error).__name__})" in message
    assert names(tmp_path / "d4") == []


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path):
    (tmp_path / "d4").write_text("a file")
    assert "not saved" in refusal(save, tmp_path / "d4", 1)
    assert (tmp_path / "d4").read_text() == "a file"


def test_what_a_killed_save_left_is_cleared_away_by_the_next_of_the_same_rank(tmp_path):
    torn = [f".{name}.0123456789abcdef.tmp" for name in (
        "model_000007.pt", "meta_000007.json", "optim_000007_rank0.pt", "optim_000007_rank1.pt")]
    for name in (*torn, "mine.tmp"):
        (tmp_path / name).write_bytes(b"torn")
    save(tmp_path, 9)
    assert [name for name in names(tmp_path) if name.endswith(".tmp")] == [torn[-1], "mine.tmp"]


def test_optimizer_shards_that_a_killed_run_of_more_ranks_left_do_not_count(tmp_path):
    (tmp_path / "optim_000002_rank1.pt").write_bytes(b"of another run")
    save(tmp_path, 2)
    assert_holds(tmp_path, 2)


# --- several ranks ---------------------------------------------------------------------------------------------------

def save_with_troubles(rank, world_size, folder):
    """On one rank of two: what happened to the saves of steps 1 to 3, and to work of rank 0 alone."""
    ranks, folder = Ranks(rank, rank, world_size), Path(folder)
    report = {}

    def attempt(name, function, *arguments):
        try:
            report[name] = function(*arguments)
        except (UserError, SystemExit) as error:
            report[name] = f"{type(error).__name__}: {error}"
        dist.barrier()
        if rank == 0 and folder.exists():
            report[f"files after {name}"] = names(folder)
        dist.barrier()

    def refuse():
        raise UserError("taken")

    def save_own(step):
        save_checkpoint(folder, step, weights(step), moments(10 * step + rank), META, ranks)

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
    attempt("done on rank 0", on_main, ranks, lambda: "done")
    return report


def test_ranks_save_together_or_not_at_all(tmp_path):
    folder = tmp_path / "d4"
    zero, one = run_on_ranks(2, save_with_troubles, str(folder))
    saved = ["meta_000001.json", "model_000001.pt", "optim_000001_rank0.pt", "optim_000001_rank1.pt"]
    assert zero["files after good"] == saved and zero["good"] is one["good"] is None
    for name, step in (("rank 1 full", 2), ("meta full", 3)):
        assert zero[name] == one[name] == (
            f"UserError: checkpoint of step {step} not saved in {folder} (No space left on device); free some space; "
            "the newest usable checkpoint is step 1")
        assert zero[f"files after {name}"] == saved
    assert (zero["own state"], one["own state"]) == (10, 11)
    assert (zero["refused on rank 0"], one["refused on rank 0"]) == ("UserError: taken", "SystemExit: 2")
    assert (zero["done on rank 0"], one["done on rank 0"]) == ("done", None)
    assert n_optimizer_shards(read_meta(folder, 1)) == 2


# --- damage ----------------------------------------------------------------------------------------------------------

FILES = ("model_000002.pt", "optim_000002_rank0.pt", "meta_000002.json")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_that_names_the_file_and_the_newest_usable_step(tmp_path, name, damage):
    for step in (1, 2):
        save(tmp_path, step)
    DAMAGES[damage](tmp_path / name)
    if (name, damage) == ("meta_000002.json", "missing"):  # then there is no such checkpoint
        assert find_checkpoint(tmp_path) == 1
        return
    assert find_checkpoint(tmp_path) == 2  # it is there; what it holds shows when it is read
    message = refusal(load, tmp_path, 2)
    assert message.startswith(f"{tmp_path / name} is damaged")
    assert message.endswith("the newest usable checkpoint is step 1")
    assert_holds(tmp_path, 1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_flipped_bit_goes_unnoticed(tmp_path, data):
    folder = tmp_path / "d4"
    if not folder.exists():
        for step in (1, 2):
            save(folder, step)
    path = folder / data.draw(st.sampled_from(FILES))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        if path.suffix == ".json" and read_or_none(flipped) == json.loads(whole):
            assert_holds(folder, 2)  # white space
        else:
            assert "newest usable checkpoint is step 1" in refusal(load, folder, 2)
    finally:
        path.write_bytes(whole)


def read_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("content", [
    b"[]", b"{}", b"null", b'{"model_config": 3}', b'{"model_config": {}, "files_sha256": 3}', b"[" * 100_000, b"\xff"],
    ids=lambda content: repr(content[:40]))
def test_a_meta_that_is_not_what_was_written_never_hides_the_usable_ones(tmp_path, content):
    save(tmp_path, 1)
    (tmp_path / "meta_000003.json").write_bytes(content)
    assert "the newest usable checkpoint is step 1" in refusal(read_meta, tmp_path, 3)
    save(tmp_path, 2)
    DAMAGES["truncated"](tmp_path / FILES[0])
    assert "the newest usable checkpoint is step 1" in refusal(load, tmp_path, 2)


# --- finding ---------------------------------------------------------------------------------------------------------

def test_the_newest_complete_checkpoint_is_the_latest(tmp_path):
    for step in (5, 40, 9):
        save(tmp_path, step)
    (tmp_path / "model_000077.pt").write_bytes(b"no meta: never finished")
    for name in ("meta_x.json", "meta_.json", "meta_²2.json", "meta_000041.json.tmp"):
        (tmp_path / name).write_text("{}")
    assert checkpoint_steps(tmp_path) == [5, 9, 40]
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, "latest") == 40
    assert find_checkpoint(tmp_path, 9) == find_checkpoint(tmp_path, "9") == find_checkpoint(tmp_path, "000009") == 9


@pytest.mark.parametrize(("step", "words"), [
    (3, "no checkpoint of step 3 in"), ("3", "no checkpoint of step 3 in"), ("last", "neither a number nor 'latest'"),
    ("-4", "neither a number"), ("²", "neither a number"), ("", "neither a number"), ("4.0", "neither a number")])
def test_a_step_that_is_not_there_is_refused(tmp_path, step, words):
    for there in (1, 4):
        save(tmp_path, there)
    DAMAGES["truncated"](tmp_path / "model_000004.pt")
    message = refusal(find_checkpoint, tmp_path, step)
    assert words in message
    if "no checkpoint" in words:  # named is what can be loaded, not what is there
        assert message.endswith("the newest usable checkpoint is step 1")


@pytest.mark.parametrize("made", [False, True], ids=["missing", "empty"])
def test_a_folder_without_checkpoints_says_what_to_do(base_dir, made):
    folder = checkpoint_folder("d4")
    assert folder == base_dir / "base_checkpoints" / "d4"
    if made:
        folder.mkdir(parents=True)
    for step in ("latest", 3):
        message = refusal(find_checkpoint, folder, step)
        assert str(folder) in message and "--model-tag" in message


def test_another_runs_checkpoints_are_moved_aside_whole_also_twice_in_a_second(tmp_path, capsys):
    folder = tmp_path / "checkpoints" / "d4"
    set_aside(folder)
    for step in (1, 2, 3):
        save(folder, step)
        set_aside(folder)
        assert not folder.exists()
    moved = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(moved) == 3 and all(re.fullmatch(r"d4\.before-\d{8}-\d{6}(-\d)?", path.name) for path in moved)
    for step, path in enumerate(moved, start=1):
        assert_holds(path, step)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [str(path) for path in moved]


# --- upstream's ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_upstreams_checkpoint_gives_the_golden_logits(tmp_path, prefix):
    model, meta = load_model(write_upstream(tmp_path / "d4", prefix), find_checkpoint(tmp_path / "d4"), "cpu",
                             torch.float32)
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
    assert loaded.dtype == torch.float32 and torch.equal(loaded, state["transformer.wte.weight"].float())


def test_upstreams_configuration_without_a_window_pattern_is_full_attention(tmp_path):
    model, _ = load_model(write_upstream(tmp_path, window_pattern=None), 100, "cpu", torch.float32)
    assert model.config.windows == [CONFIG.sequence_len] * CONFIG.n_layer


@pytest.mark.parametrize(("config", "words"), [
    ({"window_size": 3}, "window_size"), ({"n_head": 0}, "cannot be"), ({"n_embd": "32"}, "cannot be"),
    ({"n_layer": "four"}, "cannot be"), ({"n_layer": 5}, "of another model"),
    ({"vocab_size": 1000}, "of another model")], ids=str)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, config, words):
    assert words in refusal(load_model, write_upstream(tmp_path, **config), 100, "cpu", torch.float32)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "half", "other bytes"])
def test_damage_of_upstreams_model_is_one_line_too(tmp_path, damage):
    DAMAGES[damage](write_upstream(tmp_path) / "model_000100.pt")
    assert "model_000100.pt is damaged or missing" in refusal(load_model, tmp_path, 100, "cpu", torch.float32)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), None, 5], ids=["list", "tensor", "none", "int"])
def test_a_file_without_a_state_dict_is_refused(tmp_path, value):
    torch.save(value, write_upstream(tmp_path) / "model_000100.pt")
    assert "no state dict" in refusal(load_model, tmp_path, 100, "cpu", torch.float32)


def test_upstream_can_read_ours(tmp_path):
    """It reads `model_config` and loads the state dict as it is."""
    config = GPTConfig(64, 100, 2, 2, 2, 32, "SL")
    model = GPT(config)
    model.init_weights(0)
    save_checkpoint(tmp_path, 1, model.state_dict(), {}, {**META, "model_config": config.to_dict()})
    meta = json.loads((tmp_path / "meta_000001.json").read_text())
    assert meta["step"] == 1 and meta["model_config"] == config.to_dict()
    state = torch.load(tmp_path / "model_000001.pt", weights_only=True)
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
