#!/usr/bin/env bash
# What a GPU answers in a quarter of an hour, most wanted first: are the kernels right, how fast is
# a round, and then the questions of `sweep --scale gpu`, for MINUTES.
#
#   bench/on_a_gpu.sh                     files go to results/bench and results/gpu.jsonl.xz
#   OUT=/tmp/gpu MINUTES=8 DATA=/data bench/on_a_gpu.sh
#   DEVICE=cpu SMALL=1 bench/on_a_gpu.sh  does it work? At the smallest sizes
set -uo pipefail # a step that fails does not end the others
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} DEVICE=${DEVICE:-cuda} OUT=${OUT:-results} MINUTES=${MINUTES:-5} DATA=${DATA:-data}
mkdir -p "$OUT/bench"
if [ -n "${SMALL:-}" ]; then
    SETTINGS=(vit_demo) ROUNDS=(--rounds 1) PEERS=vit_demo SCALE=gpu-smoke
    SCORED=(--model vit_demo --image-size 32 --batch 8 --batches 2 --repetitions 1)
    COMMAND=(fedavg --data synthetic --rounds 2) STEPS=(--size 10000 --repetitions 2)
else
    SETTINGS=(vit_s16 vit_ti16) ROUNDS=() PEERS=vit_s16 SCALE=gpu
    SCORED=(--model vit_s16 --image-size 224 --batch 64)
    COMMAND=(fedavg --nc 1 --J 4 --rounds 2000) STEPS=()
fi

step() { # what it is, then the command; says how long it took
    local started=$SECONDS name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    timeout 300 "$@" || printf '== %s: exit status %s\n' "$name" "$?"
    printf '== %s: %s s\n' "$name" "$((SECONDS - started))"
}

[ "$DEVICE" = cuda ] && step "kernels, graphs" env GPU_TESTS=1 "$PYTHON" -m pytest -q -x tests
step "a round" "$PYTHON" bench/bench_round.py --settings "${SETTINGS[@]}" "${ROUNDS[@]}" \
    --device "$DEVICE" --csv "$OUT/bench/round_gpu.csv"
step "the careful loop" "$PYTHON" bench/bench_peers.py --settings "$PEERS" --methods project careful \
    --rounds 6 --device "$DEVICE" --csv "$OUT/bench/peers_gpu.csv"
step "scoring" "$PYTHON" bench/bench_fisher.py "${SCORED[@]}" --device "$DEVICE" \
    --json "$OUT/bench/fisher_gpu_vit_s16.json"
step "the optimiser" "$PYTHON" bench/bench_sparse_sgdm.py "${STEPS[@]}" --device "$DEVICE" \
    --csv "$OUT/bench/sparse_sgdm_gpu.csv"
step "doctor" "$PYTHON" train.py doctor --json "$OUT/bench/doctor_gpu.json" "${COMMAND[@]}"
printf '\n== questions, for %s minutes\n' "$MINUTES"
[ "$DATA" -ef data ] || ln -sfn "$(realpath "$DATA")" data
"$PYTHON" train.py sweep --scale "$SCALE" --minutes "$MINUTES" --results "$OUT"
