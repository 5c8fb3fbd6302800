"""The two commands: train a tokenizer, measure it."""

import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.tokenizer import load_tokenizer
from scripts import tok_eval, tok_train


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(3):
        texts = [f"The {word} number {j} of shard {i} went to the market.\n" * 4
                 for word in ("cat", "dog", "hen", "merchant") for j in range(25)]
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{i:05d}.parquet")
    return str(folder)


def test_trained_tokenizer_is_saved_in_the_cache_folder_and_reported(corpus, base_dir, capsys):
    tok_train.main(["--dataset", corpus, "--vocab-size", "300"])
    tokenizer = load_tokenizer(base_dir / "tokenizer")
    out = capsys.readouterr().out
    assert tokenizer.vocab_size == 300
    assert f"tokenizer {tokenizer.tokenizer_id}: 300 tokens, trained in " in out
    assert 1.5 < float(re.search(r"([\d.]+) bytes per token", out)[1]) < 10


def test_limits_on_documents_and_characters_change_what_is_learned(corpus, tmp_path):
    merges = []
    for i, limits in enumerate([[], ["--doc-cap", "8"], ["--max-chars", "200"]]):
        tok_train.main(["--dataset", corpus, "--vocab-size", "267", *limits,
                        "--tokenizer-dir", str(tmp_path / str(i))])
        tokenizer = load_tokenizer(tmp_path / str(i))
        merges.append([tokenizer.decode([token]) for token in range(256, 258)])
    assert "The" in merges[1], "every document begins with `The`, and little else is seen of it"
    assert merges[0] != merges[1]


@pytest.mark.parametrize("limits, share, reason", [
    ([], "100.0%", "10,000)"),
    (["--doc-cap", "16"], "8.0%", "--doc-cap 16)"),
    (["--max-chars", "9700"], "100.0%", "10,000); stopped at --max-chars 9,700"),
])
def test_the_share_of_the_text_that_was_read_is_printed(corpus, capsys, limits, share, reason):
    tok_train.main(["--dataset", corpus, "--vocab-size", "266", *limits])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("read ")]
    assert f"({share}, --doc-cap" in line and line.endswith(reason)


@pytest.mark.parametrize("arguments, message", [
    (["--vocab-size", "200"], "too small"),
    (["--vocab-size", "30000"], "too large for this text"),
    (["--max-chars", "0"], "must be at least 1"),
    (["--dataset", "nowhere"], "give a folder of text or one of"),
])
def test_wrong_arguments_save_nothing(corpus, base_dir, refusal, arguments, message):
    last_line = refusal(tok_train.main, ["--dataset", corpus, *arguments]).splitlines()[-1]
    assert last_line.startswith("error: ") and message in last_line
    assert not (base_dir / "tokenizer").exists()


def test_table_has_a_row_for_each_text_and_split(corpus, base_dir, capsys):
    tok_train.main(["--dataset", corpus, "--vocab-size", "300"])
    capsys.readouterr()
    tok_eval.main(["--dataset", corpus])
    lines = capsys.readouterr().out.splitlines()
    lines = lines[[line[:4] for line in lines].index("text") + 1:]
    rows = {line[:14].strip(): line[14:].split() for line in lines}
    assert set(rows) == {*tok_eval.TEXTS, "train split", "val split"}
    for n_bytes, n_tokens, ratio in rows.values():
        n_bytes, n_tokens = (int(number.replace(",", "")) for number in (n_bytes, n_tokens))
        assert float(ratio) == pytest.approx(n_bytes / n_tokens, abs=1e-3)
    assert float(rows["train split"][2]) > 1.2 * float(rows["korean"][2])
    assert len("".join(tok_eval.TEXTS["korean"]).encode()) == int(rows["korean"][0])


def test_comparison_shows_the_other_tokenizer_and_our_gain(corpus, tmp_path, capsys):
    for vocab_size in (265, 320):
        folder = str(tmp_path / str(vocab_size))
        tok_train.main(["--dataset", corpus, "--vocab-size", str(vocab_size),
                        "--tokenizer-dir", folder])
    capsys.readouterr()
    tok_eval.main(["--dataset", corpus, "--tokenizer-dir", str(tmp_path / "320"),
                   "--compare", str(tmp_path / "265")])
    out = capsys.readouterr().out
    train = next(line for line in out.splitlines() if line.startswith("train split"))
    *_, ours, other, gain = train.split()
    assert other == "1.000", "without merges a token is a byte"
    assert gain == f"{float(ours) - 1:+.1%}"


def test_missing_tokenizer_is_one_line(corpus, refusal):
    assert "python -m scripts.tok_train" in refusal(tok_eval.main, ["--dataset", corpus])


@pytest.mark.parametrize("script", ["tok_train", "tok_eval"])
def test_scripts_explain_themselves(script):
    command = [sys.executable, "-m", f"scripts.{script}", "--help"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "--dataset" in run.stdout
