"""Checkpoints in upstream's layout: saved completely or not at all, verified when loaded.

<folder>/model_<step>.pt, optim_<step>_rank<r>.pt and meta_<step>.json. The meta file is written
last and holds the SHA-256 of the others: a checkpoint without it does not exist, one that differs
from it is damaged. Its field `good` is false if weights or validation were not finite.
"""

import contextlib
import hashlib
import os
import pickle
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.common import (
    UserError,
    atomic_path,
    check_name,
    checkpoints_dir,
    json_bytes,
    parse_json,
    print0,
    sha256_of,
    write_json,
)
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig, parameter_counts
from nanochat.tokenizer import Tokenizer, load_tokenizer


def checkpoint_folder(tag):
    """Return the checkpoint folder of a tag, or the absolute path itself."""
    if Path(tag).is_absolute():
        return Path(tag)
    return checkpoints_dir() / check_name("--model-tag", tag)


def tags():
    """Return the tags that have checkpoints, the newest first."""
    metas = sorted(checkpoints_dir().glob("*/meta_*.json"), key=lambda path: path.stat().st_mtime)
    return list(dict.fromkeys(path.parent.name for path in reversed(metas)))


def checkpoint_steps(folder):
    """Return the steps of the complete checkpoints in a folder, ascending."""
    names = [path.stem.removeprefix("meta_") for path in Path(folder).glob("meta_*.json")]
    return sorted(int(name) for name in names if name.isdecimal())


# --- save ---------------------------------------------------------------------------------------

def save_checkpoint(folder, step, model_state, optimizer_state, meta, ranks=None):
    """Save one checkpoint; every rank calls it. Return whether all weights are finite.

    Rank 0 writes model and meta, each rank its share of the optimizer state. Raise UserError on
    every rank if a disk is full or not writable; earlier checkpoints stay as they were.
    """
    ranks = ranks or Ranks()
    folder = Path(folder)
    states = {f"optim_{step:06d}_rank{ranks.rank}.pt": optimizer_state}
    if ranks.is_main:
        states = {f"model_{step:06d}.pt": model_state, **states}
    good = all(bool(torch.isfinite(value).all()) for value in model_state.values())

    failure, digests = None, {}
    try:
        _remove_temporary_files(folder, ranks)
        _meta_path(folder, step).unlink(missing_ok=True)  # while its files change, it is not there
        for name, state in states.items():
            digests[name] = _write_state(folder / name, state)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = _reason(error)
    reports = _all_gather((failure, digests), ranks)

    message = None
    if ranks.is_main:  # rank 0 decides whether the checkpoint exists
        failure = next((failed for failed, _ in reports if failed), None)
        files = {name: digest for _, report in reports for name, digest in report.items()}
        content = {"step": step, **meta, "good": good, "files_sha256": files}
        failure = failure or _write_meta(folder, content)
        if failure:
            _remove(folder, step)
            message = (f"the checkpoint of step {step} was not saved in {folder} ({failure}); "
                       f"free some space; {newest_valid_in_words(folder)}")
    message = _all_gather(message, ranks)[0]
    if message:
        raise UserError(message)
    return good


def mark_bad(folder, step):
    """Note in the meta of a checkpoint, if it exists, that the run had diverged."""
    if _meta_path(folder, step).exists():
        _write_meta(folder, {**read_meta(folder, step), "good": False})


def remove_old(folder, step, keep, best_step=None):
    """Remove all but the `keep` newest good checkpoints up to `step` and that of `best_step`.

    Only rank 0 calls it. Bad checkpoints do not count and stay: they show how a run ended.
    """
    folder = Path(folder)
    steps = checkpoint_steps(folder)
    good = [older for older in steps if older <= step and not _is_bad(folder, older)]
    names = (path.name.split("_")[1].removesuffix(".pt") for path in folder.glob("*_*.pt"))
    without_meta = {int(name) for name in names if name.isdecimal()} - set(steps)
    for older in (*good[:-keep], *(older for older in without_meta if older < step)):
        if older != best_step:
            _remove(folder, older)


