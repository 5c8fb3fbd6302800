"""CORE's tasks on disk, in upstream's `eval_bundle` layout: fetch, read, check."""

import csv
import io
import random
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from nanochat.common import (
    DIGESTS,
    UserError,
    base_dir,
    locked,
    matches_checksum,
    parse_json,
    read_limited,
    sha256_of,
    write_checksums,
)

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BYTES, MAX_UNPACKED_BYTES, MAX_FILES, MAX_NAME_LENGTH = 1 << 29, 1 << 31, 10_000, 200  # of a download
SHUFFLE_SEED = 1337
# What an item of each task type must have; where there is a `gold`, it is an index into the second of them.
ITEM_KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("continuation", "context_options", "gold"),
    "language_modeling": ("context", "continuation"),
}


@dataclass(frozen=True)
class Task:
    """One task: its items in the order of evaluation, of which the first `n_evaluated` are answered and all may be
    shown before another. random_baseline: the accuracy of guessing, 0 to 1."""

    label: str
    task_type: str
    num_fewshot: int
    continuation_delimiter: str
    random_baseline: float
    items: list = field(repr=False)
    n_evaluated: int


def bundle_folder():
    """Where the bundle is looked for: <cache folder>/eval_bundle."""
    return base_dir() / "eval_bundle"


def read_bundle(folder, max_per_task=-1):
    """The bundle's Tasks, items shuffled, then cut to `max_per_task` (-1: all of them).

    A cap that leaves fewer items than are shown before each keeps as many as must be shown, and the cap is on those
    answered. Errors: UserError naming the file and line of whatever is missing or damaged.
    """
    if max_per_task == 0 or max_per_task < -1:
        raise UserError(f"{max_per_task} examples per CORE task are none; ask for at least 1, or -1 for all")
    folder = Path(folder)
    config, baselines = _read_config(folder, "core.yaml"), _read_baselines(folder, "eval_meta_data.csv")
    tasks = []
    for entry in config:
        label, task_type, uri, (num_fewshot, *_) = (
            entry[key] for key in ("label", "icl_task_type", "dataset_uri", "num_fewshot"))
        if task_type not in ITEM_KEYS:
            raise UserError(f"{folder / 'core.yaml'}: task {label} is of type {task_type}; "
                            f"known are {', '.join(ITEM_KEYS)}")
        if label not in baselines:
            raise UserError(f"{folder / 'eval_meta_data.csv'}: no random baseline for task {label}; add its row")
        items = _read_items(folder, f"eval_data/{uri}", task_type)
        random.Random(SHUFFLE_SEED).shuffle(items)
        if len(items) <= num_fewshot:
            raise UserError(f"{folder / 'eval_data' / uri}: task {label} shows {num_fewshot} other examples before "
                            f"each, and has only {len(items)}; fetch the bundle again")
        n_evaluated = len(items) if max_per_task == -1 else min(max_per_task, len(items))
        items = items[:max(n_evaluated, num_fewshot + 1)]
        tasks.append(Task(label, task_type, num_fewshot, entry.get("continuation_delimiter", " "),
                          baselines[label] / 100, items, n_evaluated))
    return tasks


def download_bundle(url=BUNDLE_URL):
    """Fetch the bundle into the cache folder unless it is there; a failure leaves nothing. Returns its folder.

    Errors: UserError when it cannot be fetched or is not a bundle.
    """
    from huggingface_hub.file_download import http_get

    folder = bundle_folder()
    with locked(folder):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=folder.parent) as temporary:
                archive = Path(temporary) / "eval_bundle.zip"
                try:
                    with _BoundedFile(archive, "wb") as file:
                        http_get(url, file)
                    with zipfile.ZipFile(archive) as file:
                        _check_members(file.infolist())
                        file.extractall(temporary)
                except Exception as error:  # the library's own, its HTTP client's, OSError, BadZipFile
                    raise UserError(f"could not download {url} ({error}); run it again, or unpack eval_bundle.zip "
                                    f"as {folder}") from None
                unpacked = Path(temporary) / "eval_bundle"
                read_bundle(unpacked)
                write_checksums(unpacked, {path.relative_to(unpacked).as_posix(): sha256_of(path)
                                        for path in unpacked.rglob("*") if path.is_file()})
                unpacked.rename(folder)
    return folder


