#!/usr/bin/env bash
# Serve a model with vLLM from compressed weights and from BF16, and compare what both answer.
#
#   scripts/quickstart.sh                           the small model in models/tiny
#   scripts/quickstart.sh MODEL                     a local folder or a hub id, in BF16
#   scripts/quickstart.sh DF11_MODEL BF16_MODEL     an official DFloat11 checkpoint and its BF16 original
set -euo pipefail
. "$(dirname "$0")/env.sh"

make_env
exec "$VENV/bin/python" "$ROOT/scripts/quickstart.py" "${@:-$ROOT/models/tiny}"
