"""base_eval as a person runs it, on checkpoints of ours and of upstream, and with every mistake."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import DAMAGES, META, TINY_LENGTH, write_model, write_upstream
from core_bundles import accuracy_by_brute_force, write_bundle
from corpus import GOLDEN_TOKENIZER, TINY_FLAGS, golden_tokenizer, write_corpus
from golden_figures import CONFIG, golden_model

from nanochat.checkpoint import checkpoint_folder, save_checkpoint
from nanochat.common import runs_dir
from nanochat.core_bundle import bundle_folder
from nanochat.dataloader import RowPlanner, TokenLoader
from nanochat.dataset import open_dataset
from nanochat.engine import generate
from nanochat.lane_b.measure.position_losses import read_position_losses
from nanochat.runlog import read_run
from nanochat.tokens import token_shards
from scripts import base_train
from scripts.base_eval import main

pytestmark = pytest.mark.usefixtures("fp32")

@pytest.fixture
def corpus(tmp_path):
    return str(write_corpus(tmp_path / "corpus", n_shards=2))


def flags(corpus, *more):
    return ["--model-tag", "tiny", "--dataset", corpus, "--tokenizer-dir", GOLDEN_TOKENIZER, "--split-tokens", "512",
            "--device-batch-size", "2", *more]


def results(arguments, tmp_path):
    """What the program writes when it is run with these arguments."""
    path = tmp_path / "results.json"
    assert main([*arguments, "--output-json", str(path)]) == 0
    return json.loads(path.read_text())


def test_text_and_tokenizer_are_the_checkpoints_own_where_none_are_given(corpus, tmp_path):
    write_model(user_config={"dataset": str(corpus), "tokenizer_dir": str(GOLDEN_TOKENIZER)})
    small = ["--split-tokens", "512", "--device-batch-size", "2"]
    own = results(["--model-tag", "tiny", "--eval", "bpb", *small], tmp_path)
    assert own == results(flags(corpus, "--eval", "bpb"), tmp_path)


def brute_force(model, tokenizer, corpus, split, n_batches, rows=2, length=TINY_LENGTH):
    """Bits per byte token by token in fp64, from logits; {tokens since BOS: [nats]}."""
    nats = n_bytes = 0.0
    by_position = {}
    shards = token_shards(open_dataset(corpus), tokenizer, split)
    with TokenLoader(shards, rows, length, shuffle=False) as loader, torch.no_grad():
        for _ in range(n_batches):
            inputs, targets = next(loader)
            losses = -torch.log_softmax(model(inputs).double(), dim=-1)
            for row in range(rows):
                since = 0
                for t in range(length):
                    since = 0 if inputs[row, t] == tokenizer.bos_id else since + 1
                    target = targets[row, t].item()
                    if target == tokenizer.bos_id:
                        continue
                    loss = losses[row, t, target].item()
                    nats, n_bytes = nats + loss, n_bytes + len(tokenizer.decode([target]).encode())
                    by_position.setdefault(since, []).append(loss)
    return nats / math.log(2) / n_bytes, by_position


def test_bits_per_byte_and_losses_by_position_are_those_of_brute_force(corpus, tmp_path, capsys):
    model = write_model()
    found = results(flags(corpus, "--eval", "bpb,position"), tmp_path)
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        bits, by_position = brute_force(model, golden_tokenizer(), corpus, split, n_batches=4)
        assert found[f"{split}_bpb"] == pytest.approx(bits, rel=1e-6)
        assert f"{split}: {bits:.4f} bits per byte" in printed
    assert found["counts_by_position"] == [len(by_position.get(n, ())) for n in range(TINY_LENGTH)]
    for n, nats in enumerate(found["nats_by_position"]):
        mean = sum(by_position[n]) / len(by_position[n]) if n in by_position else None
        assert nats == (None if mean is None else pytest.approx(mean, rel=1e-6))
    assert (found["model_tag"], found["step"], found["tokens"]) == ("tiny", 7, 7 * 256)
    assert found["tokenizer_id"] == golden_tokenizer().tokenizer_id
    assert found["dataset_id"] == open_dataset(corpus).dataset_id


def test_lane_b_reads_the_losses_by_position(corpus, tmp_path):
    write_model()
    found = results(flags(corpus, "--eval", "position"), tmp_path)
    losses = read_position_losses(str(tmp_path / "results.json"), runs_dir())
    assert losses.tokens == 7 * 256
    assert losses.counts.tolist() == found["counts_by_position"]
    assert losses.dataset_id == found["dataset_id"] and losses.tokenizer_id == found["tokenizer_id"]


def test_samples_continue_the_beginnings_of_validation_documents(corpus, tmp_path, capsys):
    model, tokenizer = write_model(), golden_tokenizer()
    found = results(flags(corpus, "--eval", "sample"), tmp_path)
    shard = token_shards(open_dataset(corpus), tokenizer, "val")[0]
    printed = capsys.readouterr().out
    for i, sample in enumerate(found["samples"]):
        prompt = shard.tokens[shard.offsets[i]:shard.offsets[i + 1]][:17].tolist()
        [new] = generate(model, prompt, 96, temperature=0.8, top_k=50, seed=i, stop_ids=(tokenizer.bos_id,))
        assert sample == {"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)}
        assert f"{sample['prompt']}[...]{sample['text']}" in printed
    assert len(found["samples"]) == 2 and "val_bpb" not in found


def test_prompts_are_continued_as_asked(tmp_path, capsys):
    model, tokenizer = write_model(), golden_tokenizer()
    sampling = ["--num-samples", "2", "--max-new-tokens", "5", "--temperature", "0.5", "--top-k", "0"]
    found = results(["--model-tag", "tiny", "--tokenizer-dir", GOLDEN_TOKENIZER, "--eval", "sample", *sampling,
                     "--prompt", "the red", "--prompt", ""], tmp_path)  # no text is looked for
    expected = [{"prompt": prompt, "text": tokenizer.decode(new)} for seed, prompt in enumerate(("the red", ""))
                for new in generate(model, [tokenizer.bos_id, *tokenizer.encode(prompt)], 5, n_samples=2,
                                    temperature=0.5, seed=seed, stop_ids=(tokenizer.bos_id,))]
    assert found["samples"] == expected and found["dataset_id"] is None
    assert f"sample: the red[...]{expected[0]['text']}" in capsys.readouterr().out


def test_the_step_asked_for_is_evaluated_and_the_newest_by_default(corpus, tmp_path):
    for step in (7, 8):
        write_model(step=step, seed=step)
    newest, named, older = (results(flags(corpus, "--eval", "bpb", *step), tmp_path)
                            for step in ([], ["--step", "8"], ["--step", "7"]))
    assert newest == named and newest["step"] == 8
    assert older["step"] == 7 and older["val_bpb"] != newest["val_bpb"]


@pytest.mark.parametrize("documents", [2, 60])
def test_more_tokens_than_the_split_has_are_one_pass_and_at_least_one_batch(tmp_path, documents):
    corpus = str(write_corpus(tmp_path / "corpus", n_shards=2, documents_per_shard=documents))
    model, tokenizer = write_model(), golden_tokenizer()
    found = results(flags(corpus, "--eval", "bpb", "--split-tokens", str(10**12)), tmp_path)
    shards = token_shards(open_dataset(corpus), tokenizer, "val")
    planner, n_used, n_batches = RowPlanner(shards, TINY_LENGTH + 1, 0, shuffle=False), 0, 0
    while (n_used := n_used + sum(len(planner.next_row()) for _ in range(2))) <= documents:
        n_batches += 1
    assert n_batches >= 20 or documents == 2
    bits, _ = brute_force(model, tokenizer, corpus, "val", max(1, n_batches))
    assert found["val_bpb"] == pytest.approx(bits, rel=1e-6)


def test_two_ranks_give_the_numbers_of_one_and_core_those_of_brute_force(corpus, tmp_path, base_dir):
    model, bundle = write_model(), write_bundle(bundle_folder())
    kinds, table = "core,bpb,sample,position", base_dir / "base_eval" / "tiny_000007.csv"
    one = results(flags(corpus, "--eval", kinds, "--device-batch-size", "4"), tmp_path)
    first_table = table.read_text()
    rows = list(csv.DictReader(first_table.splitlines()))
    accuracy = accuracy_by_brute_force(model, golden_tokenizer(), bundle, 9)
    assert {row["Task"]: float(row["Accuracy"]) for row in rows[:-1]} == pytest.approx(accuracy, abs=1e-6)
    assert 0 < sum(accuracy.values()) < 3 and rows[-1]["Task"] == "CORE"
    assert float(rows[-1]["Centered"]) == pytest.approx(one["core_metric"], abs=1e-6)
    table.unlink()
    path = tmp_path / "two.json"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "scripts.base_eval",
         *flags(corpus, "--eval", kinds, "--output-json", str(path))],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val: ") == 1  # rank 0 alone speaks
    two = json.loads(path.read_text())
    assert two["counts_by_position"] == one["counts_by_position"] and two["samples"] == one["samples"]
    assert two["core_tasks"] == one["core_tasks"] and table.read_text() == first_table
    for name in ("train_bpb", "val_bpb"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    for ours, theirs in zip(two["nats_by_position"], one["nats_by_position"], strict=True):
        assert ours == (None if theirs is None else pytest.approx(theirs, rel=1e-5))


# --- upstream's checkpoints ------------------------------------------------------------------------------------------

class SmallTokenizer:
    """A vocabulary of the golden model's size: a token a character, BOS last."""

    vocab_size, bos_id, tokenizer_id = CONFIG.vocab_size, CONFIG.vocab_size - 1, "small"

    def encode(self, text):
        return [ord(character) % 128 for character in text]

    def decode(self, ids):
        return "".join(chr(token) for token in ids)

    def token_bytes(self):
        return torch.tensor([1] * 128 + [0] * (self.vocab_size - 128), dtype=torch.int32).numpy()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_upstreams_checkpoint_is_evaluated(corpus, tmp_path, monkeypatch, prefix):
    monkeypatch.setattr("nanochat.trained.load_tokenizer", lambda folder: SmallTokenizer())
    write_upstream(checkpoint_folder("tiny"), prefix)
    found = results(flags(corpus, "--eval", "bpb,sample,position", "--split-tokens", "1024"), tmp_path)
    bits, _ = brute_force(golden_model().eval(), SmallTokenizer(), corpus, "val", n_batches=1, length=512)
    assert found["val_bpb"] == pytest.approx(bits, rel=1e-5)
    assert found["tokens"] == 100 * 524288 and found["step"] == 100
    assert read_position_losses(str(tmp_path / "results.json"), runs_dir()).tokens == 100 * 524288


