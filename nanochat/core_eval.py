"""CORE: the mean centered accuracy over in-context learning tasks (arXiv:2406.11794), as upstream.

python -m nanochat.core_eval downloads the tasks into the cache folder.
"""

import argparse
import csv
import hashlib
import math
import random
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path, PurePath, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import yaml

from nanochat.common import (
    CACHE_HELP,
    UserError,
    atomic_path,
    base_dir,
    command,
    locked,
    matches_checksum,
    parse_json,
    progress,
    sha256_of,
    warn,
    write_checksums,
)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the index of the item
WINDOW_EXAMPLES = 256  # examples that are sorted by length and batched together
BATCH_TOKENS = 8192  # at most, per forward pass
HF_ROW_TOKENS = 2048  # at most, per row of bits per byte
# Keys of an item by task type. The second key has the options; `gold` is the index of the right
# one.
ITEM_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("continuation", "context_options", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True)
class Task:
    """A task; its first `n_evaluated` items are answered, all can be shown before another."""

    label: str
    task_type: str
    num_fewshot: int
    continuation_delimiter: str
    random_baseline: float  # accuracy of guessing, 0 to 1
    items: list = field(repr=False)
    n_evaluated: int


@dataclass(frozen=True)
class CoreResult:
    """Accuracy by task, and centered: (accuracy - random) / (1 - random), whose mean is CORE."""

    core_metric: float
    accuracy: dict
    centered: dict

    def write_csv(self, path):
        """Write upstream's table: Task, Accuracy, Centered; one row per task and one for CORE."""
        rows = [(label, f"{self.accuracy[label]:.6f}", f"{centered:.6f}")
                for label, centered in self.centered.items()]
        rows = [("Task", "Accuracy", "Centered"), *rows, ("CORE", "", f"{self.core_metric:.6f}")]
        with (atomic_path(path) as temporary,
              open(temporary, "w", encoding="utf-8", newline="") as file):
            csv.writer(file, lineterminator="\n").writerows(rows)


@torch.no_grad()
def evaluate_core(model, tokenizer, bundle, device, *, max_per_task=-1, max_tokens=None, rank=0,
                  world_size=1):
    """Return the CoreResult of `model(idx)`: (B, T) int64 token ids -> (B, T, vocab) logits.

    Pass the uncompiled model: prompts have many lengths. bundle: the folder with core.yaml.
    max_tokens: longer prompts lose their beginning. A rank evaluates every world_size-th example;
    the counts are summed over ranks. Raise UserError if the bundle is missing or damaged.
    """
    tasks = read_bundle(bundle, max_per_task)
    counts = torch.zeros(len(tasks), 2, dtype=torch.int64)  # right answers, completely scored items
    n_examples = sum(task.n_evaluated for task in tasks)
    with progress(total=n_examples, unit="example", shown=rank == 0) as bar:
        for task, count in zip(tasks, counts, strict=True):
            bar.set_description(f"CORE: {task.label}")
            mine = range(rank, task.n_evaluated, world_size)
            for at in range(0, len(mine), WINDOW_EXAMPLES):
                window = mine[at : at + WINDOW_EXAMPLES]
                examples = [options_of(task, index, tokenizer, max_tokens) for index in window]
                options = [option for found, _ in examples for option in found]
                scores = iter(score_options(options, model, tokenizer.bos_id, device, BATCH_TOKENS))
                for index, (found, was_empty) in zip(window, examples, strict=True):
                    right = is_right(task, task.items[index], [next(scores) for _ in found])
                    count += torch.tensor([right, was_empty])
                bar.update(len(window) * world_size)
        bar.update(bar.total - bar.n)
    if world_size > 1:
        counts = counts.to(device)
        dist.all_reduce(counts)

    accuracy, centered = {}, {}
    for task, (n_right, n_empty) in zip(tasks, counts.tolist(), strict=True):
        accuracy[task.label] = n_right / task.n_evaluated
        above = accuracy[task.label] - task.random_baseline
        centered[task.label] = above / (1 - task.random_baseline)
        if n_empty and rank == 0:
            warn(f"CORE task {task.label}: in {n_empty} of {task.n_evaluated} items an option is "
                 "the beginning of the others; the complete options of these are scored")
    return CoreResult(sum(centered.values()) / len(tasks), accuracy, centered)


