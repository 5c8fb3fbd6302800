"""Checkpoints in upstream's layout: saved completely or not at all, verified when loaded.

<folder>/model_<step>.pt, optim_<step>_rank<r>.pt and meta_<step>.json. The meta file is written
last and holds the SHA-256 of the others: a checkpoint without it does not exist, one that differs
from it is damaged.
"""

import contextlib
import hashlib
import os
import pickle
from datetime import datetime
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
from nanochat.distributed import Ranks, on_main
from nanochat.gpt import GPT, GPTConfig, parameter_counts
from nanochat.tokenizer import load_tokenizer


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
    """Save one checkpoint; every rank calls it.

    Rank 0 writes model and meta, each rank its share of the optimizer state. If a disk is full or
    not writable, all ranks end with a UserError, and earlier checkpoints stay as they were.
    """
    ranks, folder = ranks or Ranks(), Path(folder)
    states = {f"optim_{step:06d}_rank{ranks.rank}.pt": optimizer_state}
    if ranks.is_main:
        states[f"model_{step:06d}.pt"] = model_state

    failure, digests = None, {}
    try:
        _meta_path(folder, step).unlink(missing_ok=True)  # while its files change, it is not there
        for name, state in states.items():
            with atomic_path(folder / name) as temporary:
                with open(temporary, "wb") as file:  # given a path, torch.save hides the reason
                    torch.save(state, file)
                digests[name] = sha256_of(temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = _reason(error)

    reports = [(failure, digests)] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(reports, (failure, digests))

    def write_meta():
        failures = [failure for failure, _ in reports if failure]
        files = {name: digest for _, report in reports for name, digest in report.items()}
        content = {"step": step, **meta, "files_sha256": files}
        try:
            if failures:
                raise OSError(failures[0])
            write_json(_meta_path(folder, step), {**content, "meta_sha256": _meta_digest(content)})
        except OSError as error:
            for path in _files(folder, step):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise UserError(
                f"the checkpoint of step {step} was not saved in {folder} ({_reason(error)}); "
                f"free some space; {newest_valid_in_words(folder)}") from None

    on_main(ranks, write_meta)


def remove_old(folder, keep, best_step=None):
    """Remove all checkpoints but the `keep` newest and that of `best_step`; rank 0 calls it.

    Files of a save or a removal that a kill interrupted are removed, too.
    """
    kept = {*checkpoint_steps(folder)[-keep:], best_step}
    for pattern in ("meta_*.json", "model_*.pt", "optim_*.pt"):  # without its meta it is gone
        for path in Path(folder).glob(pattern):
            step = path.stem.split("_")[1]
            if step.isdecimal() and int(step) not in kept:
                path.unlink(missing_ok=True)


def set_aside(folder, after=-1):
    """Move the checkpoints of steps `after` a given one to a new folder beside `folder`.

    They belong to another run, or to a part of this run that it is about to repeat: `latest` must
    not find them. Temporary files that a killed process left are removed.
    """
    folder = Path(folder)
    for path in folder.glob(".*.tmp"):
        path.unlink()
    steps = [step for step in checkpoint_steps(folder) if step > after]
    if not steps:
        return
    aside = folder.with_name(f"{folder.name}.before-{datetime.now():%Y%m%d-%H%M%S-%f}")
    try:
        aside.mkdir()
        for path in [path for step in steps for path in _files(folder, step)]:
            os.replace(path, aside / path.name)
    except OSError as error:
        raise UserError(f"the checkpoints in {folder} cannot be moved ({error.strerror}); give "
                        "another --model-tag") from None
    print0(f"checkpoints of {folder.name} after step {after} moved to {aside}" if after > 0
           else f"earlier checkpoints of {folder.name} moved to {aside}")


# --- find and load ------------------------------------------------------------------------------

def find_checkpoint(folder, step="latest"):
    """Return `step` (a number or digits) if it exists, or the newest one for "latest"."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; train a model with scripts.base_train, or "
                        f"give one of these with --model-tag: {', '.join(tags()) or 'none'}")
    if step == "latest":
        return steps[-1]
    if not str(step).isdecimal():
        raise UserError(f"step {step!r} is neither a number nor 'latest'")
    if int(step) not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; "
                        f"{newest_valid_in_words(folder)}")
    return int(step)


def newest_valid_step(folder, damaged_step=None):
    """Return the step of the newest checkpoint with right checksums, or None."""
    for step in reversed(checkpoint_steps(folder)):
        with contextlib.suppress(OSError, ValueError):
            digests = _parse_meta(folder, step).get("files_sha256", {f"model_{step:06d}.pt": None})
            if step != damaged_step and all(
                    sha256_of(Path(folder) / name) == digest or digest is None
                    for name, digest in digests.items()):
                return step
    return None


def newest_valid_in_words(folder, damaged_step=None):
    """Describe the newest valid checkpoint, for error messages."""
    step = newest_valid_step(folder, damaged_step)
    return f"the newest valid checkpoint is step {step}" if step else "no valid checkpoint is here"


def read_meta(folder, step):
    """Return the meta dict of a checkpoint. Raise UserError if it is damaged."""
    try:
        return _parse_meta(folder, step)
    except (OSError, ValueError) as error:
        raise UserError(f"{_meta_path(folder, step)} is damaged ({_reason(error)}); "
                        f"{newest_valid_in_words(folder, step)}") from None


def load_model_state(folder, step, meta, device):
    """Return the model's state dict on `device`; its checksum is verified if `meta` has it."""
    state = _load(folder, step, f"model_{step:06d}.pt", meta, device)
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def load_optimizer_state(folder, step, meta, device, rank=0):
    """Return the share of the optimizer state that rank `rank` saved."""
    return _load(folder, step, f"optim_{step:06d}_rank{rank}.pt", meta, device)


def load_model(folder, step, device, compute_dtype):
    """Return (model on `device`, meta) of a checkpoint of ours or of upstream."""
    meta = read_meta(folder, step)
    state = load_model_state(folder, step, meta, device)
    try:  # upstream's configurations from before sliding windows have no pattern
        config = GPTConfig.from_dict({"window_pattern": "L", **meta["model_config"]})
        described = parameter_counts(config)["total"]
        stored = sum(value.numel() for value in state.values())
        if described > stored:  # checked before memory is allocated for it
            raise ValueError(f"model_config has {described:,} parameters, the file {stored:,}")
        model = GPT(config, compute_dtype)
        model.load_state_dict(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint of step {step} in {folder} is of another model than its "
                        f"meta describes: {reason}; {newest_valid_in_words(folder, step)}"
                        ) from None
    return model.to(device), meta


class Trained:
    """A checkpoint of ours or of upstream, ready for use; `model` is in evaluation mode."""

    def __init__(self, folder, step, model, tokenizer, meta):
        self.folder, self.step, self.model, self.tokenizer = folder, step, model.eval(), tokenizer
        self.meta, self.user_config = meta, meta.get("user_config") or {}  # flags of the run
        self.tag, self.name = folder.name, f"{folder.name}_{step:06d}"
        self.row_tokens = model.config.sequence_len  # longest sequence in training
        self.max_tokens = model.cos.size(1)  # longest sequence that the model accepts
        batch = meta.get("total_batch_size_tokens", meta.get("total_batch_size", 0))
        self.tokens = step * batch  # that it was trained on


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
    expected = (meta.get("tokenizer_id", tokenizer.tokenizer_id), model.config.vocab_size)
    if expected != (tokenizer.tokenizer_id, tokenizer.vocab_size):
        raise UserError(
            f"the model was trained with tokenizer {expected[0]} of {expected[1]} tokens, this one "
            f"is {tokenizer.tokenizer_id} of {tokenizer.vocab_size}; give the right one with "
            "--tokenizer-dir")
    return Trained(folder, step, model, tokenizer, meta)


# --- files --------------------------------------------------------------------------------------

def _meta_path(folder, step):
    return Path(folder) / f"meta_{step:06d}.json"


def _files(folder, step):
    """Return the files of a checkpoint, its meta first: without it the checkpoint is gone."""
    names = (f"meta_{step:06d}.json", f"model_{step:06d}.pt", f"optim_{step:06d}_rank*.pt")
    return [path for name in names for path in Path(folder).glob(name)]


def _parse_meta(folder, step):
    """Return the meta dict. Raise OSError or ValueError if it is damaged."""
    meta = parse_json(_meta_path(folder, step).read_bytes())
    if not isinstance(meta, dict):
        raise ValueError("it is not a JSON object")
    digest = meta.pop("meta_sha256", None)  # upstream's meta files have no checksum
    if digest not in (None, _meta_digest(meta)):
        raise ValueError("its content differs from its checksum")
    if meta.get("step", step) != step:
        raise ValueError(f"it is of step {meta['step']}")
    return meta


def _meta_digest(meta):
    return hashlib.sha256(json_bytes(meta)).hexdigest()


def _load(folder, step, name, meta, device):
    path, expected = Path(folder) / name, meta.get("files_sha256", {}).get(name)
    try:
        if expected and sha256_of(path) != expected:
            raise ValueError("its content differs from its checksum")
        state = torch.load(path, map_location=device, weights_only=True)
        if isinstance(state, dict):
            return state
        reason = "it has no state dict"
    except pickle.UnpicklingError:
        reason = "it has more than tensors, and loading that could run code"
    except Exception as error:  # a damaged zip file raises errors of many kinds
        reason = _reason(error)
    raise UserError(
        f"{path} is damaged or missing ({reason}); {newest_valid_in_words(folder, step)}")


def _reason(error):
    """Return one line; the operating system's own words where torch hides them in its error."""
    system = error
    while system is not None and not isinstance(system, OSError):
        system = system.__context__
    words = system.strerror or str(system) if system is not None else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0]
