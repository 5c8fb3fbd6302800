"""The plan against the program's tensors, against sums by hand, and against records."""

import csv
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dev.bench.plan import CPU, SHAPES, planned_peak_mb, record_rows
from nanochat import build
from nanochat import plan as plan_module
from nanochat.build import compile_model
from nanochat.common import UserError
from nanochat.config import TrainingConfig, model_config, parse_config
from nanochat.device import choose_compute_dtype
from nanochat.distributed import Ranks
from nanochat.gpt import GPT, GPTConfig, parameter_counts
from nanochat.lane_b.answer import VERSION
from nanochat.optim import MuonAdamW, parameter_groups, polar_express, polar_express_flops
from nanochat.plan import (
    GPUS,
    KEPT_PER_LAYER,
    KEPT_RECOMPUTED,
    LINK_SHARE,
    Estimate,
    Part,
    at_start,
    communication_sec,
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


def test_communication_moves_gradients_there_and_weights_back():
    """Bytes by hand, and a latency per hop of each collective."""
    four_layers = GPTConfig(64, 512, 4, 2, 2, 64, "SL")
    counts = parameter_counts(four_layers)
    matrices, scalars = counts["transformer_matrices"], counts["scalars"]
    tables = counts["lm_head"] + counts["wte"] + counts["value_embeds"]
    gpu = GPUS["h100"]._replace(link_bytes_per_sec=1e-6)  # latencies do not count

    def moved(world_size, accumulation=1):
        parts, _ = model_parts(four_layers, torch.bfloat16, world_size)
        seconds = communication_sec(gpu, parts, accumulation, world_size)
        return round(seconds * 1e-6 * LINK_SHARE / (1 - 1 / world_size))

    assert moved(2) == (2 + 2) * (matrices + tables) + 8 * scalars
    # several micro-batches: the gradients of weights with a copy are fp32
    assert moved(2, accumulation=4) == moved(2) + 2 * (matrices + counts["lm_head"])
    # three ranks: stacks of 16, 4, 4 and 2 matrices are padded, and 512 rows are not divided
    padded = 18 * 64 * 64 + 2 * 6 * 4 * 64 * 64 + 3 * 2 * 12
    assert moved(3) == (2 + 2) * padded + 8 * (scalars + tables)
    part = Part(80, 80, 10, 4, 2, None)
    hops_sec = communication_sec(gpu._replace(link_bytes_per_sec=1e99), [part], 1, 8)
    assert hops_sec == pytest.approx(3 * 7 * 3.4e-6)


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (32, 8), (8, 32)])
def test_flops_of_the_orthogonalisation_are_those_that_torch_counts(rows, cols):
    with FlopCounterMode(display=False) as counter:
        polar_express(torch.zeros(1, rows, cols))
    assert polar_express_flops(rows, cols) == counter.get_total_flops()


