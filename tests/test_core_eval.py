"""CORE: prompts and spans against golden ones, scores against brute force, the bundle's files."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle

from nanochat.common import UserError
from nanochat.core_eval import (
    CoreResult,
    Task,
    bundle_folder,
    download_bundle,
    evaluate_core,
    fewshot_indices,
    is_right,
    item_of,
    read_bundle,
    score_options,
    tokenized_options,
)
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
MADE_TASKS = json.loads((GOLDEN / "core_prompts.json").read_text(encoding="utf-8"))


def bytes_tokenizer():
    """A tokenizer of single bytes, which keeps the prompts of made bundles short."""
    special = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
    return Tokenizer({bytes([i]): i for i in range(256)}, special)


def bpe_tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer_1024")


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "eval_bundle")


@functools.cache
def causal_model():
    """Logits from the decaying mean of the tokens so far."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(265, 8, generator=generator)
    head = torch.randn(8, 265, generator=generator)

    def model(idx):
        age = torch.arange(idx.size(1))[:, None] - torch.arange(idx.size(1))
        weight = torch.where(age >= 0, 0.7 ** age.clamp_min(0), 0.0)
        return weight @ embedding[idx] @ head

    return model


def model_that_knows(options, vocab_size):
    """A model that predicts the scored tokens of these options, the later the surer."""
    following = {tuple(tokens[:at]): (tokens[at], 10 + at - start) for tokens, start in options
                 for at in range(start, len(tokens))}

    def model(idx):
        logits = torch.zeros(*idx.shape, vocab_size)
        for row, tokens in enumerate(idx.tolist()):
            for t in range(len(tokens)):
                if tuple(tokens[: t + 1]) in following:
                    token, logit = following[tuple(tokens[: t + 1])]
                    logits[row, t, token] = logit
        return logits

    return model


# --- prompts and scores ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", MADE_TASKS)
def test_shots_prompts_and_spans_are_those_of_upstream(name):
    made, tokenizer = MADE_TASKS[name], bpe_tokenizer()
    items = [item_of(made["task_type"], record) for record in made["items"]]
    task = Task(name, made["task_type"], made["num_fewshot"], made["continuation_delimiter"], 0.0,
                items, len(items))
    for index, expected in enumerate(made["expected"]):
        assert fewshot_indices(task, index) == expected["fewshot"]
        options = tokenized_options(task, index, tokenizer)
        assert [start for _, start in options] == expected["start"]
        assert [len(tokens) for tokens, _ in options] == expected["end"]
        for (tokens, _), prompt in zip(options, expected["prompts"][-len(options):], strict=True):
            assert tokens == [tokenizer.bos_id, *tokenizer.encode(prompt)]


@pytest.mark.parametrize("cap", [9, 5, 1])  # a multiple-choice item shows two others
def test_core_equals_its_rules_written_out(bundle, cap):
    model, tokenizer = causal_model(), bytes_tokenizer()
    result = evaluate_core(model, tokenizer, bundle, "cpu", max_per_task=cap)
    accuracy = accuracy_by_brute_force(model, tokenizer, bundle, cap)
    assert result.accuracy == pytest.approx(accuracy)
    centered = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3),
                "schema": (accuracy["schema"] - 0.25) / 0.75, "langua": accuracy["langua"]}
    assert result.centered == pytest.approx(centered)
    assert result.core_metric == pytest.approx(sum(centered.values()) / 3)


def test_batches_of_any_size_give_the_same_scores(bundle):
    tokenizer, seen = bytes_tokenizer(), []
    options = [option for task in read_bundle(bundle) for i in range(9)
               for option in tokenized_options(task, i, tokenizer)]

    def model(idx):
        seen.append(idx.numel())
        return causal_model()(idx)

    nats, hits = zip(*score_options(options, model, 256, "cpu", batch_tokens=1), strict=True)
    for batch_tokens in (100, 1000):
        seen.clear()
        scores = score_options(options, model, 256, "cpu", batch_tokens)
        assert max(seen) <= batch_tokens and len(seen) < len(options)
        assert [each for each, _ in scores] == pytest.approx(nats, rel=1e-5)
        assert [hit for _, hit in scores] == list(hits)


def test_long_prompts_lose_their_beginning_but_keep_their_scored_end(bundle):
    [task, *_], lengths = read_bundle(bundle), []
    options = tokenized_options(task, 0, bytes_tokenizer())
    cropped = tokenized_options(task, 0, bytes_tokenizer(), max_tokens=4)
    for (tokens, start), (kept, kept_start) in zip(options, cropped, strict=True):
        assert kept == tokens[-4:] and kept_start == max(1, start - len(tokens) + 4)

    def model(idx):
        lengths.append(idx.size(1))
        return causal_model()(idx)

    evaluate_core(model, bytes_tokenizer(), bundle, "cpu", max_tokens=12)
    assert max(lengths) == 12


# --- options that begin alike ---------------------------------------------------------------------

