"""CORE: prompts and spans against golden ones, scores against brute force, the bundle's files."""

import csv
import functools
import io
import json
import math
import zipfile
from pathlib import Path

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle

from nanochat import core_eval
from nanochat.common import UserError
from nanochat.core_eval import (
    CoreResult,
    Task,
    bundle_folder,
    download_bundle,
    evaluate_core,
    fewshot_indices,
    options_of,
    read_bundle,
    render_prompts,
    score_options,
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
def causal_model(seed=0, vocab_size=265, width=8):
    """Logits from the decaying mean of the tokens so far."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocab_size, width, generator=generator)
    head = torch.randn(width, vocab_size, generator=generator)

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


def right_options(tasks, tokenizer):
    options = []
    for task in tasks:
        for index, item in enumerate(task.items):
            options.append(options_of(task, index, tokenizer)[0][item.get("gold", 0)])
    return options


# --- prompts and scores ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", MADE_TASKS)
def test_shots_prompts_and_spans_are_those_of_upstream(name):
    made, tokenizer = MADE_TASKS[name], bpe_tokenizer()
    task = Task(name, made["task_type"], made["num_fewshot"], made["continuation_delimiter"], 0.0,
                made["items"], len(made["items"]))
    for index, expected in enumerate(made["expected"]):
        assert fewshot_indices(task, index) == expected["fewshot"]
        prompts = render_prompts(task, index)
        assert prompts == expected["prompts"]
        options, was_empty = options_of(task, index, tokenizer)
        assert not was_empty
        assert [start for _, start in options] == expected["start"]
        assert [len(tokens) for tokens, _ in options] == expected["end"]
        for (tokens, _), prompt in zip(options, prompts[-len(options):], strict=True):
            assert tokens == [tokenizer.bos_id, *tokenizer.encode(prompt)]


def test_braces_and_blanks_in_items_are_kept():
    items = [{"query": " {{ x }}\r\n", "choices": ["{% y %}", " b \n"], "gold": 1}] * 2
    shot = " {{ x }}\r\n\n b \n\n\n"
    prompts = render_prompts(Task("t", "multiple_choice", 1, "\n", 0.0, items, 2), 0)
    assert prompts == [f"{shot} {{{{ x }}}}\r\n\n{option}" for option in items[0]["choices"]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cap", [9, 5, 1])  # a multiple-choice item shows two others
def test_core_equals_its_rules_written_out(bundle, seed, cap):
    model, tokenizer = causal_model(seed), bytes_tokenizer()
    result = evaluate_core(model, tokenizer, bundle, "cpu", max_per_task=cap)
    accuracy = accuracy_by_brute_force(model, tokenizer, bundle, cap)
    assert result.accuracy == pytest.approx(accuracy)
    centered = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3),
                "schema": (accuracy["schema"] - 0.25) / 0.75, "langua": accuracy["langua"]}
    assert result.centered == pytest.approx(centered)
    assert result.core_metric == pytest.approx(sum(centered.values()) / 3)


def test_a_model_that_knows_the_answers_scores_one(bundle):
    tokenizer = bytes_tokenizer()
    model = model_that_knows(right_options(read_bundle(bundle), tokenizer), 265)
    assert evaluate_core(model, tokenizer, bundle, "cpu").core_metric == 1


def test_batches_of_any_size_give_the_same_scores(bundle):
    tokenizer, seen = bytes_tokenizer(), []
    options = [option for task in read_bundle(bundle) for i in range(9)
               for option in options_of(task, i, tokenizer)[0]]

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


def test_ranks_share_the_examples_and_sum_their_counts(bundle, monkeypatch):
    model, tokenizer = causal_model(), bytes_tokenizer()
    expected = evaluate_core(model, tokenizer, bundle, "cpu")
    counts = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda each: counts.append(each.clone()))
    for rank in range(2):
        evaluate_core(model, tokenizer, bundle, "cpu", rank=rank, world_size=2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda each: each.copy_(sum(counts)))
    assert evaluate_core(model, tokenizer, bundle, "cpu", rank=1, world_size=2) == expected


def test_long_prompts_lose_their_beginning_but_keep_their_scored_end(bundle):
    [task, *_], lengths = read_bundle(bundle), []
    options, _ = options_of(task, 0, bytes_tokenizer())
    cropped, _ = options_of(task, 0, bytes_tokenizer(), max_tokens=4)
    for (tokens, start), (kept, kept_start) in zip(options, cropped, strict=True):
        assert kept == tokens[-4:] and kept_start == max(1, start - len(tokens) + 4)

    def model(idx):
        lengths.append(idx.size(1))
        return causal_model()(idx)

    evaluate_core(model, bytes_tokenizer(), bundle, "cpu", max_tokens=12)
    assert max(lengths) == 12


# --- options that begin alike ---------------------------------------------------------------------

def item_task(choices, gold=0, delimiter=" ", task_type="multiple_choice"):
    if task_type == "schema":
        item = {"context_options": choices, "continuation": "end", "gold": gold}
    else:
        item = {"query": "the", "choices": choices, "gold": gold}
    return Task("t", task_type, 0, delimiter, 0.0, [item], 1)


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(), bpe_tokenizer()], ids=["bytes", "bpe"])
@pytest.mark.parametrize("delimiter", [" ", "\n", ": "])
@pytest.mark.parametrize("choices", [
    ["a", "ab", "ac"],
    ["was was", "was was be it", "was was be"],
    ["red ", "red", "red  x"],
    [" of", " of the", " of them"],
    ["10", "100", "1000"],
    ["the\n", "the\n\n", "the"],
])
def test_an_option_that_begins_the_others_can_be_right(tokenizer, delimiter, choices):
    for gold in range(len(choices)):
        task = item_task(choices, gold, delimiter)
        options, _ = options_of(task, 0, tokenizer)
        assert all(start < len(tokens) for tokens, start in options)
        model = model_that_knows([options[gold]], tokenizer.vocab_size)
        scores = score_options(options, model, tokenizer.bos_id, "cpu", 1000)
        assert core_eval.is_right(task, task.items[0], scores)


def test_a_bundle_of_such_options_is_answered_and_warned_of(tmp_path, capsys):
    folder, tokenizer = tmp_path / "prefix", bpe_tokenizer()
    (folder / "eval_data").mkdir(parents=True)
    items = [{"query": f"item {i} of the", "choices": ["in in", "in in him"], "gold": i % 2}
             for i in range(20)]
    (folder / "eval_data" / "prefix.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "core.yaml").write_text(
        "icl_tasks:\n- {label: prefix, dataset_uri: prefix.jsonl, num_fewshot: [0], "
        "icl_task_type: multiple_choice}\n")
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nprefix,50\n")
    model = model_that_knows(right_options(read_bundle(folder), tokenizer), tokenizer.vocab_size)
    assert evaluate_core(model, tokenizer, folder, "cpu").core_metric == 1
    assert "prefix: in 20 of 20 items" in capsys.readouterr().err


@pytest.mark.parametrize("task_type", ["multiple_choice", "schema"])
def test_equal_options_are_one_answer(task_type):
    tokenizer = bpe_tokenizer()
    for gold, right in ((0, True), (1, True), (2, False)):
        task = item_task(["red", "red", "blue"], gold, task_type=task_type)
        options, _ = options_of(task, 0, tokenizer)
        model = model_that_knows(options[:1], tokenizer.vocab_size)
        scores = score_options(options, model, tokenizer.bos_id, "cpu", 1000)
        assert core_eval.is_right(task, task.items[0], scores) == right


def test_an_option_without_any_token_is_never_right():
    task = item_task(["", "", ""], delimiter="")
    options, was_empty = options_of(task, 0, bytes_tokenizer())
    scores = score_options(options, causal_model(), 256, "cpu", 1000)
    assert was_empty and scores == [(math.inf, False)] * 3
    assert not core_eval.is_right(task, task.items[0], scores)


# --- the bundle -----------------------------------------------------------------------------------

def test_a_missing_bundle_says_where_it_must_be():
    with pytest.raises(UserError, match=r"missing .*core_eval.*eval_bundle"):
        read_bundle(bundle_folder())


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("core.yaml", "icl_tasks:", "icl_tasks: [", "core.yaml is damaged"),
    ("core.yaml", "icl_tasks:", "tasks:", "core.yaml is damaged"),
    ("core.yaml", "label: schema", "label: [schema]", "core.yaml is damaged"),
    ("core.yaml", "icl_task_type: schema", "icl_task_type: riddle", "unknown task type riddle"),
    ("core.yaml", "made/schema.jsonl", "made/other.jsonl", "missing .*other.jsonl"),
    ("core.yaml", "made/schema.jsonl", "../../x.jsonl", "outside the bundle"),
    ("eval_meta_data.csv", "schema,made,25", "", "no baseline of schema"),
    ("eval_meta_data.csv", "25", "a quarter", "eval_meta_data.csv is damaged"),
    ("eval_data/made/schema.jsonl", '"gold"', '"silver"', "schema.jsonl .*line 1: .*gold"),
    ("eval_data/made/schema.jsonl", '"gold": ', '"gold": 9', "schema.jsonl .*line 1: IndexError"),
    ("eval_data/made/schema.jsonl", "{", "", "schema.jsonl .*line 1: "),
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
    with pytest.raises(UserError, match=r"multiple_choice\.jsonl .*2 items"):
        read_bundle(write_bundle(tmp_path / "small", n_items=2))


def test_the_table_has_a_row_per_task_and_one_for_core(tmp_path):
    result = CoreResult(0.25, {"a, b": 1.0, "c": 0.5}, {"a, b": 1.0, "c": -0.5})
    result.write_csv(tmp_path / "core.csv")
    with open(tmp_path / "core.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["Task", "Accuracy", "Centered"], ["a, b", "1.000000", "1.000000"],
            ["c", "0.500000", "-0.500000"], ["CORE", "", "0.250000"]]


@pytest.fixture
def serve(monkeypatch):
    """Return a function that replaces the download by some bytes or an error."""
    def start(content):
        requests = []

        def http_get(url, file):
            requests.append(url)
            if isinstance(content, Exception):
                raise content
            file.write(content)

        monkeypatch.setattr("huggingface_hub.file_download.http_get", http_get)
        return requests

    return start


def zipped(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder.parent))
    return buffer.getvalue()


def test_the_bundle_is_downloaded_once_and_its_files_are_checked(bundle, serve):
    requests = serve(zipped(bundle))
    assert download_bundle() == download_bundle() == bundle_folder() and len(requests) == 1
    assert read_bundle(bundle_folder()) == read_bundle(bundle)
    path = bundle_folder() / "eval_data" / "made" / "schema.jsonl"
    path.write_text(path.read_text().replace("a", "b", 1))
    with pytest.raises(UserError, match=r"schema\.jsonl is damaged .*SHA-256"):
        read_bundle(bundle_folder())


@pytest.mark.parametrize(("content", "message"), [
    (b"not a zip", "not a zip"), (OSError("404 Not Found"), "404 Not Found"), (None, "missing")])
def test_a_failed_download_leaves_nothing(base_dir, bundle, serve, content, message):
    if content is None:  # an archive of something else
        (bundle / "core.yaml").unlink()
        content = zipped(bundle)
    serve(content)
    with pytest.raises(UserError, match=message):
        download_bundle()
    assert not bundle_folder().exists() and not list(base_dir.glob(".eval_bundle*"))


def test_help_downloads_nothing(base_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        core_eval.main(["--help"])
    assert stopped.value.code == 0 and "CORE" in capsys.readouterr().out
    assert not list(base_dir.iterdir())