def test_records_are_within_ten_percent_and_the_kept_table_is_true():
    with open(ROOT / "dev" / "plan_records.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [list(row) for row in record_rows()]
    for name, minutes, planned, *_ in list(record_rows())[1:]:
        assert abs(float(planned) / float(minutes) - 1) <= 0.10, name


def test_the_device_batch_is_the_largest_that_fits():
    found = largest_fitting(D24, 32768, GPUS["h100"])
    doubled = dataclasses.replace(D24, device_batch_size=2 * found.device_batch_size)
    assert found.fits and not Estimate(doubled, 32768, GPUS["h100"]).fits
    on_h200 = largest_fitting(D24, 32768, GPUS["h200"])
    assert on_h200.device_batch_size == 2 * found.device_batch_size
    small_batch = TrainingConfig(depth=4, total_batch_size=2**17, num_iterations=1)
    rows_per_gpu = 2**17 // 2048 // 8
    assert largest_fitting(small_batch, 32768, GPUS["h100"]).device_batch_size == rows_per_gpu


def record_storage(sizes, tensor):
    sizes[tensor.data_ptr()] = tensor.nbytes
    return tensor


@pytest.mark.parametrize(("device_gb", "planned", "note"), [
    (80, "59.3 GB", ""), (60, "44.8 GB", "; memory is short: elementwise results are recomputed")])
def test_at_start_memory_is_that_of_the_plan(monkeypatch, device_gb, planned, note):
    monkeypatch.setattr(plan_module, "memory_bytes", lambda device: device_gb * 1e9)
    line, recompute = at_start(
        D24, model_config(D24, 32768), 32, 8, torch.device("cuda"), torch.bfloat16)
    assert line.startswith(f"plan: memory {planned} per rank: weights 4.2 GB, ")
    assert recompute == bool(note) and note in line


def test_a_run_that_fits_by_recomputing_is_not_refused(monkeypatch):
    def check(device_gb):
        monkeypatch.setattr(build, "memory_bytes", lambda device: device_gb * 1e9)
        build.check_memory(D24, 32768, torch.device("cuda"), torch.bfloat16, Ranks(0, 0, 8))

    check(52)  # 59.3 GB are planned without, 44.8 GB with recomputing
    with pytest.raises(UserError, match=r"needs about 44.8 GB"):
        check(40)


def test_the_compiled_model_keeps_less_when_it_recomputes():
    """Widths per token that autograd saves for a second layer, as planned."""
    kept = {}
    for recompute in (False, True):
        for n_layer in (1, 2):
            torch._dynamo.reset()
            model = GPT(GPTConfig(64, 512, n_layer, 2, 2, 64, "L"), attention="sdpa")
            model.init_weights(0)
            compiled = compile_model(TrainingConfig(), model, None, recompute)
            ids, saved = torch.zeros(8, 64, dtype=torch.int64), {}
            keep = functools.partial(record_storage, saved)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                compiled(ids, ids)
            kept[recompute, n_layer] = sum(saved.values()) / (8 * 64 * 64 * 4)
    stored, recomputed = (kept[recompute, 2] - kept[recompute, 1] for recompute in (False, True))
    assert stored - recomputed == pytest.approx(KEPT_PER_LAYER - KEPT_RECOMPUTED, abs=0.2)
    assert stored == pytest.approx(KEPT_PER_LAYER, rel=0.1)  # and norms, many at this width


@pytest.mark.skipif(choose_compute_dtype(CPU)[0] != torch.bfloat16, reason="measured in bf16")
def test_memory_is_within_fifteen_percent_of_the_recorded_peaks():
    with open(ROOT / "dev" / "plan_memory_cpu.csv", newline="", encoding="utf-8") as file:
        measured = {row["shape"]: float(row["measured_peak_mb"]) for row in csv.DictReader(file)}
    assert set(measured) == set(SHAPES)
    for shape, peak_mb in measured.items():
        assert planned_peak_mb(shape) == pytest.approx(peak_mb, rel=0.15), shape


# --- scripts.plan ---------------------------------------------------------------------------------

def test_the_printed_plan_has_memory_step_time_hours_and_cost(capsys):
    flags = ["--depth=24", "--fp8", "--target-param-data-ratio=8"]
    plan_script.main([*flags, "--price-per-gpu-hour=3"])
    printed = capsys.readouterr().out
    assert "72.0 GB of 80.0 GB are usable: fits" in printed and "weights 4.2 GB" in printed
    hours, gpu_hours, cost = map(float, re.search(
        r" ([\d.]+) hours, ([\d.]+) GPU hours, cost ([\d.]+)", printed).groups())
    assert hours == pytest.approx(Estimate(D24, 32768, GPUS["h100"]).train_hours, abs=0.01)
    assert gpu_hours == pytest.approx(8 * hours, abs=0.1) and cost == pytest.approx(
        3 * gpu_hours, abs=0.2)


def test_a_gpu_that_is_not_in_the_list_is_planned_from_memory_and_rate(capsys):
    plan_script.main(["--depth=12", "--gpu-memory-gb=24", "--gpu-tflops=165", "--gpus=1"])
    assert "21.6 GB of 24.0 GB are usable: fits" in capsys.readouterr().out


def test_the_flags_are_those_of_the_training_program(capsys):
    plan_script.main(["--depth=24", "--target-param-data-ratio=8", "--fp8", "--as-flags"])
    assert parse_config(capsys.readouterr().out.split()) == D24


def test_the_ratio_of_lane_b_is_taken_from_its_file(tmp_path, capsys, refusal):
    (tmp_path / "infer.json").write_text(json.dumps(
        {"schema_version": VERSION, "chosen_ratio": 9.0, "chosen_depth": 12}))
    flag = f"--inference-json={tmp_path / 'infer.json'}"
    plan_script.main(["--depth=12", flag, "--as-flags"])
    assert "--target-param-data-ratio=9.0" in capsys.readouterr().out
    assert "is for --depth 12, not 24" in refusal(plan_script.main, ["--depth=24", flag])
    (tmp_path / "infer.json").write_text(json.dumps({"schema_version": 2, "n_tokens": 1}))
    assert "make the file again" in refusal(plan_script.main, ["--depth=12", flag])


@pytest.mark.parametrize(("flags", "message"), [
    (["--gpus=0"], "--gpus 0"), (["--device-batch-size=7"], "--device-batch-size 7"),
    (["--gpu-memory-gb=24"], "--gpu-tflops"), (["--inference-json=no.json"], "no.json"),
    (["--fp8", "--gpu=a100"], "the A100 has no fp8"),
    (["--depth=120", "--gpus=1"], "one row needs"),
])
def test_the_plan_refuses_in_one_line(flags, message, refusal):
    error = refusal(plan_script.main, ["--depth=24", *flags])
    assert message in error and error.count("\n") == 1
