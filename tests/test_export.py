"""Exports: what transformers makes of them, what upstream and we do, and folders that are whole or not there."""

import json
import re
import shutil

import pytest
import torch
from checkpoints import META, write_upstream
from corpus import GOLDEN_TOKENIZER, golden_tokenizer
from golden_figures import CONFIG, arrays, batch, golden_model

from nanochat.checkpoint import checkpoint_folder, load_trained, save_checkpoint
from nanochat.common import UserError
from nanochat.export import folder as export_folder
from nanochat.export import formats
from nanochat.export.folder import check_replaceable, whole_folder
from nanochat.gpt import GPT, GPTConfig
from scripts.export import main

CPU = torch.device("cpu")


def write_model(n_layer=3, n_head=4, n_kv_head=2, dtype=torch.float32):
    """A checkpoint in which every parameter counts, of a vocabulary that is padded, with windows that bite."""
    config = GPTConfig(512, golden_tokenizer().vocab_size, n_layer, n_head, n_kv_head, 64, "SL")
    model = GPT(config, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_checkpoint(checkpoint_folder("tiny"), 7, model.state_dict(), {}, {
        **META, "model_config": config.to_dict(), "tokenizer_id": golden_tokenizer().tokenizer_id,
        "user_config": {"depth": 3, "tokenizer_dir": GOLDEN_TOKENIZER}, "total_batch_size_tokens": 256})


class NoTokenizer:
    """As large as the golden model's vocabulary."""

    vocab_size, bos_id, tokenizer_id, vocabulary = CONFIG.vocab_size, 0, "none", ({}, {}, "x")


def export(to, *more):
    assert main(["--model-tag", "tiny", "--to", str(to), *more]) == 0
    return to


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    found = pytest.importorskip("transformers", reason="the extra hf is not installed")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return found


# --- Hugging Face ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(1, 4, 4), (2, 4, 1), (5, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "embeddings in bf16"])
@torch.no_grad()
def test_transformers_gives_our_logits(transformers, tmp_path, sizes, dtype):
    write_model(*sizes, dtype)
    to = export(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    ours = load_trained("tiny", 7, CPU, torch.float32).model
    assert theirs.dtype == torch.float32 and not theirs.training
    for length in (600, 300, 1):  # beyond the longest that is attended to in blocks, beyond a window of 128
        idx = torch.randint(ours.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
        logits = ours(idx)
        assert logits.std() > 1
        torch.testing.assert_close(theirs(idx).logits, logits, rtol=0, atol=1e-5)
    idx = torch.randint(ours.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(2))
    loss = theirs(idx, labels=idx).loss
    torch.testing.assert_close(loss, ours(idx[:, :-1], idx[:, 1:]), rtol=1e-5, atol=0)


@torch.no_grad()
def test_upstreams_checkpoint_gives_upstreams_figures(transformers, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.trained.load_tokenizer", lambda folder: NoTokenizer())
    write_upstream(checkpoint_folder("tiny"), "_orig_mod.")
    to = export(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    idx, _ = batch()
    logits = model(idx).logits
    torch.testing.assert_close(logits, golden_model()(idx), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[0], arrays("outputs")["logits_row0"], rtol=0, atol=1e-4)


def test_tokenizer_and_generation_of_transformers(transformers, tmp_path):
    write_model()
    to = export(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(to, trust_remote_code=True)
    ours = golden_tokenizer()
    for text in ("The dog's 123 <|bos|> é漢\n\n  🚆", "", " <|assistant_end|>"):
        assert theirs(text)["input_ids"] == theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos_id and len(theirs) == ours.vocab_size
    assert theirs.decode([ours.bos_id, *ours.encode("a")], skip_special_tokens=True) == "a"
    model = transformers.AutoModelForCausalLM.from_pretrained(to, trust_remote_code=True)
    ids = torch.tensor([[ours.bos_id, *ours.encode("The dog")]])
    new = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)[0, ids.size(1):]
    with torch.no_grad():
        for token in new:
            assert token == model(ids).logits[0, -1].argmax()
            ids = torch.cat((ids, token.view(1, 1)), dim=1)


def test_the_cards_example_runs(transformers, tmp_path, monkeypatch, capsys):
    write_model()
    export(tmp_path / "my 'model'")
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "my 'model'" / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out.startswith("The")


def test_rows_padded_on_the_left_are_refused(transformers, tmp_path):
    write_model()
    model = transformers.AutoModelForCausalLM.from_pretrained(export(tmp_path / "out"), trust_remote_code=True)
    idx, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]])
    torch.testing.assert_close(model(idx, attention_mask=mask).logits[:, :2], model(idx[:, :2]).logits)
    with pytest.raises(ValueError, match="padded on the right"):
        model(idx, attention_mask=mask.flip(1))


def test_the_file_of_weights_is_read_by_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the extra hf is not installed")
    tensors = {"a": torch.randn(3, 5), "é": torch.randn(4, 6, dtype=torch.bfloat16).T, "empty": torch.zeros(0, 2)}
    formats.write_safetensors(tmp_path / "x.safetensors", tensors)
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].float()) for name in tensors)


# --- without transformers --------------------------------------------------------------------------------------------

