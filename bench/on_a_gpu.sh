#!/usr/bin/env bash
# What a GPU answers: first figures, most wanted first, for LIMIT seconds at most, with a table of
# them beside their goals; then the questions of `sweep --scale gpu`, for MINUTES.
#
#   bench/on_a_gpu.sh                     files go to results/bench and results/gpu.jsonl.xz
#   MINUTES=0 bench/on_a_gpu.sh           the figures alone
#   OUT=/tmp/gpu MINUTES=8 DATA=/data bench/on_a_gpu.sh
#   DEVICE=cpu SMALL=1 bench/on_a_gpu.sh  does it work? At the smallest sizes
set -uo pipefail # a step that fails does not end the others
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cuda} OUT=${OUT:-results} MINUTES=${MINUTES:-5} DATA=${DATA:-data}
LIMIT=${LIMIT:-360}
mkdir -p "$OUT/bench"
NEW=$(mktemp -d) # so that the table has no older figure
trap 'cp "$NEW"/* "$OUT/bench" 2>/dev/null; rm -rf "$NEW"' EXIT
if [ -n "${SMALL:-}" ]; then
    SETTINGS=(vit_demo) ROUNDS=(--rounds 1) PEERS=vit_demo SCALE=gpu-smoke
    SCORED=(--model vit_demo --image-size 32 --batch 8 --batches 2 --repetitions 1)
    COMMAND=(fedavg --data synthetic --rounds 2) STEPS=(--size 10000 --repetitions 2)
    PASSES=(--sizes 2 17 48 3 --repetitions 2)
else
    SETTINGS=(vit_s16 vit_ti16_224) ROUNDS=() PEERS=vit_s16 SCALE=gpu
    SCORED=(--model vit_s16 --image-size 224 --batch 64)
    COMMAND=(fedavg --nc 1 --J 4 --rounds 2000) STEPS=() PASSES=()
fi
SCORING=(training half)
[ "$DEVICE" = cuda ] || SCORING=(training scoring)
TESTS=(tests/leaves/test_fused.py tests/leaves/test_cuda_graph.py tests/leaves/test_fisher.py
    tests/leaves/test_sparse_sgdm.py tests/training/test_clients.py)

step() { # the longest it may take, what it is, then the command; says how long it took
    local started=$SECONDS most=$1 name=$2
    shift 2
    printf '\n== %s: %s\n' "$name" "$*"
    ((most < LIMIT - SECONDS)) || most=$((LIMIT - SECONDS))
    if ((most < 5)); then
        printf '== %s: left out, no time is left\n' "$name"
        return
    fi
    timeout "$most" "$@" || printf '== %s: exit status %s\n' "$name" "$?"
    printf '== %s: %s s\n' "$name" "$((SECONDS - started))"
}

step 120 "a round" "$PYTHON" bench/bench_round.py --settings "${SETTINGS[@]}" "${ROUNDS[@]}" \
    --graphs auto --device "$DEVICE" --csv "$NEW/round_gpu.csv"
step 60 "scoring" "$PYTHON" bench/bench_fisher.py "${SCORED[@]}" --methods "${SCORING[@]}" \
    --device "$DEVICE" --json "$NEW/fisher_gpu_vit_s16.json"
step 40 "passes" "$PYTHON" bench/bench_fused.py "${PASSES[@]}" --device "$DEVICE" \
    --csv "$NEW/fused_gpu.csv"
step 90 "the careful loop" "$PYTHON" bench/bench_peers.py --settings "$PEERS" \
    --methods project careful --rounds 4 --device "$DEVICE" --csv "$NEW/peers_gpu.csv"
step 60 "the optimiser" "$PYTHON" bench/bench_sparse_sgdm.py "${STEPS[@]}" --device "$DEVICE" \
    --csv "$NEW/sparse_sgdm_gpu.csv"
step 90 "doctor" "$PYTHON" train.py doctor --json "$NEW/doctor_gpu.json" "${COMMAND[@]}"
[ "$DEVICE" = cuda ] && step 150 "kernels, graphs" env GPU_TESTS=1 "$PYTHON" -m pytest -q "${TESTS[@]}"
printf '\n== figures, after %s s\n' "$SECONDS"
"$PYTHON" bench/goals.py "$NEW"
[ "$MINUTES" = 0 ] && exit
printf '\n== questions, for %s minutes\n' "$MINUTES"
[ "$DATA" -ef data ] || ln -sfn "$(realpath "$DATA")" data
"$PYTHON" train.py sweep --scale "$SCALE" --minutes "$MINUTES" --results "$OUT"