# --- prompts and scores ---------------------------------------------------------------------------

def fewshot_indices(task, index):
    """Return the indices of the items that are shown before item `index`."""
    generator = random.Random(FEWSHOT_SEED + index)
    drawn = generator.sample(range(len(task.items) - 1), task.num_fewshot)
    return [i + (i >= index) for i in drawn]


def render_prompts(task, index):
    """Return one prompt per option; for language_modeling one without and one with it."""
    options = _options(task.task_type, task.items[index])
    prompts = [_render(task, index, option) for option in options]
    if task.task_type == "language_modeling":
        # the blank before the continuation belongs to the continuation's first token
        prompts.insert(0, _render(task, index, "", is_cut=True).strip())
    return prompts


def _options(task_type, item):
    options = item[ITEM_KEYS[task_type][1]]
    return [options] if task_type == "language_modeling" else options


def _right_option(task_type, item):
    gold = 0 if task_type == "language_modeling" else item["gold"]
    return _options(task_type, item)[gold]


def _render(task, index, option, is_cut=False):
    """Return the examples shown before an item, and the item with an option."""
    shots = [task.items[i] for i in fewshot_indices(task, index)]
    texts = [_example(task, shot, _right_option(task.task_type, shot)) for shot in shots]
    return "\n\n".join([*texts, _example(task, task.items[index], option, is_cut)])


def _example(task, item, option, is_cut=False):
    """Return the text of an item with an option. is_cut: without the part that is scored."""
    if task.task_type == "schema":
        before, scored = option, item["continuation"]
    elif task.task_type == "multiple_choice":
        before, scored = item["query"], option
    else:
        before, scored = str(item["context"]).strip(), option
    return f"{before}{task.continuation_delimiter}{'' if is_cut else scored}"


def options_of(task, index, tokenizer, max_tokens=None):
    """Return ([(token ids, start of the scored ones)] of an item's options, was a span empty).

    As upstream, the tokens after the common beginning of the prompts are scored (schema: their
    common end). If that leaves an option without tokens, because it is the beginning of the others,
    all tokens after the query or context are scored. Prompts keep their last `max_tokens` tokens.
    """
    def encode(text):
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    prompts = [encode(text) for text in render_prompts(task, index)]
    if task.task_type == "schema":
        shared = common_prefix_length([tokens[::-1] for tokens in prompts])
        starts = [max(1, len(tokens) - shared) for tokens in prompts]
    else:
        starts = [common_prefix_length(prompts)] * len(prompts)
    if task.task_type == "language_modeling":
        prompts, starts = prompts[1:], starts[1:]
    was_empty = any(start == len(tokens) for tokens, start in zip(prompts, starts, strict=True))
    if was_empty:
        options = _options(task.task_type, task.items[index])
        before = [encode(_render(task, index, option, is_cut=True).rstrip()) for option in options]
        starts = [common_prefix_length(pair) for pair in zip(prompts, before, strict=True)]
    cropped = []
    for tokens, start in zip(prompts, starts, strict=True):
        surplus = max(0, len(tokens) - max_tokens) if max_tokens else 0
        cropped.append((tokens[surplus:], max(1, start - surplus)))
    return cropped, was_empty


