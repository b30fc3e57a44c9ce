#!/usr/bin/env bash
# The verdict of a GPU on this project, in under 8 minutes: bits first, then times.
#
#     scripts/gpu_verdict.sh                # needs an NVIDIA GPU, PyTorch, Triton, numba and pytest; no network, no vLLM
#     scripts/gpu_verdict.sh --device cpu   # a rehearsal in Triton's interpreter, on tiny sizes
#
# Compiles every kernel and compares its bits on a small size, runs the tests marked `gpu`, then scripts/bench_kernels.py,
# which prints a table and writes scripts/results/<gpu>/kernels-<date>.json (a rehearsal writes nothing but to --output
# FILE), then every kernel under compute-sanitizer, where there is one. The last line is the verdict.
# Exit status 0 all good, 1 wrong bits or something failed, 2 it cannot run here.
# PYTHON names the interpreter, by default python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
# Seconds for each part. The fused kernels take several each to compile; later parts find them in Triton's cache.
COMPILE_SECONDS=90
TEST_SECONDS=160
BENCH_SECONDS=100 # begins no case after that, and is given BENCH_GRACE more to end
BENCH_GRACE=30
SANITIZER_SECONDS=45
device=cuda
output=()

usage() {
  echo "usage: scripts/gpu_verdict.sh [--device cuda|cpu] [--output FILE]" >&2
  exit 2
}

while (($#)); do
  (($# > 1)) || usage
  case $1 in
    --device) device=$2 ;;
    --output) output=(--output "$2") ;;
    *) usage ;;
  esac
  shift 2
done
[[ $device == cuda || $device == cpu ]] || usage

verdict() { # STATUS SENTENCE
  echo "verdict: $2"
  exit "$1"
}

# Run a part with a limit of time; leaves its status in $status, and never ends this script.
limited() { # SECONDS COMMAND...
  local seconds=$1
  shift
  status=0
  timeout --kill-after=10 "$seconds" "$@" || status=$?
}

explain() { # PART SECONDS
  if ((status == 124 || status == 137)); then
    echo "$1 took longer than $2 s"
  else
    echo "$1 ended with status $status"
  fi
}

compile_all() {
  local i jobs=1 pid pids=()
  [[ $device == cpu ]] || jobs=$(nproc)
  ((jobs <= 16)) || jobs=16
  for ((i = 0; i < jobs; i++)); do
    timeout --kill-after=10 "$COMPILE_SECONDS" "$PYTHON" scripts/sanitize_kernels.py \
      --device "$device" --share "$i/$jobs" &
    pids+=("$!")
  done
  for pid in "${pids[@]}"; do
    status=0
    wait "$pid" || status=$?
    if ((status == 124 || status == 137)); then
      notes+=("not every kernel was compiled within $COMPILE_SECONDS s")
    elif ((status != 0)); then
      problems+=("scripts/sanitize_kernels.py ended with status $status")
      bits_in_doubt=1
    fi
  done
}

run_tests() {
  local files
  if ! "$PYTHON" -c 'import pytest' 2>/dev/null; then
    problems+=("the tests were not run, because $PYTHON has no pytest")
    return
  fi
  mapfile -t files < <(grep -lE 'NEEDS_GPU|mark\.gpu' tests/test_*.py)
  if [[ $device == cpu ]]; then
    files=(tests/test_gpu_block.py)
    export VLLM_DFLOAT_GPU_REHEARSAL=1
  fi
  VLLM_DFLOAT_REQUIRE_GPU=1 limited "$TEST_SECONDS" \
    "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider "${files[@]}"
  if ((status != 0)); then
    problems+=("$(explain "the tests marked gpu" "$TEST_SECONDS")")
    ((status == 124 || status == 137)) || bits_in_doubt=1
  fi
}

sanitize() { # TOOL
  local log checked
  log=$(mktemp)
  limited "$SANITIZER_SECONDS" compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" scripts/sanitize_kernels.py >"$log" 2>&1
  tail -n 5 "$log"
  if grep -q 'Device not supported' "$log"; then
    notes+=("compute-sanitizer does not support this device")
  elif ((status == 124 || status == 137)); then
    checked=$(grep -c '^right bits' "$log" || true)
    notes+=("$1 made $checked checks in $SANITIZER_SECONDS s, not all")
    if grep -qE '^=+ +(Invalid|Error:|.*hazard)' "$log"; then
      problems+=("$1 found errors before its time was over")
    fi
  elif ((status != 0)); then
    cat "$log"
    problems+=("$(explain "$1 of compute-sanitizer" "$SANITIZER_SECONDS")")
  fi
  rm -f "$log"
}

run_sanitizers() {
  if [[ $device == cpu ]]; then
    return
  elif command -v compute-sanitizer >/dev/null; then
    sanitize memcheck
    sanitize racecheck
  else
    notes+=("compute-sanitizer is not installed")
  fi
}

# Not after a failure: no speed is worth anything where bits may be wrong.
run_bench() {
  if ((bits_in_doubt)); then
    notes+=("nothing was timed, as bits may be wrong; scripts/bench_kernels.py compares and times by itself")
    return
  fi
  local seconds=$((BENCH_SECONDS + BENCH_GRACE))
  limited "$seconds" "$PYTHON" scripts/bench_kernels.py \
    --device "$device" --seconds "$BENCH_SECONDS" "${output[@]}"
  ((status == 0)) || problems+=("$(explain scripts/bench_kernels.py "$seconds")")
}

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [[ $device == cpu ]]; then
  export TRITON_INTERPRET=1
else
  export TRITON_INTERPRET=0
fi
status=0
bits_in_doubt=0
problems=()
notes=()

"$PYTHON" scripts/bench_setup.py --device "$device" || status=$?
((status == 0)) || verdict 2 "it cannot run here: scripts/bench_setup.py ended with status $status and says why."
compile_all
run_tests
run_bench
run_sanitizers # last: without them the verdict is weaker, without the others there is none

for note in "${notes[@]}"; do
  echo "note: $note"
done
if ((${#problems[@]})); then
  for problem in "${problems[@]}"; do
    echo "problem: $problem" >&2
  done
  verdict 1 "not good: ${problems[0]}."
fi
if [[ $device == cpu ]]; then
  verdict 0 "the rehearsal went well; nothing was measured."
fi
verdict 0 "all bits are right; the times are in the table above."
