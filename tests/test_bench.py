"""The benchmarks run: what they measure is theirs to tell."""

import json
import os
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


def test_a_chain_of_the_quality_bench_can_be_run_again(tmp_path):
    script = """
import bench, bench_quality as suite
from kit.rerank import chain as chains
class Photos:
    search = chains.Chain({"m": 1.0})
    def gain(self, chain): return "+0"
    def value(self, chain): return 0.5
steps = chains.NAMED["small-places"]
rows = [suite._told(bench.Bench(True), "a: pair " + str(s), Photos(), *s) for s in (steps, steps[:1])]
paths = [row["numbers"]["chain"] for row in rows]
found = [chains.load(suite.Path(path)) for path in paths]
assert [chain.steps for chain in found] == [steps, steps[:1]], found
assert {suite.Path(path).parent for path in paths} == {suite.Path(suite.os.environ["KIT_CHAINS"])}
"""
    here = os.environ | {"KIT_CHAINS": str(tmp_path), "PYTHONPATH": str(SCRIPTS.parent)}
    subprocess.run([sys.executable, "-c", script], cwd=SCRIPTS, check=True, env=here)
