from dataclasses import replace

import numpy as np
import pytest
import torch

from kit.answers import scene as scenes
from kit.answers.scene import INDEX, QUERY, REFERENCE, Model, Scene
from kit.features.graph import Graph
from tests.answers.scenes import (
    LOST,
    best,
    by_score,
    cosines,
    features,
    model,
    scene,
    unit,
)


def test_near_index_images_are_those_of_the_dense_scores():
    one = model()
    found = scene(one).near(QUERY, INDEX, 20)
    scores, rows = best(cosines(one.query.vectors, one.index.vectors), 20)
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.scores.numpy(), scores.astype(np.float32))


def test_near_references_are_entries_of_the_voters():
    one = model()
    at = scene(one)
    rows = at.labelled.rows
    dense = cosines(one.index.vectors, one.reference.vectors[rows])
    assert at.near(INDEX, REFERENCE, 5).rows.tolist() == by_score(dense, 5).tolist()
    own = cosines(*[one.reference.vectors[rows]] * 2)
    assert at.near(REFERENCE, REFERENCE, 4).rows.tolist() == by_score(own, 4).tolist()
    scores, landmarks, countries = at.votes(QUERY, 3)
    near = by_score(cosines(one.query.vectors, one.reference.vectors[rows]), 3)
    assert landmarks.tolist() == at.labelled.landmarks.numpy()[near].tolist()
    assert countries.tolist() == at.labelled.countries.numpy()[near].tolist()
    assert scores.shape == (13, 3)


def test_scores_of_several_models_are_weighted_sums():
    pair = model(), model("n", seed=10, dim=8, unreadable=(5,))
    found = scene(*pair, weights=(1.0, 0.25)).near(QUERY, INDEX, 30)
    dense = sum(
        weight * cosines(each.query.vectors, each.index.vectors)
        for each, weight in zip(pair, (1.0, 0.25), strict=True)
    )
    scores, rows = best(dense, 30, lost=(0, 5, 33, 89))
    assert found.rows.tolist() == rows.tolist()
    np.testing.assert_array_equal(found.scores.numpy(), scores.astype(np.float32))


def test_vectors_of_several_models_have_the_inner_products_of_their_scores():
    at = scene(model(), model("n", seed=10, dim=8), weights=(1.0, 0.25))
    products = at.stored(QUERY).float() @ at.stored(INDEX).float().T
    scores = at.near(QUERY, INDEX, 90)
    there = scores.rows >= 0
    wanted = scores.scores[there] / 1.25
    found = products.gather(1, scores.rows.clamp(min=0))[there]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


def test_what_was_searched_is_not_searched_again(monkeypatch):
    at = scene()
    wide = at.near(QUERY, INDEX, 20)
    monkeypatch.setattr(scenes.search, "knn", None)
    assert torch.equal(at.near(QUERY, INDEX, 7).rows, wide.rows[:, :7])
    with pytest.raises(TypeError):
        at.near(INDEX, INDEX, 7)


def test_moved_features_are_searched_anew_and_the_others_are_not():
    at = scene()
    at.near(QUERY, INDEX, 5)
    at.near(QUERY, REFERENCE, 5)
    moved = at.moved(INDEX, torch.from_numpy(unit(90, seed=50)))
    assert set(moved.found) == {(QUERY, REFERENCE, 5)}
    dense = cosines(at.models[0].query.vectors, unit(90, seed=50))
    assert moved.near(QUERY, INDEX, 9).rows.tolist() == best(dense, 9)[1].tolist()
    assert not np.array_equal(at.models[0].index.vectors, moved.models[0].index.vectors)


def test_neighbours_in_the_union_are_those_of_the_joined_rows():
    one = model()
    both = np.concatenate([one.query.vectors, one.index.vectors])
    dense = cosines(both, both)
    rows = best(dense, 10, lost=(13, 46, 102))[1]
    assert scene(one).near_union(10).rows.tolist() == rows.tolist()
    assert scene(one).union().numpy().tolist() == both.tolist()


