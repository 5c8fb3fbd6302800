"""The training program as a person runs it: end to end, killed, resumed, on two ranks, with every mistake."""

import contextlib
import hashlib
import json
import os
import random
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
from ranks import run_on_ranks

from nanochat import gpt
from nanochat import record as record_module
from nanochat.checkpoint import checkpoint_folder, checkpoint_steps, read_meta
from nanochat.common import json_bytes, runs_dir, write_json
from nanochat.runlog import read_run
from nanochat.segments import segments_of
from scripts import base_train
from scripts.base_train import main, parse_args

pytestmark = pytest.mark.usefixtures("fp32")


def flags(corpus, steps=12, run_id="run", *more):
    return [*TINY_FLAGS, "--dataset", corpus, "--num-iterations", str(steps), "--run-id", run_id, "--model-tag", run_id,
            *more]


def losses(run_id):
    """{step: loss} of a run, and its validations."""
    record = read_run(runs_dir() / run_id)
    return ({e["step"]: e["loss"] for e in record.of("train")}, {e["step"]: e["val_bpb"] for e in record.of("val")})


@contextlib.contextmanager
def started(arguments):
    """The program as a process of its own, its output in `process.log`; killed when the block is left early."""
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, "-m", "scripts.base_train", *arguments], stdout=log, stderr=log,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        process.log = lambda: Path(log.name).read_text()
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def trained_lines(run_id):
    """How many training events the record holds, every segment counted."""
    path = runs_dir() / run_id / "metrics.jsonl"
    return path.read_text().count('"kind": "train"') if path.exists() else 0


def wait_for_lines(run_id, n_lines, process, timeout_sec=120):
    """Until the run's record holds that many training events."""
    deadline = time.monotonic() + timeout_sec
    while trained_lines(run_id) < n_lines:
        assert time.monotonic() < deadline and process.poll() is None, process.log()
        time.sleep(0.005)


def test_a_run_learns_and_leaves_its_record(corpus, capsys):
    assert main([*flags(corpus, 30), "--sample-every", "30", "--position-losses",
                 "--target-metric-threshold", "9.9"]) == 0
    record = read_run(runs_dir() / "run")
    assert record.status == "ok"
    train, val = record.of("train"), record.of("val")
    assert [e["step"] for e in train] == list(range(1, 31))
    assert [e["tokens"] for e in train] == [256 * step for step in range(1, 31)]
    assert [e["step"] for e in val] == [0, 5, 10, 15, 20, 25, 30]
    assert val[-1]["val_bpb"] < val[0]["val_bpb"] - 0.1
    clock = [e["train_time_sec"] for e in train]
    assert clock[10] == 0 < clock[11] and clock == sorted(clock)
    summary = record.summary
    assert summary["min_val_bpb"] == min(e["val_bpb"] for e in val)
    assert summary["time_to_target_sec_measured"] is not None
    assert summary["tokens"] == 30 * 256
    [positions] = record.of("position_losses")
    assert len(positions["nats_by_position"]) == 64 and sum(positions["counts_by_position"]) > 100
    assert len(record.of("sample")) == 2
    assert record.config["n_scaling_params"] > 0 and record.config["dataset_id"]
    assert [e["step"] for e in record.of("checkpoint")] == [30]
    [target] = record.of("target")
    assert target["time_to_target_sec_measured"] == summary["time_to_target_sec_measured"]
    printed = capsys.readouterr().out
    assert "time to val_bpb <= 9.9" in printed and "plan: memory at least " in printed
    assert "val_bpb" in printed and str(runs_dir() / "run") in printed


def test_a_run_stops_at_its_target_with_a_checkpoint(corpus, capsys):
    assert main([*flags(corpus, 30), "--target-metric-threshold", "3.4", "--stop-at-target"]) == 0
    summary = read_run(runs_dir() / "run").summary
    assert (summary["status"], summary["stopped_at_target"]) == ("ok", True)
    assert summary["final_val_bpb"] <= 3.4 and 0 < summary["steps"] < 30 and summary["steps"] % 5 == 0
    assert checkpoint_steps(checkpoint_folder("run")) == [summary["steps"]]
    assert "at its target" in capsys.readouterr().out


