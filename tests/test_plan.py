"""The plan against the program's tensors, against sums by hand, and against records."""

import csv
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dev.bench.plan import CPU, SHAPES, planned_peak_mb, record_rows
from nanochat.config import TrainingConfig, model_config, parse_config, run_horizon
from nanochat.device import choose_compute_dtype
from nanochat.gpt import GPT, GPTConfig, parameter_counts
from nanochat.optim import MuonAdamW, parameter_groups, polar_express, polar_express_flops
from nanochat.plan import (
    GPUS,
    LINK_SHARE,
    at_start,
    collective_bytes,
    collective_sec,
    estimate,
    gpu_of_device,
    largest_fitting,
    memory_of,
    model_parts,
)
from scripts import plan as plan_script

ROOT = Path(__file__).parent.parent
SMALL = GPTConfig(64, 512, 3, 2, 2, 64, "SL")
D24 = TrainingConfig(depth=24, fp8=True, target_param_data_ratio=8.0, device_batch_size=16)


def n_bytes(tensors):
    storages = [tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_that_stays_is_that_of_the_programs_tensors(dtype):
    model = GPT(SMALL, dtype)
    model.init_weights(0)
    copies = model.keep_casts()
    optimizer = MuonAdamW(parameter_groups(model), matmul_dtype=dtype, casts=copies)
    ids = torch.zeros(1, 16, dtype=torch.int64)
    model(ids, ids).backward()
    optimizer.step()
    config = TrainingConfig(device_batch_size=1, max_seq_len=64)
    planned, _ = memory_of(config, SMALL, dtype, torch.device("cuda"), 1, 1)

    state = [value for values in optimizer.state.values() for value in values.values()]
    gradients = [tensor.grad for tensor in [*model.parameters(), *copies.values()]]
    assert planned["weights"] == n_bytes([*model.parameters(), *model.buffers()])
    assert planned["copies"] == n_bytes(copies.values())
    assert planned["optimizer state"] == pytest.approx(n_bytes(state), rel=0.02)
    assert planned["gradients"] == n_bytes(gradients)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 8])
def test_ranks_share_all_parameters(world_size):
    parts, _ = model_parts(SMALL, torch.bfloat16, world_size)
    assert sum(part.numel for part in parts) == parameter_counts(SMALL)["total"]
    for part in parts:
        assert part.share * world_size == part.padded_numel or part.share == part.numel
        assert part.numel <= part.padded_numel


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (32, 8), (8, 32)])
def test_flops_of_the_orthogonalisation_are_those_that_torch_counts(rows, cols):
    with FlopCounterMode(display=False) as counter:
        polar_express(torch.zeros(1, rows, cols))
    assert polar_express_flops(rows, cols) == counter.get_total_flops()


def test_a_collective_takes_the_slower_link_and_a_latency_per_hop():
    gpu = GPUS["h100"]._replace(link_bytes_per_sec=100.0, network_bytes_per_sec=10.0)
    assert collective_sec(gpu, 800, 1, 8) == pytest.approx(700 / (100 * LINK_SHARE) + 7 * 3.4e-6)
    assert collective_sec(gpu, 1600, 2, 8) == pytest.approx(
        1500 / (80 * LINK_SHARE) + 14 * 3.4e-6 + 2 * 14e-6)
    assert collective_sec(gpu, 1600, 2, 1) == pytest.approx(800 / (10 * LINK_SHARE) + 2 * 14e-6)


def test_collectives_move_gradients_there_and_weights_back():
    four_layers = GPTConfig(64, 512, 4, 2, 2, 64, "SL")
    counts = parameter_counts(four_layers)
    matrices, scalars = counts["transformer_matrices"], counts["scalars"]
    tables = counts["lm_head"] + counts["wte"] + counts["value_embeds"]

    def moved(world_size, accumulation=1):
        parts, _ = model_parts(four_layers, torch.bfloat16, world_size)
        return sum(collective_bytes(parts, accumulation))

    assert moved(2) == (2 + 2) * (matrices + tables) + 8 * scalars
    # several micro-batches: the gradients of weights with a copy are fp32
    assert moved(2, accumulation=4) == moved(2) + 2 * (matrices + counts["lm_head"])
    # three ranks: stacks of 16, 4, 4 and 2 matrices are padded, and 512 rows are not divided
    padded = 18 * 64 * 64 + 2 * 6 * 4 * 64 * 64 + 3 * 2 * 12
    assert moved(3) == (2 + 2) * padded + 8 * (scalars + tables)


