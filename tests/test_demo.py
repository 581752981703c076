"""The bars of a finished demo: KIT_DEMO names its work folder, KIT_RECIPE its recipe (toy).

scripts/demo.sh makes it.
"""

import os
from pathlib import Path

import pytest

from kit import files, plan
from kit.answers import gain_table


@pytest.fixture(scope="module")
def run() -> plan.Run:
    folder = Path(os.environ.get("KIT_DEMO", ""))
    if not os.environ.get("KIT_DEMO"):
        pytest.skip("no finished demo: KIT_DEMO names its work folder")
    about = files.read_json(folder / "lists" / "query.json")
    recipe = os.environ.get("KIT_RECIPE", "toy")
    return plan.Run(recipe, Path(about["root"]), folder)


@pytest.fixture(scope="module")
def gains(run) -> dict[str, tuple[float, float]]:
    rows = gain_table.read(run.gains)
    return {step: (public, private) for step, public, private, _ in rows}


def test_every_step_of_the_gain_table_is_above_the_one_before(gains):
    aside = ("(", "search, ")  # comparisons, and stages before the last
    taken = [both for step, both in gains.items() if not step.startswith(aside)]
    assert len(taken) >= 3
    for half in (0, 1):
        scores = [both[half] for both in taken]
        assert scores == sorted(scores) and len(set(scores)) == len(scores)


def test_the_last_stage_is_not_below_the_first(gains):
    stages = [both for step, both in gains.items() if step.startswith("search")]
    assert len(stages) >= 2
    assert sum(stages[-1]) >= sum(stages[0])  # of all queries


def test_real_photos_reach_the_bars(run, gains):
    if (run.data.name, run.recipe) != ("packages", "toy"):
        pytest.skip("these bars are for recipe toy on the packages photos")
    search, rerank = gains["search"][1], gains["rerank"][1]
    assert search >= 0.80
    assert rerank >= 0.84


def test_no_step_needs_three_gigabytes(run):
    markers = [files.read_json(path) for path in run.folder.glob("*.done.json")]
    assert len(markers) == 5 + len(run.stages)
    assert max(marker["peak_bytes"] for marker in markers) < 3e9