def item_task(choices, gold=0, delimiter=" ", task_type="multiple_choice"):
    record = {"query": "the", "choices": choices, "gold": gold,
              "context_options": choices, "continuation": "end"}
    return Task("t", task_type, 0, delimiter, 0.0, [item_of(task_type, record)], 1)


def answers_right(task, model, tokenizer):
    options = tokenized_options(task, 0, tokenizer)
    return is_right(task, 0, score_options(options, model, tokenizer.bos_id, "cpu"))


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(), bpe_tokenizer()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("delimiter", [" ", "\n", ": "])
@pytest.mark.parametrize("choices", [
    ["a", "ab", "ac"],
    ["was was", "was was be it", "was was be"],
    ["red ", "red", "red  x"],
    [" of", " of the", " of them"],
    ["the\n", "the\n\n", "the"],
])
def test_an_option_that_begins_the_others_can_be_right(tokenizer, delimiter, choices):
    for gold in range(len(choices)):
        task = item_task(choices, gold, delimiter)
        options = tokenized_options(task, 0, tokenizer)
        assert all(start < len(tokens) for tokens, start in options)
        assert answers_right(task, model_that_knows([options[gold]], tokenizer.vocab_size),
                             tokenizer)


@pytest.mark.parametrize("task_type", ["multiple_choice", "schema"])
def test_equal_options_are_one_answer(task_type):
    tokenizer = bpe_tokenizer()
    for gold, right in ((0, True), (1, True), (2, False)):
        task = item_task(["red", "red", "blue"], gold, task_type=task_type)
        options = tokenized_options(task, 0, tokenizer)
        model = model_that_knows(options[:1], tokenizer.vocab_size)
        assert answers_right(task, model, tokenizer) == right


def test_an_option_without_any_token_is_never_right():
    task = item_task(["", "", ""], delimiter="")
    options = tokenized_options(task, 0, bytes_tokenizer())
    scores = score_options(options, causal_model(), 256, "cpu", 1000)
    assert scores == [(math.inf, False)] * 3
    assert not is_right(task, 0, scores)


# --- the bundle -----------------------------------------------------------------------------------

def test_a_missing_bundle_says_where_it_must_be():
    with pytest.raises(UserError, match=r"missing .*core_eval.*eval_bundle"):
        read_bundle(bundle_folder())


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("core.yaml", "icl_tasks:", "tasks:", "damaged"),
    ("core.yaml", "label: schema", "label: multip", "not unique"),
    ("core.yaml", "icl_task_type: schema", "icl_task_type: riddle", "unknown task type riddle"),
    ("core.yaml", "made/schema.jsonl", "made/other.jsonl", "missing .*other.jsonl"),
    ("core.yaml", "made/schema.jsonl", "../../x.jsonl", "outside the bundle"),
    ("core.yaml", "made/schema.jsonl", "/etc/passwd", "outside the bundle"),
    ("eval_meta_data.csv", "schema,made,25", "", "damaged .*schema"),
    ("eval_meta_data.csv", "25", "a quarter", "damaged .*a quarter"),
    ("eval_data/made/schema.jsonl", '"gold"', '"silver"', "schema.jsonl line 1: .*gold"),
    ("eval_data/made/schema.jsonl", '"gold": ', '"gold": 9', "schema.jsonl line 1: "),
    ("eval_data/made/schema.jsonl", "{", "", "schema.jsonl line 1: "),
])
def test_a_damaged_file_is_named(bundle, file, old, new, message):
    text = (bundle / file).read_text()
    assert old in text
    (bundle / file).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_bundle(bundle)


def test_a_cap_keeps_the_items_that_must_be_shown(bundle):
    for cap in (1, 5, 20, -1):
        for task, complete in zip(read_bundle(bundle, cap), read_bundle(bundle), strict=True):
            assert task.n_evaluated == (9 if cap == -1 else min(cap, 9))
            n_items = max(task.n_evaluated, task.num_fewshot + 1)
            assert task.items == complete.items[:n_items]
    with pytest.raises(UserError, match="at least 1, or -1 for all"):
        read_bundle(bundle, max_per_task=0)


def test_a_task_with_too_few_items_to_show_is_refused(tmp_path):
    with pytest.raises(UserError, match="shows 2 of 2 items"):
        read_bundle(write_bundle(tmp_path / "small", n_items=2))


def test_the_table_has_a_row_per_task_and_one_for_core(tmp_path):
    CoreResult(0.25, {"a": 1.0, "c": 0.5}, {"a": 1.0, "c": -0.5}).write_csv(tmp_path / "core.csv")
    assert (tmp_path / "core.csv").read_text() == (
        "Task,Accuracy,Centered\na,1.000000,1.000000\nc,0.500000,-0.500000\nCORE,,0.250000\n")


def test_a_failed_download_leaves_nothing(base_dir, monkeypatch):
    def http_get(url, file):
        raise OSError("404 Not Found")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)
    with pytest.raises(UserError, match="404 Not Found"):
        download_bundle()
    assert not bundle_folder().exists() and not list(base_dir.glob(".eval_bundle*"))
