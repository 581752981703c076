import numpy as np
import pytest
import torch

from kit.answers.metrics import places
from kit.features import search
from tests.answers.scenes import features, unit

QUERIES, INDEX = 9, 140


@pytest.fixture
def scene():
    """Two models, an index of two parts with equal rows, and some unreadable images."""
    models = []
    for number in range(2):
        vectors = unit(INDEX, seed=number)
        vectors[60:75] = vectors[10:25]  # equal scores in both parts
        index = (
            features(vectors[:50], "index", f"m{number}", (7,)),
            features(
                vectors[50:], "distractors", f"m{number}", (3, 80) if number else ()
            ),
        )
        lost = (4,) if number else ()
        query = unit(QUERIES, seed=number + 7)
        query[2] = vectors[12]
        models.append((features(query, "query", f"m{number}", lost), index))
    return models


def slow(models, weights, marked):
    """Sorts the whole index for each query."""
    total = np.zeros((QUERIES, INDEX))
    lost, silent = np.zeros(INDEX, bool), np.zeros(QUERIES, bool)
    for weight, (query, parts) in zip(weights, models, strict=True):
        index = np.concatenate([part.vectors for part in parts])
        total += weight * (query.vectors.astype(float) @ index.astype(float).T)
        lost |= ~index.any(axis=1)
        silent |= ~query.vectors.any(axis=1)
    total = total.astype(np.float32)
    found = []
    for query, rows in enumerate(marked):
        ranking = sorted(
            np.flatnonzero(~lost), key=lambda row: (-total[query, row], row)
        )
        at = {row: place for place, row in enumerate(ranking)}
        found.append([-1 if silent[query] else at.get(row, -1) for row in rows])
    return found


def drawn(seed=0):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(0, 40, QUERIES)
    sizes[0], sizes[1] = 0, INDEX
    return [draw.permutation(INDEX)[:size] for size in sizes]


def counted(models, weights, marked):
    queries, parts = zip(*models, strict=True)
    return [each.tolist() for each in places.count(queries, parts, marked, weights)]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 0.25)])
def test_a_place_is_the_number_of_images_that_rank_before(scene, weights):
    models, marked = scene[: len(weights)], drawn()
    found = counted(models, weights, marked)
    assert found == slow(models, weights, marked)
    assert -1 in found[1] and 0 in found[1]
    if len(weights) == 2:
        assert set(found[4]) == {-1}


@pytest.mark.parametrize("block", [1, 7, 64])
def test_places_do_not_depend_on_the_block_sizes(scene, monkeypatch, block):
    expected = counted(scene, (0.5, 2.0), drawn())
    monkeypatch.setattr(places, "BLOCK", block)
    monkeypatch.setattr(places, "QUERIES", block)
    assert counted(scene, (0.5, 2.0), drawn()) == expected


def test_places_are_those_of_a_search_for_everything(scene):
    query, parts = scene[0]
    vectors = np.concatenate([part.vectors for part in parts])
    skip = ~vectors.any(axis=1)
    _, rows = search.knn(query.vectors, vectors, INDEX, skip=skip)
    marked = drawn(3)
    expected = [each.tolist() for each in places.of_rankings(rows, marked)]
    assert counted(scene[:1], (1.0,), marked) == expected


def test_the_place_in_a_ranking_is_the_column():
    ranked = torch.tensor([[5, 2, 9, -1], [0, 1, 2, 3]])
    marked = [np.array([9, 5, 0]), np.array([], int)]
    first, second = places.of_rankings(ranked, marked)
    assert first.tolist() == [2, 0, -1] and second.tolist() == []
    assert ranked.tolist() == [[5, 2, 9, -1], [0, 1, 2, 3]]
