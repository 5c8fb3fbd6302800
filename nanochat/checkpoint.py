"""Checkpoints in upstream's layout: written whole or not at all, verified when loaded.

<folder>/model_<step>.pt, optim_<step>_rank<r>.pt, meta_<step>.json. The meta file is written last and
carries the others' SHA-256: a checkpoint without it does not exist, one that differs from it is damaged. `good` in it
is false where weights or validation were not finite: `latest` passes over such a checkpoint.
"""

import contextlib
import hashlib
import os
import pickle
import time
from pathlib import Path

import torch
import torch.distributed as dist

from nanochat.common import (
    UserError,
    atomic_path,
    check_name,
    checkpoint_files,
    checkpoint_steps,
    checkpoints_dir,
    json_bytes,
    meta_path,
    parse_json,
    print0,
    read_limited,
    sha256_of,
    write_json,
)
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig, parameter_counts


def checkpoint_folder(tag):
    """<cache folder>/base_checkpoints/<tag>. Errors: UserError for a tag that cannot name a folder."""
    return checkpoints_dir() / check_name("--model-tag", tag)


def save_checkpoint(folder, step, model_state, optimizer_state, meta, ranks=None, group=None):
    """Save one checkpoint; every rank calls it, rank 0 writes model and meta, each its optimizer shard. group: the
    torch process group that they agree through, the default one if None.

    Returns whether the weights are finite. Errors: UserError on every rank when a disk is full or not writable;
    earlier checkpoints stay as they were.
    """
    ranks = ranks or Ranks()
    folder = Path(folder)
    states = {f"optim_{step:06d}_rank{ranks.rank}.pt": optimizer_state}
    if ranks.is_main:
        states = {f"model_{step:06d}.pt": model_state, **states}
    failure, digests = None, {}
    good = all(bool(torch.isfinite(value).all()) for value in model_state.values())
    try:
        _clear_torn(folder, ranks)
        meta_path(folder, step).unlink(missing_ok=True)  # while a step is written anew, it is not there
        for name, state in states.items():
            digests[name] = _write_state(folder / name, state)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        failure = _reason(error)
    reports = _all_gather((failure, digests), ranks, group)
    message = None
    if ranks.is_main:  # rank 0 decides for all whether the checkpoint exists
        failure = next((reported for reported, _ in reports if reported), None)
        files = {name: digest for _, report in reports for name, digest in report.items()}
        failure = failure or _write_meta(folder, {"step": step, **meta, "good": good, "files_sha256": files})
        if failure:
            _forget(folder, step)
            message = (f"checkpoint of step {step} not saved in {folder} ({failure}); free some space; "
                       f"{newest_usable(folder)}")
    [message, *_] = _all_gather(message, ranks, group)
    if message:
        raise UserError(message)
    return good


def mark_bad(folder, step):
    """Note in a checkpoint's meta that what it holds has diverged; nothing where there is none of that step."""
    if meta_path(folder, step).exists():
        _write_meta(folder, {**read_meta(folder, step), "good": False})


def remove_old(folder, step, keep, best_step=None):
    """Remove what is older than the `keep` newest good checkpoints up to `step`, which has just been saved, except the
    one of `best_step`. Bad ones do not count, and stay: they show how a run ended. Rank 0 alone calls it."""
    folder = Path(folder)
    there = checkpoint_steps(folder)
    good = [older for older in there if older <= step and not _is_bad(folder, older)]
    names = (path.name.split("_")[1].removesuffix(".pt") for path in folder.glob("*_*.pt"))
    torn = {int(name) for name in names if name.isdecimal()} - set(there)  # a removal was killed
    for older in (*good[:-keep], *(older for older in torn if older < step)):
        if older != best_step:
            _forget(folder, older)


def find_checkpoint(folder, step="latest"):
    """The step to load: `step` itself (a number, or digits) if it is there, or the newest good one for "latest"."""
    steps = checkpoint_steps(folder)
    if not steps:
        raise UserError(f"no checkpoint in {folder}; check --model-tag, or train one with scripts.base_train")
    if step == "latest":
        good = newest_good(folder, steps)
        if good is None:
            raise UserError(f"every checkpoint in {folder} is of a run that diverged; start again with lower learning "
                            "rates")
        return good
    if not str(step).isdecimal():
        raise UserError(f"step {step!r} is neither a number nor 'latest'")
    if int(step) not in steps:
        raise UserError(f"no checkpoint of step {step} in {folder}; {newest_usable(folder)}")
    return int(step)


def newest_good(folder, steps):
    """The newest of `steps` of which there is a good checkpoint, or None."""
    there = set(checkpoint_steps(folder))
    return next((step for step in sorted(steps, reverse=True) if step in there and not _is_bad(folder, step)), None)


def read_meta(folder, step):
    """The checkpoint's meta as a dict. Errors: UserError when it is damaged or has no model_config."""
    try:
        return _parse_meta(Path(folder), step)
    except (OSError, ValueError) as error:
        raise UserError(f"{meta_path(folder, step)} is damaged ({_reason(error)}); "
                        f"{newest_usable(folder, step)}") from None


def load_model_state(folder, step, meta, device):
    """The model's state dict on `device`, verified against `meta` where it has digests (ours has)."""
    state = _load(Path(folder), step, f"model_{step:06d}.pt", meta, device)
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}


