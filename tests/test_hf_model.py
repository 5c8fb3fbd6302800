"""base_eval on a model of Hugging Face: a GPT-2 with random weights, against its own logits."""

import json
import math

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle
from corpus import WORDS, write_corpus

from nanochat.common import UserError
from nanochat.core_bundle import bundle_folder
from nanochat.core_eval import evaluate_core
from nanochat.dataset import open_dataset
from nanochat.hf_model import load_hf
from nanochat.loss_eval import SplitRows
from nanochat.tokens import token_shards
from scripts.base_eval import main

N_POSITIONS, VOCAB = 64, 300


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'nanochat\[hf\]'"):
        load_hf("gpt2", torch.device("cpu"), torch.float32)


@pytest.fixture
def gpt2(tmp_path, monkeypatch):
    """The folder of a small GPT-2 with a byte-level tokenizer of its own, saved by transformers itself."""
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([" ".join(WORDS)] * 5, VOCAB, special_tokens=["<|endoftext|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, bos_token="<|endoftext|>",
                                                eos_token="<|endoftext|>")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(fast), n_positions=N_POSITIONS, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5))
    folder = tmp_path / "tiny-gpt2"
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_core_and_bits_per_byte_are_those_of_brute_force(gpt2, tmp_path, base_dir):
    bundle, corpus = write_bundle(bundle_folder()), str(write_corpus(tmp_path / "corpus", n_shards=2))
    out = tmp_path / "out.json"
    assert main(["--hf-path", str(gpt2), "--eval", "core,bpb,position", "--dataset", corpus, "--split-tokens", "256",
                 "--device-batch-size", "2", "--max-per-task", "5", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    subject = load_hf(str(gpt2), torch.device("cpu"), torch.float32)
    logits, tokenizer = subject.model.model, subject.tokenizer
    accuracy = accuracy_by_brute_force(lambda idx: logits(idx).logits, tokenizer, bundle, 5)
    expected = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3), "schema": (accuracy["schema"] - 0.25) / 0.75,
                "langua": accuracy["langua"]}
    assert found["core_tasks"] == pytest.approx(expected)
    assert (base_dir / "base_eval" / "tiny-gpt2.csv").exists()
    nats = n_bytes = 0
    shards = token_shards(open_dataset(corpus), tokenizer, "val")
    rows = SplitRows(shards, N_POSITIONS, 256, "carry")
    for row in rows.plan:
        inputs, targets, _, _ = (torch.from_numpy(part) for part in rows.batch([row], 1))
        with torch.no_grad():
            log_p = logits(inputs).logits.double().log_softmax(-1)
        for position, target in enumerate(targets[0].tolist()):
            if target not in (-1, tokenizer.bos_id):
                nats -= log_p[0, position, target].item()
                n_bytes += len(tokenizer.decode([target]).encode())
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert found["model_tag"] == str(gpt2) and found["step"] is None


def test_prompts_longer_than_the_model_takes_lose_their_beginning(gpt2, tmp_path):
    subject = load_hf(str(gpt2), torch.device("cpu"), torch.float32)
    assert subject.max_tokens == N_POSITIONS
    bundle = write_bundle(tmp_path / "bundle", words=30)
    lengths = []
    subject.model.register_forward_pre_hook(lambda module, args: lengths.append(args[0].size(1)))
    evaluate_core(subject.model, subject.tokenizer, bundle, "cpu", max_tokens=subject.max_tokens)
    assert max(lengths) == N_POSITIONS


def test_text_is_encoded_as_it_is(gpt2):
    tokenizer = load_hf(str(gpt2), torch.device("cpu"), torch.float32).tokenizer
    text = "the  red , dog's\n é 漢字"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.bos_id not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) and tokenizer.token_bytes()[tokenizer.bos_id] == 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["--hf-path", "nowhere/at-all"], "cannot be loaded"),
    (["--hf-path", "x", "--eval", "sample"], "core,bpb,position"),
])
def test_a_mistake_is_one_line(gpt2, refusal, arguments, words):
    assert words in refusal(main, arguments).splitlines()[-1]


def test_code_that_comes_with_a_model_is_not_run(gpt2, tmp_path, capsys):
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (gpt2 / "config.json").write_text(json.dumps({
        **config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_hf(str(gpt2), torch.device("cpu"), torch.float32)
    assert not (tmp_path / "ran").exists()