def test_more_neighbours_than_there_are_give_as_many_as_there_are():
    at = scene()
    assert at.near(QUERY, REFERENCE, 1000).rows.shape == (13, 61)
    assert at.near(QUERY, INDEX, 1000).rows.shape == (13, 90)


def test_references_that_all_vote_in_order_are_not_copied():
    one = model()
    rows = np.arange(70)
    voting = scenes.Voters(rows, torch.zeros(70).long(), torch.zeros(70).long())
    at = Scene((one,), (1.0,), voting)
    assert at.tensor(REFERENCE).data_ptr() == one.reference.vectors.ctypes.data
    assert scene(one).tensor(REFERENCE).shape == (61, 16)


def test_a_scene_without_references_says_what_is_missing():
    one = Model(features(unit(3), "query"), features(unit(4)))
    with pytest.raises(ValueError, match="references that vote; name their list"):
        Scene((one,), (1.0,)).votes(QUERY, 3)
    with pytest.raises(ValueError, match="model m has no features of the reference"):
        one.of(REFERENCE)


def stored(features, k, lost=()):
    """The graph of some features: each row's best others."""
    scores = cosines(features.vectors, features.vectors)
    np.fill_diagonal(scores, -np.inf)
    scores, rows = best(scores, k, lost)
    scores, rows = scores.astype(np.float32), rows.astype(np.int32)
    scores[list(lost)], rows[list(lost)] = -np.inf, -1
    return Graph(rows, scores)


def with_graphs(k, **parts):
    """A scene whose references all vote, with equal index images; and one without graphs."""
    one = replace(model(), **parts)
    one.index.vectors[50:56] = one.index.vectors[49]
    graphs = {
        INDEX: stored(one.index, k, LOST),
        REFERENCE: stored(one.reference, k),
    }
    labels = torch.arange(70) % 6
    voting = scenes.Voters(np.arange(70), labels, labels // 2)
    return [
        Scene((each,), (1.0,), voting) for each in (replace(one, graphs=graphs), one)
    ]


def test_stored_graphs_give_what_a_search_gives(monkeypatch):
    at, searched = with_graphs(9)
    found = [searched.near(which, which, 10) for which in (INDEX, REFERENCE)]
    union = searched.near_union(8)
    at.near(INDEX, QUERY, 8), at.near(QUERY, INDEX, 8), at.near(QUERY, QUERY, 8)
    monkeypatch.setattr(scenes.search, "knn", None)
    for which, wanted in zip((INDEX, REFERENCE), found, strict=True):
        near = at.near(which, which, 10)
        assert torch.equal(near.rows, wanted.rows)
        assert torch.equal(near.scores, wanted.scores)
        assert (
            at.graph(which, 9) == torch.from_numpy(at.models[0].graphs[which].rows)
        ).all()
    assert torch.equal(at.near_union(8).rows, union.rows)


def test_a_graph_of_other_rows_or_too_few_neighbours_is_not_used():
    at, searched = with_graphs(9)
    wrong = Graph(np.zeros((90, 9), np.int32), np.zeros((90, 9), np.float32))
    liar = replace(at.models[0], graphs={INDEX: wrong})
    liar = replace(at, models=(liar,), found={})
    few = searched.near(INDEX, INDEX, 5).rows
    assert not torch.equal(liar.near(INDEX, INDEX, 5).rows, few)  # it is read
    wide = searched.near(INDEX, INDEX, 11).rows
    assert torch.equal(liar.near(INDEX, INDEX, 11).rows, wide)
    assert set(at.moved(INDEX, at.stored(INDEX)).models[0].graphs) == {REFERENCE}
    half = replace(liar, weights=(0.5,), found={})
    assert torch.equal(half.near(INDEX, INDEX, 5).rows, wide[:, :5])
