"""The reference numbers of tests/golden/: computed once by the upstream program, fp32 on a CPU."""

import json
from pathlib import Path

import numpy as np
import torch

from nanochat.gpt import GPT, GPTConfig

FOLDER = Path(__file__).parent / "golden"
FACTS = json.loads((FOLDER / "gpt_small.json").read_text())
CONFIG = GPTConfig(**FACTS["config"])


def arrays(name):
    """Return the tensors of gpt_small_<name>.npz by name: weights, or expected (samples)."""
    with np.load(FOLDER / f"gpt_small_{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def batch(device="cpu"):
    """Return (idx, targets), both (3, 256) int64."""
    expected = arrays("expected")
    return expected["idx"].long().to(device), expected["targets"].long().to(device)


def golden_model(device="cpu", **flags):
    """Return the model of the reference numbers."""
    model = GPT(CONFIG, **flags)
    model.load_state_dict(arrays("weights"))
    return model.to(device)


def relative_error(found, expected):
    """Return the Frobenius norm of the difference over that of the expected tensor."""
    return ((found - expected).norm() / expected.norm()).item()


def assert_golden(tensors, name):
    """Compare {parameter name: tensor} with about 64 golden elements of each and all norms."""
    expected = arrays("expected")
    norms = dict(zip(arrays("weights"), expected[f"{name}_norms"].tolist(), strict=True))
    assert set(tensors) == set(norms)
    samples = {key: tensors[key].cpu().flatten()[:: tensors[key].numel() // 64 | 1]
               for key in norms}
    golden = expected[name].split([len(sample) for sample in samples.values()])
    for (key, sample), expected_sample in zip(samples.items(), golden, strict=True):
        assert relative_error(sample, expected_sample) < 1e-3, key
        assert abs(tensors[key].norm().item() / norms[key] - 1) < 1e-3, key
