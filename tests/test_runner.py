"""The runner, with a small stand-in for base_train that writes true run records."""

import dataclasses
import os
import random
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from nanochat.common import QUIET, UserError, runs_dir
from nanochat.experiments.gates import judge_all
from nanochat.experiments.ledger import ExperimentRow, read_experiments
from nanochat.experiments.probe import GRAPH_BREAK, Probe, probe_candidates, read_probe
from nanochat.experiments.profiles import CANDIDATES, PROFILES, Profile, candidate_flags, candidate_name, find_profile
from nanochat.experiments.runner import (
    Experiment,
    finished_runs,
    plan,
    run_experiment,
    threshold_from,
    threshold_in_use,
    training_command,
)
from nanochat.experiments.table import experiment_table

# A stand-in for scripts.base_train: parses the flags it needs and writes a record as the real one does.
FAKE_TRAIN = textwrap.dedent("""
    import argparse, os, sys, time
    from nanochat.common import runs_dir
    from nanochat.runlog import RunLog
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("run-id", "dataset"):
        parser.add_argument("--" + name)
    for name in ("depth", "seed"):
        parser.add_argument("--" + name, type=int)
    parser.add_argument("--pause-sec", type=float, default=0.0)
    parser.add_argument("--fate", default="ok")
    parser.add_argument("--num-iterations", type=int, default=4)
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--resume-from-step", type=int, default=0)
    parser.add_argument("--resume-error", type=float, default=0.0)
    parser.add_argument("--target-metric-threshold", type=float)
    for name in ("no-compile", "fused-rmsnorm", "chunked-ce"):
        parser.add_argument("--" + name, action="store_true")
    args, _ = parser.parse_known_args()
    if args.fate == "refused":
        print("some output\\nerror: --depth 4 cannot be; use 8", file=sys.stderr)
        sys.exit(2)
    last, first = args.num_iterations, args.resume_from_step
    if first and args.fate == "cannot load":
        sys.exit("error: the checkpoint cannot be loaded")
    if "graph_breaks" in os.environ.get("TORCH_LOGS", ""):
        print("V [0/0] Graph break in user code at model.py:1" if args.fate == "breaks" else "compiled")
    if first:
        log = RunLog.resume(runs_dir(), args.run_id, first)
    else:
        log = RunLog.create(runs_dir(), args.run_id, {
            "flags": vars(args), "dataset_id": args.dataset + "-1", "git_commit": "c" * 40, "num_iterations": last,
            "device": {"type": "cpu", "name": "CPU x2", "world_size": 1}})
    for step in range(first + 1, last + 1):
        time.sleep(args.pause_sec / 4)
        loss = 5.0 - step / last + (args.resume_error if first else 0.0)
        log.event("train", step=step, tokens=step * 10, loss=loss, dt_ms=1.0, train_time_sec=step * 0.1)
        if args.fate == "crash" and step == 2 or args.fate == "crash after a resume" and step == 15 and first:
            os._exit(1)
        if args.save_every and step % args.save_every == 0:
            folder = runs_dir().parent / "base_checkpoints" / args.run_id
            folder.mkdir(parents=True, exist_ok=True)
            log.event("checkpoint", step=step, path=str(folder))
    status = args.fate if args.fate in ("ok", "nan", "interrupted") else "ok"
    log.finish(status=status, tokens=40, min_val_bpb=1.0 + args.seed / 1000, tok_per_sec_median=100.0,
               dt_median_ms=1.0, wall_time_sec=0.4, time_to_target_sec_measured=0.3)
""")
PROFILE = Profile("a stand-in", 4, "stdlib", "--num-iterations 4")


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    return lambda flags: [sys.executable, str(script), *flags]


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "experiments.csv"


def experiment(name="matrix", candidates=("baseline", "both"), seeds=(0, 1), depths=(4,), **fields):
    return Experiment(name, PROFILE, {c: CANDIDATES[c] for c in candidates}, seeds, depths, "val_bpb", 1.2, **fields)


def of_candidates(**flags):
    return Experiment("matrix", PROFILE, flags, (0,), (4,))


def run(asked, ledger, fake, lines=None):
    return run_experiment(asked, ledger, runs_dir(), fake, report=(lines if lines is not None else []).append)


