"""A made bundle of CORE tasks, and its accuracies by CORE's rules written out."""

import csv
import json
import math
import random

import torch
import yaml


def made_items(task_type, n, rng, length=1):
    def words(k):
        lengths = [rng.randint(1, 4) for _ in range(k * length)]
        return " ".join("".join(rng.choices("abcde", k=n)) for n in lengths)

    for _ in range(n):
        gold = rng.randrange(3)
        if task_type == "multiple_choice":
            yield {"query": words(3), "choices": [words(2) for _ in range(3)], "gold": gold}
        elif task_type == "schema":
            contexts = [words(2) for _ in range(3)]
            yield {"context_options": contexts, "continuation": words(2), "gold": gold}
        else:
            yield {"context": words(4) + " ", "continuation": words(1)}


def write_bundle(folder, n_items=9, words=1):
    rng, tasks, baselines = random.Random(0), [], []
    for task_type, baseline, shots in (
            ("multiple_choice", 100 / 3, 2), ("schema", 25, 0), ("language_modeling", 0, 1)):
        uri, label = f"made/{task_type}.jsonl", task_type[:6]
        path = folder / "eval_data" / uri
        path.parent.mkdir(parents=True, exist_ok=True)
        items = made_items(task_type, n_items, rng, words)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        tasks.append({"label": label, "icl_task_type": task_type, "dataset_uri": uri,
                      "num_fewshot": [shots], "continuation_delimiter": ": "})
        baselines.append((label, "made", baseline))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("Eval Task", "Task Category", "Random baseline"))
        table.writerows(baselines)
    return folder


def accuracy_by_brute_force(model, tokenizer, bundle, cap):
    """Return {label: accuracy}: CORE's rules with plain strings, one unpadded prompt at a time."""
    def ids(text):
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    def nats(tokens):
        log_p = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        each = [-log_p[i, token].item() for i, token in enumerate(tokens[1:])]
        return each, log_p.argmax(-1).tolist()

    found = {}
    for entry in yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]:
        lines = (bundle / "eval_data" / entry["dataset_uri"]).read_text().splitlines()
        items = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(items)
        [n_shots], kind, right = entry["num_fewshot"], entry["icl_task_type"], 0
        items = items[: max(cap, n_shots + 1)]
        for i, item in enumerate(items[:cap]):
            others = [k for k in range(len(items)) if k != i]
            shots = [items[k] for k in random.Random(1234 + i).sample(others, n_shots)]
            if kind == "multiple_choice":
                before = "".join(f"{shot['query']}: {shot['choices'][shot['gold']]}\n\n"
                                 for shot in shots)
                prompts = [ids(f"{before}{item['query']}: {choice}") for choice in item["choices"]]
                start = 0
                while len({tuple(prompt[: start + 1]) for prompt in prompts}) == 1:
                    start += 1
                means = [sum(nats(p)[0][start - 1:]) / (len(p) - start) if len(p) > start
                         else math.inf for p in prompts]
                right += means.index(min(means)) == item["gold"]
            elif kind == "schema":
                prompts = [ids(f"{context}: {item['continuation']}")
                           for context in item["context_options"]]
                shared = 0
                while len({tuple(prompt[-shared - 1:]) for prompt in prompts}) == 1:
                    shared += 1
                means = [sum(nats(prompt)[0][-shared:]) / shared for prompt in prompts]
                right += means.index(min(means)) == item["gold"]
            else:
                before = "".join(f"{shot['context'].strip()}: {shot['continuation']}\n\n"
                                 for shot in shots)
                without = ids(f"{before}{item['context'].strip()}:")
                tokens = ids(f"{before}{item['context'].strip()}: {item['continuation']}")
                right += nats(tokens)[1][len(without) - 1:-1] == tokens[len(without):]
        found[entry["label"]] = right / min(cap, len(items))
    return found
