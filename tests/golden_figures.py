"""The reference figures of tests/golden/: computed once by the upstream program, fp32 on a CPU."""

import json
from pathlib import Path

import numpy as np
import torch

from nanochat.gpt import GPT, GPTConfig

FOLDER = Path(__file__).parent / "golden"
FACTS = json.loads((FOLDER / "gpt_small.json").read_text())
CONFIG = GPTConfig(**FACTS["config"])


def arrays(name):
    """The tensors of gpt_small_<name>.npz by name."""
    with np.load(FOLDER / f"gpt_small_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def batch(device="cpu"):
    """(idx, targets), both (3, 256) int64."""
    outputs = arrays("outputs")
    return outputs["idx"].long().to(device), outputs["targets"].long().to(device)


def golden_model(device="cpu", **flags):
    """The model the figures were computed on."""
    model = GPT(CONFIG, **flags)
    model.load_state_dict(arrays("weights"))
    return model.to(device)


def relative_error(found, expected):
    """Frobenius norm of the difference over that of the expected tensor."""
    return ((found - expected).norm() / expected.norm()).item()