class _BoundedFile(io.FileIO):
    def write(self, data):
        if self.tell() + len(data) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES >> 20} MiB")
        return super().write(data)


def _check_members(members):
    """zipfile itself keeps every file inside the folder, and to the size that its entry names."""
    if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES or len(members) > MAX_FILES:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES >> 20} MiB or {MAX_FILES} files")
    if any(len(member.filename) > MAX_NAME_LENGTH for member in members):
        raise ValueError("it holds names that are too long")


def _read_config(folder, name):
    path, text = folder / name, _read_text(folder, name)
    try:
        entries = yaml.safe_load(text)["icl_tasks"]
        for entry in entries:
            if not isinstance(entry["num_fewshot"][0], int) or entry["num_fewshot"][0] < 0:
                raise TypeError("num_fewshot is a list of one count")
            if not all(isinstance(entry[key], str) for key in ("label", "icl_task_type", "dataset_uri")):
                raise TypeError("label, icl_task_type and dataset_uri are texts")
            uri = PurePosixPath(entry["dataset_uri"])
            if uri.is_absolute() or ".." in uri.parts or "\0" in entry["dataset_uri"]:
                raise TypeError("dataset_uri leads out of the bundle")
            if not isinstance(entry.get("continuation_delimiter", " "), str):
                raise TypeError("continuation_delimiter is a text")
        if len({entry["label"] for entry in entries}) < len(entries):
            raise TypeError("two tasks have one label")
    except (yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a list of tasks under icl_tasks ({reason}); fetch the bundle again") from None
    if not entries:
        raise UserError(f"{path} lists no tasks; fetch the bundle again")
    return entries


def _read_baselines(folder, name):
    path, text = folder / name, _read_text(folder, name)
    try:
        rows = csv.DictReader(text.splitlines())
        baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
        if not all(0 <= percent < 100 for percent in baselines.values()):
            raise ValueError
        return baselines
    except (KeyError, ValueError, TypeError, csv.Error):
        raise UserError(f"{path}: not a table with the columns `Eval Task` and `Random baseline` (percent); "
                        "fetch the bundle again") from None


def _read_items(folder, name, task_type):
    items, path = [], folder / name
    for number, line in enumerate(_read_text(folder, name).split("\n"), start=1):
        if line.strip():
            try:
                items.append(_checked(parse_json(line.encode()), task_type))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}, line {number}: not an item of a {task_type} task ({error}); "
                                "fetch the bundle again") from None
    return items


def _checked(item, task_type):
    keys = ITEM_KEYS[task_type]
    missing = [key for key in keys if key not in item]
    if missing:
        raise KeyError(f"without {', '.join(missing)}")
    texts = [part for key in keys if key != "gold"
             for part in (item[key] if isinstance(item[key], list) else [item[key]])]
    if not all(isinstance(text, (str, int, float)) for text in texts):
        raise TypeError("what is to be read is no text")
    if "gold" in keys:
        options = item[keys[1]]
        if not (isinstance(options, list) and type(item["gold"]) is int and 0 <= item["gold"] < len(options)):
            raise ValueError(f"gold {item['gold']!r} is no index into {keys[1]}")
    if "continuation" in keys and not str(item["continuation"]).strip():
        raise ValueError("its continuation is blank")
    return item


def _read_text(folder, name):
    path = folder / name
    try:
        if not matches_checksum(path, folder):
            raise UserError(f"{path} is damaged (its bytes differ from those noted in {DIGESTS}); fetch the bundle "
                            "again")
        return read_limited(path, MAX_UNPACKED_BYTES).decode().replace("\r\n", "\n")
    except FileNotFoundError:
        raise UserError(f"CORE's tasks are not there: {path} is missing; fetch them with "
                        f"python -m nanochat.core_eval, or unpack eval_bundle.zip as {bundle_folder()}") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); fetch the bundle again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; fetch the bundle again") from None
