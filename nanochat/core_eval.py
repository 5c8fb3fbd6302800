"""CORE: the mean centered accuracy over in-context learning tasks (arXiv:2406.11794), as upstream.

python -m nanochat.core_eval downloads the tasks into the cache folder.
"""

import csv
import math
import random
import tempfile
import zipfile
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, takewhile
from pathlib import Path, PurePath, PurePosixPath
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from nanochat.common import (
    CACHE_HELP,
    Parser,
    UserError,
    base_dir,
    command,
    locked,
    matches_checksum,
    parse_json,
    progress,
    sha256_of,
    write_checksums,
    write_text,
)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SHUFFLE_SEED = 1337
FEWSHOT_SEED = 1234  # plus the index of the item
WINDOW_EXAMPLES = 256  # examples that are sorted by length and batched together
BATCH_TOKENS = 8192  # at most, per forward pass


class Item(NamedTuple):
    """options: (text before, text after the delimiter) of each. gold: index of the right one."""

    options: list
    gold: int


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
        rows = [f"{label},{self.accuracy[label]:.6f},{centered:.6f}"
                for label, centered in self.centered.items()]
        rows = ["Task,Accuracy,Centered", *rows, f"CORE,,{self.core_metric:.6f}"]
        write_text(path, "\n".join(rows) + "\n")


@torch.no_grad()
def evaluate_core(model, tokenizer, bundle, device, *, max_per_task=-1, max_tokens=None, rank=0,
                  world_size=1):
    """Return the CoreResult of `model(idx)`: (B, T) int64 token ids -> (B, T, vocab) logits.

    Pass the uncompiled model: prompts have many lengths. bundle: the folder with core.yaml.
    max_tokens: longer prompts lose their beginning. A rank evaluates every world_size-th example;
    the counts are summed over ranks. Raise UserError if the bundle is missing or damaged.
    """
    tasks = read_bundle(bundle, max_per_task)
    n_right = torch.zeros(len(tasks), dtype=torch.int64)
    examples = [(t, i) for t, task in enumerate(tasks) for i in range(task.n_evaluated)]
    own = examples[rank::world_size]
    for at in progress(range(0, len(own), WINDOW_EXAMPLES), desc="CORE", shown=rank == 0):
        window = own[at : at + WINDOW_EXAMPLES]
        prompts = [tokenized_options(tasks[t], i, tokenizer, max_tokens) for t, i in window]
        scores = iter(score_options(list(chain(*prompts)), model, tokenizer.bos_id, device))
        for (t, i), options in zip(window, prompts, strict=True):
            n_right[t] += is_right(tasks[t], i, [next(scores) for _ in options])
    if world_size > 1:
        n_right = n_right.to(device)
        dist.all_reduce(n_right)

    accuracy, centered = {}, {}
    for task, count in zip(tasks, n_right.tolist(), strict=True):
        accuracy[task.label] = count / task.n_evaluated
        above = accuracy[task.label] - task.random_baseline
        centered[task.label] = above / (1 - task.random_baseline)
    return CoreResult(sum(centered.values()) / len(tasks), accuracy, centered)


# --- prompts and scores ---------------------------------------------------------------------------

def fewshot_indices(task, index):
    """Return the indices of the items that are shown before item `index`."""
    generator = random.Random(FEWSHOT_SEED + index)
    drawn = generator.sample(range(len(task.items) - 1), task.num_fewshot)
    return [i + (i >= index) for i in drawn]


