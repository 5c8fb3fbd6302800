"""One mistake per program: one line that begins with `error:`, exit code 2, nothing written."""

import importlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus import TINY_FLAGS, write_corpus

from nanochat.common import base_dir, runs_dir
from scripts.base_train import main

MISTAKES = [
    ("scripts.base_eval", ["--model-tag", "none"]),
    ("scripts.base_train", ["--dataset", "/no/such/folder"]),
    ("scripts.experiment", ["--name", "../x", "--profile", "cpu"]),
    ("scripts.export", ["--model-tag", "none", "--out", "/no/such/folder/x"]),
    ("scripts.lane_b_infer_ratio", ["--calibration-run", "none", "--out", "/no/such/folder/x.json",
                                    "--target-metric-threshold", "1"]),
    ("scripts.lane_b_log_run", ["none", "--inference-json", "/no/such/file.json"]),
    ("scripts.lane_b_stats", ["--dataset", "/no/such/folder", "--out", "/no/such/folder/x.json"]),
    ("scripts.plan", ["--depth", "4", "--gpu", "none"]),
    ("scripts.report", ["none"]),
    ("scripts.runs", ["--compare", "none"]),
    ("scripts.sample", ["--model-tag", "none"]),
    ("scripts.tok_eval", ["--tokenizer-dir", "/no/such/folder"]),
    ("scripts.tok_train", ["--dataset", "/no/such/folder"]),
    ("scripts.verdict", ["--experiment", "none", "--ledger", "/no/such/file.csv"]),
    ("nanochat.dataset", ["--dataset", "/no/such/folder"]),
]


def refused(program, arguments, capsys):
    """Return the only line of an error; a usage error of argparse has its usage before it."""
    with pytest.raises(SystemExit) as stopped:
        program(arguments)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    [line] = [line for line in lines if "error: " in line]
    assert line == lines[-1] and not any("Traceback" in line for line in lines)
    assert not list(base_dir().rglob("*.tmp")) and not runs_dir().exists()
    return line


@pytest.mark.parametrize(("program", "arguments"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_mistake_is_one_line(program, arguments, capsys):
    refused(importlib.import_module(program).main, arguments, capsys)


def truncate(folder):
    path = folder / "shard_00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def leave_no_text(folder):
    for path in folder.iterdir():
        path.unlink()
    table = pa.table({"text": ["", " \n", None]})
    pq.write_table(table, folder / "blank.parquet")


@pytest.mark.parametrize(("spoil", "words"), [
    (truncate, "shard_00001.parquet"), (leave_no_text, "corpus")],
    ids=["truncated", "no text"])
def test_text_that_cannot_be_trained_on(tmp_path, capsys, spoil, words):
    corpus = write_corpus(tmp_path / "corpus")
    spoil(corpus)
    flags = [*TINY_FLAGS, "--dataset", str(corpus), "--num-iterations", "2"]
    assert words in refused(main, flags, capsys)


@pytest.mark.parametrize("change", [
    ["--matrix-lr", "nan"], ["--scalar-lr", "-1"], ["--warmdown-ratio", "1.5"], ["--seed", "-1"],
    ["--eval-tokens", "0"], ["--num-iterations", "0"], ["--total-batch-size", "300"]], ids=" ".join)
def test_numbers_that_no_run_can_have(corpus, capsys, change):
    flags = [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", "2", *change]
    assert change[0] in refused(main, flags, capsys)
