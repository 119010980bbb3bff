#!/usr/bin/env bash
# What one GPU shows in 9 minutes: the time of training steps, then four methods on CIFAR-10 until the time is over.
#
#   training/gpu_evidence.sh path/to/cifar10 runs/evidence      # or uoft-cs/cifar10, with a network
#
# OUTPUT gets step_SIZE_eager.json and step_SIZE_compiled.json, and cifar10/ with comparison.md, .png and .json of what
# was done in time. The same command goes on with CIFAR-10 where it was stopped; benchmarks that are done are left out.
#
# Environment: SECONDS_IN_ALL (540), SIZES (base large), JOBS (4 runs at the same time), PYTHON (python), COMPARISON,
# STEP_OPTIONS and COMPARE_OPTIONS (more options of `hf-mim benchmark step` and `compare.py`).
set -euo pipefail
[ $# = 2 ] || { echo "usage: training/gpu_evidence.sh DATASET OUTPUT" >&2; exit 2; }
dataset=$1 output=$2 here=$(dirname "$0") end=$((SECONDS + ${SECONDS_IN_ALL:-540}))
python=${PYTHON:-python}
mkdir -p "$output"

left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }

for size in ${SIZES:-base large}; do
  for mode in eager compiled; do
    json=$output/step_${size}_$mode.json
    [ -e "$json" ] && continue
    compile=(); [ $mode = compiled ] && compile=(--compile)
    # shellcheck disable=SC2086
    timeout "$(left)" "$python" -m hf_mim.cli benchmark step --size "$size" --dtype bfloat16 "${compile[@]}" \
      --json "$json" ${STEP_OPTIONS---device cuda --batch_size 128 --steps 10} ||
      echo "step $size $mode ended by status $?" >&2
  done
done

# SIGTERM lets the runs save a checkpoint; --kill-after is for what does not end.
status=0
# shellcheck disable=SC2086
timeout --kill-after 30 "$(left)" "$python" "$here/compare.py" \
  "${COMPARISON:-$here/comparisons/cifar10.yaml}" --dataset "$dataset" --output "$output/cifar10" \
  --jobs "${JOBS:-4}" ${COMPARE_OPTIONS-} || status=$?
case $status in
  0) echo "All of CIFAR-10 is done: $output/cifar10/comparison.md" ;;
  75 | 124) echo "The time is over: $output/cifar10/comparison.md has what is done; the same command goes on" ;;
  *) exit $status ;;
esac