def test_candidates_alternate_under_identical_seeds():
    planned = plan(experiment(seeds=(3, 5), depths=(2, 4)))
    assert [(r.depth, r.seed, r.candidate_flags) for r in planned] == [
        (depth, seed, CANDIDATES[c]) for depth in (2, 4) for seed in (3, 5) for c in ("baseline", "both")]
    assert len({r.run_id for r in planned}) == 8


def test_one_row_each_with_the_runs_figures(ledger, fake):
    lines = []
    assert run(experiment(), ledger, fake, lines) == 4
    rows = read_experiments(ledger)
    assert [r.run_id for r in rows] == [f"matrix.{c}.d4.s{s}" for s in (0, 1) for c in ("baseline", "both")]
    second = dataclasses.asdict(rows[1])
    assert second | {"timestamp": "now"} == dataclasses.asdict(ExperimentRow(
        timestamp="now", git_commit="c" * 40, experiment_name="matrix", seed=0, depth=4,
        target_metric_name="val_bpb", target_metric_threshold=1.2, time_to_target_sec_measured=0.3,
        time_to_target_sec_extrapolated=None, tok_per_sec_median=100.0, dt_median_ms=1.0, wall_time_sec=0.4,
        min_val_bpb=1.0, status="ok", candidate_flags="--fused-rmsnorm --chunked-ce", dataset_id="stdlib-1",
        total_tokens=40, device="CPU x2", peak_memory_mib=None, run_id="matrix.both.d4.s0"))
    assert lines[0] == "[1/4] matrix.baseline.d4.s0: val_bpb 1.00000, time to target 0.3 s, 100 tokens/s"


def test_finished_runs_are_skipped(ledger, fake):
    run(experiment(seeds=(0,)), ledger, fake)
    before = ledger.read_bytes()
    assert run(experiment(seeds=(0,)), ledger, fake) == 0 and ledger.read_bytes() == before
    assert run(experiment(seeds=(0, 1)), ledger, fake) == 2 and ledger.read_bytes().startswith(before)


def test_a_run_that_finished_before_its_row_was_written_is_not_run_again(ledger, fake):
    run(experiment(), ledger, fake)
    kept = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(kept[:-1]))
    assert run(experiment(), ledger, fake) == 0
    assert len(read_experiments(ledger)) == 4


def test_a_crashed_run_is_a_failed_row_and_the_others_go_on(ledger, fake):
    asked = experiment(candidates=("baseline",), seeds=(0, 1))
    run_experiment(asked, ledger, runs_dir(),
                   lambda flags: fake([*flags, "--fate", "crash" if "--seed=0" in flags else "ok"]),
                   report=lambda line: None)
    rows = read_experiments(ledger)
    assert [r.status for r in rows] == ["failed", "ok"] and rows[0].min_val_bpb is None


def test_a_nan_run_keeps_its_status(ledger, fake):
    run(experiment(candidates=("baseline",), seeds=(0,), extra_flags=("--fate", "nan")), ledger, fake)
    assert [r.status for r in read_experiments(ledger)] == ["nan"]


def test_a_refused_start_stops_the_experiment_with_the_trainings_reason(ledger, fake):
    with pytest.raises(UserError, match="did not start: error: --depth 4 cannot be; use 8"):
        run(experiment(extra_flags=("--fate", "refused")), ledger, fake)
    assert not ledger.exists()


def test_an_interrupted_training_gets_no_row_and_starts_again(ledger, fake):
    with pytest.raises(UserError, match="stopped by a signal"):
        run(experiment(seeds=(0,), extra_flags=("--fate", "interrupted")), ledger, fake)
    assert not ledger.exists()
    assert run(experiment(seeds=(0,)), ledger, fake) == 2


