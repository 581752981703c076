"""Neighbours of an image's own landmark: the published list, whatever the blocks and the order."""

import re
from dataclasses import replace

import numpy as np
import pytest

from kit.answers.cleaning import candidates
from kit.answers.cleaning.candidates import Labelled
from kit.data.lists import ImageList
from kit.features.graph import Graph
from tests.answers.cleaning.conftest import (
    features,
    image_list,
    near,
    random_given,
    walked,
)


def whole(given: Labelled, most: int) -> np.ndarray:
    return np.concatenate([rows for _, rows in candidates.blocks(given, most)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [1, 3, 99])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_candidates_are_the_first_neighbours_of_the_same_label(seed, most, k):
    given = random_given(seed, k=k)
    before = given.graph.rows.copy()
    np.testing.assert_array_equal(whole(given, most), walked(given, most))
    np.testing.assert_array_equal(
        candidates.counts(given, most), (walked(given, most) >= 0).sum(axis=1)
    )
    np.testing.assert_array_equal(given.graph.rows, before)


@pytest.mark.parametrize("block", [1, 7, 60, 1000])
def test_candidates_do_not_depend_on_the_blocks(tmp_path, monkeypatch, block):
    given = random_given(0)
    expected = walked(given, 5)
    monkeypatch.setattr(candidates, "BLOCK", block)
    path = candidates.write(given, tmp_path / "candidates.npy", 5)
    written = np.load(path, allow_pickle=False)
    assert written.dtype == np.int32
    np.testing.assert_array_equal(written, expected)


def test_an_image_is_left_out_of_its_own_wherever_it_stands():
    """0, 1 and 2 are one picture; a foreign graph lists 1 before 0 and 0 itself second."""
    rows = np.array([[1, 0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [2, 1, 0, 3]])
    labels = np.array([5, 5, 5, 5])
    found = candidates.same_landmark(rows, np.arange(4), labels, 3)
    assert found.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [2, 1, 0]]


def test_another_order_of_the_list_gives_the_same_candidates():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(50, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels, order = rng.integers(0, 5, 50), rng.permutation(50)
    one = whole(Labelled(image_list(labels), near(vectors, 30)), 8)
    moved = Labelled(image_list(labels[order]), near(vectors[order], 30))
    other = whole(moved, 8)
    np.testing.assert_array_equal(np.where(other < 0, -1, order[other]), one[order])


def test_a_list_its_features_and_their_graph_belong_together():
    given = random_given(0)
    store = features(given.images, np.zeros((60, 3)))
    assert len(candidates.labelled(given.images, store, given.graph)) == 60
    strange = features(image_list(np.zeros(60), "clean"), np.zeros((60, 3)))
    with pytest.raises(ValueError, match="features of list clean: hash"):
        candidates.labelled(given.images, strange, given.graph)
    short = Graph(given.graph.rows[:59], given.graph.scores[:59])
    with pytest.raises(ValueError, match="the graph has 59 images, the features 60"):
        candidates.labelled(given.images, store, short)


def changed(images: ImageList, row: int, **values) -> ImageList:
    rows = images.rows.copy()
    for column, value in values.items():
        rows.loc[row, column] = value
    return replace(images, rows=rows)


@pytest.mark.parametrize("values, message", [
    ({"id": "0000000000000000"}, "names image 0000000000000000 twice"),
    ({"landmark_id": "7"}, "label 1 stands with more than one landmark_id"),
    ({"label": 8}, "landmark_id 899 stands with more than one label"),
])  # fmt: skip
def test_a_list_that_cannot_be_cleaned_is_refused(values, message):
    images = changed(image_list([0, 0, 1, 1]), 3, **values)
    store = features(images, np.zeros((4, 2)))
    graph = near(np.eye(4), 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        candidates.labelled(images, store, graph)


def test_a_list_without_labels_is_refused():
    images = image_list([-1, -1])
    with pytest.raises(ValueError, match="list full has no labels to clean"):
        candidates.labelled(images, features(images, np.eye(2)), near(np.eye(2), 1))
