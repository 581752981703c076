import json

import pytest

from kit.rerank import chain, steps
from kit.rerank.chain import Chain

CHAINS = [
    Chain({"clean": 1.0}),
    Chain({"b": 0.25, "a": 1.0, "c": 0.0}, (steps.LandmarkCountry(0.2, 0.05, 7),)),
    Chain({"a": 1.0}, tuple(kind() for kind in steps.STEPS.values()), "ranks", 50),
]


@pytest.mark.parametrize("written", CHAINS)
def test_a_chain_survives_its_file(tmp_path, written):
    path = chain.save(written, tmp_path / "tune" / "chain.json")
    read = chain.load(path)
    assert read == written
    assert list(read.models) == list(written.models)
    assert [type(step) for step in read.steps] == [type(step) for step in written.steps]


def test_the_file_of_a_chain_can_be_read_without_us(tmp_path):
    written = Chain({"clean": 1.0}, (steps.AlphaQe(neighbours=4),))
    path = chain.save(written, tmp_path / "chain.json")
    step = {"step": "alpha_qe", "neighbours": 4, "alpha": 3.0, "transductive": False}
    assert json.loads(path.read_text()) == {
        "models": {"clean": 1.0},
        "fusion": "scores",
        "k": 100,
        "steps": [step],
    }


def test_fields_that_a_file_leaves_out_are_the_published_ones(tmp_path):
    values = {"models": {"a": 1}, "steps": [{"step": "landmark_country"}]}
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(values))
    (step,) = chain.load(path).steps
    assert (step.landmark, step.country, step.votes) == (1.0, 0.1, 3)


def test_a_chain_says_what_differs_from_what_was_published():
    changed = steps.LandmarkCountry(landmark=0.2), steps.SortInsert()
    written = Chain({"b": 1.0, "a": 0.5}, changed)
    assert str(written) == "b 1, a 0.5; landmark_country landmark 0.2; sort_insert"


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        (
            "sort_insert",
            "alpha_qe",
            r"\(features\) comes after sort_insert \(ranking\)",
        ),
        ("landmark_country", "dba", r"\(features\) comes after landmark_country"),
        (
            "local",
            "soft_labels",
            r"soft_labels \(bonus\) comes after local \(ranking\)",
        ),
    ],
)
def test_steps_in_an_order_that_cannot_be_are_refused_by_name(before, after, kinds):
    chosen = tuple(steps.build({"step": name}) for name in (before, after))
    with pytest.raises(ValueError, match=kinds + ".*features, bonus, ranking"):
        Chain({"a": 1.0}, chosen)
    Chain({"a": 1.0}, chosen[::-1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"models": {}}, "a chain needs at least one model"),
        ({"models": {"a": -0.5}}, "the weight of model a is -0.5; weights are not neg"),
        ({"models": {"a": 1.0}, "k": 0}, "k is 0; a ranking has at least one place"),
        ({"models": {"a": 1.0}, "fusion": "mean"}, "not one of scores, tags, ranks"),
        (
            {"models": {"a": 1.0}, "votes": 3},
            "no field 'votes'; fields: models, steps,",
        ),
        (
            {"models": {"a": 1.0}, "steps": [{"step": "dba", "k": 3}]},
            "has no field 'k'",
        ),
        (
            {"models": {"a": 1.0}, "steps": [{"neighbours": 3}]},
            "step None is not one of",
        ),
        ([], "it has fields .*, of which models must be there"),
        ({"steps": []}, "of which models must be there"),
    ],
)
def test_a_file_that_holds_no_chain_is_refused(tmp_path, values, message):
    path = tmp_path / "chain.json"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"chain.json: not a chain .*{message}"):
        chain.load(path)


def test_a_missing_chain_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no chain .*04_tune_rerank"):
        chain.load(tmp_path / "chain.json")


@pytest.mark.parametrize("kind", steps.STEPS.values(), ids=str)
def test_numbers_that_mean_nothing_are_refused_by_step_and_field(kind):
    for name, least in kind.least.items():
        with pytest.raises(ValueError, match=f"^step {kind.name}: {name} is -1"):
            kind(**{name: -1})
        kind(**{name: least})
    for name in kind.choices:
        with pytest.raises(ValueError, match=f"{name} 'x' is not one of"):
            kind(**{name: "x"})


def test_unknown_fields_of_a_step_are_refused_with_those_that_there_are():
    with pytest.raises(
        ValueError,
        match="^step alpha_qe has no field 'n'; fields: neighbours, alpha, transductive$",
    ):
        steps.build({"step": "alpha_qe", "n": 3})


@pytest.mark.parametrize("name", chain.NAMED)
def test_a_named_chain_must_be_in_order_and_survive_its_file(tmp_path, name):
    assert name not in steps.STEPS
    written = Chain({"a": 1.0}, chain.NAMED[name])
    assert chain.load(chain.save(written, tmp_path / "chain.json")) == written
