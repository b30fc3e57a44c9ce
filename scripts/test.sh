#!/usr/bin/env bash
# Lint, types and the whole test suite, in .venv with the test extra. Arguments go to pytest. Without arguments, and
# with --full alone, each core runs one file at a time, and tests that need all cores run last.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

# All checks of .pre-commit-config.yaml, which gets the files from git; outside a git repository only ruff's two.
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
if [ $# -gt 0 ] && [ "$*" != --full ]; then
  mypy
  exec pytest "$@"
fi
mypy &                    # half a minute on one core, at the same time as the tests
types=$!
pytest "$@" --numprocesses auto --dist loadfile --no-loadscope-reorder -m "not alone"
wait $types
exec pytest "$@" -m alone      # engines of two ranks need every core, and their ranks wait for each other
