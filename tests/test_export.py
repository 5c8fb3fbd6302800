"""Exports: logits and ids in transformers, upstream's layout, and folders that are kept."""

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
from nanochat.export import new_folder
from nanochat.gpt import GPT, GPTConfig
from scripts.export import main

CPU = torch.device("cpu")


def write_model(n_layer=3, n_head=4, n_kv_head=2, dtype=torch.float32):
    """Save a checkpoint: random values, a padded vocabulary, windows that hide tokens."""
    tokenizer = golden_tokenizer()
    config = GPTConfig(512, tokenizer.vocab_size, n_layer, n_head, n_kv_head, 64, "SL")
    model = GPT(config, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    meta = {**META, "model_config": config.to_dict(), "tokenizer_id": tokenizer.tokenizer_id,
            "user_config": {"depth": 3, "tokenizer_dir": GOLDEN_TOKENIZER},
            "total_batch_size_tokens": 256}
    save_checkpoint(checkpoint_folder("tiny"), 7, model.state_dict(), {}, meta)


def export(to, *more):
    main(["--model-tag", "tiny", "--to", str(to), *more])
    return to


def random_ids(vocab_size, *shape):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def transformers(monkeypatch, tmp_path):
    found = pytest.importorskip("transformers", reason="the extra hf is not installed")
    cache = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(cache, str(tmp_path / "modules"))
    return found


@pytest.fixture
def load(transformers):
    """Load an export's model as its card says."""
    def load(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return load


# --- transformers ---------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [(1, 4, 4), (2, 4, 1), (5, 4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16 tables"])
@torch.no_grad()
def test_logits_are_equal_bit_for_bit(load, tmp_path, sizes, dtype):
    write_model(*sizes, dtype)
    theirs = load(export(tmp_path / "out"))
    ours = load_trained("tiny", 7, CPU, torch.float32).model
    assert theirs.dtype == torch.float32 and not theirs.training
    for length in (600, 300, 64, 1):  # beyond blockwise attention, beyond the window of 128, within
        idx = random_ids(ours.config.vocab_size, 2, length)
        logits = ours(idx)
        assert logits.std() > 1
        assert torch.equal(theirs(idx).logits, logits)
    loss = theirs(idx := random_ids(ours.config.vocab_size, 2, 9), labels=idx).loss
    torch.testing.assert_close(loss, ours(idx[:, :-1], idx[:, 1:]), rtol=1e-5, atol=0)


@torch.no_grad()
def test_a_checkpoint_of_upstream_gives_upstreams_logits(load, tmp_path, monkeypatch):
    class NoTokenizer:
        vocab_size, bos_id, tokenizer_id = CONFIG.vocab_size, 0, "none"
        vocabulary = {}, {}, "x"

    monkeypatch.setattr("nanochat.checkpoint.load_tokenizer", lambda folder: NoTokenizer())
    write_upstream(checkpoint_folder("tiny"), "_orig_mod.")
    model = load(export(tmp_path / "out"))
    idx, _ = batch()
    logits = model(idx).logits
    torch.testing.assert_close(logits, golden_model()(idx), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[0, ::16], arrays("expected")["logits"], rtol=0, atol=1e-4)


def test_tokenizer_and_generation(transformers, load, tmp_path):
    write_model()
    to = export(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(to, trust_remote_code=True)
    ours = golden_tokenizer()
    for text in ("The dog's 123 <|bos|> é漢\n\n  🚆", "", " <|assistant_end|>"):
        assert theirs(text)["input_ids"] == theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.bos_token_id == theirs.eos_token_id == ours.bos_id
    assert len(theirs) == ours.vocab_size
    assert theirs.decode([ours.bos_id, *ours.encode("a")], skip_special_tokens=True) == "a"

    model = load(to)
    ids = torch.tensor([[ours.bos_id, *ours.encode("The dog")]])
    output = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    with torch.no_grad():
        for token in output[0, ids.size(1):]:
            assert token == model(ids).logits[0, -1].argmax()
            ids = torch.cat((ids, token.view(1, 1)), dim=1)


def test_the_example_of_the_card_runs(transformers, tmp_path, monkeypatch, capsys):
    write_model()
    card = (export(tmp_path / "my 'model'") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], {})
    assert capsys.readouterr().out.startswith("The")


def test_rows_padded_on_the_left_are_refused(load, tmp_path):
    write_model()
    model = load(export(tmp_path / "out"))
    idx, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[1, 1, 0]])
    with_padding = model(idx, attention_mask=mask).logits[:, :2]
    torch.testing.assert_close(with_padding, model(idx[:, :2]).logits)
    with pytest.raises(ValueError, match="padded on the right"):
        model(idx, attention_mask=mask.flip(1))