def load_model(folder, step, device, compute_dtype):
    """(model on `device`, meta) from a checkpoint of ours or of upstream. UserError when it cannot be."""
    meta = read_meta(folder, step)
    state = load_model_state(folder, step, meta, device)
    try:  # upstream's configurations from before sliding windows have no pattern: full attention
        config = GPTConfig.from_dict({"window_pattern": "L", **meta["model_config"]})
        described = parameter_counts(config)["total"]
        stored = sum(value.numel() for value in state.values() if torch.is_tensor(value))
        if described > stored:  # before memory is taken for it
            raise UserError(f"the checkpoint of step {step} in {folder} is of another model: its meta describes "
                            f"{described:,} parameters, its file holds {stored:,}")
        model = GPT(config, compute_dtype)
    except (TypeError, ArithmeticError) as error:
        raise UserError(f"{meta_path(folder, step)} describes a model that cannot be ({_reason(error)}); "
                        f"{newest_usable(folder, step)}") from None
    model.to(device)
    load_state(model, state, folder, step)
    return model, meta


def load_state(model, state, folder, step):
    """Copy a state dict into `model` in the model's own dtypes; every name and shape must match."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the checkpoint of step {step} in {folder} is of another model: {reason}") from None


def n_optimizer_shards(meta):
    """By how many ranks a checkpoint of ours was saved."""
    return sum(name.startswith("optim_") for name in meta.get("files_sha256", {}))


def load_optimizer_state(folder, step, meta, device, rank=0):
    """The optimizer state that rank `rank` saved, its share of the whole; verified like the model's."""
    return _load(Path(folder), step, f"optim_{step:06d}_rank{rank}.pt", meta, device)


def set_aside(folder, after=None):
    """Move another run's checkpoints out of the way, or this one's of steps `after` the one that it goes on from:
    `latest` can then only mean the run, and the course, that goes on."""
    folder = Path(folder)
    steps = [step for step in checkpoint_steps(folder) if after is None or step > after]
    if steps:
        stem = f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{stem}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        try:
            if after is None:
                os.replace(folder, aside)
            else:
                aside.mkdir()
                for path in (path for step in steps for path in checkpoint_files(folder, step)):
                    os.replace(path, aside / path.name)
        except OSError as error:
            raise UserError(f"the earlier checkpoints in {folder} cannot be moved aside ({error.strerror}); "
                            "give another --model-tag") from None
        which = "earlier checkpoints" if after is None else f"checkpoints after step {after}"
        print0(f"{which} of {folder.name} moved to {aside}")


def _write_state(path, state):
    """Save a state dict; returns its file's SHA-256."""
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:  # given a path, torch.save would not say why it could not write
            torch.save(state, file)
        return sha256_of(temporary)


def _write_meta(folder, meta):
    """Write the meta with a digest of itself; returns why it could not be, or None."""
    try:
        write_json(meta_path(folder, meta["step"]), {**meta, "meta_sha256": _meta_digest(meta)})
    except OSError as error:
        return _reason(error)
    return None


def _parse_meta(folder, step):
    meta = parse_json(read_limited(meta_path(folder, step)))
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise ValueError("it has no model_config")
    digest = meta.pop("meta_sha256", None)
    if digest != (_meta_digest(meta) if digest or "files_sha256" in meta else None):  # upstream's have none
        raise ValueError("its content differs from that written")
    if meta.get("step", step) != step:
        raise ValueError(f"it is of step {meta['step']}")
    return meta


def _meta_digest(meta):
    return hashlib.sha256(json_bytes(meta)).hexdigest()


def _load(folder, step, name, meta, device):
    expected = meta.get("files_sha256", {}).get(name)
    try:
        if expected and sha256_of(folder / name) != expected:
            raise ValueError("its bytes differ from those written")
        state = torch.load(folder / name, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError("it holds no state dict")
        return state
    except pickle.UnpicklingError:
        reason = "it is not a file of tensors alone, and to load anything else could run code"
    except Exception as error:  # whatever a damaged zip raises
        reason = _reason(error)
    raise UserError(f"{folder / name} is damaged or missing ({reason}); {newest_usable(folder, step)}")


def _is_bad(folder, step):
    """Whether the checkpoint says that its run had diverged. A damaged one is named when it is read."""
    try:
        return not _parse_meta(folder, step).get("good", True)
    except (OSError, ValueError):
        return False


def newest_usable_step(folder, damaged_step=None):
    """The step of the newest checkpoint that is whole and good, or None. Every byte of it is read."""
    return next((step for step in reversed(checkpoint_steps(folder))
                 if step != damaged_step and not _is_bad(folder, step) and _is_usable(Path(folder), step)), None)


def newest_usable(folder, damaged_step=None):
    """The same in words, for messages."""
    step = newest_usable_step(folder, damaged_step)
    return "there is no usable checkpoint here" if step is None else f"the newest usable checkpoint is step {step}"


def _is_usable(folder, step):
    try:
        digests = _parse_meta(folder, step).get("files_sha256") or {f"model_{step:06d}.pt": None}
        return all((folder / name).exists() and digest in (None, sha256_of(folder / name))
                   for name, digest in digests.items())
    except (OSError, ValueError):
        return False


def _forget(folder, step):
    """Remove what there is of a step."""
    for path in checkpoint_files(folder, step):
        with contextlib.suppress(OSError):
            path.unlink()


def _clear_torn(folder, ranks):
    """Remove what a killed process left of the files that this rank writes."""
    names = (f"optim_*_rank{ranks.rank}.pt", *(("model_*.pt", "meta_*.json") if ranks.is_main else ()))
    for path in (path for name in names for path in folder.glob(f".{name}.*.tmp")):
        path.unlink(missing_ok=True)


def _all_gather(value, ranks, group):
    """The values of all ranks, by rank."""
    if ranks.world_size == 1:
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value, group=group)
    return values


def _reason(error):
    """One line; the system's own words (no space left) where torch hid them behind an error of its own."""
    system = error
    while system is not None and not isinstance(system, OSError):
        system = system.__context__
    words = system.strerror or str(system) if system is not None else str(error)
    return (words.strip().splitlines() or [type(error).__name__])[0]