def test_the_last_validation_of_a_run_is_base_evals_on_the_same_tokens(corpus, tmp_path):
    base_train.main([*TINY_FLAGS, "--dataset", corpus, "--num-iterations", "6", "--run-id", "run",
                     "--model-tag", "tiny"])
    found = results(flags(corpus, "--eval", "bpb"), tmp_path)
    assert found["val_bpb"] == read_run(runs_dir() / "run").summary["final_val_bpb"]


def test_upstreams_checkpoint_is_not_resumed(corpus, refusal):
    write_upstream(checkpoint_folder("tiny"))
    line = refusal(base_train.main, [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", "200", "--model-tag", "tiny",
                                     "--resume-from-step", "latest"]).splitlines()[-1]
    assert line.startswith("error: the checkpoint of step 100") and "scripts.base_eval" in line
    assert not runs_dir().exists()


# --- mistakes --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "words"), [
    (["--eval", "bpb,perplexity"], "--eval perplexity is unknown; use some of core,bpb,sample,position"),
    (["--eval", ""], "is unknown"),
    (["--step", "8"], "no checkpoint of step 8"),
    (["--step", "newest"], "neither a number nor 'latest'"),
    (["--model-tag", "large"], "--model-tag"),
    (["--device-batch-size", "0"], "at least 1"),
    (["--split-tokens", "0"], "at least 1"),
    (["--device-type", "tpu"], "--device-type"),
    (["--dataset", "nowhere"], "nowhere"),
    (["--tokenizer-dir", "nowhere"], "nowhere"),
    (["--eval", "core"], "eval_bundle"),
    (["--eval", "sample", "--temperature", "-1"], "temperature"),
    (["--eval", "sample", "--num-samples", "0"], "at least 1 sample"),
    (["--eval", "sample", "--max-new-tokens", "100000"], "ask for fewer"),
])
def test_a_mistake_is_one_line_with_exit_code_2(corpus, refusal, change, words):
    write_model()
    line = refusal(main, [*flags(corpus, "--eval", "bpb"), *change]).splitlines()[-1]
    assert line.startswith("error: ") and words in line


