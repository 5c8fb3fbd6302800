"""The planner: its counts against the program's own tensors and torch's counter, its sums against sums by hand."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dev.bench.plan import CPU, SHAPES, planned_memory, record_rows
from nanochat import build
from nanochat.common import UserError, choose_compute_dtype
from nanochat.config import TrainingConfig
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig, parameter_counts, scaling_params
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.planning.estimate import estimate, with_fitting_rows
from nanochat.planning.gpus import GPUS, LINK_SHARE, gpu_of_device
from nanochat.planning.memory import memory_of
from nanochat.planning.parts import MatrixStack, Tensor, model_parts
from nanochat.planning.report import at_start, nodes_table
from nanochat.planning.step_time import collective_bytes, collective_sec
from nanochat.optim import polar_express, polar_express_flops
from scripts import base_train
from scripts import plan as plan_script

ROOT = Path(__file__).parent.parent
SMALL = GPTConfig(64, 512, 3, 2, 2, 64, "SL")
D24 = TrainingConfig(depth=24, fp8=True, target_param_data_ratio=8.0, device_batch_size=16)


def n_bytes(tensors):
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# --- counts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_copies_and_state_are_those_of_the_program(dtype):
    model = GPT(SMALL, dtype)
    model.init_weights(0)
    casts = model.keep_casts()
    optimizer = MuonAdamW(parameter_groups(model), matmul_dtype=dtype, casts=casts)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    model(ids, ids).backward()
    optimizer.step()
    planned = memory_of(TrainingConfig(device_batch_size=1, max_seq_len=64), SMALL, dtype, torch.device("cpu"), 1, 1)
    state = [value for kept in optimizer.state.values() for value in kept.values() if torch.is_tensor(value)]
    assert planned.weights == n_bytes([*model.parameters(), *model.buffers()])
    assert planned.copies == n_bytes(casts.values())
    assert planned.optimizer_state == pytest.approx(n_bytes(state), rel=0.02)  # Muon's second moments are left out
    assert planned.gradients == sum(tensor.grad.nbytes for tensor in [*model.parameters(), *casts.values()]
                                    if tensor.grad is not None)


def test_a_model_s_parts_are_all_its_parameters():
    parts = model_parts(SMALL, torch.bfloat16)
    numel = sum(stack.count * stack.numel for stack in parts.stacks) + sum(tensor.numel for tensor in parts.tensors)
    assert numel == parameter_counts(SMALL)["total"]


@given(st.integers(1, 200), st.integers(1, 1100), st.integers(1, 5000))
def test_ranks_share_all_of_a_stack_and_of_a_table(count, world_size, first):
    stack, table = MatrixStack(count, 3, 5), Tensor(first * 7, first, 2, False)
    padded = stack.padded(world_size)
    assert padded % world_size == 0 and count <= padded < count + world_size
    share = table.share(world_size)
    assert share * world_size == table.numel or share == table.numel


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (32, 8), (8, 32)])
def test_flops_of_the_orthogonalisation_are_those_that_torch_counts(rows, cols):
    with FlopCounterMode(display=False) as counter:
        polar_express(torch.zeros(1, rows, cols))
    assert polar_express_flops(rows, cols) == counter.get_total_flops()


# --- collectives -----------------------------------------------------------------------------------------------------

def test_a_collective_takes_its_bytes_over_the_slower_link_and_a_latency_for_each_hop():
    gpu = dataclasses.replace(GPUS["h100"], link_bytes_per_sec=100.0, network_bytes_per_sec=10.0)
    assert collective_sec(gpu, 800, 1, 8) == pytest.approx(700 / (100 * LINK_SHARE) + 7 * 3.4e-6)
    assert collective_sec(gpu, 1600, 2, 8) == pytest.approx(1500 / (80 * LINK_SHARE) + 14 * 3.4e-6 + 2 * 14e-6)
    assert collective_sec(gpu, 1600, 2, 1) == pytest.approx(800 / (10 * LINK_SHARE) + 2 * 14e-6)


def test_bytes_on_the_way_are_gradients_there_and_copies_back():
    four_layers = GPTConfig(64, 512, 4, 2, 2, 64, "SL")  # 16 matrices of 64 x 64, 4 and 4 of the MLPs, 2 of gates
    parts, counts = model_parts(four_layers, torch.bfloat16), parameter_counts(four_layers)
    assert collective_bytes(parts, 2, 1, 1) == []
    tables, scalars = counts["lm_head"] + counts["wte"] + counts["value_embeds"], counts["scalars"]
    two = sum(collective_bytes(parts, 2, 1, 2))
    assert two == (2 + 2) * (counts["transformer_matrices"] + tables) + 8 * scalars
    # several micro-batches: gradients of what has a copy are fp32
    assert sum(collective_bytes(parts, 2, 4, 2)) == two + 2 * (counts["transformer_matrices"] + counts["lm_head"])
    # three ranks: stacks are padded with zeros, and no rank has a third of 512 rows
    padded = 18 * 64 * 64 + 2 * 6 * 4 * 64 * 64 + 3 * 2 * 12
    assert sum(collective_bytes(parts, 2, 1, 3)) == (2 + 2) * padded + 8 * (scalars + tables)


# --- estimates -------------------------------------------------------------------------------------------------------

def test_the_horizon_is_the_training_program_s():
    model = build.model_config(D24, 32768)
    planned = estimate(D24, 32768, GPUS["h100"])
    assert planned.horizon == build.plan(D24, model) and planned.accumulation == 4
    assert planned.flops == pytest.approx(2.79e19, rel=0.01)
    assert planned.mfu == pytest.approx(
        planned.flops / planned.train_sec / (8 * 989e12)) and planned.cost(3.0) == planned.train_sec / 3600 * 24
    assert scaling_params(model) == pytest.approx(729.8e6, rel=1e-4)


def test_records_are_within_ten_percent_and_the_readme_has_these_figures():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in record_rows():
        assert abs(row["planned"] / row["minutes"] - 1) <= 0.10, row
        assert f"| {row['record']} | {row['minutes']} | {row['planned']} | {row['off']} |" in readme


def test_the_device_batch_is_the_largest_that_fits():
    found = with_fitting_rows(D24, 32768, GPUS["h100"])
    assert found.fits and not estimate(dataclasses.replace(D24, device_batch_size=2 * found.rows), 32768,
                                       GPUS["h100"]).fits
    assert with_fitting_rows(D24, 32768, GPUS["h200"]).rows == 2 * found.rows
    whole_batch = TrainingConfig(depth=4, total_batch_size=2**17, num_iterations=1)
    assert with_fitting_rows(whole_batch, 32768, GPUS["h100"]).rows == 2**17 // 2048 // 8  # no more rows are there


@pytest.mark.parametrize(("change", "gpu", "where", "message"), [
    ({}, "a100", {}, "--fp8: the A100 has none"),
    ({}, "h100", {"nodes": 129}, "nodes at most 128"),
    ({"depth": 120}, "h100", {"gpus_per_node": 1}, "one row needs"),
])
def test_what_cannot_be_is_refused(change, gpu, where, message):
    with pytest.raises(UserError, match=re.escape(message)):
        with_fitting_rows(dataclasses.replace(D24, **change), 32768, GPUS[gpu], **where)


def test_communication_takes_over_as_nodes_are_added():
    lines = nodes_table(D24, 32768, GPUS["h100"], 8, 128, 2.0)
    shares = [int(found[1]) for line in lines if (found := re.search(r"(\d+)%", line))]
    assert shares == sorted(shares) and shares[0] < 5 and shares[-1] > 50
    assert "start fewer ranks" in "\n".join(lines) and lines[-1].startswith("* communication")


@pytest.mark.parametrize(("name", "known"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200", "h200"),
    ("AMD EPYC x2", None)])
def test_time_is_planned_where_the_device_s_peaks_are_known(name, known):
    assert gpu_of_device(name) == GPUS.get(known)
    model = build.model_config(D24, 32768)
    place = SimpleNamespace(device=torch.device("cuda"), name=name, ranks=Ranks(world_size=8))
    lines = at_start(D24, model, build.plan(D24, model), 32, place, torch.bfloat16).splitlines()
    assert lines[0].startswith("plan: memory 59.3 GB a rank: weights 4.2 GB, ") and len(lines) == 1 + bool(known)
    if known == "h100":
        planned = estimate(D24, 32768, GPUS["h100"])
        assert f"{planned.tok_per_sec:,.0f} tok/s" in lines[1] and "hours" in lines[1]


# --- scripts.plan ----------------------------------------------------------------------------------------------------

def test_the_plan_s_flags_are_those_of_the_training_program(capsys):
    plan_script.main(["--depth", "24", "--ratio", "8", "--fp8", "--as-flags"])
    assert base_train.parse_args(capsys.readouterr().out.split()) == D24


def test_the_plan_in_words(capsys):
    plan_script.main(["--depth", "24", "--ratio", "8", "--fp8", "--price-per-gpu-hour", "3", "--nodes", "2"])
    printed = capsys.readouterr().out
    for part in ("5568 steps of 1048576 tokens, 5.838B tokens", "weights 4.2 GB", "--device-batch-size 16, 4 micro",
                 "with --chunked-ce", "hours", "at 3 a GPU hour", "communication"):
        assert part in printed


def test_the_plan_takes_lane_b_s_ratio_with_its_interval(tmp_path, capsys):
    file = tmp_path / "infer.json"
    known = {"schema_version": 2, "dataset_id": "x", "tokenizer_id": "y", "state": "ok", "alpha_source": "curves",
             "decision": "inferred", "target_metric_name": "val_bpb", "target_metric_threshold": 0.72, "alpha": None,
             "target_tokens": None, "target_param_data_ratio": {"value": 9.0, "lo": 8.5, "hi": None},
             "confirmation_ratio": 9.45, "default_ratio": 12.0, "n_scaling_params": 5, "slopes": None}
    file.write_text(json.dumps(known))
    plan_script.main(["--depth", "12", "--inference-json", str(file)])
    printed, warned = capsys.readouterr()
    assert "9.00 per scaling" in printed and "lower end of the inferred ratio: 8.5" in printed
    assert "upper" not in printed and "a model of 5 scaling parameters" in warned


@pytest.mark.parametrize(("flags", "message"), [
    (["--gpu", "tpu"], "--gpu 'tpu'"), (["--nodes", "0"], "error: --nodes 0 must be 1 to 128"),
    (["--price-per-gpu-hour", "-1"], "error: --price-per-gpu-hour -1.0 must be at least 0"),
    (["--price-per-gpu-hour", "inf"], "error: --price-per-gpu-hour inf must be at least 0 and finite"),
    (["--device-batch-size", "7"], "--device-batch-size 7"), (["--inference-json", "nowhere.json"], "nowhere.json"),
])
def test_the_plan_refuses_in_one_line(flags, message, refusal):
    error = refusal(plan_script.main, ["--depth", "12", *flags])
    assert message in error and error.count("\n") == 1


# --- measured --------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(choose_compute_dtype(CPU)[0] != torch.bfloat16, reason="the kept peaks are of bf16")
def test_the_plan_is_within_fifteen_percent_of_the_peaks_that_are_kept():
    with open(ROOT / "dev" / "plan_memory_cpu.csv", newline="", encoding="utf-8") as file:
        measured = {row["shape"]: float(row["measured_peak_mb"]) for row in csv.DictReader(file)}
    assert set(measured) == set(SHAPES)
    for shape, peak_mb in measured.items():
        assert planned_memory(shape).peak / 1e6 == pytest.approx(peak_mb, rel=0.15), shape


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_within_fifteen_percent_of_the_measured_peak(shape, tmp_path):
    done = subprocess.run([sys.executable, "-m", "dev.bench.plan", "memory", "--out", tmp_path / "m.csv", "--shape",
                           shape], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    planned, measured = re.search(r"planned_peak_mb ([\d.]+), measured_peak_mb ([\d.]+)", done.stdout).groups()
    assert float(planned) == pytest.approx(float(measured), rel=0.15)
