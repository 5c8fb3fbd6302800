"""Files and names of strangers: they run nothing, write nowhere else, and end in one line."""

import gzip
import io
import json
import pickle
import zipfile

import pytest
import torch
from checkpoints import Malicious
from damage import bundle

from nanochat import core_eval as core_bundle
from nanochat.checkpoint import checkpoint_folder, load_model
from nanochat.common import UserError, check_name
from nanochat.config import TrainingConfig
from nanochat.dataset import open_dataset
from nanochat.gpt import LARGEST, GPTConfig
from nanochat.runlog import RunLog
from nanochat.text_folder import folder_documents
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

NAMES = ["../x", "../../evil", "/etc/passwd", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\n", "a\0b", "x" * 300,
         "-x", "~", "a b", "ü", "\u202ex", "\ud800", "con:", "$(id)", "`id`", "a;b", "*", "", None, 7, ["a"],
         {"a": 1}, True]


# --- names -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_lead_elsewhere_are_refused_wherever_they_are_used(tmp_path, base_dir, name):
    uses = [lambda: check_name("name", name), lambda: checkpoint_folder(name),
            lambda: RunLog.create(tmp_path, name, {}), lambda: RunLog.resume(tmp_path, name, 1)]
    if isinstance(name, str) and name:  # from the command line; empty: made from the rest
        uses += [lambda: TrainingConfig(model_tag=name), lambda: TrainingConfig(run_id=name)]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("one\n\n" * 9)
    (tmp_path / "corpus" / "b.txt").write_text("two\n\n" * 9)
    manifest = open_dataset(tmp_path / "corpus").shards[0].parent / "dataset.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "dataset_id": name}))
    before = sorted(path for path in tmp_path.rglob("*"))
    for use in (*uses, lambda: open_dataset(tmp_path / "corpus")):
        with pytest.raises(UserError, match="cannot name a folder") as refused:
            use()
        assert len(str(refused.value)) < 500
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_folder_with_a_long_or_strange_name_has_a_dataset_id(tmp_path):
    for name in ("x" * 250, "ü b\n", "$(id)"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_text(f"text {i}")
        assert check_name("id", open_dataset(tmp_path / name).dataset_id)
    with pytest.raises(UserError, match="is no folder"):
        open_dataset("x" * 5000)


# --- sizes -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [0, -1, 1.5, 10**20, 10**400, "4", None, True, [4], float("nan")],
                         ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("name", LARGEST)
def test_sizes_that_no_model_has(name, value):
    with pytest.raises(UserError, match=f"a model with {name}"):
        GPTConfig.from_dict({name: value})


@pytest.mark.parametrize(("flag", "value"), [("depth", 10**20), ("depth", 10**400), ("max_seq_len", 10**400),
                                             ("aspect_ratio", 10**400), ("device_batch_size", -10**400)])
def test_flags_beyond_all_bounds(flag, value):
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}"):
        TrainingConfig(**{flag: value})


@pytest.mark.parametrize("change", [{"n_layer": 9999}, {"n_embd": 1 << 20, "n_head": 2}, {"vocab_size": 1 << 30}])
def test_a_checkpoint_that_describes_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path, change):
    torch.save({"w": torch.zeros(9)}, tmp_path / "model_000001.pt")
    sizes = {"sequence_len": 32, "vocab_size": 64, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 32}
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": {**sizes, **change}}))
    with pytest.raises(UserError, match="is of another model: its meta describes"):
        load_model(tmp_path, 1, torch.device("cpu"), torch.float32)


def test_vocabularies_that_cannot_be():
    with pytest.raises(UserError, match="too large: at most"):
        train_tokenizer(["abc"], 1 << 33)
    bytes_alone = {bytes([i]): i for i in range(256)}
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    for pattern in ("(?!)", r"\w+", "a", r"\p{L}+|\s"):
        with pytest.raises(UserError, match="leaves out text"):
            Tokenizer(bytes_alone, special, pattern)


# --- pickles ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))],
                         ids=["zip", "bare pickle"])
def test_a_checkpoint_that_would_run_code_runs_none(tmp_path, write):
    evil = Malicious(tmp_path / "ran")
    (tmp_path / "meta_000001.json").write_text(json.dumps({"model_config": {}}))  # upstream's have no digests
    write({"w": evil}, tmp_path / "model_000001.pt")
    with pytest.raises(UserError, match=r"model_000001\.pt.*not a file of tensors alone"):
        load_model(tmp_path, 1, torch.device("cpu"), torch.float32)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # it does where it is let
    assert (tmp_path / "ran").exists()


