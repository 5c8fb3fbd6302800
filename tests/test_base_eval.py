"""base_eval as a user runs it: on checkpoints of this program and of upstream; mistakes."""

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
from nanochat.core_eval import bundle_folder
from nanochat.dataset import open_dataset
from nanochat.engine import stream
from nanochat.loss_eval import SplitRows
from nanochat.runlog import read_run
from nanochat.tokens import token_shards
from scripts import base_train
from scripts.base_eval import main

pytestmark = pytest.mark.usefixtures("fp32")


@pytest.fixture
def corpus(tmp_path):
    return str(write_corpus(tmp_path / "corpus", n_shards=2))


def flags(corpus, *more):
    return ["--model-tag", "tiny", "--dataset", corpus, "--tokenizer-dir", GOLDEN_TOKENIZER,
            "--split-tokens", "512", "--device-batch-size", "3", *more]


def results(arguments, tmp_path):
    """Return what the program writes to --out."""
    path = tmp_path / "results.json"
    assert main([*arguments, "--out", str(path)]) == 0
    return json.loads(path.read_text())


def brute_force(model, tokenizer, corpus, split, n_tokens, length=TINY_LENGTH, crop="carry"):
    """Return (bits per byte in fp64 from logits, number of tokens, {position: [nats]})."""
    nats = n_bytes = 0.0
    by_position = {}
    rows = SplitRows(token_shards(open_dataset(corpus), tokenizer, split), length, n_tokens, crop)
    for row in rows.plan:
        inputs, targets, _, _ = (torch.from_numpy(part) for part in rows.batch([row], 1))
        with torch.no_grad():
            losses = -torch.log_softmax(model(inputs).double(), dim=-1)[0]
        since_bos = 0
        for at, (token, target) in enumerate(zip(inputs[0], targets[0].tolist(), strict=True)):
            since_bos = 0 if token == tokenizer.bos_id else since_bos + 1
            if target in (-1, tokenizer.bos_id):
                continue
            nats += losses[at, target].item()
            n_bytes += len(tokenizer.decode([target]).encode())
            by_position.setdefault(since_bos, []).append(losses[at, target].item())
    return nats / math.log(2) / n_bytes, sum(map(len, by_position.values())), by_position


def test_losses_are_those_of_brute_force(corpus, tmp_path, capsys):
    model = write_model()
    found = results(flags(corpus, "--eval", "bpb,position"), tmp_path)
    printed = capsys.readouterr().out
    for split in ("train", "val"):
        bits, n_tokens, by_position = brute_force(model, golden_tokenizer(), corpus, split, 512)
        assert found[f"{split}_bpb"] == pytest.approx(bits, rel=1e-6)
        assert found[f"{split}_n_tokens"] == n_tokens
        assert 0 < found[f"{split}_bpb_se"] < bits and found[f"{split}_n_bytes"] > n_tokens
        assert f"{split}: {bits:.4f} bits per byte (standard error 0." in printed
        assert f"{n_tokens:,} distinct tokens" in printed
    assert "warning: the scored validation text is small" in printed
    counts = [len(by_position.get(n, ())) for n in range(TINY_LENGTH)]
    assert found["counts_by_position"] == counts
    for n, nats in enumerate(found["nats_by_position"]):
        mean = sum(by_position[n]) / counts[n] if counts[n] else None
        assert nats == (None if mean is None else pytest.approx(mean, rel=1e-6))
    assert (found["model_tag"], found["step"], found["tokens"]) == ("tiny", 7, 7 * 256)
    assert found["tokenizer_id"] == golden_tokenizer().tokenizer_id
    assert found["dataset_id"] == open_dataset(corpus).dataset_id


def test_a_small_split_is_evaluated_completely_with_any_batch_size(tmp_path):
    """Three long texts: few documents, the last row is a partial one."""
    write_model()
    folder = tmp_path / "books"
    folder.mkdir()
    for number in range(3):
        words = " ".join(f"word{n * (number + 3) % 251}" for n in range(9_000))
        (folder / f"{number}.md").write_text(words)
    shards = token_shards(open_dataset(folder), golden_tokenizer(), "val")
    n_tokens = sum(shard.n_tokens - shard.n_docs for shard in shards)
    losses = []
    for batch_rows in ("1", "4", "128"):
        arguments = flags(str(folder), "--eval", "bpb", "--split-tokens", str(n_tokens))
        found = results([*arguments, "--device-batch-size", batch_rows], tmp_path)
        assert found["val_n_tokens"] == n_tokens
        losses.append(found["val_bpb"])
    assert losses == [pytest.approx(losses[0], rel=1e-6)] * 3


