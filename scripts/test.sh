#!/usr/bin/env bash
# Lint, types and the whole test suite, in .venv with the test extra. Arguments go to pytest; without any, each core
# runs a file at a time, and what needs all cores comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

make_env test
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not alone"
exec pytest -m alone      # engines of two ranks need every core, and wait for each other
