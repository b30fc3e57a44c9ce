#!/usr/bin/env bash
# Check and measure this project's kernels on a GPU in under 6 minutes; the most important results come first.
#
#     scripts/gpu_verdict.sh [--out DIR] [--limit SECONDS] [--commit HASH] [--site FOLDER]
#     scripts/gpu_verdict.sh --device cpu    # a rehearsal in Triton's interpreter, on tiny sizes
#
# Needs an NVIDIA GPU, PyTorch, Triton, numba and pytest; no network, no vLLM, nothing installed. For the product with
# experts alone vLLM is used: the installed one, or one in FOLDER (FOLDER/env.sh is sourced if it exists). Sections:
# environment; the bits of every kernel on small sizes; products of the fast layout next to cuBLAS, in order beside its
# bits too; experts; decode and encode of both layouts at three sizes, next to a device copy; the order in which
# cuBLASLt adds; the tests marked `gpu`. With the time that is left: runs of rows, groups, the official layout, rows,
# packed products, other sizes; the bits of LM heads in slabs; memcheck; more than 2^31 weights; hardware counters;
# racecheck; tuning. So what no GPU has run yet comes first.
# Each section has its own time limit, and none begins after --limit (345 s) in total. All up to the tests are reached
# in 330 s, whatever those before them take. Every row is printed and written as soon as it is known. After wrong bits
# or failed tests, times are marked and the status is 1.
#
# Eight files are written to DIR, by default scripts/results/<gpu>/verdict-<date>, for a rehearsal a temporary one:
# verdict.log, JSON, and logs.tar.gz, which is whole after every section, also if a signal ends this script.
# Exit status 0 all good, 1 wrong bits or something failed, 2 it cannot run here, 143 ended by SIGTERM. PYTHON names the
# interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
device=cuda out='' limit=345 site=''

# Seconds of the sections that every visit reaches, the most important first: 330 in all, so that the last of them
# begins in time even if those before it take all of theirs. What a section leaves the next one may use. In brackets
# what an H200 took for fewer kernels.
START=10     # until the first section (9)
BITS=75      # each of 16 processes compiles the kernels of two checks (40)
PRODUCTS=105 # in order; then fused, 42 kernels that 15 processes compile meanwhile
EXPERTS=60   # not decoded first, then decoded, of two layers (38), with 20 s for an import of vLLM
DECODE=25    # a start, then 3 sizes each of decoding and encoding, packed and fast, by kernels that BITS has compiled
ORDER=25     # a start, then 108 comparisons
TESTS=30     # at the least; all of them take 90 s
KILL_AFTER=6 # of a section's seconds, for its processes to say what they have found when its time is over

usage() {
  echo "usage: scripts/gpu_verdict.sh [--device cuda|cpu] [--out DIR] [--limit SECONDS] [--commit HASH] [--site FOLDER]" >&2
  exit 2
}

while (($#)); do
  (($# > 1)) || usage
  case $1 in
    --device) device=$2 ;;
    --out) out=$2 ;;
    --limit) limit=$2 ;;
    --commit) export VLLM_DFLOAT_COMMIT=$2 ;;
    --site) site=$2 ;;
    *) usage ;;
  esac
  shift 2
done
[[ $device == cuda || $device == cpu ]] || usage
if [[ -n $site && ! -d $site ]]; then
  echo "--site $site: no such folder; expected one that holds the package vllm" >&2
  exit 2
fi
[[ $limit =~ ^[1-9][0-9]{0,4}$ ]] || usage

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TRITON_INTERPRET=0
[[ $device == cuda ]] || export TRITON_INTERPRET=1
problems=()
notes=()
starter=() # put before the command of run_times
slow=1
[[ $device == cuda ]] || slow=4 # the interpreter is
planned=$START # when the sections so far will have ended
child='' # the running section's process

verdict() { # STATUS SENTENCE
  echo "verdict: $2"
  exit "$1"
}

# Print and record a problem, and continue.
problem() {
  problems+=("$1")
  echo "problem: $1"
}

# Set $most, what a section may take: its own seconds and what those before it have left of theirs.
own() { # SECONDS
  planned=$((planned + $1))
  most=$((planned - SECONDS > $1 ? planned - SECONDS : $1))
}