def tokenized_options(task, index, tokenizer, max_tokens=None):
    """Return (token ids, start of the scored ones) of each option of an item.

    As upstream, the tokens after the common beginning of the prompts are scored (schema: their
    common end; language_modeling: those after the prompt without the continuation). If that leaves
    an option without tokens, because it is the beginning of the others, all tokens after the query
    or context are scored. Prompts keep their last `max_tokens` tokens.
    """
    def encode(text):
        return [tokenizer.bos_id, *tokenizer.encode(text)]

    shown = ""
    for shot in fewshot_indices(task, index):
        before, after = task.items[shot].options[task.items[shot].gold]
        shown += f"{before}{task.continuation_delimiter}{after}\n\n"
    heads, prompts = [], []
    for before, after in task.items[index].options:
        heads.append(f"{shown}{before}{task.continuation_delimiter}")
        prompts.append(encode(f"{heads[-1]}{after}"))
    if task.task_type == "schema":
        shared = common_prefix_length([tokens[::-1] for tokens in prompts])
        starts = [max(1, len(tokens) - shared) for tokens in prompts]
    elif task.task_type == "language_modeling":
        # the blank before the continuation belongs to the continuation's first token
        starts = [common_prefix_length([*prompts, encode(heads[0].strip())])]
    else:
        starts = [common_prefix_length(prompts)] * len(prompts)
    if any(start == len(tokens) for tokens, start in zip(prompts, starts, strict=True)):
        starts = [common_prefix_length([tokens, encode(head.rstrip())])
                  for tokens, head in zip(prompts, heads, strict=True)]
    options = []
    for tokens, start in zip(prompts, starts, strict=True):
        surplus = max(0, len(tokens) - (max_tokens or len(tokens)))
        options.append((tokens[surplus:], max(1, start - surplus)))
    return options


def common_prefix_length(sequences):
    columns = zip(*sequences, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))


def score_options(options, model, pad_id, device, batch_tokens=BATCH_TOKENS):
    """Return, per option, (mean nats per scored token, are all of them the model's first choice).

    An option without scored tokens has infinite nats.
    """
    scores = [None] * len(options)
    by_length = sorted(range(len(options)), key=lambda i: len(options[i][0]))
    while by_length:
        longest = len(options[by_length[-1]][0])
        n_rows = max(1, batch_tokens // longest)
        batch, by_length = by_length[-n_rows:], by_length[:-n_rows]
        idx = torch.full((len(batch), longest), pad_id)
        for row, i in enumerate(batch):
            idx[row, : len(options[i][0])] = torch.tensor(options[i][0])
        idx = idx.to(device)
        for i, tokens, logits in zip(batch, idx, model(idx), strict=True):
            start, end = options[i][1], len(options[i][0])
            logits, targets = logits[start - 1 : end - 1].float(), tokens[start:end]
            is_first_choice = (logits.argmax(-1) == targets).all()
            scores[i] = (F.cross_entropy(logits, targets), is_first_choice)
    return [(float(nats), bool(hit)) if start < len(tokens) else (math.inf, False)
            for (nats, hit), (tokens, start) in zip(scores, options, strict=True)]


def is_right(task, index, scores):
    """Return whether an item is answered right: by the option with the lowest mean nats, or, for
    language_modeling, token by token. Options of equal text are the same answer."""
    if task.task_type == "language_modeling":
        return scores[0][1]
    nats = [option_nats for option_nats, _ in scores]
    options, gold = task.items[index]
    return min(nats) < math.inf and options[nats.index(min(nats))] == options[gold]


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
    try:
        return _parse_bundle(Path(folder), max_per_task)
    except FileNotFoundError as error:
        raise UserError(f"CORE's tasks are missing ({error.filename}); run python -m "
                        f"nanochat.core_eval, or unpack eval_bundle.zip as {bundle_folder()}"
                        ) from None
    except Exception as error:  # a damaged file can raise any error of the parsers
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"CORE's bundle {folder} is damaged ({reason}); delete it and run "
                        "python -m nanochat.core_eval") from None


