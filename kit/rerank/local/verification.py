"""Pairs of images -> inliers: how many of their matches one geometry explains.

A pair's count depends on the two images, the parameters and the seed: not on their order, their
numbers, the other pairs or the number of processes.
"""

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import cv2
import numpy as np
import torch
from torch import Tensor

from kit.rerank.local import features, matching, spread
from kit.rerank.local.features import Describer, LocalFeatures
from kit.rerank.local.matching import Matcher

FITS: dict[str, tuple[int, Callable]] = {  # least matches, and what fits them
    "affine": (3, cv2.estimateAffine2D),
    "homography": (4, cv2.findHomography),
    "fundamental": (8, cv2.findFundamentalMat),
}
SAMPLINGS = {"uniform": cv2.SAMPLING_UNIFORM, "progressive": cv2.SAMPLING_PROSAC}
CHUNK = 64  # pairs a process takes at a time
KEPT = 64  # images' features that a process holds, at most about 35 MB


@dataclass(frozen=True)
class Geometry:
    """MAGSAC++ (Barath et al., CVPR 2020) as OpenCV runs it."""

    model: str = "affine"  # or "homography", "fundamental"
    threshold: float = 8.0  # pixels of the described picture
    iterations: int = 10_000
    confidence: float = 0.99
    cell: float = 4.0  # pixels; inliers of one cell count once
    # or progressive: from the first matches on (PROSAC, Chum and Matas, CVPR 2005)
    sampling: str = "uniform"

    def __post_init__(self) -> None:
        if self.model not in FITS:
            raise ValueError(f"no geometry {self.model}; there are {', '.join(FITS)}")
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                f"no sampling {self.sampling}; there are {', '.join(SAMPLINGS)}"
            )


@dataclass(frozen=True)
class Backend:
    """One way to verify: what describes images, what matches them, what must explain the matches."""

    describe: Describer = field(default_factory=features.Sift)
    match: Matcher = field(default_factory=lambda: matching.Nearest(ratio=0.85))
    geometry: Geometry = field(default_factory=Geometry)

    def __post_init__(self) -> None:
        ranked = isinstance(self.match, matching.Ranked)
        if self.geometry.sampling == "progressive" and not ranked:
            raise ValueError(
                "progressive sampling takes matches best first; match with Ranked"
            )


LOOSE = Geometry(threshold=16.0)  # networks place keypoints less precisely
PROGRESSIVE = Geometry(sampling="progressive", iterations=2_500)
BACKENDS: dict[str, Backend] = {
    "sift": Backend(),
    "xfeat": Backend(features.XFeat(), matching.Nearest(least=0.82), LOOSE),
    "xfeat-lighterglue": Backend(features.XFeat(), matching.LighterGlue(), LOOSE),
    "aliked-lightglue": Backend(features.Aliked(), matching.LightGlue(), LOOSE),
    # every match that looks alike, for when few are right or a facade repeats itself
    "sift-ranked": Backend(match=matching.Ranked(least=0.9), geometry=PROGRESSIVE),
}


def backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"no backend {name}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def inliers(
    one: np.ndarray, other: np.ndarray, geometry: Geometry = Geometry(), seed: int = 0
) -> np.ndarray:
    """(m,) bool: which of the matched points, (m, 2) each, one geometry explains."""
    least, fit = FITS[geometry.model]
    if len(one) < least:
        return np.zeros(len(one), bool)
    params = cv2.UsacParams()
    params.threshold = geometry.threshold
    params.maxIterations = geometry.iterations
    params.confidence = geometry.confidence
    params.randomGeneratorState = seed
    params.sampler = SAMPLINGS[geometry.sampling]
    params.score = cv2.SCORE_METHOD_MAGSAC
    params.loMethod = cv2.LOCAL_OPTIM_SIGMA
    params.loIterations, params.loSampleSize = 10, 50
    params.final_polisher = cv2.MAGSAC
    found, mask = fit(
        np.ascontiguousarray(one, np.float32),
        np.ascontiguousarray(other, np.float32),
        params,
    )
    if found is None or mask is None:
        return np.zeros(len(one), bool)
    return mask.ravel() != 0