# --- without transformers -------------------------------------------------------------------------

def test_an_export_is_complete_and_names_no_path_of_this_machine(tmp_path, capsys):
    write_model()
    to = export(tmp_path / "exports" / "out")
    names = {"README.md", "config.json", "generation_config.json", "model.safetensors",
             "modeling_nanochat.py", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in to.iterdir()} == names and list(to.parent.iterdir()) == [to]
    assert f"tiny_000007 is exported to {to}, " in capsys.readouterr().out
    assert not [name for name in names if str(tmp_path).encode() in (to / name).read_bytes()]

    data = (to / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    assert (8 + length) % 64 == 0
    for name, value in load_trained("tiny", 7, CPU, torch.float32).model.state_dict().items():
        start, end = (8 + length + offset for offset in header[name]["data_offsets"])
        stored = torch.frombuffer(bytearray(data[start:end]), dtype=torch.float32)
        n_rows = golden_tokenizer().vocab_size if value.size(0) == 1088 else value.size(0)
        assert torch.equal(stored.view(header[name]["shape"]), value[:n_rows])


def test_upstreams_layout_is_a_cache_folder(tmp_path, monkeypatch, capsys):
    write_model(dtype=torch.bfloat16)
    before = load_trained("tiny", 7, CPU, torch.float32)
    to = export(tmp_path / "my cache", "--format", "upstream")
    command = f"NANOCHAT_BASE_DIR='{to}' python -m scripts.sample --model-tag tiny"
    assert command in capsys.readouterr().out

    checkpoint = to / "base_checkpoints" / "tiny"
    state = torch.load(checkpoint / "model_000007.pt", weights_only=True)
    assert state["transformer.wte.weight"].dtype == torch.bfloat16
    assert state["lm_head.weight"].dtype == torch.float32
    meta = json.loads((checkpoint / "meta_000007.json").read_text())
    assert meta["step"] == 7 and meta["model_config"] == before.meta["model_config"]
    assert "tokenizer_dir" not in meta["user_config"]
    assert {"tokenizer.pkl", "token_bytes.pt"} <= {p.name for p in (to / "tokenizer").iterdir()}

    shutil.rmtree(checkpoint_folder("tiny"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(to))
    after = load_trained("tiny", "latest", CPU, torch.float32)
    assert after.tokenizer.tokenizer_id == before.tokenizer.tokenizer_id
    weights = after.model.state_dict()
    assert all(torch.equal(value, weights[name])
               for name, value in before.model.state_dict().items())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"),
                                   RuntimeError("writing file failed\nmore"), KeyboardInterrupt()])
def test_a_failed_export_leaves_nothing(tmp_path, error):
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    out = tmp_path / "exports" / "out"
    with pytest.raises(expected), new_folder(out) as folder:
        (folder / "file").write_text("3")
        raise error
    assert not list(out.parent.iterdir())


def test_a_folder_that_another_process_filled_is_kept(tmp_path):
    with pytest.raises(UserError, match="cannot be written"), new_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("mine")
    assert (tmp_path / "out" / "file").read_text() == "mine"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--to", "taken"], "is not empty"), (["--to", "file"], "is not a folder"),
    (["--to", "file/out"], "cannot be written"),
    (["--to", "out", "--step", "9"], "no checkpoint of step 9"),
    (["--to", "out", "--model-tag", "large"], "no checkpoint in"),
])
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, refusal, arguments, words):
    write_model()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert words in refusal(main, ["--model-tag", "tiny", *arguments]).splitlines()[-1]
    assert sorted(tmp_path.rglob("*")) == before
