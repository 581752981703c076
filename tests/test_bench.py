"""The benchmarks run: what they measure is theirs to tell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SUITES = sorted(path.stem.removeprefix("bench_") for path in SCRIPTS.glob("bench_*.py"))
SMALL = ("cleaning", "lists")  # the others take minutes


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_has_rows(suite):
    script = f"import bench_{suite} as suite; assert all(map(callable, suite.ROWS))"
    subprocess.run([sys.executable, "-c", script], cwd=SCRIPTS, check=True)


@pytest.mark.parametrize("suite", SMALL)
def test_a_small_suite_runs_and_its_rows_are_written(suite, tmp_path):
    rows = tmp_path / "rows.json"
    given = [SCRIPTS / "bench.py", suite, "--quick", "--json", rows]
    done = subprocess.run(
        [sys.executable, *map(str, given)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {"name", "machine"} <= json.loads(rows.read_text())[0].keys()
    assert "goal" in done.stdout
