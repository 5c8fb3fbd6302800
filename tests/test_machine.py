import os
import resource
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from nanochat import common as provenance
from nanochat.common import (
    UserError,
    base_dir,
    choose_compute_dtype,
    choose_device,
    device_name,
    git_commit,
    peak_bf16_flops,
    peak_memory_mib,
    print0,
    runs_dir,
    versions,
)
from nanochat.distributed import Ranks, start_ranks, stop_ranks

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def set_ranks(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


# --- import and folders ----------------------------------------------------------------------------------------------

def test_importing_does_not_import_torch():
    code = ("import sys, nanochat.common, nanochat.common, nanochat.distributed, nanochat.common; "
            "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_cache_folder_is_the_one_of_the_environment_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert base_dir() == tmp_path / "a" / "b"
    assert base_dir().is_dir()
    assert runs_dir() == tmp_path / "a" / "b" / "runs"


@pytest.mark.parametrize("value", [None, ""])
def test_cache_folder_is_in_the_home_otherwise(tmp_path, monkeypatch, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    if value is not None:
        monkeypatch.setenv("NANOCHAT_BASE_DIR", value)
    assert base_dir() == tmp_path / ".cache" / "nanochat"


def test_cache_folder_that_cannot_be_made_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for inside in ("file", "file/below"):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / inside))
        with pytest.raises(UserError, match=r"cannot be made.*NANOCHAT_BASE_DIR"):
            base_dir()


# --- ranks -----------------------------------------------------------------------------------------------------------

def test_one_process_without_torchrun():
    assert Ranks.from_environment() == Ranks(rank=0, local_rank=0, world_size=1)
    assert Ranks.from_environment().is_main


def test_ranks_come_from_torchruns_environment(monkeypatch):
    set_ranks(monkeypatch, RANK="9", LOCAL_RANK="1", WORLD_SIZE="16")
    assert Ranks.from_environment() == Ranks(rank=9, local_rank=1, world_size=16)
    assert not Ranks.from_environment().is_main


@pytest.mark.parametrize("values", [{"RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0"},
                                    {"RANK": "zero", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
                                    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ""}])
def test_half_an_environment_of_torchrun_is_a_user_error(monkeypatch, values):
    set_ranks(monkeypatch, **values)
    with pytest.raises(UserError, match="torchrun"):
        Ranks.from_environment()


def test_only_rank_0_prints(capsys, monkeypatch):
    print0("a", "b", sep="-")
    set_ranks(monkeypatch, RANK="1", LOCAL_RANK="0", WORLD_SIZE="2")
    print0("nothing")
    set_ranks(monkeypatch, RANK="0")
    print0("c", end="")
    assert capsys.readouterr().out == "a-b\nc"


def test_one_rank_needs_no_process_group():
    assert start_ranks(CPU) == Ranks()
    assert not torch.distributed.is_initialized()
    stop_ranks()


# --- device and dtype ------------------------------------------------------------------------------------------------

def machine(monkeypatch, *, cuda=False, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(("there", "asked", "chosen"), [
    ({}, "", CPU), ({}, "cpu", CPU),
    ({"mps": True}, "", MPS), ({"mps": True}, "cpu", CPU), ({"mps": True}, "mps", MPS),
    ({"cuda": True}, "", torch.device("cuda", 0)), ({"cuda": True}, "cpu", CPU),
    ({"cuda": True, "mps": True}, "", torch.device("cuda", 0)), ({"cuda": True, "mps": True}, "mps", MPS),
])
def test_device_is_the_one_asked_for_or_the_best_there_is(monkeypatch, there, asked, chosen):
    machine(monkeypatch, **there)
    assert choose_device(asked) == chosen


def test_each_rank_takes_the_gpu_of_its_local_rank(monkeypatch):
    machine(monkeypatch, cuda=True)
    set_ranks(monkeypatch, RANK="11", LOCAL_RANK="3", WORLD_SIZE="16")
    assert choose_device() == torch.device("cuda", 3)
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize("asked", ["cuda", "mps"])
def test_device_that_is_not_there_is_a_user_error(monkeypatch, asked):
    machine(monkeypatch)
    with pytest.raises(UserError, match=rf"--device-type {asked} asked for.*leave it out"):
        choose_device(asked)


@pytest.mark.parametrize("asked", ["gpu", "CUDA", "cuda:0", "tpu"])
def test_unknown_device_is_a_user_error(asked):
    with pytest.raises(UserError, match="is unknown; use cuda, mps, cpu"):
        choose_device(asked)


@pytest.mark.parametrize(("capabilities", "dtype", "reason"), [
    ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16, "AMX"),
    ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16, "AMX"),
    ({"amx_bf16": False, "avx512_bf16": True}, torch.bfloat16, "AVX512-BF16"),
    ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True}, torch.float32, "no native bf16"),
    ({"architecture": "aarch64"}, torch.float32, "no native bf16"),
])
def test_cpu_computes_in_bf16_where_it_multiplies_it_natively(monkeypatch, capabilities, dtype, reason):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    chosen, why = choose_compute_dtype(CPU)
    assert chosen == dtype
    assert reason in why


