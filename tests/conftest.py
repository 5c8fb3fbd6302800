"""For every test: the Triton interpreter without a GPU, a cache folder of its own, no network."""

import os

import pytest

try:
    import torch

    HAS_CUDA = torch.cuda.is_available()
    torch.set_num_threads(1)  # tests share the cores; small tensors gain nothing by more
except ImportError:  # the data tools are tested without torch too
    HAS_CUDA = False

if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported anywhere
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("NANOCHAT_DTYPE", None)


@pytest.fixture(autouse=True)
def base_dir(tmp_path, monkeypatch):
    """An empty cache folder for each test: nothing of the person's own is read or written."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    monkeypatch.setenv("NANOCHAT_QUIET", "")  # a program that a test calls with --quiet sets it
    return folder


@pytest.fixture
def corpus(tmp_path):
    """The folder of a small corpus, as a flag names it."""
    from corpus import write_corpus

    return str(write_corpus(tmp_path / "corpus"))


@pytest.fixture
def refusal(capsys):
    """A function that calls a program, checks its exit code and returns its stderr."""

    def said(program, *arguments, exit_code=2):
        with pytest.raises(SystemExit) as stopped:
            program(*arguments)
        assert stopped.value.code == exit_code
        return capsys.readouterr().err

    return said


@pytest.fixture
def fp32(monkeypatch):
    """Compute in fp32, also where the machine multiplies bf16 natively."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in (config.option.markexpr or ""):
            item.add_marker(pytest.mark.skip(reason="minutes long; run with -m slow"))
