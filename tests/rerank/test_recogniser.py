import json
from dataclasses import fields

import pytest

from kit.rerank import recogniser
from kit.rerank.recogniser import (
    STEPS,
    Background,
    Frequent,
    Inliers,
    NonLandmark,
    Probability,
    Recogniser,
    Vote,
)

WHOLE = Recogniser(
    {"c2x": 1.0, "clean": 0.5},
    (
        Vote(5, "cosine_sum"),
        NonLandmark(0.3, 0.2, "index_val"),
        Inliers(0.7, 60, 12),
        Background(0.5, 20),
        Probability(2.5, -1.0),
        Frequent(40, 0.5),
    ),
    "ranks",
)


def test_what_is_saved_is_loaded(tmp_path):
    path = recogniser.save(WHOLE, tmp_path / "out" / "recognition.json")
    assert recogniser.load(path) == WHOLE
    assert {step.name for step in WHOLE.steps} == set(STEPS)
    assert list(json.loads(path.read_text())) == ["models", "fusion", "steps"]


def test_only_the_models_must_be_said():
    plan = recogniser.build({"models": {"m": 1}})
    assert plan == Recogniser({"m": 1})
    assert (plan.votes, plan.fusion, plan.batch) == (3, "scores", False)


def test_published_parameters_are_the_defaults():
    assert (Vote().votes, Vote().worth) == (3, "distance_sum")
    assert (Inliers().weight, Inliers().most) == (1.0, 70)
    penalty = NonLandmark()
    assert (penalty.references, penalty.queries) == (1.0, 1.0)
    assert (penalty.reference_near, penalty.query_near) == (5, 10)
    assert Frequent().most == 30
    for name in STEPS:
        assert recogniser.published(name) == STEPS[name]()
    assert recogniser.published("non_landmark", "full").images == "full"


@pytest.mark.parametrize("name", STEPS)
def test_a_step_comes_and_goes_at_its_place(name):
    step = WHOLE.step(name)
    if name == "vote":
        changed = recogniser.with_step(WHOLE, Vote(1))
        assert changed.votes == 1 and changed.steps[1:] == WHOLE.steps[1:]
        return
    less = recogniser.without(WHOLE, name)
    assert less.step(name) is None and len(less.steps) == len(WHOLE.steps) - 1
    assert recogniser.with_step(less, step) == WHOLE
    assert recogniser.with_step(WHOLE, STEPS[name]()).step(name) == STEPS[name]()


def test_each_step_but_the_vote_can_be_left_out():
    left = recogniser.ablations(WHOLE)
    assert list(left) == [name for name in STEPS if name != "vote"]
    for name, plan in left.items():
        assert plan == recogniser.without(WHOLE, name) != WHOLE


def test_who_reads_the_whole_batch_says_so():
    assert WHOLE.batch
    assert Recogniser({"m": 1.0}, (Vote(), Frequent())).batch
    assert Recogniser({"m": 1.0, "n": 1.0}, fusion="ranks").batch
    assert not Recogniser({"m": 1.0}, fusion="ranks").batch
    assert not Recogniser({"m": 1.0}, WHOLE.steps[:-1]).batch
    for step in STEPS.values():  # the star in the docstring is what a reader sees
        assert step.__doc__.startswith("*") == (step.kind == recogniser.BATCH)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "models must be there"),
        ([], "models must be there"),
        ({"models": {}}, "name at least one"),
        ({"models": {"m": -1}}, "weight of model m is -1"),
        ({"models": {"m": float("nan")}}, "weight of model m is nan"),
        ({"models": {"m": 0}}, "all weights of models m are 0"),
        ({"models": {"m": 1}, "fusion": "tags"}, "'tags' is not one of scores, votes"),
        ({"models": {"m": 1}, "k": 3}, "no field 'k'; fields: models, steps, fusion"),
        ({"models": {"m": 1}, "steps": []}, "steps none: the order is vote"),
        ({"models": {"m": 1}, "steps": [{"step": "frequent"}]}, "vote must be there"),
        (
            {"models": {"m": 1}, "steps": [{"step": "frequent"}, {"step": "vote"}]},
            "steps frequent, vote: the order is",
        ),
        (
            {"models": {"m": 1}, "steps": [{"step": "vote"}, {"step": "vote"}]},
            "each once at most",
        ),
        (
            {"models": {"m": 1}, "steps": [{"step": "alpha_qe"}]},
            "'alpha_qe' is not one of vote, non_landmark",
        ),
        (
            {"models": {"m": 1}, "steps": [{"step": "vote", "k": 3}]},
            "step vote has no field 'k'; fields: votes, worth",
        ),
        (
            {"models": {"m": 1}, "steps": [{"step": "vote", "votes": 0}]},
            "step vote: votes is 0, not at least 1",
        ),
        (
            {"models": {"m": 1}, "steps": [{"step": "vote", "worth": "rank"}]},
            "worth 'rank' is not one of cosine_mean",
        ),
        (
            {
                "models": {"m": 1},
                "steps": [{"step": "vote"}, {"step": "probability", "slope": 0.0}],
            },
            "slope is 0.0, not above 0",
        ),
    ],
)
def test_what_is_no_recogniser_is_refused(tmp_path, values, words):
    path = tmp_path / "recognition.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError) as caught:
        recogniser.load(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{path}: no recogniser (")
    assert "\n" not in str(caught.value)


def test_without_a_file_the_notebook_that_writes_it_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run 07_recognition first"):
        recogniser.load(tmp_path / "recognition.json")


def test_a_step_tells_what_is_not_published():
    assert str(Vote()) == "vote" and str(Vote(5)) == "vote votes 5"
    told = str(Recogniser({"m": 1.0}, (Vote(), Frequent(10))))
    assert told == "m 1; vote; frequent most 10"
    assert len(fields(Recogniser)) == 3