def test_this_cpus_capabilities_can_be_read():
    """The real call of the installed torch: its name and keys are what the choice relies on."""
    assert choose_compute_dtype(CPU)[0] in (torch.bfloat16, torch.float32)
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert {"amx_bf16", "avx512_bf16"} <= set(torch.cpu.get_capabilities())


@pytest.mark.parametrize(("capability", "dtype"), [
    ((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((8, 9), torch.bfloat16), ((9, 0), torch.bfloat16),
    ((10, 0), torch.bfloat16)])
def test_gpu_computes_in_bf16_from_capability_8(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    chosen, why = choose_compute_dtype(CUDA)
    assert chosen == dtype
    assert ".".join(map(str, capability)) in why


def test_devices_without_a_rule_compute_in_fp32():
    assert choose_compute_dtype(MPS)[0] == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_environment_decides_the_dtype_on_every_device(monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: pytest.fail("the machine was asked"))
    for device in (CPU, CUDA, MPS):
        assert choose_compute_dtype(device) == (getattr(torch, name), f"NANOCHAT_DTYPE={name}")


@pytest.mark.parametrize("name", ["bf16", "float64", "torch.float32", "BFLOAT16", " float32"])
def test_unknown_dtype_in_the_environment_is_a_user_error(monkeypatch, name):
    monkeypatch.setenv("NANOCHAT_DTYPE", name)
    with pytest.raises(UserError, match=r"NANOCHAT_DTYPE=.*use one of bfloat16, float16, float32"):
        choose_compute_dtype(CPU)


def test_empty_dtype_in_the_environment_is_none(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DTYPE", "")
    assert choose_compute_dtype(MPS)[0] == torch.float32


@pytest.mark.parametrize(("platform", "maxrss"), [("linux", 3 * 2**10), ("darwin", 3 * 2**20)])
def test_peak_memory_is_mib_on_every_system(monkeypatch, platform, maxrss):
    """getrusage counts KiB on Linux, bytes on macOS."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: resource.struct_rusage([0.0, 0.0, maxrss, *[0] * 13]))
    assert peak_memory_mib(CPU) == 3.0


# --- names for the record --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "flops"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA B200", 2.25e15),
    ("NVIDIA GB200", 2.5e15), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA L40S", 362e12), ("NVIDIA L40", 181e12), ("NVIDIA L4", 121e12), ("NVIDIA GeForce RTX 4090", 165.2e12),
    ("NVIDIA H20", None), ("Tesla V100-SXM2-16GB", None), ("Intel(R) Xeon(R) CPU x8", None), ("", None),
])
def test_peak_flops_by_the_devices_name(name, flops):
    assert peak_bf16_flops(name) == flops


def test_cpu_is_named_with_its_core_count():
    assert device_name(CPU).endswith(f" x{os.cpu_count()}")
    assert "\n" not in device_name(CPU)


def test_time_is_utc_to_the_second():
    code = "from nanochat.common import utc_now; print(utc_now(), end='')"
    far_east = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TZ": "EAST-14"}, capture_output=True,
                              text=True, check=True).stdout
    written = datetime.strptime(far_east, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    assert timedelta(0) <= datetime.now(timezone.utc) - written < timedelta(minutes=1)


def test_versions_are_those_of_the_installed_packages():
    found = versions()
    assert list(found) == ["python", "torch", "triton", "numpy", "nanochat"]
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]  # the wheel may leave the build out
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))


def test_version_of_a_missing_package_is_null(monkeypatch):
    def missing(name):
        raise provenance.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.metadata, "version", missing)
    assert {versions()[name] for name in ("torch", "triton", "numpy", "nanochat")} == {None}


def checkout(folder):
    """A git checkout with one commit; returns a function that runs git in it."""
    def git(*words):
        settings = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", "-C", folder, *settings, *words], check=True, capture_output=True, text=True)

    folder.mkdir()
    git("init", "--quiet")
    (folder / "code.py").write_text("")
    (folder / "ledger.csv").write_text("header\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    return git


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_the_checkouts_and_says_whether_tracked_files_changed(tmp_path, monkeypatch):
    git = checkout(tmp_path / "package")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package" / "code.py"))
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert git_commit() == (commit, False)
    (tmp_path / "package" / "notes.txt").write_text("untracked")
    assert git_commit() == (commit, False)
    (tmp_path / "package" / "ledger.csv").write_text("header\na run's row\n")
    assert git_commit() == (commit, False)
    (tmp_path / "package" / "code.py").write_text("changed")
    assert git_commit() == (commit, True)


def test_no_commit_outside_a_checkout_or_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "nowhere" / "code.py"))
    assert git_commit() == (None, None)
    monkeypatch.setattr(provenance, "__file__", str(Path(__file__)))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() == (None, None)