def common_prefix_length(sequences):
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def score_options(options, model, pad_id, device, batch_tokens):
    """Return, per option, (mean nats per scored token, are all of them the model's first choice).

    An option without scored tokens has infinite nats.
    """
    scores = [None] * len(options)
    by_length = sorted(range(len(options)), key=lambda i: len(options[i][0]))
    while by_length:
        longest = len(options[by_length[-1]][0])
        n_rows = max(1, batch_tokens // longest)
        batch, by_length = by_length[-n_rows:], by_length[:-n_rows]
        found = _score_batch([options[i] for i in batch], model, pad_id, device)
        for i, score in zip(batch, found, strict=True):
            scores[i] = score
    return scores


def _score_batch(options, model, pad_id, device):
    length = max(len(tokens) for tokens, _ in options)
    padded = [tokens + [pad_id] * (length - len(tokens)) for tokens, _ in options]
    spans = [(row, position) for row, (tokens, start) in enumerate(options)
             for position in range(start, len(tokens))]
    idx = torch.tensor(padded, device=device)
    row, position = torch.tensor(spans, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    logits, targets = model(idx)[row, position - 1].float(), idx[row, position]
    nats = F.cross_entropy(logits, targets, reduction="none")
    found = torch.stack((nats, (logits.argmax(-1) == targets).float()))
    totals, hits = torch.zeros(2, len(options), device=device).index_add_(1, row, found).tolist()
    lengths = [len(tokens) - start for tokens, start in options]
    return [(total / length, hit == length) if length else (math.inf, False)
            for total, hit, length in zip(totals, hits, lengths, strict=True)]


def is_right(task, item, scores):
    """Return whether an item is answered right: by the option with the lowest mean nats, or, for
    language_modeling, token by token. Options of equal text are the same answer."""
    if task.task_type == "language_modeling":
        return scores[0][1]
    nats = [option_nats for option_nats, _ in scores]
    chosen = _options(task.task_type, item)[nats.index(min(nats))]
    return min(nats) < math.inf and chosen == _right_option(task.task_type, item)


# --- the bundle: upstream's `eval_bundle` ---------------------------------------------------------

def bundle_folder():
    return base_dir() / "eval_bundle"


def read_bundle(folder, max_per_task=-1):
    """Return the bundle's Tasks: items shuffled, at most `max_per_task` (-1: all) to be answered.

    Raise UserError with the path if a file is missing or damaged.
    """
    if max_per_task == 0 or max_per_task < -1:
        raise UserError(f"cannot evaluate {max_per_task} examples per CORE task; use at least 1, "
                        "or -1 for all")
    folder = Path(folder)
    baselines = _read(folder, "eval_meta_data.csv", _parse_baselines)
    tasks = []
    for entry in _read(folder, "core.yaml", _parse_config):
        task_type, n_shots = entry["icl_task_type"], entry["num_fewshot"][0]
        parse = partial(_parse_items, task_type=task_type, n_shots=n_shots)
        items = _read(folder, f"eval_data/{entry['dataset_uri']}", parse)
        random.Random(SHUFFLE_SEED).shuffle(items)
        if entry["label"] not in baselines:
            raise UserError(f"{folder / 'eval_meta_data.csv'} has no baseline of {entry['label']}")
        n_evaluated = len(items) if max_per_task == -1 else min(max_per_task, len(items))
        items = items[: max(n_evaluated, n_shots + 1)]
        delimiter, baseline = entry.get("continuation_delimiter", " "), baselines[entry["label"]]
        tasks.append(Task(entry["label"], task_type, n_shots, delimiter, baseline / 100, items,
                          n_evaluated))
    return tasks


def _read(folder, name, parse):
    path = folder / name
    try:
        if not matches_checksum(path, folder):
            raise ValueError("its SHA-256 is not the recorded one")
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"CORE's tasks are missing ({path}); run python -m nanochat.core_eval, or "
                        f"unpack eval_bundle.zip as {bundle_folder()}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError,
            yaml.YAMLError, csv.Error) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path} is damaged ({reason}); delete its folder and run "
                        "python -m nanochat.core_eval") from None


def _parse_config(text):
    entries = yaml.safe_load(text)["icl_tasks"]
    for entry in entries:
        uri, n_shots = PurePosixPath(entry["dataset_uri"]), entry["num_fewshot"][0]
        if uri.is_absolute() or ".." in uri.parts:
            raise ValueError(f"{uri} is outside the bundle")
        if entry["icl_task_type"] not in ITEM_KEYS or type(n_shots) is not int or n_shots < 0:
            raise ValueError(f"unknown task type {entry['icl_task_type']} or {n_shots} examples")
    if not entries or len({entry["label"] for entry in entries}) < len(entries):
        raise ValueError("it has no tasks, or two with one label")
    return entries


def _parse_baselines(text):
    rows = csv.DictReader(text.splitlines())
    baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
    if not all(0 <= percent < 100 for percent in baselines.values()):
        raise ValueError("a random baseline is not a percentage below 100")
    return baselines


