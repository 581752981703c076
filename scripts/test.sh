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
# two files of tests at a time; threads of one process only get in the way of the others
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile "${slow[@]}" "$@"