def _parse_bundle(folder, max_per_task):
    def lines_of(name):
        if not matches_checksum(folder / name, folder):
            raise ValueError(f"{name} differs from its SHA-256")
        return (folder / name).read_text(encoding="utf-8").split("\n")

    tasks = {}
    baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100
                 for row in csv.DictReader(lines_of("eval_meta_data.csv"))}
    for entry in yaml.safe_load("\n".join(lines_of("core.yaml")))["icl_tasks"]:
        label, task_type, [n_shots] = (
            entry[key] for key in ("label", "icl_task_type", "num_fewshot"))
        name = PurePosixPath("eval_data", entry["dataset_uri"])
        if name.parts[0] != "eval_data" or ".." in name.parts:
            raise ValueError(f"core.yaml: {name} is outside the bundle")
        items = []
        for number, line in enumerate(lines_of(name), start=1):
            try:
                if line.strip():
                    items.append(item_of(task_type, parse_json(line.encode())))
            except Exception as error:
                raise ValueError(f"{name} line {number}: {type(error).__name__} {error}") from None
        if label in tasks or not 0 <= n_shots < len(items) or not 0 <= baselines[label] < 1:
            raise ValueError(f"task {label} is not unique, shows {n_shots} of {len(items)} items, "
                             "or has no baseline of 0 to 99 %")
        random.Random(SHUFFLE_SEED).shuffle(items)
        n_evaluated = len(items) if max_per_task == -1 else min(max_per_task, len(items))
        tasks[label] = Task(label, task_type, n_shots, entry.get("continuation_delimiter", " "),
                            baselines[label], items[: max(n_evaluated, n_shots + 1)], n_evaluated)
    if not tasks:
        raise ValueError("core.yaml has no tasks")
    return list(tasks.values())


def item_of(task_type, record):
    """Return the Item of a line of a task's file. Raise an error if it is not of this type."""
    if task_type == "multiple_choice":
        options, gold = [(record["query"], choice) for choice in record["choices"]], record["gold"]
    elif task_type == "schema":
        contexts, gold = record["context_options"], record["gold"]
        options = [(context, record["continuation"]) for context in contexts]
    elif task_type == "language_modeling":
        options, gold = [(str(record["context"]).strip(), record["continuation"])], 0
    else:
        raise ValueError(f"unknown task type {task_type}")
    if gold not in range(len(options)) or not str(record.get("continuation", "-")).strip():
        raise ValueError("gold is not the index of an option, or the continuation is blank")
    return Item(options, gold)


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
            archive, unpacked = Path(temporary) / "bundle.zip", Path(temporary) / "eval_bundle"
            try:
                with open(archive, "wb") as file:
                    http_get(url, file)
                with zipfile.ZipFile(archive) as file:
                    file.extractall(temporary)  # keeps every file inside the folder
            except Exception as error:  # of the library, its HTTP client, zipfile and the disk
                raise UserError(f"could not download {url} ({error}); run it again, or unpack "
                                f"eval_bundle.zip as {folder}") from None
            read_bundle(unpacked)
            files = [path for path in unpacked.rglob("*") if path.is_file()]
            write_checksums(unpacked, {path.relative_to(unpacked).as_posix(): sha256_of(path)
                                       for path in files})
            unpacked.rename(folder)
    return folder


def load_hf(path, device, dtype):
    """Return a Hugging Face model with the attributes of Trained that evaluate_core needs.

    path: a folder or a name on the hub. Code that comes with a model is not run.
    """
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
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    bos_id = next((token_id for token_id in ids if token_id is not None), None)
    if bos_id is None:
        raise UserError(f"the tokenizer of {path} has neither a BOS nor an end-of-text token")
    model = model.to(device).eval()
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    return SimpleNamespace(
        tag=path, name=PurePath(path).name, step=None, tokens=None,
        model=lambda idx: model(input_ids=idx, use_cache=False).logits,
        tokenizer=SimpleNamespace(bos_id=bos_id, encode=encode, tokenizer_id=None),
        max_tokens=getattr(model.config, "max_position_embeddings", None))


def parse_args(argv=None):
    description = f"Download the tasks of CORE into <cache>/eval_bundle. {CACHE_HELP}."
    parser = Parser("python -m nanochat.core_eval", description)
    return parser.parse_args(argv)


@command
def main(argv=None):
    parse_args(argv)
    print(f"CORE's tasks are in {download_bundle()}")


if __name__ == "__main__":
    main()
