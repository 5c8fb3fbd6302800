#!/usr/bin/env bash
# Train on several nodes under SLURM until the horizon is reached. SLURM sends USR1 120 seconds
# before the time limit: the ranks save a checkpoint and exit, and the job is queued again. If a
# rank dies, all ranks restart from the newest valid checkpoint; --save-minutes limits the lost
# work.
#   sbatch --nodes 4 runs/slurm.sh --depth 24 --target-param-data-ratio 8 --device-batch-size 16 \
#       --save-minutes 20
# The flags are those of scripts.base_train. Before the first job, run bash runs/setup.sh, download
# the dataset and train the tokenizer (README, section Train), with NANOCHAT_BASE_DIR on a disk that
# all nodes share.
#SBATCH --job-name=nanochat
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2 # SLURM runs a copy of this file
source .venv/bin/activate

RUN_ID="$SLURM_JOB_NAME-$SLURM_JOB_ID" # a job that is queued again keeps its id
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT: seconds that torchrun gives the ranks to save
export OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100

# torchrun forwards the signals that it handles; any other would end it
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:29500" \
    --rdzv-id="$RUN_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m scripts.base_train --run-id "$RUN_ID" --model-tag "$RUN_ID" --resume-from-step auto "$@"
STATUS=$?

# queue again only after an interruption: a failure would repeat
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
BASE="${BASE/#\~/$HOME}" # the programs expand a leading ~, too
SUMMARY="$BASE/runs/$RUN_ID/summary.json"
grep -q '"status": "interrupted"' "$SUMMARY" 2>/dev/null && exec scontrol requeue "$SLURM_JOB_ID"
exit "$STATUS"
