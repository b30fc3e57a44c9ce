#!/usr/bin/env bash
# A real vLLM end to end on a GPU, in under 6 minutes: BF16 against DFloat11 exact, packed, in the fast layout and with
# about half of the matrices in each, and fused in the fast layout.
#
#     scripts/gpu_serve.sh [--out DIR] [--limit SECONDS] [--commit HASH] [--site FOLDER] [--shape SHAPE] [BENCH_SERVE ARGUMENT...]
#     scripts/gpu_serve.sh --invariant [...]    # under VLLM_BATCH_INVARIANT: BF16 against exact, and fused where exact
#     scripts/gpu_serve.sh --protocol [...] [BENCH_ONLINE ARGUMENT...]    # `vllm bench serve` against `vllm serve`
#     scripts/gpu_serve.sh --device cpu      # a rehearsal with vLLM's CPU build, on a tiny model
#
# Weights in host memory, BF16 and compressed in the same GPU memory: --variants bf16,exact,offload,exact_offload,offload_more
# The same layers copied ahead of use, in BF16 and compressed: --variants bf16,exact,prefetch,exact_prefetch
# The packed layout in mode fused, which decodes more than 4 rows: --variants bf16,exact,fused
# A mixture of experts: --shape qwen3-30b-a3b-12 --variants bf16,exact,fast_fused_exact
# Uses the installed vLLM, or one in FOLDER (put on PYTHONPATH; FOLDER/env.sh is sourced if it exists), with this
# checkout as its plugin. Random weights in the shape of Llama 3.1 8B are written to memory if it has room. vLLM may use
# 28 GiB of the GPU, as on a smaller card, so that the memory saved decides how many sequences fit. Decode steps run
# from CUDA graphs, without torch.compile, which would take half a minute more per engine. Decode steps of up to 64
# sequences are measured with every engine before anything else. Results are written after each engine; if the first
# attention backend gives none, another is tried once. Further arguments go to scripts/bench_serve.py and replace these
# choices. With --protocol, requests go to servers instead, by the protocol that others publish (scripts/bench_online.py,
# to which further arguments go); that takes about 100 s an engine, and --limit is 900 s if not given.
#
# serve.json, serve.png (not with --protocol), logs.tar.gz and serve.log are written to DIR, by default
# scripts/results/<gpu>/serve-<date>, for a rehearsal a temporary folder. Exit status 0 measured, 1 other tokens than BF16's or an engine that did not run,
# 2 it cannot run here. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
device=cuda out='' limit='' site='' shape=''
MEMORY_MIB=28672
GRAPHS='"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 4, 16, 64, 256]}, '

usage() {
  echo "usage: scripts/gpu_serve.sh [--invariant] [--protocol] [--device cuda|cpu] [--out DIR] [--limit SECONDS] [--commit HASH] [--site FOLDER] [--shape SHAPE] [BENCH_SERVE ARGUMENT...]" >&2
  exit 2
}

protocol='' invariant=''
while (($#)); do
  case $1 in
    -h | --help) usage ;;
    --protocol)
      protocol=1
      shift
      continue
      ;;
    --invariant)
      invariant=1
      shift
      continue
      ;;
    --device | --out | --limit | --commit | --site | --shape) (($# > 1)) || usage ;;&
    --device) device=$2 ;;
    --out) out=$2 ;;
    --limit) limit=$2 ;;
    --commit) export VLLM_DFLOAT_COMMIT=$2 ;;
    --site) site=$2 ;;
    --shape) shape=$2 ;;
    *) break ;;
  esac
  shift 2
done
[[ $device == cuda || $device == cpu ]] || usage
limit=${limit:-$([[ -n $protocol ]] && echo 900 || echo 345)}
[[ $limit =~ ^[1-9][0-9]{0,4}$ ]] || usage

cannot() {
  echo "verdict: it cannot run here: $1"
  exit 2
}

[[ -z $invariant || $device == cuda ]] ||
  cannot "--invariant --device cpu: vLLM's CPU build does not start under VLLM_BATCH_INVARIANT. Leave --invariant out."
if [[ -n $site ]]; then
  [[ -d $site ]] || cannot "--site $site: no such folder; expected one that holds the package vllm."
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
  # shellcheck source=/dev/null
  [[ ! -f $site/env.sh ]] || . "$site/env.sh"
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Entry-point metadata by which vLLM finds the plugin in a checkout that is not installed.
plugin=$work/plugin/vllm_dfloat-0.0.0.dist-info
mkdir -p "$plugin"
printf 'Metadata-Version: 2.1\nName: vllm-dfloat\nVersion: 0.0.0\n' >"$plugin/METADATA"
printf '[vllm.general_plugins]\ndfloat11 = vllm_dfloat.integration.plugin:register\n' >"$plugin/entry_points.txt"
export PYTHONPATH=$PWD:$work/plugin${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("vllm"))' ||
  cannot "$PYTHON has no package vllm. Name an interpreter that has it, as PYTHON=.venv/bin/python, or with --site a folder that holds it."
status=0
facts=$("$PYTHON" scripts/bench_setup.py --device "$device") || status=$?
((status == 0)) || cannot "scripts/bench_setup.py ended with status $status and says why."
if [[ -z $out && $device == cuda ]]; then
  out=scripts/results/$("$PYTHON" scripts/bench_report.py "$facts")/serve-$(date +%F)
fi
out=${out:-$(mktemp -d)}
mkdir -p "$out"
rm -f "$out"/serve.{json,png,log} "$out/logs.tar.gz" # no file of an earlier run may be mistaken for this run's
exec > >(tee "$out/serve.log") 2>&1
echo "$facts"

