#!/usr/bin/env bash
# Lint, types and the whole test suite, in .venv with the test extra. Arguments go to pytest; without any, each core
# runs a file at a time, and what needs all cores comes last.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

# All checks of .pre-commit-config.yaml, which asks git for the files. Without a repository here, ruff's two only.
check_files() {
  local place
  if place=$(git rev-parse --show-prefix 2>/dev/null) && [ -z "$place" ]; then
    PRE_COMMIT_HOME=$VENV/pre-commit pre-commit run --all-files
  else
    say "no git repository here: ruff only, not the other checks of .pre-commit-config.yaml"
    ruff check .
    ruff format --check .
  fi
}

make_env test
export HF_HUB_OFFLINE=1
check_files
mypy
if [ $# -gt 0 ]; then
  exec pytest "$@"
fi
pytest --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not alone"
exec pytest -m alone      # engines of two ranks need every core, and wait for each other
