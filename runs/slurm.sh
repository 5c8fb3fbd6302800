#!/usr/bin/env bash
# A training on several nodes that goes on by itself: a rank that dies or hangs is restarted from the newest whole
# checkpoint; 120 s before the time limit SLURM warns, the ranks save and end, and the job queues again.
#   sbatch --nodes 4 runs/slurm.sh --depth 24 --target-param-data-ratio 8 --device-batch-size 16 --save-minutes 20
# The flags are base_train's. Before: bash runs/setup.sh, the dataset and the tokenizer (README, Train), and
# NANOCHAT_BASE_DIR on a disk of all nodes.
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
cd "$SLURM_SUBMIT_DIR" || exit 2 # SLURM runs a copy of this file from elsewhere
source .venv/bin/activate

RUN_ID="$SLURM_JOB_NAME-$SLURM_JOB_ID" # the same when the job is queued again
HEAD_NODE="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export OMP_NUM_THREADS=1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds that torchrun gives the ranks to save

# torchrun passes the signals on that it handles; the warning would end it
srun torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD_NODE:29500" --rdzv-id="$RUN_ID-${SLURM_RESTART_COUNT:-0}" \
    --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
    -m scripts.base_train --run-id "$RUN_ID" --model-tag "$RUN_ID" --resume-from-step auto "$@"
STATUS=$?

# not after a failure: it would fail again
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
BASE="${BASE/#\~/$HOME}" # as the programs read it
SUMMARY="$BASE/runs/$RUN_ID/summary.json"
grep -q '"status": "interrupted"' "$SUMMARY" 2>/dev/null && exec scontrol requeue "$SLURM_JOB_ID"
exit "$STATUS"