if [[ $device == cpu ]]; then
  shape=${shape:-tiny} folder=$work/weights attention=('') graphs=''
  choices=(--fork --decode-first --eager --batches 1,2 --context 16 --prefill 64 --hold 128 --steps 4 --point-seconds 2 --max-seqs 4 --variants bf16,exact,fast_exact,auto,fast_fused_exact)
else
  shape=${shape:-llama-3.1-8b} attention=(FLASH_ATTN TRITON_ATTN) graphs=$GRAPHS folder=$work/weights
  room=$(df -BG --output=avail /dev/shm 2>/dev/null | tail -n 1 | tr -dc 0-9) || true
  if ((${room:-0} >= 24)); then # 16 GB of weights, and room for the engines
    folder=/dev/shm/vllm-dfloat-$$
    trap 'rm -rf "$work" "$folder"' EXIT
  fi
  total=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1 | tr -dc 0-9) || true
  share=$(awk -v mine="$MEMORY_MIB" -v total="${total:-81559}" 'BEGIN { s = mine / total; printf "%.3f", s < 0.9 ? s : 0.9 }')
  choices=(--fork --decode-first --batches 1,4,16,64,256 --prefill 8192 --hold 2048 --steps 60 --point-seconds 4 --max-seqs 256
    --gpu-memory "$share")
  # The most important first. An engine starts in about 30 s and has 4 s for each of four small batches: 230 s for all
  # five of 290 s, and then two of them or more start again for the rest.
  choices+=(--variants bf16,exact,fast_exact,fast_fused,auto)
fi
if [[ -n $invariant ]]; then # mode fused is refused then
  export VLLM_BATCH_INVARIANT=1
  choices+=(--variants bf16,fast_fused_exact,fast_exact)
fi

# While the GPU makes the weights, vLLM is imported, once for all engines (--fork), and the libraries that the first
# engine would wait for are read into the page cache.
if [[ $device == cuda ]]; then
  mapfile -t folders < <("$PYTHON" -c 'import importlib.util as u
for name in ("torch", "vllm", "nvidia"):
    spec = u.find_spec(name)
    print(*(spec.submodule_search_locations or [] if spec else []), sep="\n")')
  find "${folders[@]}" -name '*.so*' -type f -size +1M -exec cat {} + >/dev/null 2>&1 &
fi

serve() { # ATTENTION_BACKEND ARGUMENT...
  local backend=$1 budget=$((limit - SECONDS - 25)) engine="{${graphs%, }}"
  shift
  if ((budget < 20)); then
    echo "note: no time was left to serve${backend:+ with $backend}"
    return 1
  fi
  [[ -z $backend ]] || engine="{$graphs\"attention_backend\": \"$backend\"}"
  status=0
  timeout --kill-after=10 $((budget + 15)) "$PYTHON" scripts/bench_serve.py --shape "$shape" --folder "$folder" \
    --runs 1 --budget "$budget" --engine "$engine" --logs "$out/logs.tar.gz" --output "$out/serve.json" \
    "${choices[@]}" "$@" || status=$?
  echo "== bench_serve${backend:+ with $backend}: status $status at $SECONDS s"
  return "$status"
}

# As `serve`, with the protocol that others publish.
serve_online() { # ATTENTION_BACKEND ARGUMENT...
  local backend=$1 engine="{${graphs%, }}" online=(--variants "bf16,exact,fast_exact,fast_fused${invariant:+_exact},auto")
  shift
  [[ -z $backend ]] || engine="{$graphs\"attention_backend\": \"$backend\", \"gpu_memory_utilization\": $share}"
  [[ $device == cuda ]] || online=(--variants exact --rates 4,inf --seconds 2 --prompts 6 --input-len 32 --output-len 8)
  [[ $device == cuda ]] || engine='{"enforce_eager": true, "max_num_seqs": 8}'
  status=0
  timeout --kill-after=30 $((limit - SECONDS)) "$PYTHON" scripts/bench_online.py --shape "$shape" --folder "$folder" \
    --budget $((limit - SECONDS - 20)) --engine "$engine" --logs "$work/logs" --output "$out/serve.json" \
    "${online[@]}" "$@" || status=$?
  tar -czf "$out/logs.tar.gz" -C "$work" logs
  echo "== bench_online${backend:+ with $backend}: status $status at $SECONDS s"
}

if [[ -n $protocol ]]; then
  serve_online "${attention[0]}" "$@"
  echo "results: $out"
  ((status == 0)) || echo "verdict: not good: scripts/bench_online.py ended with status $status; see above and $out/logs.tar.gz."
  ((status != 0)) || echo "verdict: measured; the times are in the table above."
  exit $((status == 2 ? 2 : status != 0))
fi
if ! serve "${attention[0]}" "$@" && [[ ! -s $out/serve.json ]] && ((${#attention[@]} > 1)); then
  serve "${attention[1]}" "$@" || true
fi
# Show the engines' log lines about sizes and loading.
tar -xzOf "$out/logs.tar.gz" --wildcards '*.log' 2>/dev/null |
  grep -hE 'dfloat11:|Model loading took|Loading weights took|GPU KV cache size|Graph capturing finished' |
  sed 's/^.*\] //' | cut -c1-200 || true
echo "results: $out"
if ((status != 0)); then
  echo "verdict: not good: scripts/bench_serve.py ended with status $status; see above and $out/logs.tar.gz."
  exit $((status == 2 ? 2 : 1))
fi
echo "verdict: tokens of exact are those of BF16; the times are in the table above."
