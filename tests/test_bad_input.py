"""What a person can get wrong, through the training program: one line, exit code 2, nothing half-written."""

import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from checkpoints import DAMAGES, Malicious
from corpus import GOLDEN_TOKENIZER, TINY_FLAGS, write_corpus
from full_disk import full_disk

from nanochat.checkpoint import checkpoint_folder, checkpoint_steps
from nanochat.common import UserError, runs_dir
from nanochat.runlog import read_run
from nanochat.tokenizer import load_tokenizer, train_tokenizer
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


def flags(corpus, steps, *more):
    return [*TINY_FLAGS, "--dataset", str(corpus), "--num-iterations", str(steps), "--run-id", "run",
            "--model-tag", "run", *more]


def refused(arguments, capsys):
    """The one line that the program ends with; nothing torn lies about."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    cache = runs_dir().parent
    assert not list(cache.rglob("*.tmp")) and not list(cache.rglob(".*.tmp"))
    return lines[-1]


def assert_nothing_begun():
    assert not list(runs_dir().glob("*")) and not checkpoint_folder("run").exists()


# --- the text --------------------------------------------------------------------------------------------------------

def write_shard(folder, texts, column="text"):
    pq.write_table(pa.table({column: texts}), folder / "shard_00002.parquet")


def truncate(folder):
    path = folder / "shard_00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def damage_page(folder):
    path = folder / "shard_00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(("spoil", "words"), [
    (empty, "corpus"), (truncate, "shard_00001.parquet"), (damage_page, "shard_00001.parquet"),
], ids=["no shards", "truncated", "damaged page"])
def test_text_that_cannot_be_trained_on(corpus, capsys, spoil, words):
    spoil(corpus)
    assert words in refused(flags(corpus, 2), capsys)
    assert_nothing_begun()


def test_blank_documents_among_others_do_no_harm(corpus):
    write_shard(corpus, ["", "some words", None, " "])
    assert main(flags(corpus, 1)) == 0


# --- the tokenizer ---------------------------------------------------------------------------------------------------

def test_a_tokenizer_pickle_that_asks_for_anything_but_an_encoding(corpus, tmp_path, capsys):
    folder = tmp_path / "tokenizer"
    shutil.copytree(GOLDEN_TOKENIZER, folder)
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    line = refused([*flags(corpus, 2), "--tokenizer-dir", str(folder)], capsys)
    assert "tokenizer.pkl" in line
    assert not (tmp_path / "ran").exists()
    assert_nothing_begun()


@pytest.mark.parametrize("vocab_size", [300, 1024])
def test_another_tokenizer_than_the_checkpoints(corpus, tmp_path, capsys, vocab_size):
    main(flags(corpus, 2))
    text = " ".join(f"{a}{b}{c}{a}" for a in "abcdefghij" for b in "klmnopqrst" for c in "uvwxyz")
    other = train_tokenizer([text], vocab_size)
    assert (other.vocab_size == load_tokenizer(GOLDEN_TOKENIZER).vocab_size) == (vocab_size == 1024)
    other.save(tmp_path / "other")
    before = read_run(runs_dir() / "run").events
    line = refused(flags(corpus, 2, "--tokenizer-dir", str(tmp_path / "other"), "--resume-from-step", "latest"), capsys)
    assert "tokenizer_id" in line and other.tokenizer_id in line
    assert read_run(runs_dir() / "run").events == before


# --- the numbers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    ["--matrix-lr", "nan"], ["--embedding-lr", "inf"], ["--scalar-lr", "-1"], ["--weight-decay", "nan"],
    ["--final-lr-frac", "nan"], ["--seed", "-1"], ["--warmdown-ratio", "1.5"], ["--warmup-steps", "-1"],
    ["--eval-tokens", "0"], ["--max-seq-len", "0"], ["--num-iterations", "0"], ["--total-batch-size", "300"],
    ["--aspect-ratio", "0"], ["--target-flops", "nan"]], ids=" ".join)
def test_numbers_that_no_run_can_have(corpus, capsys, change):
    more = ["--num-iterations", "-1"] if change[0] == "--target-flops" else []
    assert change[0] in refused(flags(corpus, 2, *more, *change), capsys)
    assert_nothing_begun()


@pytest.mark.parametrize(("dtype", "words"), [("float16", "loss scaling"), ("bf16", "use one of")])
def test_a_dtype_that_cannot_train(corpus, capsys, monkeypatch, dtype, words):
    monkeypatch.setenv("NANOCHAT_DTYPE", dtype)
    assert words in refused(flags(corpus, 2), capsys)
    assert_nothing_begun()


@pytest.mark.parametrize(("flag", "words"), [
    (["--fused-rmsnorm"], "--fused-rmsnorm needs a CUDA device"),
    (["--attention", "varlen"], "--attention varlen needs a CUDA device"),
    (["--attention", "flash"], "--attention flash must be auto or varlen"),
    (["--fp8", "--max-seq-len", "100", "--device-batch-size", "1"], "--fp8 takes micro-batches of a multiple of 16"),
    (["--fp8-recipe", "rowwise"], "--fp8-recipe rowwise must be tensorwise"),
])
def test_kernels_that_the_device_cannot_run_are_refused_before_any_text_is_opened(capsys, monkeypatch, flag, words):
    monkeypatch.setattr("nanochat.build.open_data", lambda args: pytest.fail("text was opened first"))
    monkeypatch.setattr("nanochat.kernels.runtime.INTERPRETED", False)
    assert words in refused(["--depth", "2", "--device-type", "cpu", *flag], capsys)
    assert_nothing_begun()


def test_wandb_that_does_not_start_begins_no_record_and_moves_no_checkpoint(corpus, capsys, monkeypatch):
    main(flags(corpus, 2, "--run-id", "earlier"))

    class NoWandb:
        def __init__(self, *_):
            raise UserError("wandb does not start")

    monkeypatch.setattr("nanochat.record.WandbSink", NoWandb)
    assert "wandb does not start" in refused(flags(corpus, 2, "--run", "name"), capsys)
    assert [path.name for path in runs_dir().iterdir()] == ["earlier"]
    assert checkpoint_steps(checkpoint_folder("run")) == [2]


# --- checkpoints -----------------------------------------------------------------------------------------------------

def test_resuming_a_damaged_checkpoint_names_the_newest_usable_and_that_one_resumes(corpus, capsys):
    main(flags(corpus, 4, "--save-every", "1"))
    before, folder = read_run(runs_dir() / "run").events, checkpoint_folder("run")
    DAMAGES["other bytes"](folder / "optim_000003_rank0.pt")
    for name in ("model_000004.pt", "optim_000004_rank0.pt", "meta_000004.json"):
        whole = (folder / name).read_bytes()
        DAMAGES["half"](folder / name)
        line = refused(flags(corpus, 4, "--resume-from-step", "latest"), capsys)
        assert name in line and line.endswith("the newest usable checkpoint is step 2")
        (folder / name).write_bytes(whole)
    assert read_run(runs_dir() / "run").events == before
    assert main(flags(corpus, 4, "--resume-from-step", "2")) == 0


def test_a_run_is_not_resumed_with_another_optimizer(corpus, capsys):
    main(flags(corpus, 2))
    for flag in ("--matrix-lr", "--embedding-lr", "--unembedding-lr", "--scalar-lr", "--weight-decay"):
        line = refused(flags(corpus, 2, "--resume-from-step", "latest", flag, "0.123"), capsys)
        assert f"{flag} was " in line and "is 0.123" in line


@pytest.mark.parametrize("record_too", [False, True], ids=["checkpoint", "record too"])
def test_a_disk_that_fills_up_while_saving_keeps_the_previous_checkpoint(corpus, capsys, record_too):
    save, saves = torch.save, []

    with pytest.MonkeyPatch.context() as patch:
        def fills_up(*arguments):
            saves.append(None)
            if len(saves) > 3:  # the optimizer of the second checkpoint
                if record_too:
                    patch.setattr("nanochat.runlog.os.fsync", full_disk)
                full_disk()
            save(*arguments)

        patch.setattr(torch, "save", fills_up)
        line = refused(flags(corpus, 6, "--save-every", "2"), capsys)
    assert "step 4 not saved" in line and "No space left on device" in line
    assert line.endswith("the newest usable checkpoint is step 2")
    names = sorted(path.name for path in checkpoint_folder("run").iterdir())
    assert names == ["meta_000002.json", "model_000002.pt", "optim_000002_rank0.pt"]
    assert read_run(runs_dir() / "run").status == ("unfinished" if record_too else "error")
    assert main(flags(corpus, 6, "--save-every", "2", "--resume-from-step", "latest")) == 0


# --- and what must go well -------------------------------------------------------------------------------------------

def test_a_bfloat16_run_resumed_is_the_whole_one_bit_for_bit(corpus, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    arguments = flags(corpus, 14, "--save-every", "6")
    assert main(arguments) == 0
    folder = checkpoint_folder("run")
    whole = read_run(runs_dir() / "run")

    def states():
        optimizer = torch.load(folder / "optim_000014_rank0.pt")
        return torch.load(folder / "model_000014.pt"), optimizer["state"]

    before = states()
    assert before[0]["transformer.wte.weight"].dtype == torch.bfloat16
    for path in folder.glob("*_000014*"):
        path.unlink()
    assert main([*arguments, "--resume-from-step", "6"]) == 0
    resumed = read_run(runs_dir() / "run")
    for kind, field in (("train", "loss"), ("val", "val_bpb")):
        assert [e[field] for e in resumed.of(kind)] == [e[field] for e in whole.of(kind)]
    torch.testing.assert_close(states(), before, rtol=0, atol=0)
