import math

import numpy as np
import pytest

from kit.answers.metrics import definitions, revisited
from kit.answers.metrics.revisited import CLASSIC, LABELS, REVISITED, evaluate

GROUPS = ("easy", "hard", "junk")
# the protocol's table: what counts and what is left out
SETUPS = {
    "Easy": (["easy"], ["junk", "hard"]),
    "Medium": (["easy", "hard"], ["junk"]),
    "Hard": (["hard"], ["junk", "easy"]),
}


def one_by_one(ranking, positives, junk, ks):
    """AP and mP@k of a ranking of names: junk is struck out, then the curve is walked."""
    kept = [image for image in ranking if image not in junk]
    area, old_recall, old_precision, right, found = 0.0, 0.0, 1.0, 0, []
    for place, image in enumerate(kept, start=1):
        right += image in positives
        recall, precision = right / len(positives), right / place
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
        if image in positives:
            found.append(place)
    values = []
    for k in ks:
        at = min(found[-1], k) if found else k
        values.append(sum(place <= at for place in found) / at)
    return [area, *values]


def drawn(seed, images=120, queries=25):
    """Random rankings and groups; some queries lack a group, some images are in no ranking."""
    draw = np.random.default_rng(seed)
    rankings, groups = [], []
    for number in range(queries):
        order = draw.permutation(images)
        sizes = draw.integers(0, 12, 3) * (draw.random(3) < 0.7)
        chosen = draw.permutation(images)[: sizes.sum()]
        # positives rather early, as of a system that is some good
        weight = np.isin(order, chosen[: sizes[0]]) * draw.integers(0, 60, images)
        order = order[np.argsort(np.arange(images) - weight, kind="stable")]
        rankings.append(order[: images - (7 if number % 3 == 0 else 0)].tolist())
        parts = np.split(chosen, np.cumsum(sizes)[:-1])
        groups.append(dict(zip(GROUPS, parts, strict=True)))
    return rankings, groups


def places(ranking, groups):
    at = {image: place for place, image in enumerate(ranking)}
    return {
        name: np.array([at.get(image, -1) for image in images.tolist()], dtype=int)
        for name, images in groups.items()
    }


@pytest.mark.parametrize("name", SETUPS)
@pytest.mark.parametrize("seed", range(6))
def test_a_setup_matches_its_definition_on_random_rankings(name, seed):
    rankings, groups = drawn(seed)
    asked = [places(*pair) for pair in zip(rankings, groups, strict=True)]
    score = evaluate(asked, REVISITED[name])
    positive, junk = SETUPS[name]
    rows = []
    for number, (ranking, each) in enumerate(zip(rankings, groups, strict=True)):
        wanted = {image for group in positive for image in each[group].tolist()}
        left_out = {image for group in junk for image in each[group].tolist()}
        if not wanted:
            assert math.isnan(score.ap[number])
            assert np.isnan(score.precision[number]).all()
            continue
        rows.append(one_by_one(ranking, wanted, left_out, (1, 5, 10)))
        found = [score.ap[number], *score.precision[number]]
        np.testing.assert_allclose(found, rows[-1], atol=1e-12)
    assert 0 < len(rows) < len(rankings) and score.queries == len(rows)
    means = np.mean(rows, axis=0)
    np.testing.assert_allclose([score.mean_ap, *score.mean_precision], means)
    assert 0 < score.mean_ap < 1


def test_by_hand():
    """Ranking: hard, junk, easy, wrong, easy."""
    asked = [
        {"hard": np.array([0]), "junk": np.array([1]), "easy": np.array([4, 2])},
    ]
    easy = evaluate(asked, REVISITED["Easy"])  # easy, wrong, easy
    assert easy.mean_ap == pytest.approx((1 + (1 / 2 + 2 / 3) / 2) / 2)
    assert easy.mean_precision == pytest.approx((1, 2 / 3, 2 / 3))
    medium = evaluate(asked, REVISITED["Medium"])  # hard, easy, wrong, easy
    assert medium.mean_ap == pytest.approx((1 + 1 + (2 / 3 + 3 / 4) / 2) / 3)
    assert medium.mean_precision == pytest.approx((1, 3 / 4, 3 / 4))
    hard = evaluate(asked, REVISITED["Hard"])  # hard, wrong
    assert (hard.mean_ap, hard.mean_precision) == (1, (1, 1, 1))
    assert str(hard) == (
        "mAP (trapezoid) 1.0000  mP@1 1.0000  mP@5 1.0000  mP@10 1.0000  (1 queries)"
    )


def test_the_older_benchmarks_count_good_and_ok_images_alike():
    asked = [
        {"good": np.array([0]), "ok": np.array([2]), "junk": np.array([1])},
    ]
    assert evaluate(asked, CLASSIC["classic"]).mean_ap == 1


def test_a_query_of_a_labelled_set_does_not_find_itself():
    asked = [{"same": np.array([1]), "self": np.array([0])}]
    assert evaluate(asked, LABELS["all"]).mean_ap == 1


def test_what_no_ranking_holds_is_not_found_but_asked_for():
    asked = [{"same": np.array([0, -1, -1]), "self": np.array([-1])}]
    score = evaluate(asked, LABELS["all"])
    assert score.mean_ap == pytest.approx(1 / 3)
    assert score.mean_precision == (1, 1, 1)
    nothing = [{"same": np.array([-1]), "self": np.array([], int)}]
    score = evaluate(nothing, LABELS["all"])
    assert (score.mean_ap, score.mean_precision) == (0, (0, 0, 0))


def test_no_query_that_counts_gives_no_number():
    empty = np.array([], dtype=int)
    score = evaluate([{"same": empty, "self": empty}], LABELS["all"])
    assert math.isnan(score.mean_ap) and score.queries == 0
    assert evaluate([], LABELS["all"]).queries == 0


def test_the_area_is_the_one_of_the_other_definitions():
    draw = np.random.default_rng(5)
    hits = draw.random((20, 60)) < 0.2
    expected = definitions.trapezoid(hits, hits.sum(axis=1))
    found = [
        revisited.average_precision(np.flatnonzero(row), int(row.sum())) for row in hits
    ]
    np.testing.assert_allclose(found, expected)


def test_places_come_in_any_order_and_stay_as_they_are():
    rankings, groups = drawn(1)
    asked = [places(*pair) for pair in zip(rankings, groups, strict=True)]
    before = [{name: at.copy() for name, at in each.items()} for each in asked]
    expected = evaluate(asked, REVISITED["Medium"])
    turned = [{name: at[::-1] for name, at in each.items()} for each in asked]
    np.testing.assert_array_equal(evaluate(turned, REVISITED["Medium"]).ap, expected.ap)
    for kept, each in zip(before, asked, strict=True):
        assert all(np.array_equal(kept[name], each[name]) for name in each)
