"""CORE of a Hugging Face model: a GPT-2 with random weights against its own logits."""

import json
import sys

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle
from corpus import WORDS

from nanochat.common import UserError
from nanochat.core_eval import bundle_folder, evaluate_core, load_hf
from scripts.base_eval import main

N_POSITIONS, VOCAB = 64, 300
CPU = torch.device("cpu")


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """The folder of a small GPT-2 with its own byte-level tokenizer, saved by transformers."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    tokenizer, bos = tokenizers.ByteLevelBPETokenizer(), "<|endoftext|>"
    tokenizer.train_from_iterator(
        [" ".join(WORDS)] * 5, VOCAB, special_tokens=[bos], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token=bos, eos_token=bos)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(fast), n_positions=N_POSITIONS, n_embd=32, n_layer=2, n_head=2,
        initializer_range=0.5))
    folder = tmp_path / "tiny-gpt2"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_core_is_that_of_brute_force(gpt2, base_dir, tmp_path):
    bundle, out = write_bundle(bundle_folder()), tmp_path / "out.json"
    assert main(["--hf-path", str(gpt2), "--max-per-task", "5", "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    subject = load_hf(str(gpt2), CPU, torch.float32)
    with torch.no_grad():
        accuracy = accuracy_by_brute_force(subject.model, subject.tokenizer, bundle, 5)
    expected = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3),
                "schema": (accuracy["schema"] - 0.25) / 0.75, "langua": accuracy["langua"]}
    assert results["core_tasks"] == pytest.approx(expected)
    assert results["model_tag"] == str(gpt2)
    assert (base_dir / "base_eval" / "tiny-gpt2.csv").exists()
    long_prompts = write_bundle(tmp_path / "long", words=30)
    evaluate_core(subject.model, subject.tokenizer, long_prompts, CPU,
                  max_tokens=subject.max_tokens)  # GPT-2 fails beyond its positions


def test_code_that_comes_with_a_model_is_not_run(gpt2, tmp_path):
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (gpt2 / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_hf(str(gpt2), CPU, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_mistake_is_one_line(monkeypatch, refusal):
    assert "only --eval core" in refusal(main, ["--hf-path", "x", "--eval", "sample"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[hf]'" in refusal(main, ["--hf-path", "x"])