def set_aside(folder, after=None):
    """Move the checkpoints in `folder` (only those of steps `after` a given one) to a new folder.

    They belong to another run, or to a part of this run that it is about to repeat: `latest` must
    not find them.
    """
    folder = Path(folder)
    steps = [step for step in checkpoint_steps(folder) if after is None or step > after]
    if not steps:
        return
    stem = f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (f"{stem}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    try:
        if after is None:
            os.replace(folder, aside)
        else:
            aside.mkdir()
            for step in steps:
                for path in _files(folder, step):
                    os.replace(path, aside / path.name)
    except OSError as error:
        raise UserError(f"the earlier checkpoints in {folder} cannot be moved "
                        f"({error.strerror}); give another --model-tag") from None
    which = "earlier checkpoints" if after is None else f"checkpoints after step {after}"
    print0(f"{which} of {folder.name} moved to {aside}")


# --- find and load ------------------------------------------------------------------------------

def find_checkpoint(folder, step="latest"):
    """Return `step` (a number or digits) if it exists, or the newest good one for "latest"."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; train a model with scripts.base_train, or "
                        f"give one of these with --model-tag: {', '.join(tags()) or 'none'}")
    if step == "latest":
        good = [step for step in steps if not _is_bad(folder, step)]
        if not good:
            raise UserError(f"every checkpoint in {folder} is of a run that diverged; start again "
                            "with lower learning rates")
        return good[-1]
    if not str(step).isdecimal():
        raise UserError(f"step {step!r} is neither a number nor 'latest'")
    if int(step) not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; "
                        f"{newest_valid_in_words(folder)}")
    return int(step)


def newest_valid_step(folder, damaged_step=None):
    """Return the step of the newest good checkpoint with right checksums, or None."""
    steps = reversed(checkpoint_steps(folder))
    return next((step for step in steps if step != damaged_step
                 and not _is_bad(folder, step) and _is_valid(Path(folder), step)), None)


def newest_valid_in_words(folder, damaged_step=None):
    """Describe the newest valid checkpoint, for error messages."""
    step = newest_valid_step(folder, damaged_step)
    if step is None:
        return "there is no valid checkpoint here"
    return f"the newest valid checkpoint is step {step}"


def read_meta(folder, step):
    """Return the meta dict of a checkpoint. Raise UserError if it is damaged."""
    try:
        return _parse_meta(Path(folder), step)
    except (OSError, ValueError) as error:
        raise UserError(f"{_meta_path(folder, step)} is damaged ({_reason(error)}); "
                        f"{newest_valid_in_words(folder, step)}") from None


def load_model_state(folder, step, meta, device):
    """Return the model's state dict on `device`; checksums are verified where `meta` has them."""
    state = _load(Path(folder), step, f"model_{step:06d}.pt", meta, device)
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def load_model(folder, step, device, compute_dtype):
    """Return (model on `device`, meta) of a checkpoint of ours or of upstream."""
    meta = read_meta(folder, step)
    state = load_model_state(folder, step, meta, device)
    try:  # upstream's configurations from before sliding windows have no pattern
        config = GPTConfig.from_dict({"window_pattern": "L", **meta["model_config"]})
        described = parameter_counts(config)["total"]
        stored = sum(value.numel() for value in state.values() if torch.is_tensor(value))
        if described > stored:  # checked before memory is allocated for it
            raise UserError(f"the checkpoint of step {step} in {folder} is of another model: its "
                            f"meta describes {described:,} parameters, its file has {stored:,}")
        model = GPT(config, compute_dtype)
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{_meta_path(folder, step)} describes an impossible model "
                        f"({_reason(error)}); {newest_valid_in_words(folder, step)}") from None
    model.to(device)
    load_state(model, state, folder, step)
    return model, meta