# Run a section within its own limit and the remaining total; sets $status: 124 or 137 if it ran out of time. When
# MOST_SECONDS are over, nothing of it runs any more.
section() { # NAME MOST_SECONDS LOG COMMAND...
  local name=$1 most=$((slow * $2)) begun=$SECONDS left=$((limit - SECONDS))
  log=$3
  shift 3
  touch "$log"
  log_start=$(stat -c %s "$log")
  status=0
  ((most <= left)) || most=$left
  if ((most < 8 + KILL_AFTER)); then
    notes+=("no time was left for $name")
    status=124
    return
  fi
  echo "== $name (at $SECONDS s, at most $most s)"
  # In the background, so that a signal to this script is handled at once; there a shell ignores SIGINT.
  timeout --signal="${stop_signal:-TERM}" --kill-after="$KILL_AFTER" $((most - KILL_AFTER)) \
    env --default-signal=INT "$@" >>"$log" 2>&1 &
  child=$!
  wait "$child" || status=$?
  child=''
  keep_logs
  echo "== $name: status $status after $((SECONDS - begun)) s"
  ! ended_by_time || notes+=("$name was ended after $most s")
}

# Put the logs so far into one archive.
keep_logs() {
  tar -czf "$out/.logs.part" -C "$logs" . && mv "$out/.logs.part" "$out/logs.tar.gz"
}

ended_by_signal() {
  trap '' TERM
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
  keep_logs
  verdict 143 "ended by a signal after $SECONDS s; the results so far are in $out."
}

# Print what the last section wrote into its log.
printed() { tail -c "+$((log_start + 1))" "$log"; }

ended_by_time() { ((status == 124 || status == 137)); }

# Run a section; a status other than success or timeout is a problem.
checked_section() {
  section "$@"
  ((status == 0)) || ended_by_time || problem "$1 ended with status $status; see ${3##*/}"
}

# Compare the bits of every kernel; many processes compile at the same time.
small_checks() {
  local i jobs=2
  [[ $device == cpu ]] || jobs=$(($(nproc) < 16 ? $(nproc) : 16))
  for ((i = 0; i < jobs; i++)); do
    "$PYTHON" scripts/sanitize_kernels.py --device "$device" --share "$i/$jobs" &
  done
  wait
}
export -f small_checks

run_bits() { # MOST_SECONDS
  local wrong
  section bits "$1" "$logs/bits.log" bash -c small_checks
  printed | grep -E '^(right bits|WRONG):' | sort -r | cut -c1-170 || true
  wrong=$(grep -c '^WRONG:' "$logs/bits.log" || true)
  ((wrong == 0)) || problem "$wrong small checks of kernels failed; see bits.log"
  grep -q '^right bits:' "$logs/bits.log" || problem "no kernel's bits were found right; see bits.log"
}

# No case begins in the last GRACE seconds, so that the last one may end.
run_times() { # NAME MOST_SECONDS GRACE FILE ARGUMENT...
  local name=$1 most=$2 grace=$3 file=$4
  shift 4
  checked_section "$name" "$most" "$logs/times.log" "${starter[@]}" "$PYTHON" scripts/bench_kernels.py --device "$device" \
    --seconds $((slow * most - grace)) --output "$out/$file" "$@"
  printed | grep -vE '^(Traceback|  )' | cut -c1-170 || true
}

