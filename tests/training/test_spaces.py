import itertools
import json
import math

import numpy as np
import pytest

from kit.training.job import Stage, change
from kit.training.spaces import is_range, points

PLAN = Stage("first", images="clean", size=32, epochs=4, batch=8)
RANGES = {
    "lr": [1e-4, 1e-1, "log"],
    "margin": [0.1, 0.5, "linear"],
    "epochs": [5, 8, "int"],
    "loss": ["arcface", "cosface"],
}


def fields(*arguments, **options):
    return [point.fields for point in points(*arguments, **options)]


def test_a_grid_is_every_combination_once_in_order():
    space = {"lr": [0.1, 0.2], "margin": [0.3, 0.4, 0.5], "loss": ["arcface"]}
    found = points(space, PLAN)
    assert [tuple(point.fields.values()) for point in found] == list(
        itertools.product([0.1, 0.2], [0.3, 0.4, 0.5], ["arcface"])
    )
    for point in found:
        assert point.stage == change(PLAN, **point.fields) != PLAN
    assert len({point.key for point in found}) == 6


def test_spaces_follow_each_other_and_each_keeps_its_own_fields():
    found = points([{"lr": [0.1, 0.2]}, {"margin": [0.4], "epochs": [2]}], PLAN)
    wanted = [{"lr": 0.1}, {"lr": 0.2}, {"margin": 0.4, "epochs": 2}]
    assert [point.fields for point in found] == wanted
    assert found[2].stage.optim == PLAN.optim
    assert found[0].stage.head == PLAN.head


def test_points_that_give_the_same_stage_are_one():
    same = {"lr": [0.1], "margin": [PLAN.head.margin]}
    assert fields([{"lr": [0.1, 0.2, 0.1]}, same], PLAN) == [{"lr": 0.1}, {"lr": 0.2}]


def test_a_choice_may_be_a_list_as_json_has_it():
    (point,) = points({"milestones": [[1, 2]]}, PLAN)
    assert point.stage.optim.milestones == (1, 2)


def test_draws_stay_in_their_ranges_and_fill_them():
    drawn = fields(RANGES, PLAN, trials=400)
    lr, margin, epochs = (
        np.array([each[name] for each in drawn]) for name in ("lr", "margin", "epochs")
    )
    assert lr.min() >= 1e-4 and lr.max() <= 1e-1
    assert margin.min() >= 0.1 and margin.max() <= 0.5
    assert set(epochs.tolist()) == {5, 6, 7, 8}
    assert {each["loss"] for each in drawn} == {"arcface", "cosface"}
    # a tenth of the draws in every tenth of its range, give or take three deviations
    for share in (np.log10(lr / 1e-4) / 3, (margin - 0.1) / 0.4):
        counts = np.histogram(share, bins=10, range=(0, 1))[0]
        assert np.abs(counts - 40).max() <= 3 * math.sqrt(40)


def test_draws_are_repeated_by_their_seed_and_only_added_to_by_more_of_them():
    few, many = fields(RANGES, PLAN, trials=5), fields(RANGES, PLAN, trials=9)
    assert few == many[:5] == json.loads(json.dumps(few))
    assert few != fields(RANGES, PLAN, trials=5, seed=1)
    other = fields([{"lr": [1, 2]}, RANGES], PLAN, trials=5)
    assert few[0] not in other  # each space has draws of its own


def test_from_choices_alone_no_point_is_drawn_twice():
    space = {"lr": [0.1, 0.2, 0.3], "epochs": [1, 2, 3]}
    grid, some = fields(space, PLAN), fields(space, PLAN, trials=5)
    assert len(some) == 5 and all(some.count(each) == 1 for each in some)
    assert some != grid[:5] and all(each in grid for each in some)
    everything = fields(space, PLAN, trials=20)
    assert everything[:5] == some and len(everything) == 9


def test_what_is_a_range_and_what_are_choices():
    assert is_range([0, 1, "linear"]) and is_range((1, 4, "int"))
    for axis in ([0, 1], [0, 1, 2], ["a", "b", "log"], [1, 2, 3, "log"]):
        assert not is_range(axis)


@pytest.mark.parametrize(
    ("spaces", "trials", "words"),
    [
        ([], 0, "no space to search"),
        ([{"lr": [0.1]}, {}], 0, "a space is empty"),
        ({"lr": []}, 0, "lr: \\[\\] is no list of choices and no range"),
        ({"loss": "arcface"}, 0, "loss: 'arcface' is no list of choices"),
        ({"lr": 0.1}, 0, "lr: 0.1 is no list of choices"),
        ({"rate": [0.1]}, 0, r"stage first: no field 'rate'.*; fields: .*\blr\b"),
        ({"loss": ["arc"]}, 0, "loss 'arc' is not one of arcface, cosface"),
        ({"seed": [0, 1]}, 0, "seed cannot be searched; seeds are averaged"),
        ({"name": ["a"]}, 0, "name cannot be searched"),
        ({"lr": [0.1, 1, "log"]}, 0, "lr is a range: say how many trials to draw"),
        ({"lr": [0.1]}, -1, "trials is -1, not at least 0"),
        ({"lr": [0, 1, "log"]}, 3, "lr: 0 to 1 cannot be a range of log"),
        ({"lr": [2, 1, "linear"]}, 3, "lr: 2 to 1 cannot be a range of linear"),
        ({"epochs": [1, 2.5, "int"]}, 3, "epochs: 1 to 2.5 cannot be a range of int"),
        ({"epochs": [1, 3, "linear"]}, 3, "stage first: epochs cannot be"),
    ],
)
def test_what_is_no_space_of_this_stage_is_refused(spaces, trials, words):
    with pytest.raises(ValueError, match=words):
        points(spaces, PLAN, trials)
