"""The published rule against its slow transcription, cell by cell of the grid."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from kit.answers.cleaning import rule
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Rule
from kit.answers.cleaning.verified import Verified
from tests.answers.cleaning.conftest import (
    image_list,
    random_given,
    random_inliers,
    stored,
    walked,
)

REASONS = ("without a label", "no neighbour of its landmark", "not confirmed")


def slow(found, inliers, labels, needs: Rule) -> tuple[set[int], dict[str, set[int]]]:
    """Images that stay, the image as the query; and why the others do not."""
    kept, dropped = set(), {reason: set() for reason in (*REASONS, "few")}
    for image, others in enumerate(found.tolist()):
        others = [other for other in others if other >= 0]
        enough = [o for o in others if inliers[image, o] >= needs.min_inliers]
        if labels[image] < 0:
            dropped["without a label"].add(image)
        elif not others and needs.alone == "drop":
            dropped["no neighbour of its landmark"].add(image)
        elif others and len(enough) < needs.min_neighbours:
            dropped["not confirmed"].add(image)
        else:
            kept.add(image)
    sizes = Counter(labels[image] for image in kept)
    dropped["few"] = {i for i in kept if sizes[labels[i]] < needs.min_images}
    return kept - dropped["few"], dropped


def scene(folder, seed: int, most: int = 4) -> tuple[Labelled, np.ndarray, Verified]:
    """Few neighbours of each, so that few are mutual; exact duplicates and ties among them."""
    given = random_given(seed, images=60, labels=8, k=12)
    inliers = random_inliers(seed, 60)
    return given, inliers, stored(folder, walked(given, most), inliers)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("needs", [
    Rule("inliers"),
    Rule("inliers", min_neighbours=1, min_images=1),
    Rule("inliers", min_inliers=45, min_neighbours=2, alone="keep"),
    Rule("inliers", min_inliers=1, min_neighbours=4, min_images=5, alone="keep"),
])  # fmt: skip
def test_the_rule_matches_its_definition(tmp_path, seed, needs):
    given, inliers, verified = scene(tmp_path, seed)
    kept = rule.by_inliers(verified, given.labels, needs)
    stay, dropped = slow(verified.candidates, inliers, given.labels, needs)
    assert set(np.flatnonzero(kept.images)) == stay
    found = [set(np.flatnonzero(images)) for images in kept.dropped.values()]
    assert found == list(dropped.values())
    assert kept.counts() == dict(zip(kept.dropped, map(len, found), strict=True))
    together = np.sum([kept.images, *kept.dropped.values()], axis=0)
    np.testing.assert_array_equal(together, 1)  # an image has one reason


def test_every_reason_occurs_in_what_is_compared(tmp_path):
    needs = Rule("inliers", min_neighbours=2, min_images=4)
    given, inliers, verified = scene(tmp_path, 0)
    stay, dropped = slow(verified.candidates, inliers, given.labels, needs)
    assert stay and all(dropped.values())


def test_who_asks_is_the_image_itself(tmp_path):
    """0 is a candidate of 1, 2 and 3; of its own it has 1 alone."""
    found = np.array([[1, -1, -1], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    verified = stored(tmp_path, found, np.full((4, 4), 30))
    kept = rule.by_inliers(verified, np.zeros(4, np.int32), Rule("inliers"))
    assert kept.images.tolist() == [False, True, True, True]
    assert rule.support(verified, [30, 31]).tolist() == [[1, 3, 3, 3], [0] * 4]


@pytest.mark.parametrize("needs", [
    Rule("inliers"),
    Rule("inliers", min_images=5, alone="keep"),
])  # fmt: skip
def test_each_cell_of_the_grid_is_the_rule_s(tmp_path, needs):
    given, inliers, verified = scene(tmp_path, 1, most=12)
    grid = rule.grid(verified, given.labels, needs)
    cells = [tuple(row) for row in grid.to_numpy().tolist()]
    assert [cell[:2] for cell in cells] == [
        (least, count) for least in (20, 30, 40, 50) for count in range(1, 11)
    ]
    for least, count, landmarks, images in cells:
        asked = replace(needs, min_inliers=least, min_neighbours=count)
        stay, _ = slow(verified.candidates, inliers, given.labels, asked)
        assert images == len(stay)
        assert landmarks == len({given.labels[image] for image in stay})
    assert len({cell[3] for cell in cells}) > 5


def test_another_order_of_the_list_keeps_the_same_images(tmp_path):
    given, inliers, verified = scene(tmp_path / "one", 2)
    order = np.random.default_rng(0).permutation(60)
    new = np.argsort(order)
    moved = np.where(verified.candidates < 0, -1, new[verified.candidates])[order]
    other = stored(tmp_path / "other", moved, inliers[np.ix_(order, order)])
    needs = Rule("inliers", min_neighbours=2)
    kept = rule.by_inliers(verified, given.labels, needs).images
    labels = image_list(given.labels[order]).labels
    again = rule.by_inliers(other, labels, needs).images
    assert 0 < kept.sum() < 60
    np.testing.assert_array_equal(again, kept[order])


def test_inliers_of_some_images_stand_beside_their_candidates(tmp_path):
    _, inliers, verified = scene(tmp_path, 3)
    rows = np.array([7, 3, 59, 7, 0])
    found = verified.inliers(rows)
    for row, counts in zip(rows, found, strict=True):
        others = verified.candidates[row]
        expected = [inliers[row, other] if other >= 0 else -1 for other in others]
        assert counts.tolist() == expected
    assert (found >= 0).any() and (found < 0).any()


def test_an_empty_place_has_no_inliers_whoever_stands_before(tmp_path):
    """Image 0 has the last image as a candidate, image 1 nobody."""
    found = np.array([[3, -1], [-1, -1], [-1, -1], [0, -1]])
    verified = stored(tmp_path, found, np.full((4, 4), 30))
    expected = [[30, -1], [-1, -1], [-1, -1], [30, -1]]
    assert verified.inliers(np.arange(4)).tolist() == expected


@pytest.mark.parametrize("values, message", [
    ({"mode": "vote"}, "mode"),
    ({"alone": "hide"}, "alone"),
    ({"min_inliers": 0}, "min_inliers"),
    ({"min_neighbours": 0}, "min_neighbours"),
    ({"min_images": 0}, "min_images"),
])  # fmt: skip
def test_a_rule_that_means_nothing_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Rule(**values)
