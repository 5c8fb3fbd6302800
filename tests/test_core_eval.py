import csv
import functools
import http.server
import io
import json
import math
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from core_bundles import accuracy_by_brute_force, write_bundle

from nanochat import core_eval
from nanochat.common import UserError
from nanochat.core_eval import Task, bundle_folder, download_bundle, read_bundle
from nanochat.core_eval import (
    CoreResult,
    Option,
    crop,
    evaluate_core,
    fewshot_indices,
    options_of,
    render_prompts,
    score_options,
)
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
MADE_TASKS = json.loads((GOLDEN / "core_prompts.json").read_text(encoding="utf-8"))


def golden_task(name):
    made = MADE_TASKS[name]
    return Task(name, made["task_type"], made["num_fewshot"], made["continuation_delimiter"], 0.0, made["items"],
                len(made["items"]))


@pytest.mark.parametrize("name", MADE_TASKS)
def test_shots_prompts_and_spans_are_upstreams(name):
    task, tokenizer = golden_task(name), load_tokenizer(GOLDEN / "tokenizer_1024")
    for index, expected in enumerate(MADE_TASKS[name]["expected"]):
        assert fewshot_indices(task, index) == expected["fewshot"]
        prompts = render_prompts(task, index)
        assert prompts == expected["prompts"]
        options = options_of(task, index, tokenizer)
        assert [option.start for option in options] == expected["start"]
        assert [option.end for option in options] == expected["end"]
        scored = prompts[-len(options):]
        assert [option.tokens for option in options] == [[tokenizer.bos_id, *tokenizer.encode(p)] for p in scored]


def test_braces_and_blanks_in_the_items_stay_as_they_are():
    items = [{"query": " {{ x }}\r\n", "choices": ["{% y %}", " b \n"], "gold": 1}] * 2
    prompts = render_prompts(Task("t", "multiple_choice", 1, "\n", 0.0, items, 2), 0)
    assert prompts == [" {{ x }}\r\n\n b \n\n\n {{ x }}\r\n\n{% y %}", " {{ x }}\r\n\n b \n\n\n {{ x }}\r\n\n b \n"]


# A made bundle: words of a few letters, so that the tokenizer of single bytes keeps prompts short.

def bytes_tokenizer():
    return Tokenizer({bytes([i]): i for i in range(256)}, {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)})


@pytest.fixture
def bundle(tmp_path):
    return write_bundle(tmp_path / "eval_bundle")