def test_the_checkpoint_is_saved_before_the_final_evaluation(corpus):
    main(flags(corpus))
    kinds = [(e["kind"], e["step"]) for e in read_run(runs_dir() / "run").events]
    assert kinds.index(("checkpoint", 12)) < kinds.index(("val", 12))


def test_a_run_killed_at_random_steps_and_resumed_is_the_uninterrupted_one_bit_for_bit(corpus):
    # both in processes with one thread: the order of a CPU's sums depends on the number of threads
    with started(flags(corpus, 24, "whole")) as process:
        assert process.wait(120) == 0, process.log()
    resume = []
    for _ in range(2):
        with started([*flags(corpus, 24, "killed", "--save-every", "3"), *resume]) as process:
            wait_for_lines("killed", trained_lines("killed") + random.randint(4, 10), process)
            process.send_signal(signal.SIGKILL)
        resume = ["--resume-from-step", "latest"]
    with started([*flags(corpus, 24, "killed", "--save-every", "3"), *resume]) as process:
        assert process.wait(120) == 0, process.log()
    assert losses("killed") == losses("whole")
    weights = [torch.load(checkpoint_folder(name) / "model_000024.pt") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_a_checkpoint_and_ends_cleanly(corpus, number):
    with started(flags(corpus, 100_000, "stopped")) as process:
        wait_for_lines("stopped", 3, process)
        process.send_signal(number)
        assert process.wait(60) == 128 + number, process.log()
        assert "Traceback" not in process.log()
    record = read_run(runs_dir() / "stopped")
    assert record.status == "interrupted"
    assert checkpoint_steps(checkpoint_folder("stopped")) == [record.of("train")[-1]["step"]]


def test_a_time_limit_saves_and_ends_as_interrupted(corpus):
    with started(flags(corpus, 100_000, "limited", "--time-limit-minutes", "0.55")) as process:
        assert process.wait(60) == 128 + signal.SIGALRM, process.log()
    record = read_run(runs_dir() / "limited")
    assert record.status == "interrupted"
    assert checkpoint_steps(checkpoint_folder("limited")) == [record.of("train")[-1]["step"]]
    assert record.summary["wall_time_sec"] < 33


def test_the_newest_checkpoints_and_the_best_are_kept(corpus):
    assert main(flags(corpus, 12, "run", "--save-every", "1", "--keep-checkpoints", "2")) == 0
    [best] = [e["step"] for e in read_run(runs_dir() / "run").of("val") if e["val_bpb"] == min(
        losses("run")[1][step] for step in (5, 10))]
    assert checkpoint_steps(checkpoint_folder("run")) == sorted({best, 11, 12})


def test_a_run_saves_by_the_minute(corpus):
    assert main(flags(corpus, 12, "run", "--save-minutes", "0.000001")) == 0
    assert [e["saved_step"] for e in read_run(runs_dir() / "run").of("checkpoint")] == list(range(1, 13))


def poison(monkeypatch, is_poisoned):
    """Make the training loss NaN wherever is_poisoned(number of the micro-batch, from 1) says so."""
    forward, calls = gpt.GPT.forward, []

    def poisoned(self, idx, targets=None, *rest, **options):
        loss = forward(self, idx, targets, *rest, **options)
        if self.training and targets is not None:
            calls.append(None)
            return loss * float("nan") if is_poisoned(len(calls)) else loss
        return loss

    monkeypatch.setattr(gpt.GPT, "forward", poisoned)


@pytest.mark.parametrize("rollbacks", [0, 2])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_status(corpus, monkeypatch, refusal, rollbacks):
    poison(monkeypatch, lambda n_batches: n_batches > 8)
    policy = ["--on-nan", "rollback", "--max-rollbacks", str(rollbacks)] if rollbacks else []
    assert "not finite" in refusal(main, flags(corpus, 30, "nan", "--save-every", "2", *policy))
    record = read_run(runs_dir() / "nan")
    assert record.status == "nan" and len(record.of("resume")) == rollbacks
    assert record.of("train")[-1]["loss"] is None and record.of("train")[-1]["nonfinite"] == ["loss"]
    newest = checkpoint_steps(checkpoint_folder("nan"))[-1]
    assert newest < record.of("train")[-1]["step"]


def test_a_run_that_rolls_back_is_the_one_that_was_rolled_back_by_hand_bit_for_bit(corpus, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        poison(patch, lambda n_batches: n_batches == 14)  # the second of step 7
        assert main(flags(corpus, 12, "auto", "--save-every", "4", "--on-nan", "rollback")) == 0
    assert "back to the checkpoint of step 4, on with other text (rollback 1 of 3)" in capsys.readouterr().out
    # by hand: the checkpoint of step 4, with the position in the data after 7 steps
    main(flags(corpus, 12, "hand", "--save-every", "1"))
    folder = checkpoint_folder("hand")
    meta = read_meta(folder, 4)
    meta["loop_state"]["loader"] = read_meta(folder, 7)["loop_state"]["loader"]
    write_json(folder / "meta_000004.json", {**meta, "meta_sha256": hashlib.sha256(json_bytes(meta)).hexdigest()})
    plain = losses("hand")
    assert main([*flags(corpus, 12, "hand"), "--resume-from-step", "4"]) == 0
    assert losses("auto") == losses("hand") != plain
    weights = [torch.load(checkpoint_folder(name) / "model_000012.pt") for name in ("auto", "hand")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    first, second = segments_of(read_run(runs_dir() / "auto"))
    assert (second["first_step"], second["rollback"]) == (4, "loss not finite at step 7")
    assert second["flags"] == first["flags"] and second["device"] == first["device"]


def roll_back_on_a_rank(rank, world_size, arguments):
    """The training program on one of several ranks; the second one's loss is NaN in step 7."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_train, "stop_ranks", lambda: None)
        if rank == 1:
            poison(patch, lambda n_batches: n_batches == 7)
        return main(arguments)


def test_all_ranks_roll_back_when_the_loss_of_one_is_not_finite(corpus, monkeypatch):
    rollback = ["--save-every", "4", "--on-nan", "rollback", "--keep-checkpoints", "1"]
    with monkeypatch.context() as patch:
        poison(patch, lambda n_batches: n_batches == 14)
        assert main(flags(corpus, 12, "one", *rollback)) == 0
    assert run_on_ranks(2, roll_back_on_a_rank, flags(corpus, 12, "two", *rollback)) == [0, 0]
    (one, _), (two, _) = losses("one"), losses("two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert checkpoint_steps(checkpoint_folder("two"))[-1] == 12


def test_two_ranks_give_the_losses_of_one_with_twice_the_accumulation(corpus):
    assert main(flags(corpus, 20, "one")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
                "-m", "scripts.base_train"]
    done = subprocess.run([*launcher, *flags(corpus, 20, "two")], capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    (one, one_val), (two, two_val) = losses("one"), losses("two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert list(two_val.values()) == pytest.approx(list(one_val.values()), rel=1e-5)
    shards = [torch.load(checkpoint_folder("two") / f"optim_000020_rank{r}.pt") for r in range(2)]
    whole = torch.load(checkpoint_folder("one") / "optim_000020_rank0.pt")
    sizes = [sum(v.numel() for s in state["state"].values() for v in s.values() if torch.is_tensor(v))
             for state in (whole, *shards)]
    assert all(0.45 < size / sizes[0] < 0.6 for size in sizes[1:])


def test_the_flags_are_frozen():
    expected = json.loads((Path(__file__).parent / "golden" / "base_train_flags.json").read_text())
    assert {name: repr(value) for name, value in vars(parse_args([])).items()} == expected


@pytest.mark.parametrize(("dataset", "rule"), [("stdlib", "drop"), ("climbmix", "drop"), ("my_folder", "carry")])
def test_all_of_ones_own_text_is_trained_on_unless_asked_otherwise(dataset, rule):
    assert parse_args(["--dataset", dataset]).crop == rule
    assert parse_args(["--dataset", dataset, "--crop", "drop"]).crop == "drop"


@pytest.mark.parametrize(("change", "words"), [
    (["--depth", "0"], "--depth"),
    (["--head-dim", "15"], "--head-dim"),
    (["--total-batch-size", "200"], "--total-batch-size"),
    (["--device-batch-size", "0"], "--device-batch-size"),
    (["--window-pattern", "SQ"], "--window-pattern"),
    (["--device-type", "tpu"], "--device-type"),
    (["--tokenizer-dir", "nowhere"], "nowhere"),
    (["--dataset", "nowhere"], "nowhere"),
    (["--run-id", "a/b"], "--run-id 'a/b' cannot name a folder"),
    (["--resume-from-step", "latest"], "no checkpoint"),
    (["--target-metric-threshold", "-1"], "--target-metric-threshold"),
    (["--target-metric-name", "loss", "--target-metric-threshold", "1"], "--target-metric-name"),
    (["--crop", "keep"], "--crop keep must be carry or drop"),
    (["--save-minutes", "5", "--save-every", "0"], "leave one out"),
    (["--on-nan", "rollback"], "--save-every or --save-minutes"),
    (["--keep-checkpoints", "-1"], "--keep-checkpoints"),
    (["--stop-at-target"], "--target-metric-threshold"),
    (["--num-iterations", "-1", "--target-param-data-ratio", "-1"], "--target-param-data-ratio"),
])
def test_a_mistake_is_one_line_with_exit_code_2_and_leaves_nothing(corpus, refusal, change, words):
    message = refusal(main, [*flags(corpus), *change]).splitlines()[-1]
    assert message.startswith("error: ") and words in message
    assert not list(runs_dir().glob("*/config.json")) if runs_dir().exists() else True


def test_a_taken_run_id_is_refused_and_the_old_record_stays(corpus, refusal):
    main(flags(corpus, 2))
    before = (runs_dir() / "run" / "metrics.jsonl").read_bytes()
    assert "taken" in refusal(main, flags(corpus, 2))
    assert (runs_dir() / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [["--seed", "7"], ["--depth", "3"], ["--num-iterations", "13"],
                                    ["--total-batch-size", "512"], ["--crop", "drop"]], ids=str)
def test_another_run_is_not_resumed_whatever_is_allowed(corpus, refusal, change):
    main(flags(corpus, 4))
    resume = [*flags(corpus, 4), "--resume-from-step", "4", "--allow-changed", *change]
    assert "it is of another run: " in refusal(main, resume)


def test_what_changes_the_numbers_is_named_and_refused_unless_allowed_and_then_recorded(corpus, capsys, monkeypatch,
                                                                                             refusal):
    main(flags(corpus, 6, "run", "--save-every", "2"))
    resume = [*flags(corpus, 6), "--resume-from-step", "4", "--warmup-steps", "3", "--device-batch-size", "4",
              "--chunked-ce"]
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setattr(record_module, "versions", lambda: {"torch": "9.9"})
    monkeypatch.setattr(record_module, "git_commit", lambda: ("f" * 40, False))
    [line] = [line for line in refusal(main, resume).splitlines() if line.startswith("error: ")]
    assert "compute_dtype was float32, is bfloat16; " in line and f"torch was {torch.__version__}, is 9.9; " in line
    assert "--device-batch-size was 2, is 4; " in line and "--chunked-ce was False, is True; " in line
    assert "--warmup-steps was 40, is 3; " in line and "--allow-changed" in line and "commit" not in line
    assert len(segments_of(read_run(runs_dir() / "run"))) == 1
    assert main([*resume, "--allow-changed"]) == 0
    assert "is of commit" in capsys.readouterr().out
    first, second = segments_of(read_run(runs_dir() / "run"))
    assert (first["first_step"], second["first_step"]) == (0, 4)
    assert (first["device"]["compute_dtype"], second["device"]["compute_dtype"]) == ("float32", "bfloat16")
    assert second["git_commit"] == "f" * 40 and second["device"]["host"] and second["device"]["world_size"] == 1
    assert ["--warmup-steps", 40, 3] in second["changed"] and second["flags"]["chunked_ce"] is True


def test_what_changes_no_numbers_goes_through(corpus):
    main(flags(corpus, 6, "run", "--save-every", "2"))
    assert main([*flags(corpus, 6), "--resume-from-step", "4", "--save-every", "3", "--eval-every", "2",
                 "--sample-every", "3"]) == 0
    assert segments_of(read_run(runs_dir() / "run"))[1]["changed"] == []


def test_a_checkpoint_of_an_earlier_version_has_the_defaults_of_flags_that_came_later(corpus, refusal):
    main(flags(corpus, 4))
    meta = read_meta(checkpoint_folder("run"), 4)
    del meta["segment"], meta["user_config"]["fp8"], meta["user_config"]["chunked_ce"], meta["user_config"]["crop"]
    write_json(checkpoint_folder("run") / "meta_000004.json",
               {**meta, "meta_sha256": hashlib.sha256(json_bytes(meta)).hexdigest()})
    resume = [*flags(corpus, 4), "--resume-from-step", "4", "--crop", "drop", "--chunked-ce"]
    line = refusal(main, resume).splitlines()[-1]
    assert "--chunked-ce was False, is True; resume" in line and "--fp8" not in line


def test_resuming_a_step_that_is_not_there_names_the_newest(corpus, refusal):
    main(flags(corpus, 4))
    error = refusal(main, [*flags(corpus, 4), "--resume-from-step", "3"])
    assert "newest usable checkpoint is step 4" in error


def test_another_runs_checkpoints_are_set_aside_not_mixed(corpus):
    main(flags(corpus, 4, "first", "--model-tag", "shared"))
    main(flags(corpus, 2, "second", "--model-tag", "shared"))
    assert checkpoint_steps(checkpoint_folder("shared")) == [2]
    [aside] = checkpoint_folder("shared").parent.glob("shared.before-*")
    assert checkpoint_steps(aside) == [4]


def test_a_run_that_goes_on_from_an_earlier_step_sets_the_later_ones_aside(corpus):
    """Killed before it has saved anew, its newest checkpoint must not be one of the course it left."""
    main(flags(corpus, 6, "run", "--save-every", "2"))
    folder = checkpoint_folder("run")
    assert main([*flags(corpus, 6, "run"), "--resume-from-step", "2", "--save-every", "0"]) == 0
    assert checkpoint_steps(folder) == [2]
    [aside] = folder.parent.glob("run.before-*")
    assert checkpoint_steps(aside) == [4, 6] and not list(folder.glob("*_000004*"))


def test_wandb_offline_records_without_a_network(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(flags(corpus, 3, "logged", "--run", "name")) == 0
    assert list((tmp_path / "wandb").glob("offline-run-*"))


# --- two writers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("change", "words"), [
    (["--run-id", "other"], "--model-tag"), (["--model-tag", "other", "--resume-from-step", "latest"], "no checkpoint"),
    (["--resume-from-step", "latest"], "--run-id"), ([], "taken")])
def test_a_second_writer_is_refused_with_the_owners_name(corpus, refusal, change, words):
    with started(flags(corpus, 100_000, "run", "--save-every", "2")) as process:
        wait_for_lines("run", 5, process)
        line = refusal(main, [*flags(corpus, 100_000), *change]).splitlines()[-1]
        assert words in line
        assert words.startswith("--") == (f"run run (pid {process.pid}" in line)
        before = trained_lines("run")
        wait_for_lines("run", before + 2, process)  # it goes on undisturbed
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(flags(corpus, 2, "new", "--model-tag", "run")) == 0  # what the killed process left is no lock


def test_a_run_whose_folder_was_taken_over_saves_nothing_more(corpus, base_dir, capsys):
    with started(flags(corpus, 100_000, "run", "--save-every", "2")) as process:
        wait_for_lines("run", 5, process)
        lock = base_dir / "locks" / "checkpoints.run"
        lock.unlink()
        lock.write_text('{"owner": "thief", "host": "elsewhere", "pid": 1}')
        assert process.wait(60) == 2
        assert "run thief (pid 1 on elsewhere)" in process.log()


# --- the console -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("output", ["| head -n 1", "> /dev/full", "2>&- >&-"])
def test_a_console_that_goes_away_does_not_end_the_run(corpus, output):
    words = shlex.join([sys.executable, "-m", "scripts.base_train", *flags(corpus, 6), "--sample-every", "6"])
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {words} {output}"], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read_run(runs_dir() / "run").status == "ok"
