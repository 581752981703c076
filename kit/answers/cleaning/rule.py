"""Verified candidates -> images and landmarks that stay: the rule of the 1st place of Google
Landmark Retrieval 2019.

An image stays with `min_neighbours` candidates or more that have `min_inliers` inliers or more with
it; a landmark stays with `min_images` images that stay. The rule is directed: the image is the
query, and who has it among their own candidates does not matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from kit import config
from kit.answers.cleaning.verified import Verified

GRID_INLIERS, GRID_NEIGHBOURS = (20, 30, 40, 50), tuple(range(1, 11))  # published


@dataclass(frozen=True)
class Rule:
    """What an image and a landmark need to stay."""

    mode: str = "votes"  # what confirms an image; or inliers
    min_inliers: int = 30  # published for DELF; `calibrate` finds another backend's
    min_neighbours: int = 3
    min_images: int = 2  # of a landmark
    alone: str = "drop"  # images without any candidate; or keep

    def __post_init__(self) -> None:
        least = {"min_inliers": 1, "min_neighbours": 1, "min_images": 1}
        choices = {"mode": ("votes", "inliers"), "alone": ("drop", "keep")}
        config.check(self, least=least, choices=choices)


@dataclass(frozen=True)
class Kept:
    """Which images stay, and why the others do not."""

    images: np.ndarray  # (N,) bool
    dropped: dict[str, np.ndarray]  # reason -> (N,) bool; an image has one reason

    def counts(self) -> dict[str, int]:
        return {reason: int(images.sum()) for reason, images in self.dropped.items()}


def support(verified: Verified, thresholds: Sequence[int]) -> np.ndarray:
    """(T, N) int32: candidates of each image that have at least so many inliers with it."""
    found = np.zeros((len(thresholds), len(verified)), np.int32)
    for image, _, inliers in verified.directed():
        for row, least in zip(found, thresholds, strict=True):
            np.add.at(row, image[inliers >= least], 1)
    return found


def apply(
    confirmed: np.ndarray, alone: np.ndarray, labels: np.ndarray, rule: Rule
) -> Kept:
    """confirmed, alone (N,) bool: by enough of its candidates; has no candidate."""
    labelled = labels >= 0
    kept = labelled & np.where(alone, rule.alone == "keep", confirmed)
    sizes = np.bincount(labels[kept], minlength=labels.max(initial=-1) + 1)
    rest = np.zeros(len(labels), bool)
    rest[kept] = sizes[labels[kept]] < rule.min_images
    return Kept(
        kept & ~rest,
        {
            "without a label": ~labelled,
            "no neighbour of its landmark": labelled & alone & ~kept,
            "not confirmed": labelled & ~alone & ~kept,
            f"fewer than {rule.min_images} of its landmark stay": rest,
        },
    )


def by_inliers(verified: Verified, labels: np.ndarray, rule: Rule) -> Kept:
    (found,) = support(verified, [rule.min_inliers])
    return apply(found >= rule.min_neighbours, alone(verified), labels, rule)


def alone(verified: Verified) -> np.ndarray:
    """(N,) bool: images without any candidate."""
    return np.array(verified.candidates[:, 0]) < 0


def grid(
    verified: Verified,
    labels: np.ndarray,
    rule: Rule,
    inliers: Sequence[int] = GRID_INLIERS,
    neighbours: Sequence[int] = GRID_NEIGHBOURS,
) -> pd.DataFrame:
    """Landmarks and images that stay, for each min_inliers and min_neighbours; the rest is `rule`'s."""
    lonely, rows = alone(verified), []
    for least, found in zip(inliers, support(verified, inliers), strict=True):
        for count in neighbours:
            kept = apply(found >= count, lonely, labels, rule).images
            landmarks = len(np.unique(labels[kept]))
            rows.append((least, count, landmarks, int(kept.sum())))
    names = ["min_inliers", "min_neighbours", "landmarks", "images"]
    return pd.DataFrame(rows, columns=names)
