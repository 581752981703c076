"""Rows of `bench.py cleaning`: verified pairs of images, beside the published loop over them.

Ours is `kit.rerank.local.verification.verify`, which cleaning calls, with the backend that
01_clean_labels names, sift-ranked, but for two numbers: descriptors as alike, and as far beside the
map, as published. `as sift` is the same with the matcher of the other backend of SIFT: mutual, with
a ratio test, sampled evenly. It has no goal: on photos it is as good and faster, but here, where
false matches crowd out true ones, it misses some.

Synthetic pairs whose true matches are known: 1,000 keypoints with 40-d descriptors in each picture
of 1,024 x 768, some of them moved by one affine map and up to 8 pixels beside it. The rest of what
looks alike is false: a descriptor of one picture, seen again anywhere in the other. True matches lie
nearer than false ones (distances 0.5 and 0.68, deviations 0.1 and 0.07), or no nearer, where only
places tell. `inlier ratio` is the share of the true ones among what looks alike.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np

from kit.rerank.local import verification
from kit.rerank.local.features import LocalFeatures
from kit.rerank.local.matching import Ranked
from kit.rerank.local.verification import Backend

KEYPOINTS, DIM, SIZE = 1000, 40, (768, 1024)
FARTHEST, RESIDUAL, TRIALS = 0.8, 20.0, 1000  # published
RANKED, SIFT = (
    replace(each, geometry=replace(each.geometry, threshold=RESIDUAL))
    for each in map(verification.backend, ("sift-ranked", "sift"))
)
OURS = replace(RANKED, match=Ranked(least=1 - FARTHEST**2 / 2))
CASES = (  # inlier ratio, true matches, are they nearer than false ones
    *((0.04, 20, True), (0.04, 40, True), (0.1, 40, True), (0.1, 100, True)),
    *((0.3, 60, True), (0.3, 300, True), (0.6, 100, True), (0.6, 600, True)),
    *((0.04, 40, False), (0.1, 100, False), (0.3, 300, False), (0.6, 600, False)),
)
TIMED, COUNTED = 8, 16  # pairs of each case
EMPTY = 40  # pairs without any true match
NO_TREE = "the published loop's kd-tree is scipy's, which is not installed"


@dataclass(frozen=True)
class Pair:
    """Two pictures, and which keypoint of the second belongs to which of the first."""

    one: LocalFeatures
    other: LocalFeatures
    true: np.ndarray  # (n, 2)


def verification_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """Speed and recall, case by case."""
    if find_spec("scipy") is None:
        yield bench.missing("pairs verified", NO_TREE)
        return
    for number, (ratio, true, nearer) in enumerate(CASES):
        false = round(true / ratio) - true
        pairs = [
            synthetic(1000 * number + each, true, false, nearer)
            for each in range(4 if bench.quick else COUNTED)
        ]
        timed = pairs[: 1 if bench.quick else TIMED]

        def ours(timed: list[Pair] = timed) -> np.ndarray:
            return inliers(timed)

        def theirs(timed: list[Pair] = timed) -> list[np.ndarray]:
            return [published(pair) for pair in timed]

        name = f"{ratio} inliers, {true} true{'' if nearer else ', no nearer'}"
        ours_s, theirs_s = (
            seconds / len(timed) for seconds in bench.interleaved(ours, theirs)
        )
        yield bench.speed(f"{name}: a pair", ours_s, theirs_s, 20, False)
        found, loop = (
            np.mean([recall(find(pair), pair) for pair in pairs])
            for find in (explained, published)
        )
        yield bench.row(f"{name}: recall ratio", ratio_of(found, loop), 1, False)
        start = time.perf_counter()
        inliers(pairs, SIFT)
        seconds = (time.perf_counter() - start) / len(pairs)
        mutual = np.mean([recall(explained(pair, SIFT), pair) for pair in pairs])
        shares = {"ours": found, "theirs": loop, "as_sift": mutual}
        yield bench.told(
            f"{name}: recall",
            **{side: f"{share:.3f}" for side, share in shares.items()},
            as_sift_a_pair=f"{seconds:.2g} s",
        )


def chance_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """Inliers of pairs that have nothing in common: what a threshold has to stand above."""
    if find_spec("scipy") is None:
        yield bench.missing("false inliers", NO_TREE)
        return
    for false in (300, 960):
        pairs = [
            synthetic(9000 + each, 0, false)
            for each in range(4 if bench.quick else EMPTY)
        ]
        loop = np.array([len(published(pair)) for pair in pairs])
        sides = {
            "ours": inliers(pairs),
            "theirs": loop,
            "as_sift": inliers(pairs, SIFT),
        }
        numbers = {
            side: f"mean {counts.mean():.1f}, most {counts.max()}"
            for side, counts in sides.items()
        }
        yield bench.told(f"no true match, {false} look alike: inliers", **numbers)


def synthetic(seed: int, true: int, false: int, nearer: bool = True) -> Pair:
    """`true` matches, and `false` keypoints of the second picture that look like one of the first."""
    rng = np.random.default_rng(seed)
    here = rng.uniform(0, SIZE[::-1], (KEYPOINTS, 2))
    there = rng.uniform(0, SIZE[::-1], (KEYPOINTS, 2))
    one, other = (directions(rng, KEYPOINTS) for _ in range(2))
    places = rng.permutation(KEYPOINTS)
    moved, copies = places[:true], places[true : true + false]
    origin = rng.permutation(KEYPOINTS)[:true]
    angle, scale = rng.uniform(-0.5, 0.5), rng.uniform(0.7, 1.4)
    linear = scale * np.array(
        [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    ) + rng.uniform(-0.15, 0.15, (2, 2))
    middle = np.array(SIZE[::-1]) / 2
    angles = rng.uniform(0, 2 * np.pi, true)
    beside = rng.uniform(0, 8, (true, 1)) * np.c_[np.cos(angles), np.sin(angles)]
    there[moved] = (here[origin] - middle) @ linear.T + middle + beside
    distance = (0.5, 0.1) if nearer else (0.68, 0.07)
    far = rng.normal(*distance, true).clip(0.2, 0.79)
    other[moved] = at_distance(rng, one[origin], far)
    seen = rng.integers(KEYPOINTS, size=false)
    other[copies] = at_distance(
        rng, one[seen], rng.normal(0.68, 0.07, false).clip(0.4, 0.79)
    )
    first, second = (
        LocalFeatures(points.astype(np.float32), vectors.astype(np.float16), SIZE)
        for points, vectors in ((here, one), (there, other))
    )
    return Pair(first, second, np.stack([origin, moved], axis=1))


def directions(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.normal(size=(count, DIM))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def at_distance(
    rng: np.random.Generator, vectors: np.ndarray, far: np.ndarray
) -> np.ndarray:
    """Unit vectors at these Euclidean distances from the given ones, in random directions."""
    cos = 1 - far[:, None] ** 2 / 2
    aside = rng.normal(size=vectors.shape)
    aside -= (aside * vectors).sum(axis=1, keepdims=True) * vectors
    aside /= np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-12)
    return cos * vectors + np.sqrt(1 - cos**2) * aside


def inliers(pairs: list[Pair], way: Backend = OURS) -> np.ndarray:
    """As cleaning counts them."""
    images = [side for pair in pairs for side in (pair.one, pair.other)]
    numbers = np.arange(len(images)).reshape(-1, 2)
    return verification.verify(numbers, images, way)


def explained(pair: Pair, way: Backend = OURS) -> np.ndarray:
    return verification.explained(pair.one, pair.other, way)


def recall(found: np.ndarray, pair: Pair) -> float:
    """Share of the true matches among `found` (m, 2)."""
    codes = [each[:, 0] * KEYPOINTS + each[:, 1] for each in (found, pair.true)]
    return float(np.isin(codes[1], codes[0]).mean())


def ratio_of(ours: float, theirs: float) -> float:
    return ours / theirs if theirs else float("inf")


def published(pair: Pair) -> np.ndarray:
    """The baseline: (m, 2) inliers, as the 1st place of 2019 found them, a pair at a time."""
    from scipy.spatial import cKDTree

    np.random.seed(114514)  # the loop seeds for every pair
    tree = cKDTree(pair.one.descriptors.astype(np.float32))
    _, nearest = tree.query(
        pair.other.descriptors.astype(np.float32), distance_upper_bound=FARTHEST
    )
    theirs = np.flatnonzero(nearest < KEYPOINTS)
    matches = np.stack([nearest[theirs], theirs], axis=1)
    if len(matches) < 3:
        return matches[:0]
    return matches[
        ransac(pair.one.keypoints[matches[:, 0]], pair.other.keypoints[matches[:, 1]])
    ]


def ransac(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """(m,) bool by random triples: most inliers, then the smallest sum of squares, wins."""
    here, there = here.astype(np.float64), there.astype(np.float64)
    best = np.zeros(len(here), bool)
    best_sum = np.inf
    for _ in range(TRIALS):
        some = np.random.choice(len(here), 3, replace=False)
        matrix = affine(here[some], there[some])
        if matrix is None:
            continue
        moved = np.c_[here, np.ones(len(here))] @ matrix.T
        residuals = np.sqrt(((moved[:, :2] / moved[:, 2:] - there) ** 2).sum(axis=1))
        found = residuals < RESIDUAL
        total = residuals @ residuals
        if found.sum() > best.sum() or (found.sum() == best.sum() and total < best_sum):
            best, best_sum = found, total
            if best.all():
                break
    return best


def affine(here: np.ndarray, there: np.ndarray) -> np.ndarray | None:
    """(3, 3) affine map by total least squares on points moved to their middle and to one size."""
    (mine, points), (yours, targets) = normalised(here), normalised(there)
    count = len(points)
    system = np.zeros((2 * count, 7))
    system[:count, :2], system[:count, 2] = points, 1
    system[count:, 3:5], system[count:, 5] = points, 1
    system[:, 6] = targets.T.ravel()
    _, _, rows = np.linalg.svd(system)
    if not np.isfinite(rows).all() or abs(rows[-1, 6]) < 1e-12:
        return None
    flat = -rows[-1, :6] / rows[-1, 6]
    matrix = np.vstack([flat.reshape(2, 3), [0, 0, 1]])
    return np.linalg.inv(yours) @ matrix @ mine


def normalised(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map that puts the middle at 0 and the mean square distance at 2, and the points there."""
    middle = points.mean(axis=0)
    spread = np.sqrt(((points - middle) ** 2).sum() / len(points))
    scale = np.sqrt(2) / max(spread, 1e-12)
    matrix = np.array(
        [[scale, 0, -scale * middle[0]], [0, scale, -scale * middle[1]], [0, 0, 1]]
    )
    return matrix, (points - middle) * scale


ROWS: list[Callable] = [verification_rows, chance_rows]
