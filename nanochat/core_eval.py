"""Download CORE's tasks into the cache folder: python -m nanochat.core_eval"""

import argparse
import csv
import functools
import random
from dataclasses import dataclass
from itertools import takewhile

import jinja2
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.common import atomic_path, command, progress
from nanochat.core_bundle import download_bundle, read_bundle

FEWSHOT_SEED = 1234  # of item i: FEWSHOT_SEED + i
WINDOW_EXAMPLES = 256  # rendered, sorted by length and batched together
BATCH_TOKENS = 8192  # at most in one forward pass

# By task type: how an example before the item is written (its answer included), and the item itself. `option` is one
# of the item's choices, one of its contexts, or its continuation.
_SHOT_AND_ITEM = {
    "multiple_choice": ("{{ shot.query }}{{ delimiter }}{{ shot.choices[shot.gold] }}",
                        "{{ item.query }}{{ delimiter }}{{ option }}"),
    "schema": ("{{ shot.context_options[shot.gold] }}{{ delimiter }}{{ shot.continuation }}",
               "{{ option }}{{ delimiter }}{{ item.continuation }}"),
    "language_modeling": ("{{ shot.context | trim }}{{ delimiter }}{{ shot.continuation }}",
                          "{{ item.context | trim }}{{ delimiter }}{{ option }}"),
}


@dataclass(frozen=True)
class CoreResult:
    """core_metric: the mean of `centered` over tasks. By task label: `accuracy`, and `centered`, which is
    (accuracy - random) / (1 - random)."""

    core_metric: float
    accuracy: dict
    centered: dict

    def write_csv(self, path):
        """Write Task, Accuracy, Centered, a row for each task and one for CORE, as upstream's table has them."""
        rows = [(label, f"{self.accuracy[label]:.6f}", f"{value:.6f}") for label, value in self.centered.items()]
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerows([("Task", "Accuracy", "Centered"), *rows, ("CORE", "", f"{self.core_metric:.6f}")])


@dataclass(frozen=True)
class Option:
    """A prompt as token ids, and the span start..end (end excluded) whose tokens are scored."""

    tokens: list
    start: int
    end: int


@torch.no_grad()
def evaluate_core(model, tokenizer, bundle, device, *, max_per_task=-1, max_tokens=None, rank=0, world_size=1):
    """CoreResult of `model(idx)`: (B, T) int64 token ids -> (B, T, vocab) logits. Prompts come in many lengths, so
    give the model as it is, not a compiled one.

    bundle: the folder with core.yaml. max_tokens: longer prompts lose their beginning. With several ranks every
    world_size-th example is this one's, and counts are summed over ranks.
    Errors: UserError when the bundle is missing or damaged.
    """
    tasks = read_bundle(bundle, max_per_task)
    n_correct = torch.zeros(len(tasks), dtype=torch.int64, device=device)
    with progress(total=sum(task.n_evaluated for task in tasks), unit="example", shown=rank == 0) as bar:
        for number, task in enumerate(tasks):
            bar.set_description(f"CORE: {task.label}")
            mine = range(rank, task.n_evaluated, world_size)
            for at in range(0, len(mine), WINDOW_EXAMPLES):
                window = mine[at:at + WINDOW_EXAMPLES]
                examples = [options_of(task, index, tokenizer) for index in window]
                scores = score_options([crop(option, max_tokens) for options in examples for option in options],
                                       model, tokenizer.bos_id, device, BATCH_TOKENS)
                n_correct[number] += count_correct(task, window, examples, scores)
                bar.update(len(window) * world_size)
        bar.update(bar.total - bar.n)
    if world_size > 1:
        dist.all_reduce(n_correct)
    accuracy = {task.label: correct / task.n_evaluated
                for task, correct in zip(tasks, n_correct.tolist(), strict=True)}
    centered = {task.label: (accuracy[task.label] - task.random_baseline) / (1 - task.random_baseline)
                for task in tasks}
    return CoreResult(sum(centered.values()) / len(tasks), accuracy, centered)


def fewshot_indices(task, index):
    """The other items shown before item `index`."""
    drawn = random.Random(FEWSHOT_SEED + index).sample(range(len(task.items) - 1), task.num_fewshot)
    return [i + (i >= index) for i in drawn]


