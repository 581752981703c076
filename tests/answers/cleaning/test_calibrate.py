"""Curves against a loop, pairs that are what they are called, and the smallest threshold."""

from dataclasses import replace

import numpy as np
import pytest

from kit.answers.cleaning import calibrate
from kit.answers.cleaning.candidates import Labelled
from kit.rerank.local import features
from kit.rerank.local.verification import Backend
from tests.answers.cleaning.conftest import random_given

WAY = Backend(features.Sift(side=160, most=300))


def slow_curve(same, different) -> list[tuple[int, float, float]]:
    rows, least = [], 0
    while not rows or rows[-1][1] or rows[-1][2]:
        least += 1
        shares = [
            sum(n >= least for n in found) / len(found) for found in (same, different)
        ]
        rows.append((least, *shares))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_the_curve_matches_its_definition(seed):
    rng = np.random.default_rng(seed)
    same, different = rng.integers(0, 80, 30), rng.integers(0, 20, 7 + seed)
    before = same.copy(), different.copy()
    curve = calibrate.curve(same, different)
    found = [tuple(row) for row in curve.table().to_numpy().tolist()]
    assert found == slow_curve(same.tolist(), different.tolist())
    assert curve.pairs == (30, 7 + seed)
    np.testing.assert_array_equal(same, before[0])
    np.testing.assert_array_equal(different, before[1])


@pytest.mark.parametrize("share, least", [
    (0.0, 31), (0.01, 30), (0.0149, 30), (0.02, 29), (0.05, 26), (0.5, 1), (0.005, 31)
])  # fmt: skip
def test_the_smallest_threshold_accepts_at_most_that_share(share, least):
    """Of 100 false pairs one has 30 inliers, one 29, and so on; 70 have none."""
    different = np.r_[np.arange(1, 31), np.zeros(70, int)]
    curve = calibrate.curve([200], different)
    assert curve.smallest(share) == least
    assert (different >= least).mean() <= share
    assert least == 1 or (different >= least - 1).mean() > share


def test_pairs_without_inliers_make_a_curve_too():
    curve = calibrate.curve([0, 0], [0])
    assert curve.table().to_numpy().tolist() == [[1, 0, 0]]
    assert curve.smallest(0) == 1


@pytest.mark.parametrize("share", [-0.01, 1, 2, float("nan")])
def test_a_share_that_means_nothing_is_refused(share):
    with pytest.raises(ValueError, match="share of false pairs is"):
        calibrate.curve([5], [3]).smallest(share)


@pytest.mark.parametrize("count", [3, 500])
def test_pairs_are_near_trusted_and_of_one_landmark_or_of_two(count):
    given = random_given(0)
    trusted = np.random.default_rng(0).random(60) < 0.7
    drawn = calibrate.sample(given, trusted, count)
    assert len(drawn.same) <= count and len(drawn.different) <= count
    for pairs, alike in ((drawn.same, True), (drawn.different, False)):
        assert len(set(pairs[:, 0].tolist())) == len(pairs)  # an image asks once
        for image, other in pairs.tolist():
            assert image != other and other in given.graph.rows[image]
            assert trusted[image] and trusted[other]
            assert given.labels[image] >= 0 and given.labels[other] >= 0
            assert (given.labels[image] == given.labels[other]) == alike
    assert count == 500 or len(drawn.same) == len(drawn.different) == 3


def test_pairs_are_among_the_nearest(monkeypatch):
    given = random_given(0, images=200, labels=3, k=100)
    monkeypatch.setattr(calibrate, "NEAR", 10)
    drawn = calibrate.sample(given, np.ones(200, bool))
    for image, other in np.concatenate([drawn.same, drawn.different]).tolist():
        assert other in given.graph.rows[image, :10]


def test_the_seed_decides_the_pairs():
    given, trusted = random_given(0), np.ones(60, bool)
    one, again, other = (
        calibrate.sample(given, trusted, 10, seed).same for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_too_few_trusted_images_are_refused():
    given = random_given(0)
    one = given.labels == given.labels.max()
    for trusted in (one, np.zeros(60, bool)):
        with pytest.raises(ValueError, match="list full: .* trust more of them"):
            calibrate.sample(given, trusted)


def test_pictures_of_one_landmark_have_more_inliers(pictures, tmp_path):
    folder, images, graph = pictures
    given = Labelled(images, graph)
    drawn = calibrate.sample(given, np.ones(len(given), bool), 12)
    curve = calibrate.measure(drawn, given, folder, WAY, tmp_path)
    least = curve.smallest(0.0)
    assert curve.true[least - 1] > 0.4 and curve.false[least - 1] == 0
    assert not list(tmp_path.iterdir())  # local features are gone


def test_measured_pairs_have_the_kind_they_were_drawn_as(pictures, tmp_path):
    folder, images, graph = pictures
    given = Labelled(images, graph)
    drawn = calibrate.sample(given, np.ones(len(given), bool), 12)
    turned = replace(drawn, same=drawn.different, different=drawn.same)
    one, other = (
        calibrate.measure(each, given, folder, WAY, tmp_path)
        for each in (drawn, turned)
    )
    np.testing.assert_array_equal(one.true, other.false)
    np.testing.assert_array_equal(one.false, other.true)
    assert one.pairs == other.pairs[::-1]


def test_pairs_with_an_image_that_cannot_be_read_do_not_count(pictures, tmp_path):
    folder, images, graph = pictures
    given = Labelled(images, graph)
    sizes = [(folder / path).stat().st_size for path in images.rows["path"]]
    cut = int(np.argmin(sizes))
    read, other, third = np.setdiff1d(np.arange(4), cut)[:3]
    drawn = calibrate.Sample(
        np.array([[read, other], [cut, read]]), np.array([[read, third]])
    )
    assert calibrate.measure(drawn, given, folder, WAY, tmp_path).pairs == (1, 1)
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"^{nowhere}: 4 of the 4 images .* no pairs"):
        calibrate.measure(drawn, given, nowhere, WAY, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_killed_calibration_is_in_no_other_backend_s_way(
    pictures, tmp_path, monkeypatch
):
    folder, images, graph = pictures
    given = Labelled(images, graph)
    drawn = calibrate.sample(given, np.ones(len(given), bool), 3)
    with monkeypatch.context() as patch:
        patch.setattr(
            calibrate.shutil, "rmtree", lambda path, ignore_errors=False: None
        )
        calibrate.measure(drawn, given, folder, WAY, tmp_path)
    assert list(tmp_path.iterdir())
    other = Backend(features.Sift(side=160, most=200))
    calibrate.measure(drawn, given, folder, other, tmp_path)


def test_no_pairs_calibrate_nothing():
    with pytest.raises(ValueError, match="^0 pairs of each kind; at least 1"):
        calibrate.sample(random_given(0), np.ones(60, bool), 0)
