from pathlib import Path

import pandas as pd
import pytest

from kit.answers import tuning
from kit.rerank import recogniser, steps
from kit.rerank.chain import Chain

BASE = Chain({"a": 1.0})


def worth(chain: Chain) -> float:
    """A made-up score: b at weight 0.5 helps a, c never does."""
    gains = {("b", 0.5): 0.2, ("b", 1.0): 0.1, ("c", 0.5): -0.1, ("c", 1.0): 0.0}
    return sum(gains.get(pair, 0) for pair in chain.models.items())


def test_a_model_joins_at_its_best_weight_and_only_if_it_helps():
    fused = tuning.fused(BASE, ["b", "c"], [0.5, 1.0], worth)
    assert dict(fused.models) == {"a": 1.0, "b": 0.5}
    assert tuning.fused(BASE, ["b"], [], worth) == BASE


def near(chain: Chain) -> float:
    step = chain.steps[-1]
    return -abs(step.landmark - 0.3) - abs(step.country - 0.05)


def test_tuned_fields_score_better_than_published_ones_and_repeat():
    published = steps.LandmarkCountry()
    found = tuning.tuned(BASE, published, near, trials=60)
    assert near(tuning.with_step(BASE, found)) > near(tuning.with_step(BASE, published))
    assert abs(found.landmark - 0.3) < 0.15
    assert found == tuning.tuned(BASE, published, near, trials=60)


def test_a_step_that_nothing_improves_stays_as_it_is():
    published = steps.AlphaQe(alpha=100.0)  # outside of the space
    assert tuning.tuned(BASE, published, lambda chain: 0.5, 20) is published
    assert tuning.tuned(BASE, published, lambda chain: 0.5, 0) is published
    unknown = steps.Category()  # nothing of it is searched
    assert tuning.tuned(BASE, unknown, lambda chain: 0.5, 20) is unknown


def test_a_step_joins_at_the_end_of_its_kind():
    chain = tuning.with_step(BASE, steps.SortInsert())
    for step in (steps.LandmarkCountry(), steps.AlphaQe(), steps.Refine(), steps.Dba()):
        chain = tuning.with_step(chain, step)
    names = [step.name for step in chain.steps]
    assert names == ["alpha_qe", "dba", "landmark_country", "sort_insert", "refine"]


@pytest.mark.parametrize("name", tuning.SPACES)
def test_every_space_names_numbers_of_its_step_that_the_step_accepts(name):
    known = steps.STEPS | recogniser.STEPS
    step = steps.build({"step": name}, known)
    for field, axis in tuning.SPACES[name].items():
        assert type(axis[0]) is type(axis[1]) and axis[0] < axis[1]
        for value in axis:
            changed = steps.build({**step.to_dict(), field: value}, known)
            assert type(getattr(changed, field)) is type(getattr(step, field))


def test_a_step_of_recognition_is_tuned_at_its_place():
    plan = recogniser.Recogniser({"a": 1.0}, (recogniser.Vote(), recogniser.Frequent()))

    def worth(plan):
        assert [step.name for step in plan.steps] == ["vote", "background", "frequent"]
        return -abs(plan.step("background").weight - 2)

    join = recogniser.with_step
    step = tuning.tuned(plan, recogniser.Background(), worth, 20, join=join)
    assert abs(step.weight - 2) < 0.9


def halves(*rows: tuple[str, str]) -> pd.DataFrame:
    ids = [f"q{number}" for number in range(len(rows))]
    images, usage = zip(*rows, strict=True)
    return pd.DataFrame({"id": ids, "images": images, "usage": usage})


@pytest.mark.parametrize(
    ("rows", "empty"),
    [
        ([("a", "Public"), ("b c", "Private")], ""),
        ([("a", "Private"), ("b", "Private")], "Public"),
        ([("", "Public"), ("b", "Private")], "Public"),
        ([(" ", "Public"), ("b", "Private")], "Public"),
        ([("a", "Public"), ("", "Private"), ("", "Ignored")], "Private"),
        ([("", "Ignored")], "Public"),
    ],
)
def test_a_half_without_a_query_that_counts_must_be_refused_by_name(rows, empty):
    source = Path("lists/solution.csv")
    if not empty:
        tuning.refuse_empty_half(halves(*rows), source)
        return
    with pytest.raises(ValueError, match=f"{source}: no query of the {empty} half"):
        tuning.refuse_empty_half(halves(*rows), source)


def test_nothing_must_be_chosen_by_a_score_that_is_nan():
    def nan(chain: Chain) -> float:
        return float("nan")

    with pytest.raises(ValueError, match="a 1; landmark_country.* is not a number"):
        tuning.tuned(BASE, steps.LandmarkCountry(), nan, 3)
    with pytest.raises(ValueError, match="a 1 is not a number"):
        tuning.fused(BASE, ["b"], [0.5], nan)
    assert tuning.fused(BASE, ["b"], [], nan) == BASE  # nothing to choose from
