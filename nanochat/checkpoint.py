"""Checkpoints in upstream's layout: written whole or not at all, verified when loaded.

<folder>/model_<step>.pt, optim_<step>_rank<r>.pt, meta_<step>.json. The meta file is written last and
carries the others' SHA-256: a checkpoint without it does not exist, one that differs from it is damaged.
"""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.common import Ranks, base_dir, print0
from nanochat.errors import UserError
from nanochat.files import atomic_path, sha256_of, write_json
from nanochat.gpt import GPT, GPTConfig


def checkpoint_folder(tag):
    """<cache folder>/base_checkpoints/<tag>."""
    return base_dir() / "base_checkpoints" / tag


def checkpoint_steps(folder):
    """Steps of the complete checkpoints in `folder`, ascending."""
    names = [path.stem.removeprefix("meta_") for path in Path(folder).glob("meta_*.json")]
    return sorted(int(name) for name in names if name.isdigit())


def save_checkpoint(folder, step, model_state, optimizer_state, meta, ranks=None):
    """Save one checkpoint; every rank calls it, rank 0 writes model and meta, each its optimizer shard.

    Errors: UserError when the disk is full or not writable; earlier checkpoints stay as they were.
    """
    ranks = ranks or Ranks()
    folder = Path(folder)
    states = {f"optim_{step:06d}_rank{ranks.rank}.pt": optimizer_state}
    if ranks.is_main:
        states = {f"model_{step:06d}.pt": model_state, **states}
    failure, digests = None, {}
    try:
        for name, state in states.items():
            with atomic_path(folder / name) as temporary:
                torch.save(state, temporary)
                digests[name] = sha256_of(temporary)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = str(error).splitlines()[0]
    reports = [(failure, digests)]
    if ranks.world_size > 1:
        reports = [None] * ranks.world_size
        dist.all_gather_object(reports, (failure, digests))
    failures = [reported for reported, _ in reports if reported]
    if failures:
        _forget(folder, step)
        raise UserError(f"checkpoint of step {step} not saved in {folder} ({failures[0]}); free some space and resume "
                        f"{_newest_usable(folder)}")
    if ranks.is_main:
        files = {name: digest for _, report in reports for name, digest in report.items()}
        try:
            write_json(folder / f"meta_{step:06d}.json", {"step": step, **meta, "files_sha256": files})
        except OSError as error:
            _forget(folder, step)
            raise UserError(f"checkpoint of step {step} not saved in {folder} ({error}); free some space and resume "
                            f"{_newest_usable(folder)}") from None


def find_checkpoint(folder, step="latest"):
    """The step to load: `step` itself (a number, or digits) if it is there, or the newest for "latest"."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; check --model-tag, or train one with scripts.base_train")
    if step == "latest":
        return steps[-1]
    if not str(step).isdigit():
        raise UserError(f"step {step!r} is neither a number nor 'latest'")
    if int(step) not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; the newest usable one is {steps[-1]}")
    return int(step)


def read_meta(folder, step):
    """The checkpoint's meta as a dict. Errors: UserError when it is damaged or has no model_config."""
    path = Path(folder) / f"meta_{step:06d}.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta["model_config"], dict):
            raise TypeError("model_config is not an object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); {_newest_usable(folder, step)}") from None
    return meta


def load_model_state(folder, step, meta, device):
    """The model's state dict on `device`, verified against `meta` where it has digests (ours has)."""
    state = _load(Path(folder), step, f"model_{step:06d}.pt", meta, device)
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def load_model(folder, step, device, compute_dtype):
    """(model on `device`, meta) from a checkpoint of ours or of upstream. UserError when it cannot be."""
    meta = read_meta(folder, step)
    config = GPTConfig.from_dict(meta["model_config"])
    model = GPT(config, compute_dtype).to(device)
    load_state(model, load_model_state(folder, step, meta, device), folder, step)
    return model, meta


def load_state(model, state, folder, step):
    """Copy a state dict into `model` in the model's own dtypes; every name and shape must match."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint of step {step} in {folder} is of another model: {reason}") from None


def load_optimizer_state(folder, step, meta, device, ranks=None):
    """This rank's optimizer state. UserError when the checkpoint was made by another number of ranks."""
    ranks = ranks or Ranks()
    n_shards = len(list(Path(folder).glob(f"optim_{step:06d}_rank*.pt")))
    if n_shards != ranks.world_size:
        raise UserError(f"the checkpoint of step {step} in {folder} has optimizer state for {n_shards} ranks, this run "
                        f"has {ranks.world_size}; resume with {n_shards}")
    return _load(Path(folder), step, f"optim_{step:06d}_rank{ranks.rank}.pt", meta, device)


def set_aside(folder):
    """Move another run's checkpoints out of the way, so that `latest` can only mean this run's."""
    folder = Path(folder)
    if checkpoint_steps(folder):
        aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(folder, aside)
        print0(f"earlier checkpoints of {folder.name} moved to {aside}")


def _load(folder, step, name, meta, device):
    expected = meta.get("files_sha256", {}).get(name)
    try:
        if expected and sha256_of(folder / name) != expected:
            raise ValueError("its bytes differ from those written")
        return torch.load(folder / name, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged zip or pickle raises
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder / name} is damaged or missing ({reason}); {_newest_usable(folder, step)}") from None


def _newest_usable(folder, damaged_step=None):
    for step in reversed(checkpoint_steps(folder)):
        if step != damaged_step and _is_usable(Path(folder), step):
            return f"the newest usable checkpoint is step {step}"
    return "there is no usable checkpoint here"


def _is_usable(folder, step):
    try:
        meta = json.loads((folder / f"meta_{step:06d}.json").read_text(encoding="utf-8"))
        digests = meta.get("files_sha256") or {f"model_{step:06d}.pt": None}
        return all((folder / name).exists() and digest in (None, sha256_of(folder / name))
                   for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _forget(folder, step):
    """Remove what a failed save left of its own step."""
    for path in [*folder.glob(f"model_{step:06d}.pt"), *folder.glob(f"optim_{step:06d}_rank*.pt")]:
        path.unlink(missing_ok=True)