@functools.cache
def causal_model(seed=0, vocab_size=265, width=8):
    """Logits from the decaying mean of what came so far: causal, and every token before counts."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(vocab_size, width, generator=generator)
    head = torch.randn(width, vocab_size, generator=generator)

    def model(idx):
        T = idx.size(1)
        age = torch.arange(T)[:, None] - torch.arange(T)
        weight = torch.where(age >= 0, 0.7 ** age.clamp_min(0), 0.0)
        return weight @ embedding[idx] @ head

    return model


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("cap", [9, 5, 2, 1])  # two examples are shown before one of multip
def test_core_equals_the_rules_spelled_out(bundle, seed, cap):
    result = evaluate_core(causal_model(seed), bytes_tokenizer(), bundle, "cpu", max_per_task=cap)
    accuracy = accuracy_by_brute_force(causal_model(seed), bytes_tokenizer(), bundle, cap)
    assert result.accuracy == pytest.approx(accuracy)
    expected = {"multip": (accuracy["multip"] - 1 / 3) / (2 / 3), "schema": (accuracy["schema"] - 0.25) / 0.75,
                "langua": accuracy["langua"]}
    assert result.centered == pytest.approx(expected)
    assert result.core_metric == pytest.approx(sum(expected.values()) / 3)


def test_a_model_that_knows_the_answers_scores_one(bundle):
    tokenizer, right = bytes_tokenizer(), {}
    for task in read_bundle(bundle):
        for index, item in enumerate(task.items):
            options = options_of(task, index, tokenizer)
            option = options[item.get("gold", 0)]
            for at in range(option.start, option.end):
                right[tuple(option.tokens[:at])] = option.tokens[at]

    def model(idx):
        logits = torch.zeros(*idx.shape, 265)
        for b, row in enumerate(idx.tolist()):
            for t in range(len(row)):
                if tuple(row[:t + 1]) in right:
                    logits[b, t, right[tuple(row[:t + 1])]] = 20
        return logits

    assert evaluate_core(model, tokenizer, bundle, "cpu").core_metric == pytest.approx(1, abs=0)


def test_batches_of_any_size_give_the_same_scores(bundle):
    tokenizer = bytes_tokenizer()
    options = [option for task in read_bundle(bundle) for i in range(9) for option in options_of(task, i, tokenizer)]
    seen = []

    def model(idx):
        seen.append(idx.numel())
        return causal_model()(idx)

    one_by_one = score_options(options, model, 256, "cpu", batch_tokens=1)
    for batch_tokens in (100, 1000):
        seen.clear()
        batched = score_options(options, model, 256, "cpu", batch_tokens)
        assert max(seen) <= batch_tokens and len(seen) < len(options)
        assert [nats for nats, _ in batched] == pytest.approx([nats for nats, _ in one_by_one], rel=1e-5)
        assert [hit for _, hit in batched] == [hit for _, hit in one_by_one]


def test_ranks_share_the_examples_and_sum_their_counts(bundle, monkeypatch):
    tokenizer, whole = bytes_tokenizer(), evaluate_core(causal_model(), bytes_tokenizer(), bundle, "cpu")
    counts, calls = [], []

    def model(idx):
        calls.append(len(idx))
        return causal_model()(idx)

    monkeypatch.setattr("torch.distributed.all_reduce", lambda n_correct: counts.append(n_correct.clone()))
    for rank in range(2):
        evaluate_core(model, tokenizer, bundle, "cpu", rank=rank, world_size=2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda n_correct: n_correct.copy_(sum(counts)))
    assert evaluate_core(model, tokenizer, bundle, "cpu", rank=1, world_size=2) == whole
    assert len(counts) == 2 and sum(calls) == 9 * 7 + 4 * 7  # rank 0 has 5 of the 9 items, rank 1 has 4, twice


def test_long_prompts_lose_their_beginning():
    option = Option(list(range(10)), 7, 9)
    assert crop(option, None) is option and crop(option, 10) is option
    assert crop(option, 4) == Option([6, 7, 8, 9], 1, 3)
    assert crop(Option(list(range(10)), 2, 10), 3) == Option([7, 8, 9], 1, 3)


def test_no_prompt_is_longer_than_the_model_takes(bundle):
    lengths = []

    def model(idx):
        lengths.append(idx.size(1))
        return causal_model()(idx)

    evaluate_core(model, bytes_tokenizer(), bundle, "cpu", max_tokens=12)
    assert max(lengths) == 12


def test_a_choice_that_is_the_beginning_of_another_is_never_chosen():
    items = [{"query": "q", "choices": ["a", "ab", "ac"], "gold": 0}]
    options = options_of(Task("t", "multiple_choice", 0, " ", 0.0, items, 1), 0, bytes_tokenizer())
    assert [option.end - option.start for option in options] == [0, 1, 1]
    scores = score_options(options, causal_model(), 256, "cpu", batch_tokens=1)
    assert scores[0] == (math.inf, False) and all(math.isfinite(nats) for nats, _ in scores[1:])


def test_a_missing_bundle_says_where_it_must_be():
    with pytest.raises(UserError, match=r"core.yaml is missing.*nanochat.core_eval.*eval_bundle") as error:
        evaluate_core(causal_model(), bytes_tokenizer(), bundle_folder(), "cpu")
    assert str(bundle_folder()) in str(error.value)


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("core.yaml", "icl_tasks:", "icl_tasks: [", "not a list of tasks"),
    ("core.yaml", "icl_tasks:", "tasks:", "not a list of tasks"),
    ("core.yaml", "label: schema", "label: [schema]", "are texts"),
    ("core.yaml", "icl_task_type: schema", "icl_task_type: riddle", "task schema is of type riddle"),
    ("core.yaml", "made/schema.jsonl", "made/other.jsonl", "other.jsonl is missing"),
    ("eval_meta_data.csv", "schema,made,25", "", "no random baseline for task schema"),
    ("eval_meta_data.csv", "25", "a quarter", "not a table with the columns"),
    ("eval_data/made/schema.jsonl", '"gold"', '"silver"', "schema.jsonl, line 1: .*without gold"),
    ("eval_data/made/schema.jsonl", '"gold": ', '"gold": 9', "line 1: .*no index into context_options"),
    ("eval_data/made/schema.jsonl", "{", "", "schema.jsonl, line 1: not an item of a schema task"),
    ("eval_data/made/schema.jsonl", '"continuation": "', '"continuation": "", "was": "', "continuation is blank"),
])
def test_a_damaged_bundle_is_named(bundle, file, old, new, message):
    path = bundle / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_bundle(bundle)


def test_a_cap_keeps_as_many_items_as_must_be_shown(bundle):
    for cap in (1, 2, 5, 9, 20, -1):
        whole = read_bundle(bundle)
        for task, all_of_it in zip(read_bundle(bundle, cap), whole, strict=True):
            assert task.n_evaluated == (9 if cap == -1 else min(cap, 9))
            assert task.items == all_of_it.items[:max(task.n_evaluated, task.num_fewshot + 1)]


@pytest.mark.parametrize("cap", [0, -2])
def test_a_cap_of_none_is_refused(bundle, cap):
    with pytest.raises(UserError, match="at least 1, or -1 for all"):
        read_bundle(bundle, max_per_task=cap)


def test_a_task_of_fewer_items_than_it_shows_is_damaged(tmp_path):
    with pytest.raises(UserError, match=r"multiple_choice\.jsonl: task multip shows 2 other examples .* has only 2"):
        read_bundle(write_bundle(tmp_path / "small", n_items=2))


def test_the_table_has_a_row_for_each_task_and_one_for_core(tmp_path):
    CoreResult(0.25, {"a, b": 1.0, "c": 0.5}, {"a, b": 1.0, "c": -0.5}).write_csv(tmp_path / "core.csv")
    with open(tmp_path / "core.csv", newline="") as file:
        assert list(csv.reader(file)) == [["Task", "Accuracy", "Centered"], ["a, b", "1.000000", "1.000000"],
                                          ["c", "0.500000", "-0.500000"], ["CORE", "", "0.250000"]]


def test_help_shows_help_and_fetches_nothing(base_dir, capsys, monkeypatch):
    monkeypatch.setattr("nanochat.core_eval.download_bundle", lambda: pytest.fail("downloaded"))
    with pytest.raises(SystemExit) as stopped:
        core_eval.main(["--help"])
    assert stopped.value.code == 0 and "CORE" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        core_eval.main(["--url", "x"])
    assert stopped.value.code == 2 and not list(base_dir.iterdir())


@pytest.fixture
def serve(monkeypatch):
    """Serve bytes on loopback: serve(content, status) -> (url, requests so far)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    servers = []

    def start(content, status=200):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/eval_bundle.zip", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def zipped(folder):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in folder.rglob("*"):
            file.write(path, path.relative_to(folder.parent))
    return buffer.getvalue()