def _parse_items(text, task_type, n_shots):
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                item = parse_json(line.encode())
                if item.get("gold", 0) < 0 or not str(item.get("continuation", "-")).strip():
                    raise ValueError("gold is negative, or the continuation is blank")
                _right_option(task_type, item)  # raises an error if the index is too large
                items.append({key: item[key] for key in ITEM_KEYS[task_type]})
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(f"line {number}: {type(error).__name__} {error}") from None
    if len(items) <= n_shots:
        raise ValueError(f"{len(items)} items, of which {n_shots} others are shown before each")
    return items


def download_bundle(url=BUNDLE_URL):
    """Download the bundle into the cache unless it is there; return its folder.

    A download that fails or is not a bundle leaves nothing and raises UserError.
    """
    from huggingface_hub.file_download import http_get

    folder = bundle_folder()
    with locked(folder):
        if folder.exists():
            return folder
        with tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as temporary:
            archive = Path(temporary) / "eval_bundle.zip"
            try:
                with open(archive, "wb") as file:
                    http_get(url, file)
                with zipfile.ZipFile(archive) as file:
                    file.extractall(temporary)  # keeps every file inside the folder
            except Exception as error:  # of the library, its HTTP client, zipfile and the disk
                raise UserError(f"could not download {url} ({error}); run it again, or unpack "
                                f"eval_bundle.zip as {folder}") from None
            unpacked = Path(temporary) / "eval_bundle"
            read_bundle(unpacked)
            files = [path for path in unpacked.rglob("*") if path.is_file()]
            write_checksums(unpacked, {path.relative_to(unpacked).as_posix(): sha256_of(path)
                                       for path in files})
            unpacked.rename(folder)
    return folder


# --- models of Hugging Face -----------------------------------------------------------------------

class HFModel(nn.Module):
    """A causal language model of `transformers`, called like GPT."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, targets=None, loss_reduction="mean"):
        logits = self.model(input_ids=idx, use_cache=False).logits.float()
        if targets is None:
            return logits
        return F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction=loss_reduction)


class HFTokenizer:
    """A tokenizer of `transformers` with the methods of Tokenizer that evaluations use."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self.bos_id = next((each for each in ids if each is not None), None)
        if self.bos_id is None:
            raise UserError("the model's tokenizer has neither a BOS nor an end-of-text token")
        content = tokenizer.backend_tokenizer.to_str().encode()
        self.tokenizer_id = hashlib.sha256(content).hexdigest()[:12]

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, ids):
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def token_bytes(self):
        """Return int32 (vocab_size): bytes per token. UserError for vocabularies not of bytes."""
        if type(self._tokenizer.backend_tokenizer.decoder).__name__ != "ByteLevel":
            raise UserError("the vocabulary is not byte-level: bits per byte are not defined; use "
                            "--eval core")
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_id in self._tokenizer.get_vocab().items():
            lengths[token_id] = len(token)  # a character of a byte-level token stands for a byte
        lengths[self._tokenizer.all_special_ids] = 0
        return lengths


@dataclass(frozen=True)
class HFSubject:
    """A Hugging Face model with the attributes of Trained."""

    tag: str  # folder, or name on the hub
    model: HFModel
    tokenizer: HFTokenizer
    max_tokens: int | None  # None: unlimited
    step = tokens = None
    user_config: dict = field(default_factory=dict)

    @property
    def name(self):
        return PurePath(self.tag).name

    @property
    def row_tokens(self):
        return min(self.max_tokens or HF_ROW_TOKENS, HF_ROW_TOKENS)


def load_hf(path, device, dtype):
    """Return the HFSubject of a folder or hub name; code that comes with a model is not run."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise UserError("--hf-path needs transformers; run pip install -e '.[hf]'") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--hf-path {path} cannot be loaded ({reason}); use a folder or hub name "
                        "of a causal language model") from None
    max_tokens = getattr(model.config, "max_position_embeddings", None)
    return HFSubject(path, HFModel(model).to(device).eval(), HFTokenizer(tokenizer), max_tokens)


def parse_args(argv=None):
    description = ("Download the tasks of CORE, the score that compares a model with GPT-2, into "
                   f"<cache>/eval_bundle. {CACHE_HELP}.")
    parser = argparse.ArgumentParser("python -m nanochat.core_eval", description=description)
    return parser.parse_args(argv)


@command
def main(argv=None):
    parse_args(argv)
    print(f"CORE's tasks are in {download_bundle()}")


if __name__ == "__main__":
    main()
