#!/usr/bin/env bash
# The tests: bash scripts/test.sh [--all] [pytest options]; --all adds those marked slow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
slow=(-m "not slow")
if [ "${1:-}" = --all ]; then
    slow=() && shift
fi
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/python -m pytest "${slow[@]}" "$@"