def driver(tmp_path, ledger):
    """A process that runs the whole matrix; its group is its own, so that a kill reaches nobody else."""
    code = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_runner import experiment
        from nanochat.common import runs_dir
        from nanochat.experiments.runner import run_experiment
        asked = experiment(seeds=(0, 1), extra_flags=("--pause-sec", "0.6"))
        run_experiment(asked, {str(ledger)!r}, runs_dir(),
                       lambda flags: [sys.executable, {str(tmp_path / "fake_train.py")!r}, *flags])
    """)
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, QUIET: "1"})


def training_since(time_unix_sec):
    """Whether a training that began after that moment is under way."""
    return any(config.stat().st_mtime > time_unix_sec and not (config.parent / "summary.json").exists()
               for config in runs_dir().glob("*/config.json"))


def wait_until(condition, timeout_sec=30):
    deadline = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_a_matrix_killed_five_times_ends_with_the_rows_of_an_uninterrupted_one(tmp_path, ledger, fake, monkeypatch):
    """SIGKILL to the runner alone (its training lives on) or to both, at random moments of a training."""
    rng = random.Random(7)
    for kill in rng.sample([os.kill, os.killpg] * 3, 5):
        started, process = time.time(), driver(tmp_path, ledger)
        wait_until(lambda since=started: training_since(since))
        time.sleep(rng.uniform(0, 0.4))
        assert process.poll() is None, "the matrix was over before the kill: the test would show nothing"
        kill(process.pid, signal.SIGKILL)
        process.communicate()
    last = driver(tmp_path, ledger)
    assert last.communicate(timeout=60)[1] == "" and last.returncode == 0

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "other"))
    straight = tmp_path / "straight.csv"
    run(experiment(seeds=(0, 1)), straight, fake)
    rows, wanted = (
        [dataclasses.replace(row, timestamp="") for row in read_experiments(path)] for path in (ledger, straight))
    assert rows == wanted


def test_two_runners_of_one_experiment_take_turns(tmp_path, ledger, fake):
    processes = [driver(tmp_path, ledger) for _ in range(2)]
    assert [p.communicate(timeout=60)[1] for p in processes] == ["", ""]
    assert len(read_experiments(ledger)) == 4


def test_a_terminated_runner_ends_its_training_too(tmp_path, ledger, fake):
    code = textwrap.dedent(f"""
        import signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_runner import experiment
        from nanochat.common import runs_dir
        from nanochat.experiments.runner import run_experiment
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_experiment(experiment(extra_flags=("--pause-sec", "30")), {str(ledger)!r}, runs_dir(),
                       lambda flags: [sys.executable, {str(tmp_path / "fake_train.py")!r}, *flags])
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    config = runs_dir() / "matrix.baseline.d4.s0" / "config.json"
    wait_until(config.exists)
    process.terminate()
    process.communicate(timeout=20)  # returns when the training has closed the pipe as well
    assert process.returncode == 143 and not ledger.exists()


def test_a_name_in_use_for_another_experiment_is_refused(ledger, fake):
    run(experiment(seeds=(0,)), ledger, fake)
    other = dataclasses.replace(experiment(seeds=(0,)), target_metric_threshold=0.9)
    with pytest.raises(UserError, match="choose another --name"):
        finished_runs(other, ledger)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize(("before", "after", "words"), [
    ({}, {"dataset": "books"}, "--dataset stdlib, now it is books"),
    ({}, {"extra_flags": ("--num-iterations", "8")}, "--num-iterations 4, now it is 8"),
    ({"extra_flags": ("--no-compile",)}, {}, "--no-compile True, now it is not given"),
    ({"extra_flags": ("--matrix-lr", "0.1")}, {}, "--matrix-lr 0.1, now it is not given"),
])
def test_a_record_made_under_other_flags_is_refused_by_the_first(ledger, fake, logged, before, after, words):
    run(experiment(seeds=(0,), **before), ledger, fake)
    if not logged:
        ledger.unlink()
    there = ledger.read_bytes() if logged else None
    with pytest.raises(UserError, match=f"matrix.baseline.d4.s0: this run was made with {words}; choose another"):
        run(experiment(seeds=(0,), **after), ledger, fake)
    assert (ledger.read_bytes() if ledger.exists() else None) == there


def test_a_time_is_never_logged_with_another_runs_threshold(ledger, fake):
    run(experiment(seeds=(0,)), ledger, fake)
    ledger.unlink()
    for threshold in (1.1, None):
        with pytest.raises(UserError, match=r"--target-metric-(threshold 1\.2|name val_bpb), now it is"):
            run(dataclasses.replace(experiment(seeds=(0,)), target_metric_threshold=threshold), ledger, fake)


def test_equal_flags_written_otherwise_are_the_same_run(ledger, fake):
    run(experiment(seeds=(0,), extra_flags=("--resume-error=0.50",)), ledger, fake)
    assert run(experiment(seeds=(0,), extra_flags=("--resume-error", "0.5")), ledger, fake) == 0