def test_text_and_tokenizer_default_to_the_checkpoints_own(corpus, tmp_path, capsys):
    own = {"dataset": str(corpus), "tokenizer_dir": str(GOLDEN_TOKENIZER), "crop": "drop"}
    write_model(user_config=own, dataset_id=open_dataset(corpus).dataset_id)
    found = results(["--model-tag", "tiny", "--eval", "bpb", "--split-tokens", "512"], tmp_path)
    arguments = write_model(), golden_tokenizer(), corpus, "val", 512
    assert found["val_bpb"] == pytest.approx(brute_force(*arguments, crop="drop")[0], rel=1e-6)
    assert "crop rule drop" in capsys.readouterr().out


def test_other_text_than_the_checkpoints_needs_the_flag(corpus, tmp_path, capsys, refusal):
    own = {"dataset": str(corpus), "tokenizer_dir": str(GOLDEN_TOKENIZER), "crop": "drop"}
    write_model(user_config=own, dataset_id="corpus-0badf00d")
    dataset_id = open_dataset(corpus).dataset_id
    line = refusal(main, ["--model-tag", "tiny", "--eval", "bpb"]).splitlines()[-1]
    for word in ("corpus-0badf00d", dataset_id, f"--dataset {corpus}"):
        assert word in line
    results(flags(corpus, "--eval", "bpb"), tmp_path)
    words = f"{dataset_id} (the checkpoint was trained on corpus-0badf00d), crop rule carry"
    assert words in capsys.readouterr().out


def test_samples_continue_validation_documents(corpus, tmp_path, capsys):
    model, tokenizer = write_model(), golden_tokenizer()
    found = results(flags(corpus, "--eval", "sample"), tmp_path)
    shard = token_shards(open_dataset(corpus), tokenizer, "val")[0]
    printed = capsys.readouterr().out
    for i, sample in enumerate(found["samples"]):
        prompt = shard.tokens[shard.offsets[i] : shard.offsets[i + 1]][:17].tolist()
        new = list(stream(model, prompt, 96, temperature=0.8, top_k=50, seed=i,
                          stop_ids=(tokenizer.bos_id,)))
        assert sample == {"prompt": tokenizer.decode(prompt[1:]), "text": tokenizer.decode(new)}
        assert f"{sample['prompt']}[...]{sample['text']}" in printed
    assert len(found["samples"]) == 2 and "val_bpb" not in found


def test_the_given_step_is_evaluated_and_the_newest_by_default(corpus, tmp_path):
    for step in (7, 8):
        write_model(step=step, seed=step)
    newest, named, older = (results(flags(corpus, "--eval", "bpb", *step), tmp_path)
                            for step in ([], ["--step", "8"], ["--step", "7"]))
    assert newest == named and newest["step"] == 8
    assert older["step"] == 7 and older["val_bpb"] != newest["val_bpb"]


def test_two_ranks_equal_one_and_core_equals_brute_force(corpus, tmp_path, base_dir):
    model, bundle = write_model(), write_bundle(bundle_folder())
    arguments = flags(corpus, "--eval", "core,bpb,sample,position")
    one = results(arguments, tmp_path)
    table = base_dir / "base_eval" / "tiny_000007.csv"
    first_table = table.read_text()
    *tasks, core = csv.DictReader(first_table.splitlines())
    accuracy = accuracy_by_brute_force(model, golden_tokenizer(), bundle, 9)
    found = {row["Task"]: float(row["Accuracy"]) for row in tasks}
    assert found == pytest.approx(accuracy, abs=1e-6)
    assert 0 < sum(accuracy.values()) < 3 and core["Task"] == "CORE"
    assert float(core["Centered"]) == pytest.approx(one["core_metric"], abs=1e-6)
    table.unlink()

    path = tmp_path / "two.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, "-m", "scripts.base_eval", *arguments, "--out", str(path)],
                          capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("val: ") == 1, "only rank 0 prints"
    two = json.loads(path.read_text())
    assert table.read_text() == first_table
    for name, value in one.items():
        if isinstance(value, float):
            assert two[name] == pytest.approx(value, rel=1e-6)
        elif name == "nats_by_position":
            assert two[name] == pytest.approx(value, rel=1e-5)
        else:
            assert two[name] == value


# --- checkpoints of upstream and of runs -------------------------------------