# --- text ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [b"\0", b'{"text": "a"}\n'], ids=["one line", "many lines"])
def test_a_gzip_bomb_is_refused(tmp_path, line, monkeypatch):
    monkeypatch.setattr("nanochat.text_folder._MAX_SAMPLE_BYTES", 1 << 22)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * ((8 << 20) // len(line))))
    with pytest.raises(UserError, match=r"a\.jsonl\.gz, line \d+: the file unpacks to more than 300"):
        list(folder_documents(tmp_path))


@pytest.mark.parametrize("line", [
    b'{"text": ' + b"9" * 5000 + b"}", b'{"a": ' * 5000, b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"text": ["a"]}', b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\x00", b"NaN"], ids=range(7))
def test_a_hostile_line_of_json_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        list(folder_documents(tmp_path))


# --- archives --------------------------------------------------------------------------------------------------------

def archive(tmp_path, change):
    """A sound bundle's zip with entries added by `change(zip file)`."""
    (tmp_path / "made").mkdir()
    bundle(tmp_path / "made")
    data, root = io.BytesIO(), tmp_path / "made" / "b"
    with zipfile.ZipFile(data, "w") as file:
        for path in root.rglob("*"):
            if path.is_file():
                file.write(path, f"eval_bundle/{path.relative_to(root)}")
        change(file)
    return data.getvalue()


def fetched(content, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.http_get", lambda url, file: file.write(content))
    return core_bundle.download_bundle("http://127.0.0.1/eval_bundle.zip")


@pytest.mark.parametrize("name", ["../evil", "/evil", "eval_bundle/../../evil", "eval_bundle/a\0b"])
def test_entries_that_lead_out_of_the_archive_stay_within(tmp_path, base_dir, monkeypatch, name):
    def evil(file):
        file.writestr(name, "evil")
    folder = fetched(archive(tmp_path, evil), monkeypatch)
    assert core_bundle.read_bundle(folder) and all(path.is_relative_to(folder) for path in tmp_path.rglob("evil"))
    assert sorted(path.name for path in base_dir.iterdir()) == ["eval_bundle", "eval_bundle.lock"]


@pytest.mark.parametrize("spoil", [
    lambda data: data.replace(b"icl_task_type", b"icl_task_typo"), lambda data: data[:len(data) // 2],
    lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"),
    lambda data: data.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x00\x00",
                              b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63\x00"),
], ids=["other bytes", "half", "encrypted", "unknown compression"])
def test_a_spoilt_archive_leaves_nothing(tmp_path, base_dir, monkeypatch, spoil):
    sound = archive(tmp_path, lambda file: None)
    assert spoil(sound) != sound
    with pytest.raises(UserError, match="could not download"):
        fetched(spoil(sound), monkeypatch)
    assert [path.name for path in base_dir.iterdir()] == ["eval_bundle.lock"]


@pytest.mark.parametrize(("limit", "change"), [
    ("MAX_BYTES", None),
    ("MAX_UNPACKED_BYTES", lambda file: file.writestr("big", bytes(1 << 20), zipfile.ZIP_DEFLATED)),
    ("MAX_FILES", None), ("MAX_NAME_LENGTH", lambda file: file.writestr("a/" * 200 + "b", ""))])
def test_an_archive_beyond_the_limits_is_refused(tmp_path, base_dir, monkeypatch, limit, change):
    content = archive(tmp_path, change or (lambda file: None))
    monkeypatch.setattr(core_bundle, limit, {"MAX_BYTES": 100, "MAX_UNPACKED_BYTES": 1 << 19, "MAX_FILES": 2,
                                             "MAX_NAME_LENGTH": 200}[limit])
    with pytest.raises(UserError, match=r"could not download .*(larger|unpacks|too long)"):
        fetched(content, monkeypatch)
    assert [path.name for path in base_dir.iterdir()] == ["eval_bundle.lock"]


@pytest.mark.parametrize("uri", ["../../secret.jsonl", "/etc/passwd", "a\\0.jsonl", ".", "d"])
def test_a_bundle_reads_its_own_files_alone(tmp_path, uri):
    bundle(tmp_path)
    (tmp_path / "b" / "eval_data" / "d").mkdir()
    (tmp_path / "secret.jsonl").write_text((tmp_path / "b" / "eval_data" / "t.jsonl").read_text())
    path = tmp_path / "b" / "core.yaml"
    path.write_text(path.read_text().replace("t.jsonl", f'"{uri}"'))
    with pytest.raises(UserError, match=r"leads out of the bundle|cannot read"):
        core_bundle.read_bundle(tmp_path / "b")


def test_files_of_a_downloaded_bundle_are_checked(tmp_path, base_dir, monkeypatch):
    folder = fetched(archive(tmp_path, lambda file: None), monkeypatch)
    path = folder / "eval_data" / "t.jsonl"
    path.write_text(path.read_text().replace("q0", "q1"))
    with pytest.raises(UserError, match=r"t\.jsonl is damaged"):
        core_bundle.read_bundle(folder)
