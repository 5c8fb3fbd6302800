"""The two commands: train a tokenizer, measure it."""

import re

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


def test_a_trained_tokenizer_is_saved_in_the_cache_folder_and_measured(corpus, base_dir, capsys):
    tok_train.main(["--dataset", corpus, "--vocab-size", "300"])
    tokenizer = load_tokenizer(base_dir / "tokenizer")
    assert tokenizer.vocab_size == 300
    done, advice = capsys.readouterr().out.splitlines()[-2:]
    assert done.startswith(f"tokenizer {tokenizer.tokenizer_id}: 300 tokens, trained on ")
    assert advice == f"next: python -m scripts.base_train --dataset {corpus} --preset laptop"
    tok_eval.main(["--dataset", corpus])
    lines = capsys.readouterr().out.splitlines()
    for split, line in zip(("train", "val"), lines[-2:], strict=True):
        assert line.startswith(f"{split}: ")
        n_bytes, n_tokens, ratio = re.findall(r"[\d,.]+\d", line)
        n_bytes, n_tokens = (int(number.replace(",", "")) for number in (n_bytes, n_tokens))
        assert float(ratio) == pytest.approx(n_bytes / n_tokens, abs=1e-3)
        assert 1.5 < float(ratio) < 10


def test_limits_on_documents_and_characters_change_what_is_learned(corpus, tmp_path):
    merges = []
    for i, limits in enumerate([[], ["--doc-cap", "8"], ["--max-chars", "200"]]):
        tok_train.main(["--dataset", corpus, "--vocab-size", "267", *limits,
                        "--tokenizer-dir", str(tmp_path / str(i))])
        tokenizer = load_tokenizer(tmp_path / str(i))
        merges.append([tokenizer.decode([token]) for token in range(256, 258)])
    assert "The" in merges[1], "every document begins with `The`, and little else is seen of it"
    assert merges[0] != merges[1]


@pytest.mark.parametrize("arguments", [
    ["--vocab-size", "200"], ["--vocab-size", "30000"], ["--max-chars", "0"],
    ["--dataset", "nowhere"]], ids=" ".join)
def test_wrong_arguments_save_nothing(corpus, base_dir, refusal, arguments):
    last_line = refusal(tok_train.main, ["--dataset", corpus, *arguments]).splitlines()[-1]
    assert last_line.startswith("error: ")
    assert not (base_dir / "tokenizer").exists()
