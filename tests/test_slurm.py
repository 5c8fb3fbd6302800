"""runs/slurm.sh with stand-ins for SLURM's programs, and a real torchrun under SLURM's warning."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import TINY_FLAGS, write_corpus

from nanochat.checkpoint import checkpoint_steps
from nanochat.common import base_dir, runs_dir
from nanochat.config import parse_config
from nanochat.runlog import read_run

SCRIPT = Path(__file__).parent.parent / "runs" / "slurm.sh"


@pytest.mark.parametrize(("status", "is_queued_again"), [
    ("interrupted", True), ("ok", False), ("error", False), (None, False)])
def test_the_job_is_queued_again_after_an_interruption_only(tmp_path, status, is_queued_again):
    folder, programs = tmp_path / "submitted", tmp_path / "programs"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    programs.mkdir()
    summary = runs_dir() / "job-77" / "summary.json"
    train = ""
    if status:
        text = f'{{"run_id": "job-77", "status": "{status}"}}'
        train = f"mkdir -p '{summary.parent}'; echo '{text}' > '{summary}'"
    nodes = 'case "$1" in show) printf "node7\\nnode8\\n";; esac'
    for name, commands in (("scontrol", nodes), ("srun", train)):
        log = f'echo {name} "$@" >> {tmp_path}/calls'
        (programs / name).write_text(f"#!/bin/sh\n{log}\n{commands}\nexit 3\n")
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, "--depth", "24"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_NAME": "job",
             "NANOCHAT_BASE_DIR": str(base_dir()), "SLURM_SUBMIT_DIR": str(folder),
             "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"})
    assert done.returncode == 3 and not done.stderr
    _, launch, *then = (tmp_path / "calls").read_text().splitlines()
    assert then == (["scontrol requeue 77"] if is_queued_again else [])
    assert "--nnodes=2 --nproc-per-node=8 --max-restarts=3" in launch
    assert "--rdzv-endpoint=node7:29500" in launch
    config = parse_config(launch.split(" scripts.base_train ")[1].split())
    assert config.run_id == config.tag == "job-77" and config.depth == 24
    assert config.resume_from_step == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "all"])
def test_slurms_warning_makes_the_ranks_save_and_torchrun_end(tmp_path, whom):
    """SLURM signals every process, or only torchrun, which forwards the signal."""
    corpus = write_corpus(tmp_path / "corpus")
    [signals] = re.findall(r"--signals-to-handle=\S+", SCRIPT.read_text())
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=3", signals, "-m", "scripts.base_train", *TINY_FLAGS,
        "--dataset", str(corpus), "--num-iterations=99999", "--run-id=job", "--model-tag=job",
        "--device-type=cpu", "--eval-every=-1", "--resume-from-step=auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32"}
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=environment)
    try:
        deadline_sec = time.monotonic() + 100
        metrics = runs_dir() / "job" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count('"train"') < 5:
            is_late = time.monotonic() > deadline_sec or job.poll() is not None
            assert not is_late, (tmp_path / "log").read_text()
            time.sleep(0.05)
        (os.killpg if whom == "all" else os.kill)(job.pid, signal.SIGUSR1)
        assert job.wait(60) != 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    run = read_run(runs_dir() / "job")
    assert run.status == "interrupted", (tmp_path / "log").read_text()
    checkpoints = base_dir() / "base_checkpoints" / "job"
    assert checkpoint_steps(checkpoints) == [run.of("train")[-1]["step"]]
    assert not run.of("resume")
