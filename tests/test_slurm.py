"""runs/slurm.sh with stand-ins for SLURM's programs; what torchrun does with SLURM's warning, for real."""

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
from nanochat.runlog import read_run
from scripts.base_train import parse_args

SCRIPT = Path(__file__).parent.parent / "runs" / "slurm.sh"


@pytest.mark.parametrize(("ended", "requeued"), [("interrupted", True), ("ok", False), ("error", False), (None, False)])
def test_the_job_queues_again_when_it_was_warned_and_not_after_a_failure(tmp_path, ended, requeued):
    folder, programs = tmp_path / "submitted", tmp_path / "programs"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    programs.mkdir()
    summary = runs_dir() / "job-77" / "summary.json"
    write = f'mkdir -p "{summary.parent}"; echo \'{{"run_id": "job-77", "status": "{ended}"}}\' > "{summary}"'
    for name, does in (("scontrol", 'case "$1" in show) printf "node7\\nnode8\\n";; esac'),
                       ("srun", write if ended else "")):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/calls\n{does}\nexit 3\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(["bash", SCRIPT, "--depth", "24"], cwd=tmp_path, capture_output=True, text=True, env={
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(base_dir()),
        "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "job", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]"})
    assert done.returncode == 3 and not done.stderr
    launched, *then = (tmp_path / "calls").read_text().splitlines()[1:]
    assert then == (["scontrol requeue 77"] if requeued else [])
    assert "--nnodes=2 --nproc-per-node=8 --max-restarts=3" in launched and "--rdzv-endpoint=node7:29500" in launched
    config = parse_args(launched.split(" scripts.base_train ")[1].split())
    assert (config.run_id, config.tag, config.depth, config.resume_from_step) == ("job-77", "job-77", 24, "auto")


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["torchrun", "all"])
def test_slurms_warning_has_the_ranks_save_and_torchrun_end_without_a_restart(tmp_path, whom):
    """SLURM sends it to every process, or to torchrun alone, which passes it on."""
    corpus = write_corpus(tmp_path / "corpus")
    [signals] = re.findall(r"--signals-to-handle=\S+", SCRIPT.read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3",
               signals, "-m", "scripts.base_train", *TINY_FLAGS, "--dataset", str(corpus), "--num-iterations", "99999",
               "--run-id", "job", "--model-tag", "job", "--device-type", "cpu", "--eval-every", "-1",
               "--resume-from-step", "auto"]
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "NANOCHAT_DTYPE": "float32"})
    try:
        deadline_sec = time.monotonic() + 100
        record = runs_dir() / "job" / "metrics.jsonl"
        while not record.exists() or record.read_text().count('"train"') < 5:
            assert time.monotonic() < deadline_sec and job.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.05)
        (os.killpg if whom == "all" else os.kill)(job.pid, signal.SIGUSR1)
        assert job.wait(60) != 0
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    run = read_run(runs_dir() / "job")
    assert run.status == "interrupted", (tmp_path / "log").read_text()
    assert checkpoint_steps(base_dir() / "base_checkpoints" / "job") == [run.of("train")[-1]["step"]]
    assert not run.of("resume")