def test_records_are_within_ten_percent_and_the_kept_table_is_true():
    with open(ROOT / "dev" / "plan_records.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [list(row) for row in record_rows()]
    for name, minutes, planned, *_ in list(record_rows())[1:]:
        assert abs(float(planned) / float(minutes) - 1) <= 0.10, name


def test_the_horizon_is_that_of_the_training_program():
    found = estimate(D24, 32768, GPUS["h100"])
    assert found.horizon == run_horizon(D24, model_config(D24, 32768))
    assert "MFU 59%, 1.67 hours" in found.speed()


def test_the_device_batch_is_the_largest_that_fits():
    found = largest_fitting(D24, 32768, GPUS["h100"])
    doubled = dataclasses.replace(D24, device_batch_size=2 * found.device_batch_size)
    assert found.fits and not estimate(doubled, 32768, GPUS["h100"]).fits
    on_h200 = largest_fitting(D24, 32768, GPUS["h200"])
    assert on_h200.device_batch_size == 2 * found.device_batch_size
    small_batch = TrainingConfig(depth=4, total_batch_size=2**17, num_iterations=1)
    rows_per_gpu = 2**17 // 2048 // 8
    assert largest_fitting(small_batch, 32768, GPUS["h100"]).device_batch_size == rows_per_gpu


@pytest.mark.parametrize(("name", "known"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", None), ("NVIDIA H200", "h200"),
    ("AMD EPYC x2", None)])
def test_at_start_time_is_planned_if_the_device_is_in_the_table(name, known):
    assert gpu_of_device(name) == GPUS.get(known)
    model = model_config(D24, 32768)
    lines = at_start(D24, model, run_horizon(D24, model), 32, name, 8, torch.device("cuda"),
                     torch.bfloat16).splitlines()
    assert lines[0].startswith("plan: memory 59.3 GB per rank: weights 4.2 GB, ")
    expected = [f"plan: {estimate(D24, 32768, GPUS[known]).speed()}"] if known else []
    assert lines[1:] == expected


@pytest.mark.skipif(choose_compute_dtype(CPU)[0] != torch.bfloat16, reason="measured in bf16")
def test_memory_is_within_fifteen_percent_of_the_recorded_peaks():
    with open(ROOT / "dev" / "plan_memory_cpu.csv", newline="", encoding="utf-8") as file:
        measured = {row["shape"]: float(row["measured_peak_mb"]) for row in csv.DictReader(file)}
    assert set(measured) == set(SHAPES)
    for shape, peak_mb in measured.items():
        assert planned_peak_mb(shape) == pytest.approx(peak_mb, rel=0.15), shape


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.parametrize("shape", SHAPES)
def test_memory_is_within_fifteen_percent_of_the_measured_peak(shape):
    command = [sys.executable, "-m", "dev.bench.plan", "memory", "--shape", shape]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    _, planned, measured, _ = next(csv.reader(done.stdout.splitlines()[-1:]))
    assert float(planned) == pytest.approx(float(measured), rel=0.15)


# --- scripts.plan ---------------------------------------------------------------------------------

def test_the_printed_plan_has_one_gpu_and_every_number_of_nodes(capsys):
    plan_script.main(["--depth=24", "--fp8", "--price-per-gpu-hour=3", "--nodes=128"])
    printed = capsys.readouterr().out
    gpus = [int(n) for n in re.findall(r"^(\d+) GPU\(s\)", printed, re.MULTILINE)]
    shares = [int(n) for n in re.findall(r"communication (\d+)%", printed)]
    assert gpus == [1, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert shares == sorted(shares) and shares[1] < 5 and shares[-1] > 50
    assert "weights 4.2 GB" in printed and "cost " in printed and "fits" in printed


def test_a_gpu_that_is_not_in_the_list_is_planned_from_memory_and_rate(capsys):
    plan_script.main(["--depth=12", "--gpu-memory-gb=24", "--gpu-tflops=165", "--gpus=1"])
    printed = capsys.readouterr().out
    assert "21.6 GB of 24.0 GB are usable: fits" in printed
    assert re.search(r"^1 GPU\(s\): .* hours of training", printed, re.MULTILINE)


def test_the_flags_are_those_of_the_training_program(capsys):
    plan_script.main(["--depth=24", "--target-param-data-ratio=8", "--fp8", "--as-flags"])
    assert parse_config(capsys.readouterr().out.split()) == D24


def test_the_ratio_of_lane_b_is_taken_from_its_file(tmp_path, capsys, refusal):
    (tmp_path / "infer.json").write_text(json.dumps({"chosen_ratio": 9.0, "chosen_depth": 12}))
    flag = f"--inference-json={tmp_path / 'infer.json'}"
    plan_script.main(["--depth=12", flag, "--as-flags"])
    assert "--target-param-data-ratio=9.0" in capsys.readouterr().out
    assert "is for --depth 12, not 24" in refusal(plan_script.main, ["--depth=24", flag])


@pytest.mark.parametrize(("flags", "message"), [
    (["--gpus=0"], "--gpus 0"), (["--device-batch-size=7"], "--device-batch-size 7"),
    (["--gpu-memory-gb=24"], "--gpu-tflops"), (["--inference-json=no.json"], "no.json"),
    (["--fp8", "--gpu=a100"], "the A100 has no fp8"),
    (["--depth=120", "--gpus=1"], "one row needs"),
])
def test_the_plan_refuses_in_one_line(flags, message, refusal):
    error = refusal(plan_script.main, ["--depth=24", *flags])
    assert message in error and error.count("\n") == 1