run_tests() { # NAME MOST_SECONDS EXPRESSION OPTION...
  local name=$1 most=$2 which=$3 files
  shift 3
  mapfile -t files < <(grep -lE 'NEEDS_GPU|mark\.gpu' tests/*/test_*.py)
  if [[ $device == cpu ]]; then
    files=(tests/gpu/test_gpu_group.py)
    export VLLM_DFLOAT_GPU_REHEARSAL=1
  fi
  # On SIGINT, as from the keyboard, pytest still reports what has failed so far.
  stop_signal=INT section "$name" "$most" "$logs/tests.log" "$PYTHON" -m pytest -v -m gpu -k "$which" \
    -p no:cacheprovider --tb=short --durations=8 "$@" "${files[@]}"
  printed | grep -E '^(FAILED|ERROR)|passed|failed|no tests ran' | cut -c1-200 | tail -n 12 || true
  ((status == 0 || status == 5)) || ended_by_time || problem "$name ended with status $status; see tests.log"
  ! printed | grep -E '^(FAILED|ERROR) ' >/dev/null || problem "$name: some failed; see tests.log"
}

sanitize() { # TOOL MOST_SECONDS CHECK...
  local tool=$1 most=$2
  shift 2
  section "$tool" "$most" "$logs/sanitizer.log" compute-sanitizer --tool "$tool" --error-exitcode 9 \
    "$PYTHON" scripts/sanitize_kernels.py "$@"
  printed | grep -E '^=+ (ERROR SUMMARY|RACECHECK SUMMARY|Invalid|Error)|^(right bits|WRONG):' |
    cut -c1-160 | tail -n 12 || true
  if printed | grep 'Device not supported' >/dev/null; then
    notes+=("compute-sanitizer does not support this device")
  elif printed | grep -E '^=+ +(Invalid|Error:|RACECHECK SUMMARY: [1-9]|.* hazard detected)|^WRONG:' >/dev/null || { ((status)) && ! ended_by_time; }; then
    problem "$tool of compute-sanitizer found errors; see sanitizer.log"
  fi
}

# Profile one launch of a decode kernel, with its stall reasons.
run_counters() {
  section counters 45 "$logs/counters.txt" ncu --clock-control none --target-processes all \
    -k regex:_decode_kernel -s 4 -c 1 --section SpeedOfLight --section MemoryWorkloadAnalysis \
    --section WarpStateStats --section Occupancy "$PYTHON" scripts/launch_decode.py
  printed | grep -E 'Throughput|Duration|Hit Rate|Registers|Occupancy' | head -n 20 || true
  ((status == 0)) || ended_by_time || notes+=("ncu ended with status $status; see counters.txt")
}

on_gpu_only() {
  if command -v compute-sanitizer >/dev/null; then
    # Without PyTorch's memory pool: within the pool, a read past a tensor's end would not be detected.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitize memcheck 50 fast_group fast_chosen fast_run fast_in_order official_run packed_run \
      official_held packed_decode encoder packed_rows packed_group packed_experts official_encoder official_unit
  else
    notes+=("compute-sanitizer is not installed")
  fi
  run_tests "tests of over 2^31 weights" 90 two_billion
  if command -v ncu >/dev/null; then run_counters; else notes+=("ncu is not installed"); fi
  ! command -v compute-sanitizer >/dev/null || sanitize racecheck 35 official_run official_held fast_chosen encoder packed_decode
  section tuning 70 "$logs/times.log" "$PYTHON" scripts/tune_kernels.py --seconds 50 \
    --only fast_rows_per_program fast_tiles_per_program chosen_programs
  printed | sed -n '/^section  *case/,$p' | tail -n 18 | cut -c1-130
}

status=0
facts=$("$PYTHON" scripts/bench_setup.py --device "$device") || status=$?
((status == 0)) || verdict 2 "it cannot run here: scripts/bench_setup.py ended with status $status and says why."
if [[ -z $out && $device == cuda ]]; then
  out=scripts/results/$("$PYTHON" scripts/bench_report.py "$facts")/verdict-$(date +%F)
fi
out=${out:-$(mktemp -d)}
mkdir -p "$out"
# No file of an earlier run may be mistaken for this run's.
rm -f "$out"/{verdict.log,logs.tar.gz,times1.json,times2.json,experts.json,in_order.json,slabs.json,order.json}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap ended_by_signal TERM HUP
exec > >(trap '' TERM HUP; tee "$out/verdict.log")

echo "$facts"
nvidia-smi --query-gpu=clocks.sm,clocks.mem,temperature.gpu,memory.total --format=csv 2>/dev/null || true
echo "$(nproc) cores, $(free -g | sed -n 's/^Mem: *\([0-9]*\).*/\1/p') GiB"
export PYTHON device
own "$BITS"
run_bits "$most"
own "$PRODUCTS"
run_times "products of the fast layout" "$most" 20 in_order.json --only in_order fast_fused
starter=(bash -c '[[ ! -f $1/env.sh ]] || . "$1/env.sh"; PYTHONPATH=$PYTHONPATH:$1; shift; exec "$@"' site "$site")
[[ -n $site ]] || starter=()
own "$EXPERTS"
run_times "times of experts" "$most" 16 experts.json --only experts_fused experts
starter=()
own "$DECODE"
run_times "times of decode and encode" "$most" 10 times1.json --sizes first --only decode fast encode
own "$ORDER"
checked_section order "$most" "$logs/times.log" "$PYTHON" scripts/probe_order.py --device "$device" --output "$out/order.json"
printed | tail -n 20 | cut -c1-170 || true
workers=()
if [[ $device == cuda ]] && "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
own "$TESTS"
run_tests "tests marked gpu" "$most" "not two_billion" "${workers[@]}"
# From here on with the time that is left of --limit.
run_times "times of runs, blocks, layouts, rows, other sizes" 90 20 times2.json --sizes rest \
  --only runs block layouts decode_rows fused decode fast encode
run_times "LM heads in slabs" 50 20 slabs.json --only slabs
[[ $device == cpu ]] || on_gpu_only

for note in "${notes[@]}"; do
  echo "note: $note"
done
echo "results: $out"
((${#problems[@]} == 0)) || verdict 1 "not good: ${problems[0]}."
[[ $device == cuda ]] || verdict 0 "the rehearsal went well; nothing was measured."
verdict 0 "all bits that were compared are right; the times are in the tables above."