class SmallTokenizer:
    """The golden model's vocabulary: one token per character, BOS last."""

    vocab_size, bos_id, tokenizer_id = CONFIG.vocab_size, CONFIG.vocab_size - 1, "small"

    def encode(self, text):
        return [ord(character) % 128 for character in text]

    def decode(self, ids):
        return "".join(chr(token) for token in ids)

    def token_bytes(self):
        is_text = torch.arange(self.vocab_size) < 128
        return is_text.int().numpy()


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_upstreams_checkpoint_is_evaluated(corpus, tmp_path, monkeypatch, prefix):
    monkeypatch.setattr("nanochat.checkpoint.load_tokenizer", lambda folder: SmallTokenizer())
    write_upstream(checkpoint_folder("tiny"), prefix)
    found = results(flags(corpus, "--eval", "bpb,sample", "--split-tokens", "1024"), tmp_path)
    bits, _, _ = brute_force(golden_model().eval(), SmallTokenizer(), corpus, "val", 1024, 512)
    assert found["val_bpb"] == pytest.approx(bits, rel=1e-5)
    assert found["tokens"] == 100 * 524288 and found["step"] == 100


def test_the_last_validation_of_a_run_is_that_of_base_eval(corpus, tmp_path):
    base_train.main([*TINY_FLAGS, "--dataset", corpus, "--num-iterations", "6", "--run-id", "run",
                     "--model-tag", "tiny"])
    found = results(flags(corpus, "--eval", "bpb"), tmp_path)
    event = read_run(runs_dir() / "run").of("val")[-1]
    assert found["val_bpb"] == pytest.approx(event["val_bpb"], rel=1e-6)
    assert found["val_bpb_se"] == pytest.approx(event["val_bpb_se"], rel=1e-6)
    assert (found["val_n_tokens"], found["val_n_bytes"]) == (event["n_tokens"], event["n_bytes"])


def test_upstreams_checkpoint_is_not_resumed(corpus, refusal):
    write_upstream(checkpoint_folder("tiny"))
    more = ["--num-iterations", "200", "--model-tag", "tiny", "--resume-from-step", "latest"]
    output = refusal(base_train.main, [*TINY_FLAGS, "--dataset", corpus, *more])
    line = output.splitlines()[-1]
    assert "cannot be resumed" in line and "scripts.base_eval" in line
    assert not runs_dir().exists()


# --- mistakes ----------------------------------------------------------------


@pytest.mark.parametrize(("change", "words"), [
    (["--eval", "bpb,perplexity"], "perplexity is unknown; use some of core,bpb,sample,position"),
    (["--step", "8"], "no checkpoint of step 8"),
    (["--step", "newest"], "neither a number nor 'latest'"),
    (["--model-tag", "large"], "--model-tag"),
    (["--device-batch-size", "0"], "at least 1"),
    (["--split-tokens", "0"], "at least 1"),
    (["--device-type", "tpu"], "--device-type"),
    (["--dataset", "nowhere"], "nowhere"),
    (["--tokenizer-dir", "nowhere"], "nowhere"),
    (["--eval", "core"], "eval_bundle"),
])
def test_a_mistake_is_one_line_with_exit_code_2(corpus, refusal, change, words):
    write_model()
    line = refusal(main, [*flags(corpus, "--eval", "bpb"), *change]).splitlines()[-1]
    assert line.startswith("error: ") and words in line


def test_another_tokenizer_is_refused(corpus, refusal):
    write_model(tokenizer_id="another")
    line = refusal(main, flags(corpus)).splitlines()[-1]
    assert "tokenizer another" in line and "--tokenizer-dir" in line


def test_a_damaged_checkpoint_is_named_with_the_newest_valid_one(corpus, refusal):
    for step in (6, 7, 8):
        write_model(step=step)
    for step in (7, 8):
        DAMAGES["half"](checkpoint_folder("tiny") / f"model_00000{step}.pt")
    line = refusal(main, flags(corpus)).splitlines()[-1]
    assert "model_000008.pt" in line and line.endswith("the newest valid checkpoint is step 6")


def test_results_that_cannot_be_written_are_one_line(corpus, tmp_path, refusal):
    model = write_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    meta = {**META, "model_config": model.config.to_dict()}
    save_checkpoint(checkpoint_folder("tiny"), 9, model.state_dict(), {}, meta)
    arguments = flags(corpus, "--eval", "bpb", "--out", str(tmp_path / "results.json"))
    assert "not finite" in refusal(main, [*arguments, "--step", "9"])
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "file").write_text("")
    assert "--out" in refusal(main, flags(corpus, "--out", str(tmp_path / "file" / "results.json")))