def test_a_tokenizer_of_another_size_is_refused(corpus, refusal, monkeypatch):
    write_model()
    monkeypatch.setattr("nanochat.trained.load_tokenizer", lambda folder: SmallTokenizer())
    line = refusal(main, flags(corpus)).splitlines()[-1]
    assert f"vocabulary is {golden_tokenizer().vocab_size}" in line and "--tokenizer-dir" in line


def test_another_tokenizer_of_the_same_size_is_refused(corpus, refusal):
    write_model(tokenizer_id="another")
    line = refusal(main, flags(corpus)).splitlines()[-1]
    assert "trained with tokenizer another" in line and "--tokenizer-dir" in line


@pytest.mark.parametrize("name", ["model_000008.pt", "meta_000008.json"])
@pytest.mark.parametrize("damage", ["truncated", "other bytes"])
def test_a_damaged_checkpoint_is_named_with_the_newest_usable(corpus, refusal, name, damage):
    for step in (6, 7, 8):
        write_model(step=step)
    DAMAGES[damage](checkpoint_folder("tiny") / name)
    DAMAGES["half"](checkpoint_folder("tiny") / "model_000007.pt")
    line = refusal(main, flags(corpus)).splitlines()[-1]
    assert name in line and line.endswith("the newest usable checkpoint is step 6")


def test_losses_that_are_not_finite_are_no_results(corpus, tmp_path, refusal):
    model = write_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    save_checkpoint(checkpoint_folder("tiny"), 9, model.state_dict(), {},
                    {**META, "model_config": model.config.to_dict()})
    path = tmp_path / "results.json"
    assert "not finite" in refusal(main, flags(corpus, "--eval", "bpb", "--step", "9", "--out", str(path)))
    assert not path.exists()


def test_results_that_cannot_be_written_are_one_line(corpus, tmp_path, refusal):
    write_model()
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "results.json"
    assert "--out" in refusal(main, flags(corpus, "--eval", "bpb", "--out", str(path)))