def test_a_record_that_ended_badly_without_a_row_is_made_again(ledger, fake):
    run(experiment(candidates=("baseline",), seeds=(0,), extra_flags=("--fate", "nan")), ledger, fake)
    ledger.unlink()
    assert run(experiment(candidates=("baseline",), seeds=(0,)), ledger, fake) == 1
    assert [row.status for row in read_experiments(ledger)] == ["ok"]


def test_rows_made_elsewhere_are_refused_before_anything_runs(ledger, fake, monkeypatch, tmp_path):
    run(experiment(), ledger, fake)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "fresh"))
    with pytest.raises(UserError, match=r"4 of 4 rows of 'matrix' in .* made elsewhere; .*TAG=\.\.\.\), or another"):
        run(experiment(seeds=(5,)), ledger, fake)
    assert finished_runs(experiment(), ledger) == {row.run_id for row in read_experiments(ledger)}  # for --dry-run
    assert not list(runs_dir().glob("matrix*"))


def test_rows_keep_the_threshold_they_have(ledger, fake):
    assert threshold_in_use(ledger, "matrix") is None
    run(experiment(seeds=(0,)), ledger, fake)
    assert threshold_in_use(ledger, "matrix") == 1.2


def test_threshold_is_one_that_every_baseline_seed_reached(ledger, fake):
    run(experiment(name="base", candidates=("baseline",), seeds=(0, 1, 2)), ledger, fake)
    assert threshold_from(ledger, "base", runs_dir()) == pytest.approx(1.002 + 0.001)
    run(experiment(name="single", candidates=("baseline",), seeds=(0,)), ledger, fake)
    with pytest.raises(UserError, match="two baseline seeds"):
        threshold_from(ledger, "single", runs_dir())


@pytest.mark.parametrize(("extra", "expected"), [
    ((), Probe(0, 0.0, 10)), (("--resume-error", "0.25"), Probe(0, 0.25, 10)),
    (("--fate", "breaks"), Probe(1, 0.0, 10)), (("--fate", "crash after a resume"), Probe(0, None, 10)),
    (("--fate", "cannot load"), Probe(0, None, 10)), (("--no-compile",), Probe(None, 0.0, 10)),
])
def test_probe_resumes_from_the_middle_and_counts_graph_breaks(base_dir, ledger, fake, extra, expected):
    asked, lines = experiment(extra_flags=extra), []
    probe_candidates(asked, runs_dir(), fake, lines.append)
    assert read_probe(runs_dir(), "matrix", "both") == expected
    assert read_probe(runs_dir(), "matrix", "baseline") is None and len(lines) == 1
    assert not (base_dir / "base_checkpoints" / "matrix.both.probe").exists()
    console = runs_dir() / "matrix.both.probe" / "console.txt"
    before = console.stat().st_mtime_ns
    probe_candidates(asked, runs_dir(), fake, lines.append)
    assert console.stat().st_mtime_ns == before


def test_a_probe_made_under_other_flags_is_refused(fake):
    probe_candidates(experiment(), runs_dir(), fake, lambda line: None)
    with pytest.raises(UserError, match=r"matrix\.both\.probe: this run was made with --seed 0, now it is 7; choose"):
        probe_candidates(experiment(seeds=(7,)), runs_dir(), fake, lambda line: None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"graph_breaks": "0", "resume_difference_nats": 0, '
                                  '"steps_compared": 10}'])
def test_a_damaged_probe_is_named(base_dir, text):
    folder = runs_dir() / "matrix.both.probe"
    folder.mkdir(parents=True)
    (folder / "probe.json").write_text(text)
    with pytest.raises(UserError, match=r"probe\.json.*delete it and probe again"):
        read_probe(runs_dir(), "matrix", "both")


def test_a_candidate_of_ones_own_has_its_probe_and_its_name(ledger, fake):
    asked = Experiment("own", PROFILE, {"baseline": "", "hot": "--matrix-lr 0.1"}, (0, 1), (4,), "val_bpb", 1.2)
    run(asked, ledger, fake)
    probe_candidates(asked, runs_dir(), fake, lambda line: None)
    [verdict] = judge_all(experiment_table(ledger, "own", runs_dir()), None, runs_dir(), candidates=["hot"])
    assert (verdict.candidate, verdict.flags) == ("hot", "--matrix-lr 0.1")
    assert "no save/resume probe" not in verdict.gates[2].sentence


