"""Evaluations of a Hugging Face model: a GPT-2 with random weights against its own logits."""

import json
import math

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle
from corpus import WORDS, write_corpus

from nanochat.common import UserError
from nanochat.core_eval import bundle_folder, evaluate_core, load_hf
from nanochat.dataset import open_dataset
from nanochat.loss_eval import SplitRows
from nanochat.tokens import token_shards
from scripts.base_eval import main

N_POSITIONS, VOCAB = 64, 300
CPU = torch.device("cpu")


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[hf\]'"):
        load_hf("gpt2", CPU, torch.float32)


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
    assert main(["--hf-path", str(gpt2), "--eval", "core", "--max-per-task", "5",
                 "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    subject = load_hf(str(gpt2), CPU, torch.float32)
    accuracy = accuracy_by_brute_force(subject.model, subject.tokenizer, bundle, 5)
    expected = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3),
                "schema": (accuracy["schema"] - 0.25) / 0.75, "langua": accuracy["langua"]}
    assert found["core_tasks"] == pytest.approx(expected)
    assert found["model_tag"] == str(gpt2) and found["step"] is None
    assert (base_dir / "base_eval" / "tiny-gpt2.csv").exists()


def test_bits_per_byte_are_those_of_brute_force(gpt2, tmp_path):
    corpus, out = str(write_corpus(tmp_path / "corpus", n_shards=2)), tmp_path / "out.json"
    assert main(["--hf-path", str(gpt2), "--eval", "bpb", "--dataset", corpus, "--split-tokens",
                 "256", "--device-batch-size", "2", "--out", str(out)]) == 0
    subject = load_hf(str(gpt2), CPU, torch.float32)
    tokenizer = subject.tokenizer
    shards = token_shards(open_dataset(corpus), tokenizer, "val")
    rows = SplitRows(shards, N_POSITIONS, 256, "carry")
    nats = n_bytes = 0
    for row in rows.plan:
        inputs, targets, _, _ = (torch.from_numpy(part) for part in rows.batch([row], 1))
        with torch.no_grad():
            log_p = subject.model(inputs).double().log_softmax(-1)
        for position, target in enumerate(targets[0].tolist()):
            if target not in (-1, tokenizer.bos_id):
                nats -= log_p[0, position, target].item()
                n_bytes += len(tokenizer.decode([target]).encode())
    found = json.loads(out.read_text())
    assert found["val_bpb"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)


def test_long_prompts_lose_their_beginning(gpt2, tmp_path):
    subject, lengths = load_hf(str(gpt2), CPU, torch.float32), []
    subject.model.register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].size(1)))
    evaluate_core(subject.model, subject.tokenizer, write_bundle(tmp_path / "bundle", words=30),
                  "cpu", max_tokens=subject.max_tokens)
    assert max(lengths) == subject.max_tokens == N_POSITIONS


def test_text_is_encoded_unchanged_and_the_loss_is_that_of_the_logits(gpt2):
    subject = load_hf(str(gpt2), CPU, torch.float32)
    tokenizer, text = subject.tokenizer, "the  red , dog's\n é 漢字"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.bos_id not in ids
    n_bytes = tokenizer.token_bytes()
    assert n_bytes[ids].sum() == len(text.encode()) and n_bytes[tokenizer.bos_id] == 0
    idx, targets = torch.tensor([[tokenizer.bos_id, *ids[:-1]]]), torch.tensor([ids])
    targets[0, 2] = -1
    log_p = subject.model(idx).log_softmax(-1)[0]
    expected = [-log_p[i, token].item() if token >= 0 else 0.0
                for i, token in enumerate(targets[0].tolist())]
    assert subject.model(idx, targets, "none")[0].tolist() == pytest.approx(expected, rel=1e-4)


def test_code_that_comes_with_a_model_is_not_run(gpt2, tmp_path):
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (gpt2 / "config.json").write_text(
        json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_hf(str(gpt2), CPU, torch.float32)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--hf-path", "nowhere/at-all"], "cannot be loaded"),
    (["--hf-path", "x", "--eval", "sample"], "core,bpb,position"),
])
def test_a_mistake_is_one_line(gpt2, refusal, arguments, words):
    assert words in refusal(main, arguments).splitlines()[-1]