def render_prompts(task, index):
    """The prompts of one item: one an option; of a language_modeling item without and with its continuation."""
    item = task.items[index]
    fewshot = [task.items[i] for i in fewshot_indices(task, index)]
    if task.task_type == "language_modeling":
        options = ["", item["continuation"]]
    else:
        options = item["choices" if task.task_type == "multiple_choice" else "context_options"]
    template = _template(task.task_type)
    prompts = [template.render(fewshot=fewshot, item=item, option=option, delimiter=task.continuation_delimiter)
               for option in options]
    if task.task_type == "language_modeling":
        prompts[0] = prompts[0].strip()  # the blank before the continuation is part of the continuation's token
    return prompts


@functools.cache
def _template(task_type):
    shot, item = _SHOT_AND_ITEM[task_type]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string("{% for shot in fewshot %}" + shot + "\n\n{% endfor %}" + item)


def options_of(task, index, tokenizer):
    """The Options of one item. Scored are the choices where they differ (multiple_choice), the end that the prompts
    share (schema), the continuation (language_modeling, which has one option)."""
    prompts = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in render_prompts(task, index)]
    if task.task_type == "schema":
        shared = common_prefix_length([tokens[::-1] for tokens in prompts])
        return [Option(tokens, max(1, len(tokens) - shared), len(tokens)) for tokens in prompts]
    start = common_prefix_length(prompts)
    if task.task_type == "language_modeling":
        prompts = prompts[1:]
    return [Option(tokens, start, len(tokens)) for tokens in prompts]


def common_prefix_length(sequences):
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False)))


def crop(option, max_tokens):
    """The option's last `max_tokens` tokens; at least one token stays before the span."""
    surplus = len(option.tokens) - max_tokens if max_tokens else 0
    if surplus <= 0:
        return option
    return Option(option.tokens[surplus:], max(1, option.start - surplus), option.end - surplus)


def score_options(options, model, pad_id, device, batch_tokens):
    """[(mean nats per token of the span, is every token of it the model's first choice)], in the options' order.

    An empty span (a choice that is the beginning of another) has infinite nats and is never the first choice.
    """
    scores = [None] * len(options)
    by_length = sorted(range(len(options)), key=lambda i: len(options[i].tokens))
    while by_length:
        longest = len(options[by_length[-1]].tokens)
        n_rows = max(1, batch_tokens // longest)
        batch, by_length = by_length[-n_rows:], by_length[:-n_rows]
        for i, score in zip(batch, _score_batch([options[i] for i in batch], model, pad_id, device), strict=True):
            scores[i] = score
    return scores


def _score_batch(options, model, pad_id, device):
    length = max(len(option.tokens) for option in options)
    idx = torch.tensor([option.tokens + [pad_id] * (length - len(option.tokens)) for option in options], device=device)
    spans = [(row, position) for row, option in enumerate(options) for position in range(option.start, option.end)]
    row, position = torch.tensor(spans, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    logits, targets = model(idx)[row, position - 1].float(), idx[row, position]
    found = torch.stack((F.cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()))
    nats, hits = torch.zeros(2, len(options), device=device).index_add_(1, row, found).tolist()
    lengths = [option.end - option.start for option in options]
    return [(total / length, hit == length) if length else (float("inf"), False)
            for total, hit, length in zip(nats, hits, lengths, strict=True)]


def count_correct(task, window, examples, scores):
    """How many items are answered right: by the option with the lowest mean nats, or word for word."""
    scores, n_correct = iter(scores), 0
    for index, options in zip(window, examples, strict=True):
        mine = [next(scores) for _ in options]
        if task.task_type == "language_modeling":
            n_correct += mine[0][1]
        else:
            nats = [option_nats for option_nats, _ in mine]
            n_correct += nats.index(min(nats)) == task.items[index]["gold"]
    return n_correct


def parse_args(argv=None):
    return argparse.ArgumentParser(prog="python -m nanochat.core_eval", description=__doc__).parse_args(argv)


@command
def main(argv=None):
    parse_args(argv)
    print(f"CORE's tasks are in {download_bundle()}")


if __name__ == "__main__":
    main()
