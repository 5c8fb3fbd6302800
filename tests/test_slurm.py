"""runs/slurm.sh with substitutes for SLURM's programs, and torchrun with SLURM's signal."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import TINY_FLAGS

from nanochat.checkpoint import checkpoint_steps
from nanochat.common import base_dir, runs_dir
from nanochat.config import parse_config
from nanochat.runlog import METRICS, read_run

SCRIPT = Path(__file__).parent.parent / "runs" / "slurm.sh"


def write_program(path, shell_code):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{shell_code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("status", "requeued"), [
    ("interrupted", True), ("ok", False), ("error", False), (None, False)])
def test_a_job_is_queued_again_after_the_signal_and_not_after_a_failure(
        tmp_path, status, requeued):
    folder, calls = tmp_path / "submitted", tmp_path / "calls"
    summary = runs_dir() / "job-77" / "summary.json"
    write_summary = (f'mkdir -p "{summary.parent}"; '
                     f'echo \'{{"run_id": "job-77", "status": "{status}"}}\' > "{summary}"')
    write_program(folder / ".venv" / "bin" / "activate", "")
    write_program(tmp_path / "bin" / "scontrol", f"""
        echo scontrol "$@" >> {calls}
        case "$1" in show) printf "node7\\nnode8\\n";; esac""")
    write_program(tmp_path / "bin" / "srun", f"""
        echo srun "$@" >> {calls}
        {write_summary if status else ""}
        exit 3""")
    done = subprocess.run(
        ["bash", SCRIPT, "--depth", "24"], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"})
    assert done.returncode == (0 if requeued else 3) and not done.stderr
    launched, *later = calls.read_text().splitlines()[1:]
    assert later == (["scontrol requeue 77"] if requeued else [])
    assert "--nnodes=2 --nproc-per-node=8 --max-restarts=3" in launched
    assert "--rdzv-endpoint=node7:29500" in launched
    config = parse_config(launched.split(" scripts.base_train ")[1].split())
    assert (config.run_id, config.tag, config.depth) == ("job-77", "job-77", 24)
    assert config.resume_from_step == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "all processes"])
def test_the_signal_makes_the_ranks_save_and_torchrun_end_without_a_restart(
        tmp_path, corpus, fp32, to):
    [signals] = re.findall(r"--signals-to-handle=\S+", SCRIPT.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", "--max-restarts=3", signals, "-m", "scripts.base_train",
               *TINY_FLAGS, "--dataset", corpus, "--num-iterations", "99999", "--run-id", "job",
               "--model-tag", "job", "--device-type", "cpu", "--eval-every", "-1",
               "--resume-from-step", "auto", "--allow-repeats"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        deadline_sec = time.monotonic() + 100
        record = runs_dir() / "job" / METRICS
        while not record.exists() or record.read_text().count('"train"') < 5:
            assert time.monotonic() < deadline_sec and job.poll() is None, log.name
            time.sleep(0.05)
        (os.kill if to == "torchrun" else os.killpg)(job.pid, signal.SIGUSR1)
        assert job.wait(60) != 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    run = read_run(runs_dir() / "job")
    assert run.status == "interrupted" and not run.of("resume")
    last_step = run.of("train")[-1]["step"]
    assert checkpoint_steps(base_dir() / "base_checkpoints" / "job") == [last_step]
