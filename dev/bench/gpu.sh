#!/usr/bin/env bash
# All that is measured on a GPU, what is worth most first, in pieces of at most 9 minutes: call it until it says "done".
#   bash dev/bench/gpu.sh OUT              results, logs and what is finished go to the folder OUT
#   bash dev/bench/gpu.sh OUT --dry-run    the same pieces at toy sizes, on a CPU too: no measurement
# Exit code 0: all pieces finished; 3: some are left, call it again; 1: all finished, some failed (OUT/<piece>.log).
# MINUTES (9): the limit of a call. PYTHON (python3). DATASET: a folder of text in place of the protocol's climbmix.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=$(realpath -m "${1:?a folder for the results}")
DRY=${2:-}
PYTHON=${PYTHON:-python3}
MOST_CALLS=12  # of one piece: what gets no further is given up
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + $(awk "BEGIN {print int(60 * ${MINUTES:-9})}")))
left=() failed=()

# piece NAME COMMAND...: runs it in the time that is left, unless it has finished. Its exit code 3 and a time-out mean
# that there is more to do: the next call repeats it.
piece() {
    local name=$1 status=$OUT/$1.status calls code
    shift
    calls=$(grep -c . "$OUT/$name.calls" 2>/dev/null || true)
    if [[ ! -e $status ]]; then
        if ((end - SECONDS < 5)); then
            left+=("$name")
            return
        fi
        echo "== $name: ${*}" | tee -a "$OUT/$name.log"
        date >> "$OUT/$name.calls"
        timeout --signal=INT --kill-after=20 $((end - SECONDS)) "$@" 2>&1 | tee -a "$OUT/$name.log"
        code=${PIPESTATUS[0]}
        if ((code == 3 || code == 124 || code == 130 || code == 137)) && ((calls + 1 < MOST_CALLS)); then
            left+=("$name")
            return
        fi
        echo "$code" > "$status"
    fi
    [[ $(<"$status") == 0 ]] || failed+=("$name")
}

minutes_left() { awk "BEGIN {print ($end - $SECONDS) / 60 - 0.5}"; }

step() { # step NAME CANDIDATES FLAGS...
    local name=$1 candidates=$2
    shift 2
    # shellcheck disable=SC2086  (the candidates are words)
    piece "$name" "$PYTHON" -m dev.bench.train_step --out "$OUT/train_step.csv" --candidates $candidates "$@"
}

TESTS="tests/test_linear_cross_entropy.py tests/test_rms_norm.py tests/test_embedding.py tests/test_attention.py
       tests/test_fp8.py tests/test_kernel_oracles.py"
if [[ $DRY == --dry-run ]]; then
    TESTS="tests/test_attention.py -k flag"
    KERNELS="--kernels qk-norm"
    D12="--depth 1 --head-dim 64 --seq-len 64 --rows 1 --vocab-size 256 --repeats 2 --no-compile --device-type cpu"
    D12_WINDOWS=$D12 D24="$D12 --depth 2"
    PROFILE=cpu-short EXPERIMENT=--dry-run
else
    KERNELS=""
    D12="" # the protocol's
    D12_WINDOWS="--seq-len 2048 --window-pattern SSSL"
    D24="--depth 24 --seq-len 2048 --window-pattern SSSL"
    PROFILE=d12-protocol EXPERIMENT=""
fi

# shellcheck disable=SC2086  (flags are words)
{
    piece correctness "$PYTHON" -m pytest -q -p no:cacheprovider $TESTS
    step step_d12 "both chunked-ce fused-rmsnorm" $D12
    piece kernels "$PYTHON" -m dev.bench.kernels --out "$OUT/kernels.csv" --minutes "$(minutes_left)" $KERNELS
    step attention "attention-varlen attention-sdpa" $D12_WINDOWS
    step step_d24 "both" $D24
    step fp8_d24 "fp8" $D24
    step attention_d24 "attention-sdpa" $D24
    for name in baseline lane_c; do
        more=""
        [[ $name == baseline ]] || more="--candidates baseline fused-rmsnorm chunked-ce both"
        [[ $name == baseline || -n $EXPERIMENT ]] || more="$more --target-from gpu_baseline"
        piece "protocol_$name" "$PYTHON" -m scripts.experiment --name "gpu_$name" --profile $PROFILE --seeds 0 1 \
            --ledger "$OUT/experiments.csv" $more $EXPERIMENT \
            ${DATASET:+-- --dataset "$DATASET" --tokenizer-dir=}
    done
}

if ((${#left[@]})); then
    echo "left: ${left[*]}; call it again"
    exit 3
fi
echo "done${failed[*]:+; failed: ${failed[*]}}"
((${#failed[@]} == 0))