def test_one_name_for_two_sets_of_flags_is_refused_in_the_ledger(ledger, fake):
    for seed, flags in ((0, "--matrix-lr 0.1"), (1, "--matrix-lr 0.2")):
        run(Experiment("own", PROFILE, {"hot": flags}, (seed,), (4,), "val_bpb", 1.2), ledger, fake)
    with pytest.raises(UserError, match=r"'hot' has the flags '--matrix-lr 0\.1' and '--matrix-lr 0\.2'"):
        experiment_table(ledger, "own", runs_dir())


def test_torch_words_a_graph_break_as_the_probe_counts_it():
    code = textwrap.dedent("""
        import torch
        def f(x):
            y = x + 1
            torch._dynamo.graph_break()
            return y * 2
        torch.compile(f, backend="eager")(torch.ones(2))
    """)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120,
                            env={**os.environ, "TORCH_LOGS": "graph_breaks"})
    assert result.stderr.count(GRAPH_BREAK) == 1


def test_several_processes_start_under_torchrun():
    argv = training_command(["--depth", "4"], nproc_per_node=8)
    assert shlex.join(argv[1:]) == (
        "-m torch.distributed.run --standalone --nproc_per_node=8 -m scripts.base_train --depth 4")


def test_a_threshold_and_a_candidate_follow_the_profile_in_the_plan():
    asked = Experiment("b", find_profile("cpu"), {"mine": "--matrix-lr 0.1"}, (0,), (2,), "val_bpb", 0.9,
                       extra_flags=("--run", "mine"))
    [planned] = plan(asked)
    assert planned.flags[0] == "--depth=2" and planned.flags[-13:] == [
        "--run=dummy", "--crop=drop", f"--tokenizer-dir={runs_dir().parent / 'tokenizer_stdlib'}", "--run", "mine",
        "--matrix-lr", "0.1", "--dataset=stdlib", "--seed=0", "--target-metric-name=val_bpb",
        "--target-metric-threshold=0.9", "--run-id=b.mine.d2.s0", "--model-tag=b.mine.d2.s0"]


def test_another_dataset_takes_the_trainings_own_tokenizer():
    [planned] = plan(dataclasses.replace(experiment(candidates=("baseline",), seeds=(0,)), dataset="books"))
    assert "--dataset=books" in planned.flags and not any("tokenizer" in flag for flag in planned.flags)


def test_every_evaluation_interval_leaves_enough_points_to_extrapolate():
    for profile in PROFILES.values():
        flags = dict(flag.split("=") for flag in profile.command_flags(4))
        if "--num-iterations" in flags:
            assert int(flags["--num-iterations"]) // int(flags["--eval-every"]) >= 6


@pytest.mark.parametrize(("ask", "message"), [
    (lambda: find_profile("d99"), "no profile 'd99'.*d12"),
    (lambda: candidate_flags("magic"), "no candidate 'magic'.*baseline"),
    (lambda: experiment(seeds=(0, 0)), "each seed once"),
    (lambda: experiment(seeds=()), "at least one"),
    (lambda: Experiment("b", find_profile("d12"), {"baseline": ""}, (0,), (12,)), "a protocol run needs 2 seeds"),
    (lambda: plan(experiment(name="a b")), "cannot name a folder"),
    (lambda: candidate_flags("hot='--matrix-lr"), "'hot': its flags .* do not parse"),
    (lambda: of_candidates(a="--x 1", b="--x 1"), "'a' has the flags '--x 1', 'b' has '--x 1'"),
    (lambda: of_candidates(mine="--chunked-ce"), "'mine' has the flags '--chunked-ce', 'chunked-ce' has"),
    (lambda: of_candidates(both="--x 1"), "'both' has the flags '--x 1', 'both' has '--fused-rmsnorm "),
])
def test_unknown_and_impossible_requests_are_refused(ask, message):
    with pytest.raises(UserError, match=message):
        ask()


def test_a_candidate_of_ones_own_is_named_by_its_flags():
    assert candidate_flags("ratio8=--target-param-data-ratio 8") == ("ratio8", "--target-param-data-ratio 8")
    assert candidate_name("--chunked-ce") == "chunked-ce"
    assert candidate_name("--target-param-data-ratio 8") == "--target-param-data-ratio 8"