def load_state(model, state, folder, step):
    """Copy a state dict into `model`; every name and shape must match."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint of step {step} in {folder} is of another model: "
                        f"{reason}") from None


def load_optimizer_state(folder, step, meta, device, rank=0):
    """Return the share of the optimizer state that rank `rank` saved."""
    return _load(Path(folder), step, f"optim_{step:06d}_rank{rank}.pt", meta, device)


def n_optimizer_shards(meta):
    """Return the number of ranks that saved a checkpoint of ours."""
    return sum(name.startswith("optim_") for name in meta.get("files_sha256", {}))


@dataclass(frozen=True)
class Trained:
    """A checkpoint of ours or of upstream, ready for use; `model` is in evaluation mode."""

    folder: Path
    step: int
    model: GPT
    tokenizer: Tokenizer
    meta: dict

    @property
    def tag(self):
        """Return the name of the checkpoint folder."""
        return self.folder.name

    @property
    def name(self):
        """Return tag and step for file names."""
        return f"{self.tag}_{self.step:06d}"

    @property
    def row_tokens(self):
        """Return the longest sequence in training."""
        return self.model.config.sequence_len

    @property
    def max_tokens(self):
        """Return the longest sequence that the model accepts."""
        return self.model.cos.size(1)

    @property
    def user_config(self):
        """Return the flags of the run that the checkpoint has."""
        return self.meta.get("user_config") or {}

    @property
    def tokens(self):
        """Return the number of tokens trained on."""
        batch = self.meta.get("total_batch_size_tokens", self.meta.get("total_batch_size", 0))
        return self.step * batch


def load_trained(model_tag, step, device, compute_dtype, tokenizer_dir=""):
    """Load a checkpoint with its tokenizer, by tag or absolute path; no tag: the newest checkpoint.

    step: a number, digits, or "latest". tokenizer_dir: empty for the folder that the checkpoint
    names, else the cache's. Raise UserError if there is no such checkpoint, it is damaged, or
    the tokenizer is not the one it was trained with.
    """
    folder = checkpoint_folder(model_tag or next(iter(tags()), "any"))
    step = find_checkpoint(folder, step)
    user_config = read_meta(folder, step).get("user_config") or {}
    tokenizer = load_tokenizer(tokenizer_dir or user_config.get("tokenizer_dir"))
    model, meta = load_model(folder, step, device, compute_dtype)
    expected = (model.config.vocab_size, meta.get("tokenizer_id", tokenizer.tokenizer_id))
    if expected != (tokenizer.vocab_size, tokenizer.tokenizer_id):
        raise UserError(
            f"the model was trained with tokenizer {meta.get('tokenizer_id', '(unknown)')} of "
            f"{expected[0]} tokens, this one is {tokenizer.tokenizer_id} of "
            f"{tokenizer.vocab_size}; give the right one with --tokenizer-dir")
    return Trained(folder, step, model.eval(), tokenizer, meta)


# --- files --------------------------------------------------------------------------------------

def _meta_path(folder, step):
    return Path(folder) / f"meta_{step:06d}.json"


def _files(folder, step):
    """Return the files of a checkpoint, its meta first: without it the checkpoint is gone."""
    others = [Path(folder) / f"model_{step:06d}.pt",
              *sorted(Path(folder).glob(f"optim_{step:06d}_rank*.pt"))]
    return [_meta_path(folder, step), *(path for path in others if path.exists())]


def _remove(folder, step):
    for path in _files(folder, step):
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_temporary_files(folder, ranks):
    """Remove temporary files of this rank that a killed process left."""
    names = [f"optim_*_rank{ranks.rank}.pt"]
    if ranks.is_main:
        names += ["model_*.pt", "meta_*.json"]
    for name in names:
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)


def _write_state(path, state):
    """Write a state dict atomically; return the SHA-256 of the file."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save hides the reason of errors
            torch.save(state, file)
        return sha256_of(temporary)


def _write_meta(folder, meta):
    """Write the meta with its own checksum; return the reason of a failure, or None."""
    try:
        write_json(_meta_path(folder, meta["step"]), {**meta, "meta_sha256": _meta_digest(meta)})
    except OSError as error:
        return _reason(error)
    return None


def _parse_meta(folder, step):
    meta = parse_json(_meta_path(folder, step).read_bytes())
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise ValueError("it has no model_config")
    digest = meta.pop("meta_sha256", None)
    ours = digest or "files_sha256" in meta  # upstream's meta files have no checksums
    if ours and digest != _meta_digest(meta):
        raise ValueError("its content differs from its checksum")
    if meta.get("step", step) != step:
        raise ValueError(f"it is of step {meta['step']}")
    return meta


def _meta_digest(meta):
    return hashlib.sha256(json_bytes(meta)).hexdigest()


def _load(folder, step, name, meta, device):
    expected = meta.get("files_sha256", {}).get(name)
    try:
        if expected and sha256_of(folder / name) != expected:
            raise ValueError("its content differs from its checksum")
        state = torch.load(folder / name, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it has no state dict")
        return state
    except pickle.UnpicklingError:
        reason = "it has more than tensors, and loading that could run code"
    except Exception as error:  # a damaged zip file raises errors of many kinds
        reason = _reason(error)
    raise UserError(f"{folder / name} is damaged or missing ({reason}); "
                    f"{newest_valid_in_words(folder, step)}")


def _is_bad(folder, step):
    """Return whether a checkpoint says that its run had diverged (a damaged one does not)."""
    try:
        return not _parse_meta(Path(folder), step).get("good", True)
    except (OSError, ValueError):
        return False


def _is_valid(folder, step):
    try:
        digests = _parse_meta(folder, step).get("files_sha256") or {f"model_{step:06d}.pt": None}
        return all((folder / name).exists() and digest in (None, sha256_of(folder / name))
                   for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _all_gather(value, ranks):
    """Return the values of all ranks, in the order of the ranks."""
    if ranks.world_size == 1:
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def _reason(error):
    """Return one line; the operating system's own words where torch hides them in its error."""
    system = error
    while system is not None and not isinstance(system, OSError):
        system = system.__context__
    words = system.strerror or str(system) if system is not None else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0]
