import json
import os
import random
import string
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from lane_b_sources import Copying, cut
from ranks import run_on_ranks

from nanochat.common import UserError
from nanochat.dataset import open_dataset
from nanochat.distributed import Ranks, all_reduce_sum, spawn_workers, start_ranks
from nanochat.lane_b import Refusal
from nanochat.lane_b.measure.beta import measure_beta
from nanochat.lane_b.measure.corpus import from_documents, from_shards
from nanochat.lane_b.measure.correlation import LagEstimate
from nanochat.lane_b.measure.documents import from_arrays
from nanochat.lane_b.measure.entropy import PositionLosses
from nanochat.lane_b.measure.fit import BrokenPowerLaw
from nanochat.lane_b.measure.statistics import DEFAULT_LAGS, measure
from nanochat.lane_b.measure.statistics_figure import draw_statistics
from nanochat.lane_b.measure.statistics_file import statistics_document
from nanochat.tokenizer import train_tokenizer
from nanochat.tokens import TokenShard, write_token_shard
from scripts.lane_b_stats import main, parse_args


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of text (words that repeat what is near, cut into pages) and a tokenizer for it."""
    folder = tmp_path_factory.mktemp("corpus")
    spell = random.Random(0)
    words = ["".join(spell.choices(string.ascii_lowercase, k=2 + rank % 6)) for rank in range(300)]
    text = " ".join(words[rank] for rank in Copying(1.2, q=0.9, vocab_size=300).sample(120_000, seed=0))
    pages = [text[start:start + 2500] for start in range(0, len(text), 2500)]
    (folder / "text").mkdir()
    (folder / "text" / "pages.jsonl").write_text("".join(json.dumps({"text": page}) + "\n" for page in pages))
    train_tokenizer(pages, 700).save(folder / "tokenizer")
    return folder


def arguments(corpus, tmp_path, *more):
    return ["--dataset", str(corpus / "text"), "--tokenizer", str(corpus / "tokenizer"), "--processes", "1",
            "--output-json", str(tmp_path / "stats.json"), *more]


def copying_text(n_tokens, document_tokens=1000, seed=0):
    source = Copying(0.9, vocab_size=500)
    return cut(source.sample(n_tokens, seed), document_tokens, 500)


def measured(documents, lags=None, losses=()):
    return measure(from_documents(documents), lags, list(losses))


def position_losses(tokens, gamma=0.3, excess=0.0):
    nats = 5 * np.maximum(np.arange(100), 0.5) ** -gamma + excess
    return PositionLosses("run", tokens, nats, np.full(100, 10 ** 5))


def test_a_corpus_becomes_a_file_and_a_figure(corpus, tmp_path, capsys):
    main(arguments(corpus, tmp_path, "--plot", str(tmp_path / "stats.png"), "--context-tokens", "256"))
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["dataset_id"] == open_dataset(str(corpus / "text")).dataset_id and stats["vocab_size"] == 700
    assert stats["schema_version"] == 1 and stats["context_tokens"] == 256 and stats["split"] == "train"
    assert 2 < stats["bytes_per_token"] < 4 and stats["n_tokens"] > 100_000
    assert {lag["lag"] for lag in stats["lags"]} <= set(DEFAULT_LAGS)
    beta, gamma, alpha = stats["beta"], stats["gamma"], stats["alpha_theory"]
    assert 0 < beta["lo"] < beta["value"] < beta["hi"] and beta["n_lags"] >= 5
    assert gamma["value"] is None and stats["refusals"] == [gamma["refusal"]]
    assert alpha["value"] is None and "give --position-losses" in gamma["refusal"]
    assert stats["versions"]["numpy"] == np.__version__ and "--context-tokens 256" in stats["command"]
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"beta   {beta['value']:.3f}" in out and "gamma not reported" in out


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_give_what_one_process_gives(world_size):
    """Integers exactly, floats to 1e-12; documents of all sizes, an outlier among them, in several blocks a fold."""
    alone = _measure_on_rank(0, 1)
    together, *others = run_on_ranks(world_size, _measure_on_rank)
    assert others == [None] * (world_size - 1)
    assert_same(together, alone)
    assert alone["n_outlier_documents"] == 1 and alone["n_tokens"] == 250_000


def _measure_on_rank(rank, world_size):
    source = Copying(0.9, vocab_size=500)
    lengths = np.random.default_rng(0).integers(20, 2000, 10 ** 4)
    lengths = lengths[:np.searchsorted(np.cumsum(lengths), 250_000)]
    lengths = np.append(lengths, 250_000 - lengths.sum())
    arrays = np.split(source.sample(250_000, seed=0), np.cumsum(lengths)[:-1])
    shards = [token_shard(part, bos=500) for part in (arrays[:100], [np.full(3000, 7)], arrays[100:])]
    with pytest.MonkeyPatch.context() as patch:
        for name, tokens in (("counting._COUNT_TOKENS", 30_000), ("corpus._BLOCK_TOKENS", 20_000),
                             ("counting.MAX_GROUPS", 50), ("entropy.MAX_NGRAM_TOKENS", 1 << 17),
                             ("entropy.MIN_NGRAM_TOKENS", 1 << 16)):
            patch.setattr(f"nanochat.lane_b.measure.{name}", tokens)
        corpus = from_shards(shards, 500, 501, 10 ** 6, Ranks(rank, rank, world_size))
        statistics = measure(corpus, [1, 2, 3, 4, 5], [])
    return statistics and statistics_document(statistics)


def token_shard(arrays, bos):
    tokens = np.concatenate([np.append(bos, array) for array in arrays]).astype(np.uint16)
    return tokens, np.concatenate([[0], np.cumsum([len(array) + 1 for array in arrays])])


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert one == (pytest.approx(other, rel=1e-12) if isinstance(one, float) else other)


def test_groups_of_documents_have_the_errors_of_their_documents():
    documents = copying_text(400_000, document_tokens=200)
    each = measured(documents, (1, 2, 3, 4, 5)).estimates
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.lane_b.measure.counting.MAX_GROUPS", 150)
        grouped = measured(documents, (1, 2, 3, 4, 5)).estimates
    assert [len(e.op_influence) for e in grouped] == [450] * 5 and len(each[0].op_influence) == 2000
    for one, other in zip(each, grouped, strict=True):
        assert other.op == one.op and other.op_se == pytest.approx(one.op_se, rel=0.1)


def test_the_corpus_is_never_in_memory(tmp_path, monkeypatch):
    """Three times the text, the same memory, but for the index: 40 bytes a document, and as much in passing."""
    small = {"counting._COUNT_TOKENS": 1 << 16, "corpus._BLOCK_TOKENS": 1 << 16, "counting.MAX_GROUPS": 100,
             "correlation._NULL_TOKENS": 1 << 16, "entropy.MAX_NGRAM_TOKENS": 1 << 17,
             "entropy.MIN_NGRAM_TOKENS": 1 << 16, "entropy._HELD_OUT_TOKENS": 1 << 15}
    for name, tokens in small.items():
        monkeypatch.setattr(f"nanochat.lane_b.measure.{name}", tokens)
    n_documents, peaks = 1000, []
    for n_shards in (1, 3):
        shards = []
        for i in range(n_shards):
            text = Copying(0.9, vocab_size=100).sample(1000 * n_documents, seed=i).reshape(n_documents, 1000)
            groups = [([1001] * n_documents, np.insert(text, 0, 100, axis=1).ravel())]
            write_token_shard(tmp_path / f"{i}.bin", groups, {"vocab_size": 101, "bos_id": 100})
            shard = TokenShard(tmp_path / f"{i}.bin")
            shards.append((shard.tokens, shard.offsets))
            del text, groups
        tracemalloc.start()
        measure(from_shards(shards, 100, 101, 10 ** 9), [1, 2, 3, 4, 5], [])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 80 * 2 * n_documents + 100_000  # the text grows by 4 MB


def test_converged_losses_by_position_give_alpha_a_value(tmp_path):
    documents = copying_text(400_000)
    statistics = measured(documents, (1, 2, 3, 4, 5, 6), [position_losses(10 ** 6), position_losses(5 * 10 ** 5)])
    file = statistics_document(statistics)
    gamma, beta, alpha = file["gamma"], file["beta"], file["alpha_theory"]
    assert gamma["source"] == "position_losses" and gamma["refusal"] is None and file["refusals"] == []
    assert gamma["value"] == pytest.approx(0.3, abs=0.01)
    assert alpha["value"] == pytest.approx(gamma["value"] / (2 * beta["value"]))
    assert (alpha["lo"], alpha["hi"]) == (gamma["lo"] / (2 * beta["hi"]), gamma["hi"] / (2 * beta["lo"]))
    draw_statistics(statistics, tmp_path / "stats.png")
    assert (tmp_path / "stats.png").stat().st_size > 10_000


def test_unconverged_losses_leave_the_bracket_and_say_so():
    statistics = measured(copying_text(400_000), (1, 2, 3, 4, 5),
                          [position_losses(10 ** 6), position_losses(5 * 10 ** 5, excess=0.1)])
    file = statistics_document(statistics)
    assert file["gamma"]["source"] in ("ngram_bracket", None) and file["alpha_theory"]["value"] is None
    assert "H_n at n=1 still falls 0.100 nats per data doubling" in file["refusals"][0]
    assert file["entropy"]["position_losses"]["points"][0]["converged"] is False


def test_books_like_correlations_report_both_regimes():
    law = BrokenPowerLaw(1.6, 0.17, 6.4, np.log(9.5e-3), 0, 1, 0)
    beta = measure_beta(estimates(law), 0.26)
    assert beta.slope.value == pytest.approx(1.6, abs=0.05) and beta.window == (1, 6)
    assert beta.op.n_break == pytest.approx(6.4, abs=0.5)
    assert beta.regime.startswith("correlations follow two regimes (break at n=6.4: 1.60 -> 0.17); beta=1.60 describes")
    assert beta.max_data_tokens == pytest.approx((0.26 / (9.5e-3 * 6 ** -1.6)) ** 2, rel=0.01)


@pytest.mark.parametrize("n_break, lags, words", [
    (6.4, (1, 2, 4, 6, 8, 16, 32, 64), r"4 lags before the break at n=6\.\d \(need 5\); give more --lags within it"),
    (3.6, DEFAULT_LAGS, r"3 lags before the break at n=3\.\d \(need 5\); no 5 lags fit there"),
])
def test_beta_never_reaches_across_the_break(n_break, lags, words):
    law = BrokenPowerLaw(1.6, 0.17, n_break, np.log(9.5e-3), 0, 1, 0)
    with pytest.raises(Refusal, match=words):
        measure_beta([e for e in estimates(law) if e.lag in lags], 0.26)


def test_the_frobenius_slope_is_of_the_lags_that_give_beta():
    law = BrokenPowerLaw(1.6, 0.17, 6.4, np.log(9.5e-3), 0, 1, 0)
    seen = estimates(law)
    hidden = replace(seen[-1], frobenius_squared=-1e-12)
    assert hidden.frobenius is None
    beta = measure_beta([*seen[:-1], hidden], 0.26)
    assert beta.frobenius is None and beta.frobenius_slope == measure_beta(seen, 0.26).frobenius_slope
    assert measure_beta([replace(seen[0], frobenius_squared=-1e-12), *seen[1:]], 0.26).frobenius_slope is None


def test_one_law_uses_all_lags():
    beta = measure_beta(estimates(lambda n: 9e-3 * n ** -0.8), 0.26)
    assert beta.window == (1, 64) and beta.op.n_break is None and beta.regime.startswith("one power law over lags 1")
    assert beta.slope.value == pytest.approx(0.8, abs=0.01)


def test_correlations_that_do_not_decay_are_refused():
    with pytest.raises(Refusal, match="not clear of 0"):
        measure_beta(estimates(lambda n: 5e-3 * np.exp(0.3 * np.sin(n))), 0.26)


def estimates(op_of, relative_error=0.01, n_pairs=32_000_000):
    rng = np.random.default_rng(0)
    values = []
    for lag in DEFAULT_LAGS:
        op = float(op_of(lag))
        influence = rng.standard_normal(300) * op * relative_error / np.sqrt(300)
        values.append(LagEstimate(lag, n_pairs, op, (1.5 * op) ** 2, op, influence, 3 * op * influence, 0.0))
    return values


def test_too_little_text_says_how_much_is_needed():
    with pytest.raises(Refusal, match=r"only \d lags above noise \(need 5\); about \S+ tokens needed") as refusal:
        measured(copying_text(30_000), (1, 2, 3, 4, 5))
    needed = float(str(refusal.value).split("about ")[1].split()[0])
    assert measured(copying_text(int(1.5 * needed)), (1, 2, 3, 4, 5)).beta.n_lags == 5


def test_text_without_correlations_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(Refusal, match=r"no correlations at these lags|tokens needed"):
        measured(from_arrays([rng.integers(0, 300, 500).astype(np.uint16) for _ in range(200)], 300))


@pytest.mark.parametrize("document_tokens, lags, words", [
    (300, (1, 2, 3, 4, 5, 64), r"lag 64 is above a tenth of the median document's length \(30\)"),
    (40, None, r"only 4 lags \(need 5\), and they end at a tenth of the median document's 40 tokens"),
    (300, (1, 2, 4), r"only 3 lags \(need 5\)"),
])
def test_lags_longer_than_documents_are_refused(document_tokens, lags, words):
    with pytest.raises(Refusal, match=words):
        measured(copying_text(100_000, document_tokens), lags)


def test_a_fold_without_long_documents_is_refused():
    rng = np.random.default_rng(0)
    lengths = [400] * 90 + [20] * 30
    documents = from_arrays([rng.integers(0, 300, length).astype(np.uint16) for length in lengths], 300)
    documents = documents.select((documents.folds != 1) | (documents.lengths == 20))
    with pytest.raises(Refusal, match="a third of the documents has none longer than lag 23"):
        measured(documents, (1, 2, 3, 4, 23))


def test_default_lags_end_at_a_tenth_of_the_documents_and_say_so():
    statistics = measured(copying_text(300_000, 200))
    assert [e.lag for e in statistics.estimates] == [1, 2, 3, 4, 5, 6, 8, 11, 16]
    assert "lags end at 16, a tenth of the median document's length" in statistics.warnings


@pytest.mark.parametrize("documents, words", [
    ([{"text": "alone " * 3000}, {"text": "validation"}], "only 1 different document"),
    ([{"text": "~" * (1000 + i)} for i in range(200)], "one token makes up 100% of the text"),
])
def test_a_corpus_that_cannot_do_exits_with_3_and_writes_nothing(corpus, tmp_path, refusal, documents, words):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    text = str(tmp_path / "text")
    error = refusal(main, arguments(corpus, tmp_path, "--dataset", text), exit_code=3).splitlines()[-1]
    assert error.startswith("error: ") and words in error
    assert not (tmp_path / "stats.json").exists()


def test_losses_of_another_dataset_exit_with_3(corpus, tmp_path, refusal):
    event = {"tokens": 10, "nats_by_position": [1.0, 1.0], "counts_by_position": [1, 1], "dataset_id": "climbmix-1"}
    (tmp_path / "event.json").write_text(json.dumps(event))
    argv = arguments(corpus, tmp_path, "--position-losses", str(tmp_path / "event.json"))
    assert "entropy measured on another distribution than the training text" in refusal(main, argv, exit_code=3)
    assert not (tmp_path / "stats.json").exists()


@pytest.mark.parametrize("more", [["--lags", "0,1"], ["--lags", "a"], ["--max-tokens", "0"], ["--split", "test"]])
def test_flags_without_sense_exit_with_2(corpus, tmp_path, more, refusal):
    assert refusal(main, arguments(corpus, tmp_path, *more))


def test_losses_of_different_models_exit_with_3(corpus, tmp_path, refusal):
    dataset_id = open_dataset(str(corpus / "text")).dataset_id
    for name in ("a.json", "b.json"):
        event = {"tokens": 10, "nats_by_position": [1.0, 1.0], "counts_by_position": [1, 1], "dataset_id": dataset_id,
                 "model_config": {"n_layer": len(list(tmp_path.iterdir()))}}
        (tmp_path / name).write_text(json.dumps(event))
    argv = arguments(corpus, tmp_path, "--position-losses", str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    assert "are of different models" in refusal(main, argv, exit_code=3)


@pytest.mark.parametrize("path", ["missing/stats.json", "."])
def test_an_output_that_cannot_be_written_is_named_before_the_work(corpus, tmp_path, path, refusal):
    assert "--out" in refusal(main, arguments(corpus, tmp_path, "--output-json", str(tmp_path / path)))


def test_a_missing_matplotlib_is_named_before_the_work(corpus, tmp_path, monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    argv = arguments(corpus, tmp_path, "--plot", str(tmp_path / "stats.png"))
    assert "pip install 'nanochat[report]'" in refusal(main, argv)
    assert not (tmp_path / "stats.json").exists()


def test_lags_are_sorted_and_different():
    assert parse_args(["--dataset", "d", "--output-json", "s", "--lags", "4,1,2,4"]).lags == [1, 2, 4]


def test_processes_give_one_file_and_the_last_word_to_the_first(corpus, tmp_path, capfd):
    main(arguments(corpus, tmp_path))
    alone = json.loads((tmp_path / "stats.json").read_text())
    main(arguments(corpus, tmp_path, "--processes", "2"))
    together = json.loads((tmp_path / "stats.json").read_text())
    for name in ("settings", "command", "created_utc", "wall_time_sec"):
        del alone[name], together[name]
    assert_same(together, alone)
    capfd.readouterr()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    with pytest.raises(SystemExit) as stop:
        main(arguments(corpus, tmp_path, "--processes", "2", "--dataset", str(tmp_path / "text")))
    assert stop.value.code == 3 and capfd.readouterr().err.count("only 1 different") == 1


def test_a_killed_process_is_named():
    with pytest.raises(UserError, match="fewer --processes"), spawn_workers(1, _die, ()):
        start_ranks()
        all_reduce_sum(Ranks(0, 0, 2), np.zeros(1))


def _die(_):
    start_ranks()
    os._exit(9)
