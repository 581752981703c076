#!/usr/bin/env bash
# The whole pipeline on one machine, no GPU needed: bash scripts/demo.sh [--data DIR] [--work DIR]
# Without --data it renders a small synthetic set; other options go to run_pipeline.py.
set -euo pipefail
data= work= rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --data) data=$(realpath -e -- "$2"); shift 2 ;;
    --work) work=$(realpath -m -- "$2"); shift 2 ;;
    *) rest+=("$1"); shift ;;
    esac
done
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
work=${work:-$PWD/work/toy}
if [ -z "$data" ]; then
    data=$work/data
    .venv/bin/python -m kit.data.toy "$data"
fi
.venv/bin/python scripts/run_pipeline.py --recipe toy --data "$data" --work "$work" "${rest[@]}"
