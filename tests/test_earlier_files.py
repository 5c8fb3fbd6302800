"""What the program wrote before its modules were grouped into packages is still read, resumed and appended to.

tests/golden/before_packages.zip: a corpus of three shards, a tokenizer of 300 tokens, its token cache, the record of a
run of 12 steps with the checkpoint of step 6, and both ledgers, all written by commit 8efa307.
"""

import dataclasses
import shlex
import shutil
from pathlib import Path

import pytest

from nanochat.common import runs_dir
from nanochat.dataset import open_dataset
from nanochat.experiments.ledger import append_experiment, read_experiments
from nanochat.lane_b.infer.record import append_record, read_records
from nanochat.runlog import read_run
from nanochat.tokenizer import Tokenizer, load_tokenizer
from nanochat.tokens import token_shards
from scripts import base_eval, base_train

FILES = Path(__file__).parent / "golden" / "before_packages.zip"
FLAGS = shlex.split("""
    --dataset corpus --tokenizer-dir tokenizer --depth 1 --aspect-ratio 32 --head-dim 16 --max-seq-len 32
    --device-batch-size 2 --total-batch-size 128 --num-iterations 12 --eval-every 6 --eval-tokens 512 --no-compile
    --core-metric-every -1 --sample-every -1 --save-every 6 --run-id before --model-tag before --device-type cpu
    --crop drop""")


@pytest.fixture(autouse=True)
def earlier(tmp_path, base_dir, monkeypatch):
    """The folder in which the earlier run was made, its cache the test's."""
    folder = tmp_path / "earlier"
    shutil.unpack_archive(FILES, folder)
    base_dir.rmdir()
    shutil.move(folder / "cache", base_dir)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    return folder


def events(kind, field):
    return {event["step"]: event[field] for event in read_run(runs_dir() / "before").of(kind)}


def test_the_token_cache_is_read_not_made_again(monkeypatch):
    tokenizer = load_tokenizer("tokenizer")
    assert (tokenizer.tokenizer_id, tokenizer.vocab_size) == ("97632383265d", 300)
    monkeypatch.setattr(Tokenizer, "encode", lambda *_: pytest.fail("text was tokenised again"))
    shards = [shard for split in ("train", "val") for shard in token_shards(open_dataset("corpus"), tokenizer, split)]
    assert [shard.n_docs for shard in shards] == [40, 40, 40]
    assert tokenizer.decode(shards[0].tokens[1:shards[0].offsets[1]].tolist()).split()[0].isalpha()


def test_a_run_is_resumed_and_ends_as_it_did():
    losses, bits = events("train", "loss"), events("val", "val_bpb")
    assert base_train.main([*FLAGS, "--resume-from-step", "6"]) == 0
    assert events("train", "loss") == pytest.approx(losses, rel=1e-5)
    assert events("val", "val_bpb") == pytest.approx(bits, rel=1e-5)
    assert set(losses) == set(range(1, 13))


def test_a_checkpoint_is_evaluated(capsys):
    assert base_eval.main(["--model-tag", "before", "--eval", "bpb", "--split-tokens", "512",
                           "--device-batch-size", "2", "--device-type", "cpu"]) == 0
    assert f"val: {events('val', 'val_bpb')[6]:.4f} bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "read", "append", "n_rows"), [
    ("experiments.csv", read_experiments, append_experiment, 38),
    ("lane_b_inference_schema.csv", read_records, append_record, 4)])
def test_ledgers_are_read_and_appended_to(name, read, append, n_rows):
    path = Path("ledgers") / name
    before, rows = path.read_bytes(), read(path)
    assert len(rows) == n_rows
    append(path, dataclasses.replace(rows[-1], run_id="a-new-run"))
    assert path.read_bytes().startswith(before) and len(read(path)) == n_rows + 1
