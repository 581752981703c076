import json
import math
from dataclasses import fields

import pytest

from kit.rerank import chain, recogniser, steps
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
        ({"models": {}}, "name at least one"),
        ({"models": {"a": -0.5}}, "the weight of model a is -0.5; weights are num"),
        ({"models": {"a": 1.0}, "k": 0}, "k is 0; a ranking has 1 to"),
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


NUMBERS = [
    (kind, each.name)
    for kind in (*steps.STEPS.values(), *recogniser.STEPS.values())
    for each in fields(kind)
    if each.type in (int, float)
]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -1e300, 1e308, 10**9, 10**400, True, "1", None]
)
@pytest.mark.parametrize(("kind", "name"), NUMBERS)
def test_a_number_outside_of_its_meaning_must_be_refused_by_name(kind, name, value):
    if (kind.name, name, value) in (("probability", "slope", 10**9),):
        return  # a curve may be that steep
    if (kind.name, name, value) in (("probability", "offset", 10**9),):
        return
    of = recogniser.STEPS if kind.name in recogniser.STEPS else steps.STEPS
    with pytest.raises(ValueError, match=rf"^step {kind.name}: {name} (is|cannot be) "):
        steps.build({"step": kind.name, name: value}, of)


@pytest.mark.parametrize(
    "text",
    [
        '{"models": {"a": 1}, "k": 100.0}',
        '{"models": {"a": 1}, "k": true}',
        '{"models": {"a": 1}, "k": 1e9}',
        '{"models": {"a": 0, "b": 0.0}}',
        '{"models": {"a": 1e308}}',
        '{"models": {"a": true}}',
        '{"models": {"a": "1"}}',
        '{"models": ["a"]}',
        '{"models": {"a": 1}, "models": {"b": 1}}',
        '{"models": {"a": 1, "a": 2}}',
        '{"models": {"a": 1}, "steps": {"step": "dba"}}',
        '{"models": {"a": 1}, "steps": ["dba"]}',
        '{"models": {"a": 1}, "steps": ['
        + ",".join(['{"step": "dba"}'] * 10_000)
        + "]}",
    ],
)
def test_a_hostile_chain_must_be_one_line_with_the_file_s_name(tmp_path, text):
    path = tmp_path / "chain.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*chain\.json: not [^\n]*$"):
        chain.load(path)


@pytest.mark.parametrize(
    ("step", "index", "told"),
    [
        *((steps.Diffusion(), 96, "52%"), (steps.Diffusion(), 500, "10%")),
        *((steps.Diffusion(), 501, ""), (steps.Dba(3), 10, ""), (steps.Local(), 5, "")),
        *((steps.KReciprocal(), 20, "100%"), (steps.Traversal(), 50, "100%")),
    ],
)
def test_a_step_that_averages_over_much_of_an_index_must_be_told(step, index, told):
    (found,) = chain.wide_steps([step], index) or [""]
    assert told in found and bool(told) == bool(found)
