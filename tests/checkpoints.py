"""Checkpoints for tests: a small one of ours, those of upstream, and damages of a file."""

import json
import os
import shutil

import torch
from corpus import golden_tokenizer
from golden_figures import CONFIG, arrays

from nanochat.checkpoint import checkpoint_folder, save_checkpoint
from nanochat.gpt import GPT, GPTConfig

TINY_LENGTH = 64  # of write_model's rows
META = {
    "model_config": CONFIG.to_dict(), "user_config": {"depth": 4, "target": None}, "run_id": "a",
    "loop_state": {"step": 1, "train_time_sec": 0.1 + 0.2,
                   "loader": {"epoch": 0, "buffer": [[0, 1], [2, 3]]}}}
UPSTREAM_META = {  # the keys of a checkpoint that upstream writes
    "step": 100, "val_bpb": 1.25, "model_config": CONFIG.to_dict(),
    "user_config": {"depth": 4, "run": "dummy"}, "device_batch_size": 32, "max_seq_len": 512,
    "total_batch_size": 524288, "dataloader_state_dict": {"pq_idx": 0, "rg_idx": 3, "epoch": 1},
    "loop_state": {"min_val_bpb": 1.25, "smooth_train_loss": 2.5, "total_training_time": 12.5}}
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "other bytes": lambda path: path.write_bytes(bytes(256)),
    "of another step": lambda path: shutil.copy(
        path.with_name(path.name.replace("2", "1", 1)), path)}


class Malicious:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write_model(tag="tiny", step=7, seed=0, **meta):
    """Write a small model with a head that is not near zero as a checkpoint of ours; return it."""
    tokenizer = golden_tokenizer()
    config = GPTConfig(TINY_LENGTH, tokenizer.vocab_size, 2, 2, 2, 32, "L")
    model = GPT(config)
    model.init_weights(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    meta = {**META, "model_config": config.to_dict(), "tokenizer_id": tokenizer.tokenizer_id,
            "total_batch_size_tokens": 256, **meta}
    save_checkpoint(checkpoint_folder(tag), step, model.state_dict(), {}, meta)
    return model.eval()


def write_upstream(folder, prefix="", **config):
    """Write a checkpoint as upstream does, without checksums; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {prefix + name: value for name, value in arrays("weights").items()}
    torch.save(weights, folder / "model_000100.pt")
    torch.save({"state": {}}, folder / "optim_000100_rank0.pt")
    model_config = {**UPSTREAM_META["model_config"], **config}
    model_config = {name: value for name, value in model_config.items() if value is not None}
    meta = {**UPSTREAM_META, "model_config": model_config}
    (folder / "meta_000100.json").write_text(json.dumps(meta, indent=2))
    return folder