def test_the_bundle_is_downloaded_once(bundle, serve):
    url, requests = serve(zipped(bundle))
    assert download_bundle(url) == bundle_folder()
    assert read_bundle(bundle_folder()) == read_bundle(bundle)
    assert download_bundle(url) == bundle_folder() and len(requests) == 1


@pytest.mark.parametrize(("status", "message"), [(200, "not a zip"), (404, "404 Not Found"), (503, "503")])
def test_a_failed_download_leaves_nothing(base_dir, serve, status, message):
    url, _ = serve(b"not a zip", status)
    with pytest.raises(UserError, match=f"could not download .*{message}"):
        download_bundle(url)
    assert [path.name for path in base_dir.iterdir()] == ["eval_bundle.lock"]


def test_an_archive_of_something_else_is_refused(base_dir, bundle, serve):
    (bundle / "core.yaml").unlink()
    url, _ = serve(zipped(bundle))
    with pytest.raises(UserError, match=r"core\.yaml is missing"):
        download_bundle(url)
    assert [path.name for path in base_dir.iterdir()] == ["eval_bundle.lock"]


def test_no_server_is_one_line(serve, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's attempts
    with pytest.raises(UserError, match=r"could not download http://127\.0\.0\.1:9/"):
        download_bundle("http://127.0.0.1:9/eval_bundle.zip")