def distinct(one: np.ndarray, other: np.ndarray, found: np.ndarray, cell: float) -> int:
    """Places, `cell` pixels wide, that the inliers `found` take; the picture with fewer counts.

    A keypoint with several orientations is one piece of evidence, and so is a heap of points: a
    geometry that squeezes a picture into a spot explains anything.
    """
    cells = ((points[found] // cell).astype(np.int64) for points in (one, other))
    # a cell as one number: to compare pairs takes ten times as long
    return min(len(np.unique((x << 32) + y)) for x, y in (each.T for each in cells))


def count(
    one: LocalFeatures, other: LocalFeatures, way: Backend = Backend(), seed: int = 0
) -> int:
    """Inliers of one pair, whichever of the two comes first."""
    pairs = explained(one, other, way, seed)
    here, there = one.keypoints[pairs[:, 0]], other.keypoints[pairs[:, 1]]
    return distinct(here, there, np.ones(len(pairs), bool), way.geometry.cell)


def explained(
    one: LocalFeatures, other: LocalFeatures, way: Backend = Backend(), seed: int = 0
) -> np.ndarray:
    """(m, 2) keypoints of `one` and of `other` that match and that one geometry explains."""
    marks = [zlib.crc32(np.ascontiguousarray(x.keypoints)) for x in (one, other)]
    if marks[0] > marks[1]:
        return explained(other, one, way, seed)[:, ::-1]
    dims = one.descriptors.shape[1], other.descriptors.shape[1]
    if dims[0] != dims[1]:
        raise ValueError(
            f"descriptors of {dims[0]} numbers, others {dims[1]}: one describer for both"
        )
    pairs = way.match(one, other)
    state = zlib.crc32(struct.pack("<qII", seed, *marks)) >> 1  # a positive int32
    here, there = one.keypoints[pairs[:, 0]], other.keypoints[pairs[:, 1]]
    return pairs[inliers(here, there, way.geometry, state)]


def verify(
    pairs: np.ndarray,
    images: Sequence[LocalFeatures],
    way: Backend = Backend(),
    *,
    seed: int = 0,
    processes: int = 0,
) -> np.ndarray:
    """(P,) int32 inliers of pairs (P, 2) of numbers of `images`; (a, b) and (b, a) are one pair.

    A pair with a negative number (an empty place) and an image with itself have 0: neither is
    evidence. processes: 0 works in this one.
    """
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    if len(pairs) and pairs.max() >= len(images):
        raise IndexError(
            f"a pair names image {pairs.max()}; there are {len(images)} images"
        )
    counted = (pairs >= 0).all(axis=1) & (pairs[:, 0] != pairs[:, 1])
    ordered = np.sort(pairs[counted], axis=1)
    # sorted: a process reads the first image of many pairs once
    once, places = np.unique(ordered, axis=0, return_inverse=True)
    chunks = [once[start : start + CHUNK] for start in range(0, len(once), CHUNK)]
    found = spread.run(_counts, chunks, (images, way, seed), processes)
    result = np.zeros(len(pairs), np.int32)
    if chunks:
        result[counted] = np.concatenate(list(found))[places.ravel()]
    return result


def _counts(
    pairs: np.ndarray, images: Sequence[LocalFeatures], way: Backend, seed: int
) -> np.ndarray:
    image = lru_cache(KEPT)(images.__getitem__)
    return np.array(
        [count(image(int(a)), image(int(b)), way, seed) for a, b in pairs], np.int32
    )


@dataclass(frozen=True)
class _Joined:
    """The images of the index, then those of the queries, under one numbering."""

    index: Sequence[LocalFeatures]
    queries: Sequence[LocalFeatures]

    def __len__(self) -> int:
        return len(self.index) + len(self.queries)

    def __getitem__(self, number: int) -> LocalFeatures:
        beyond = number - len(self.index)
        return self.index[number] if beyond < 0 else self.queries[beyond]


def shortlist_inliers(
    rows: Tensor,
    queries: Sequence[LocalFeatures],
    index: Sequence[LocalFeatures],
    way: Backend = Backend(),
    *,
    top: int | None = None,
    seed: int = 0,
    processes: int = 0,
) -> Tensor:
    """(Q, k) int32 inliers of each query with its ranking rows (Q, k); -1 is an empty place.

    top: only so many columns are verified, the result has no more. With `queries` the same object
    as `index` (the neighbours for DBA) mutual neighbours are verified once, and a row that names
    itself has 0.
    """
    if len(rows) != len(queries):
        raise ValueError(
            f"rows has {len(rows)} rankings, there are {len(queries)} queries"
        )
    wanted = rows[:, :top].cpu().numpy().astype(np.int64)
    if wanted.size and wanted.max() >= len(index):
        raise IndexError(
            f"a ranking names row {wanted.max()}; the index has {len(index)} images"
        )
    same = queries is index
    own = np.arange(len(wanted)) + (0 if same else len(index))
    pairs = np.stack([np.repeat(own, wanted.shape[1]), wanted.ravel()], axis=1)
    images = index if same else _Joined(index, queries)
    found = verify(pairs, images, way, seed=seed, processes=processes)
    return torch.from_numpy(found.reshape(wanted.shape)).to(rows.device)
