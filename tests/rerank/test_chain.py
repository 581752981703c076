import json

import pytest

from kit.rerank import chain
from kit.rerank.chain import Chain
from kit.rerank.landmark_country import PUBLISHED, Weights


@pytest.mark.parametrize(
    "written",
    [
        Chain({"clean": 1.0}),
        Chain({"b": 0.25, "a": 1.0, "c": 0.0}, votes=7, weights=Weights(0.2, 0.05)),
    ],
)
def test_a_chain_survives_its_file(tmp_path, written):
    path = chain.save(written, tmp_path / "tune" / "chain.json")
    read = chain.load(path)
    assert read == written
    assert list(read.models) == list(written.models)
    assert isinstance(read.weights, Weights)


def test_the_file_of_a_chain_can_be_read_without_us(tmp_path):
    path = chain.save(Chain({"clean": 1.0}), tmp_path / "chain.json")
    assert json.loads(path.read_text()) == {
        "models": {"clean": 1.0},
        "votes": 3,
        "weights": {"landmark": 1.0, "country": 0.1},
    }


def test_a_chain_is_as_published_unless_it_is_told_otherwise():
    assert Chain({"clean": 1.0}).votes == 3
    assert Chain({"clean": 1.0}).weights == PUBLISHED


def test_a_chain_without_a_model_is_refused():
    with pytest.raises(ValueError, match="^a chain needs at least one model$"):
        Chain({})


@pytest.mark.parametrize(
    ("models", "weights"),
    [
        ({"a": 1.0, "b": -0.5}, PUBLISHED),
        ({"a": 1.0}, Weights(-0.5, 0.1)),
        ({"a": 1.0}, Weights(0.1, -0.5)),
    ],
)
def test_a_negative_weight_is_refused(models, weights):
    with pytest.raises(ValueError, match="^a weight of the chain is -0.5; weights are"):
        Chain(models, weights=weights)


def test_a_file_with_a_chain_that_is_refused_is_refused(tmp_path):
    path = chain.save(Chain({"clean": 1.0}), tmp_path / "chain.json")
    path.write_text(path.read_text().replace("1.0", "-1.0"))
    with pytest.raises(ValueError, match="weights are not negative"):
        chain.load(path)


def test_a_missing_chain_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="no chain .*04_tune_rerank"):
        chain.load(tmp_path / "chain.json")
