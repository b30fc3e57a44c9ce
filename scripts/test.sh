#!/usr/bin/env bash
# Lint, types and the whole test suite, in .venv with the test extra. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh

make_env test
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
exec pytest "$@"
