"""The training program as a person runs it: end to end, killed, resumed, with every mistake."""

import contextlib
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from corpus import TINY_FLAGS

from nanochat import build
from nanochat.checkpoint import checkpoint_folder, checkpoint_steps
from nanochat.common import base_dir, runs_dir
from nanochat.config import model_config, parse_config, run_horizon
from nanochat.runlog import read_run
from scripts import runs
from scripts.base_train import main

pytestmark = pytest.mark.usefixtures("fp32")
PROGRAM = [sys.executable, "-m", "scripts.base_train"]


def flags(corpus, steps=12, run_id="run", *more):
    return [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", str(steps), "--run-id", run_id,
            "--model-tag", run_id, *more]


def losses(run_id):
    """({step: loss}, {step: val_bpb}) of a run."""
    record = read_run(runs_dir() / run_id)
    return ({event["step"]: event["loss"] for event in record.of("train")},
            {event["step"]: event["val_bpb"] for event in record.of("val")})


@contextlib.contextmanager
def started(arguments):
    """The program as a process; killed when the block ends. `process.log()` is its output."""
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen([*PROGRAM, *arguments], stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        process.log = lambda: Path(log.name).read_text()
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def trained_lines(run_id):
    """Number of training events in the record, including repeated steps."""
    path = runs_dir() / run_id / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def wait_for_lines(run_id, n_lines, process, timeout_sec=120):
    """Wait until the record has that many training events."""
    deadline = time.monotonic() + timeout_sec
    while trained_lines(run_id) < n_lines:
        assert time.monotonic() < deadline and process.poll() is None, process.log()
        time.sleep(0.005)


def test_a_run_learns_and_leaves_its_record(corpus, capsys):
    assert main(flags(corpus, 30, "run", "--sample-every", "30",
                      "--target-metric-threshold", "9.9")) == 0
    record = read_run(runs_dir() / "run")
    assert record.status == "ok"
    train, val = record.of("train"), record.of("val")
    assert [event["step"] for event in train] == list(range(1, 31))
    assert [event["step"] for event in val] == [0, 5, 10, 15, 20, 25, 30]
    assert val[-1]["val_bpb"] < val[0]["val_bpb"] - 0.1
    clock = [event["train_time_sec"] for event in train]
    assert clock[10] == 0 < clock[11] and clock == sorted(clock)

    summary = record.summary
    assert summary["min_val_bpb"] == min(event["val_bpb"] for event in val)
    assert summary["time_to_target_sec_measured"] is not None
    assert summary["tokens"] == 30 * 256
    assert len(record.of("sample")) == 2
    assert record.config["n_scaling_params"] > 0 and record.config["dataset_id"]

    printed = capsys.readouterr().out
    assert "plan: memory at least " in printed
    assert printed.splitlines()[-1].startswith("target 9.9 reached by val_bpb ")
    assert str(runs_dir() / "run") in printed


def test_a_run_killed_at_random_steps_and_resumed_is_the_uninterrupted_one_bit_for_bit(corpus):
    # Processes with one thread each: the order of a CPU's sums depends on the number of threads.
    with started(flags(corpus, 24, "uninterrupted")) as process:
        assert process.wait(120) == 0, process.log()
    resume = []
    for _ in range(2):
        with started([*flags(corpus, 24, "killed", "--save-every", "3"), *resume]) as process:
            n_lines = trained_lines("killed") + random.randint(4, 10)
            wait_for_lines("killed", n_lines, process)
            process.send_signal(signal.SIGKILL)
        resume = ["--resume-from-step", "latest"]
    with started([*flags(corpus, 24, "killed", "--save-every", "3"), *resume]) as process:
        assert process.wait(120) == 0, process.log()
        assert "resumed at step" in process.log()
    assert losses("killed") == losses("uninterrupted")
    one, other = (torch.load(checkpoint_folder(name) / "model_000024.pt")
                  for name in ("uninterrupted", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_names_and_defaults_of_the_flags_are_frozen():
    golden = Path(__file__).parent / "golden" / "base_train_flags.json"
    expected = json.loads(golden.read_text())
    assert {name: repr(value) for name, value in vars(parse_config([])).items()} == expected


@pytest.mark.parametrize(("dataset", "rule"), [
    ("stdlib", "carry"), ("climbmix", "drop"), ("my_folder", "carry")])
def test_only_the_remote_datasets_keep_upstreams_crop_rule(dataset, rule):
    assert parse_config(["--dataset", dataset]).crop == rule
    assert parse_config(["--dataset", dataset, "--crop", "drop"]).crop == "drop"


@pytest.mark.parametrize(("change", "words"), [
    (["--depth", "0"], "--depth"),
    (["--head-dim", "15"], "--head-dim"),
    (["--total-batch-size", "200"], "--total-batch-size"),
    (["--total-batch-size", "0"], "--total-batch-size"),
    (["--device-batch-size", "0"], "--device-batch-size"),
    (["--window-pattern", "SQ"], "--window-pattern"),
    (["--device-type", "tpu"], "--device-type"),
    (["--tokenizer-dir", "nowhere"], "nowhere"),
    (["--run-id", "a/b"], "--run-id 'a/b' cannot name a folder"),
    (["--resume-from-step", "latest"], "no checkpoint"),
    (["--target-metric-threshold", "-1"], "--target-metric-threshold"),
    (["--target-metric-name", "loss", "--target-metric-threshold", "1"], "--target-metric-name"),
    (["--crop", "keep"], "--crop keep must be carry or drop"),
    (["--save-minutes", "5", "--save-every", "0"], "leave one out"),
    (["--keep-checkpoints", "-1"], "--keep-checkpoints"),
    (["--stop-at-target"], "--target-metric-threshold"),
    (["--num-iterations", "-1", "--target-param-data-ratio", "-1"], "--target-param-data-ratio"),
    (["--num-iterations", "0"], "--num-iterations"),
    (["--target-flops", "inf"], "--target-flops"),
    (["--target-param-data-ratio", "1e308"], "--target-param-data-ratio"),
    (["--matrix-lr", "nan"], "--matrix-lr"),
    (["--warmdown-ratio", "1.5"], "--warmdown-ratio"),
])
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(corpus, refusal, change, words):
    message = refusal(main, [*flags(corpus), *change]).splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert not list(runs_dir().glob("*/config.json"))


def test_an_unknown_flag_is_two_lines_with_the_flag_that_was_meant(refusal):
    assert refusal(main, ["--dept", "4"]).splitlines() == [
        "error: unknown flag --dept; did you mean --depth?", "run with --help to see all flags"]
    assert refusal(main, ["--zzzzzzzz=4"]).startswith("error: unknown flag --zzzzzzzz\n")
    assert "--depth" in refusal(main, ["--depth", "four"]).splitlines()[0]


def test_a_missed_target_is_the_last_line_and_in_the_list(corpus, capsys):
    main(flags(corpus, 2, "run", "--target-metric-threshold", "0.5", "--quiet"))
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert last_line.startswith("target 0.5 not reached by val_bpb")
    runs.main([])
    assert "0.5 not reached" in capsys.readouterr().out


# --- sizes ----------------------------------------------------------------------------------------

def test_a_run_that_exceeds_the_memory_is_refused_with_flags_that_fit(
        corpus, monkeypatch, refusal):
    large = flags(corpus, 2, "run", "--device-batch-size", "4", "--depth", "8")
    monkeypatch.setattr(build, "memory_bytes", lambda device: 50e6)
    line = refusal(main, large).splitlines()[-1]
    needed, rows, depth = re.fullmatch(
        r"error: the run needs about (\d+) MB of memory per rank, and 50 MB are there; give "
        r"--preset laptop or --device-batch-size (\d) or --depth (\d), or start it nevertheless "
        r"with --allow-memory", line).groups()
    assert int(needed) > 55 and not (base_dir() / "tokens").exists()
    refusal(main, [*large, "--depth", str(int(depth) + 1)])
    for number, change in enumerate((["--device-batch-size", rows], ["--depth", depth],
                                     ["--allow-memory"])):
        assert main([*large, *change, "--run-id", str(number)]) == 0


def test_a_horizon_that_repeats_the_text_too_often_needs_a_flag(corpus, monkeypatch, refusal):
    long = flags(corpus, 12, "run", "--save-every", "6")
    monkeypatch.setattr(build, "MAX_PASSES", 0.1)
    line = refusal(main, long).splitlines()[-1]
    pattern = r"3,072 tokens reads the ([\d,]+) training tokens about .* --num-iterations (\d+) or "
    tokens, steps = re.search(pattern, line).groups()
    assert int(steps) == int(tokens.replace(",", "")) // 2560 and "--allow-repeats" in line
    assert main([*long, "--allow-repeats"]) == 0
    assert main([*long, "--resume-from-step", "6"]) == 0  # it was accepted before


def test_the_preset_for_a_laptop_sets_defaults(refusal):
    config = parse_config(["--preset", "laptop", "--depth", "6", "--num-iterations", "9"])
    assert (config.depth, config.max_seq_len, config.matrix_lr) == (6, 256, 0.32)
    horizons = [run_horizon(config, model_config(config, 8192)).num_iterations
                for config in (config, parse_config(["--preset", "laptop"]))]
    assert horizons == [9, 512]
    assert refusal(parse_config, ["--preset", "lap"]).count("\n") == 2


def test_a_taken_run_id_is_refused_and_the_old_record_stays(corpus, refusal):
    main(flags(corpus, 2))
    before = (runs_dir() / "run" / "metrics.jsonl").read_bytes()
    assert "taken" in refusal(main, flags(corpus, 2))
    assert (runs_dir() / "run" / "metrics.jsonl").read_bytes() == before


# --- resume ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    ["--seed", "7"], ["--depth", "3"], ["--num-iterations", "3"], ["--total-batch-size", "512"],
    ["--crop", "drop"]], ids=str)
def test_another_run_is_not_resumed_even_if_changes_are_allowed(corpus, refusal, change):
    main(flags(corpus, 4))
    resume = [*flags(corpus, 4), "--resume-from-step", "4", "--allow-changed", *change]
    assert "it belongs to another run: " in refusal(main, resume)


def test_what_changes_the_numbers_is_refused_unless_allowed_and_then_recorded(
        corpus, capsys, monkeypatch, refusal):
    main(flags(corpus, 6, "run", "--save-every", "2"))
    resume = [*flags(corpus, 6), "--resume-from-step", "4", "--warmup-steps", "3",
              "--device-batch-size", "4", "--chunked-ce"]
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setattr(build, "versions", lambda: {"torch": "9.9"})
    monkeypatch.setattr(build, "git_commit", lambda: ("f" * 40, False))
    message = refusal(main, resume)
    [line] = [line for line in message.splitlines() if line.startswith("error: ")]
    for words in ("compute_dtype was float32, is bfloat16", f"torch was {torch.__version__}, is 9",
                  "--device-batch-size was 2, is 4", "--chunked-ce was False, is True",
                  "--warmup-steps was 40, is 3", "--allow-changed"):
        assert words in line
    assert not read_run(runs_dir() / "run").of("resume")

    assert main([*resume, "--allow-changed"]) == 0
    assert "--warmup-steps was 40, is 3" in capsys.readouterr().out
    [resumed] = read_run(runs_dir() / "run").of("resume")
    assert resumed["step"] == 4 and resumed["device"]["compute_dtype"] == "bfloat16"
    assert resumed["git_commit"] == "f" * 40 and resumed["flags"]["chunked_ce"] is True
    assert ["--warmup-steps", 40, 3] in resumed["changed"]


def test_what_changes_no_numbers_may_change(corpus, refusal):
    main(flags(corpus, 6, "run", "--save-every", "2"))
    error = refusal(main, [*flags(corpus, 6), "--resume-from-step", "3"])
    assert "newest valid checkpoint is step 6" in error
    assert main([*flags(corpus, 6), "--resume-from-step", "4", "--save-every", "3",
                 "--eval-every", "2", "--sample-every", "3"]) == 0
    assert read_run(runs_dir() / "run").of("resume")[0]["changed"] == []


def test_resume_auto_begins_anew_where_there_is_no_checkpoint(corpus, monkeypatch):
    arguments = [*flags(corpus, 6), "--resume-from-step", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr("nanochat.train.evaluate_split", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    assert read_run(runs_dir() / "run").status == "error"
    assert main(arguments) == 0
    assert [event["step"] for event in read_run(runs_dir() / "run").of("train")] == [*range(1, 7)]


def test_checkpoints_of_another_run_and_of_later_steps_are_moved_away(corpus):
    main(flags(corpus, 4, "first", "--model-tag", "shared"))
    main(flags(corpus, 6, "second", "--model-tag", "shared", "--save-every", "2"))
    folder = checkpoint_folder("shared")
    assert checkpoint_steps(folder) == [2, 4, 6]
    main(flags(corpus, 6, "second", "--model-tag", "shared", "--resume-from-step", "2",
               "--save-every", "0"))
    assert checkpoint_steps(folder) == [2]
    aside = [checkpoint_steps(path) for path in sorted(folder.parent.glob("shared.before-*"))]
    assert aside == [[4], [4, 6]]


# --- two writers, the console, wandb --------------------------------------------------------------

@pytest.mark.parametrize(("change", "words"), [
    (["--run-id", "other"], "--model-tag"),
    (["--model-tag", "other", "--resume-from-step", "latest"], "no checkpoint"),
    (["--resume-from-step", "latest"], "--run-id")])
def test_a_second_writer_is_refused_with_the_owners_name(corpus, refusal, change, words):
    endless = flags(corpus, 100_000, "run", "--save-every", "2", "--allow-repeats")
    with started(endless) as process:
        wait_for_lines("run", 5, process)
        line = refusal(main, [*endless, *change]).splitlines()[-1]
        assert words in line
        assert words.startswith("--") == (f"pid {process.pid}" in line)
        wait_for_lines("run", trained_lines("run") + 2, process)  # it continues undisturbed
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(flags(corpus, 2, "new", "--model-tag", "run")) == 0  # the lock died with it


@pytest.mark.parametrize("output", ["| head -n 1", "> /dev/full", "2>&- >&-"])
def test_a_console_that_disappears_does_not_end_the_run(corpus, output):
    words = shlex.join([*PROGRAM, *flags(corpus, 6), "--sample-every", "6"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} {output}"], timeout=120,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read_run(runs_dir() / "run").status == "ok"


def test_wandb_offline_records_without_a_network(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(flags(corpus, 3, "logged", "--run", "name")) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_training_needs_no_triton(corpus):
    """macOS, ARM and machines without a GPU lack it. Importing None fails as if it were missing."""
    program = ("import sys; sys.modules['triton'] = None; from scripts.base_train import main; "
               "main(sys.argv[1:])")
    subprocess.run([sys.executable, "-c", program, *flags(corpus, 2)], timeout=300, check=True,
                   env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)})
    assert read_run(runs_dir() / "run").status == "ok"