def test_the_export_and_its_end(tmp_path, capsys):
    write_model()
    to = export(tmp_path / "out")
    names = ["README.md", "config.json", "export.json", "generation_config.json", "model.safetensors",
             "modeling_nanochat.py", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in to.iterdir()) == names
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    said = capsys.readouterr().out
    assert f"tiny_000007 is in {to}, " in said and "try it" in said
    manifest = json.loads((to / "export.json").read_text())
    assert (manifest["format"], manifest["model_tag"], manifest["step"]) == ("hf", "tiny", 7)
    assert not [name for name in names if str(tmp_path) in (to / name).read_bytes().decode(errors="replace")]


def test_weights_are_those_of_the_vocabulary(tmp_path):
    write_model()
    data = (export(tmp_path / "out") / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    model = load_trained("tiny", 7, CPU, torch.float32).model
    assert header.keys() - {"__metadata__"} == model.state_dict().keys()
    for name, value in model.state_dict().items():
        start, end = header[name]["data_offsets"]
        stored = torch.frombuffer(bytearray(data[8 + length + start:8 + length + end]), dtype=torch.float32)
        rows = header[name]["shape"][0]
        assert rows == (golden_tokenizer().vocab_size if value.size(0) == model.config.padded_vocab_size
                        else value.size(0))
        assert torch.equal(stored.view(header[name]["shape"]), value[:rows])


def test_upstreams_layout_is_a_cache_folder_for_its_programs_and_ours(tmp_path, monkeypatch, capsys):
    write_model(dtype=torch.bfloat16)
    before = load_trained("tiny", 7, CPU, torch.float32)
    to = export(tmp_path / "my cache", "--format", "upstream")
    assert f"NANOCHAT_BASE_DIR='{to}' python -m scripts.sample --model-tag tiny" in capsys.readouterr().out
    shutil.rmtree(checkpoint_folder("tiny"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(to))
    after = load_trained("tiny", "latest", CPU, torch.float32)
    assert after.tokenizer.tokenizer_id == before.tokenizer.tokenizer_id
    assert all(torch.equal(value, after.model.state_dict()[name]) for name, value in before.model.state_dict().items())
    assert (to / "tokenizer" / "tokenizer.pkl").exists() and (to / "tokenizer" / "token_bytes.pt").exists()
    state = torch.load(to / "base_checkpoints" / "tiny" / "model_000007.pt", weights_only=True)
    assert state["transformer.wte.weight"].dtype == torch.bfloat16 and state["lm_head.weight"].dtype == torch.float32
    meta = json.loads((to / "base_checkpoints" / "tiny" / "meta_000007.json").read_text())
    assert meta["step"] == 7 and meta["model_config"] == before.meta["model_config"]
    assert "tokenizer_dir" not in meta["user_config"]


# --- folders ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def place(tmp_path):
    """An empty folder."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def filled(folder, **files):
    with whole_folder(folder, {"format": "x"}) as new:
        for name, text in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            (new / name).write_text(text)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_earlier_export_is_replaced_whole(place):
    (place / "out").mkdir()  # an empty folder is taken
    filled(place / "out", **{"a": "1", "b/c": "2"})
    filled(place / "out", d="3")
    assert content(place / "out").keys() == {"d", "export.json"} and list(place.iterdir()) == [place / "out"]


@pytest.mark.parametrize("change", [
    lambda out: (out / "note").write_text("mine"), lambda out: (out / "a").write_text("mine"),
    lambda out: (out / "link").symlink_to(out / "a"), lambda out: (out / "export.json").unlink(),
    lambda out: (out / "export.json").write_text("{"), lambda out: (out / "export.json").write_text("{}"),
], ids=["file added", "file changed", "link added", "no manifest", "damaged manifest", "empty manifest"])
def test_what_no_export_wrote_is_kept(place, change):
    filled(place / "out", **{"a": "1", "b/c": "2"})
    change(place / "out")
    before = content(place / "out")
    with pytest.raises(UserError, match="give a new folder"):
        filled(place / "out", d="3")
    assert content(place / "out") == before and list(place.iterdir()) == [place / "out"]


def test_files_and_links_are_no_folders(place):
    (place / "file").write_text("")
    (place / "link").symlink_to(place)
    for name in ("file", "link"):
        with pytest.raises(UserError, match="give a new one"):
            check_replaceable(place / name)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("writing file failed\nmore"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_what_fails_on_the_way_leaves_all_as_it_was(place, error, there):
    if there:
        filled(place / "out", a="1")
    before = content(place)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError), \
            whole_folder(place / "out", {}) as new:
        (new / "d").write_text("3")
        raise error
    assert content(place) == before and len(list(place.iterdir())) == there


def test_a_rename_that_fails_puts_the_earlier_export_back(place, monkeypatch):
    filled(place / "out", a="1")
    before, rename, calls = content(place), export_folder.os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(export_folder.os, "rename", second_fails)
    with pytest.raises(UserError, match="Input/output error"):
        filled(place / "out", d="3")
    assert content(place) == before and len(calls) == 3
    calls[:] = calls[:1]
    with pytest.raises(UserError, match="Input/output error"):
        filled(place / "new", d="3")
    assert content(place) == before


@pytest.mark.parametrize(("arguments", "words"), [
    (["--to", "taken"], "no export wrote"), (["--to", "out", "--step", "9"], "no checkpoint of step 9"),
    (["--to", "out", "--model-tag", "large"], "no checkpoint in"), (["--to", "file/out"], "cannot be written"),
])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, refusal, arguments, words):
    write_model()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    assert words in refusal(main, ["--model-tag", "tiny", *arguments]).splitlines()[-1]
    assert sorted(tmp_path.iterdir()) == before
