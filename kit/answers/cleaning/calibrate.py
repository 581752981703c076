"""Pairs of which we know whether they show one landmark -> how many inliers are evidence.

The published 30 belongs to DELF's matches, of which none has to be mutual, and to an affine RANSAC
with 20 pixels: unrelated images reach a dozen there by chance. Another backend has another number,
so the same question is put to it: from how many inliers on do pairs of different landmarks hardly
ever pass?

Pairs are neighbours by global features, so that those of different landmarks look alike. Where a
trusted label is wrong, a pair of one landmark counts as different: what is measured as false
acceptance is then too high, and the threshold on the safe side.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from kit import files
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.pairs import decoded
from kit.data.readers import open_reader
from kit.rerank.local import cache, verification
from kit.rerank.local.verification import Backend

NEAR = 100  # neighbours among which an image's partners are drawn


@dataclass(frozen=True)
class Sample:
    """Pairs of rows of the list."""

    same: np.ndarray  # (n, 2) of one landmark
    different: np.ndarray  # (m, 2)


@dataclass(frozen=True)
class Curve:
    """Shares of the pairs that are accepted, by the least number of inliers."""

    least: np.ndarray  # (T,) 1, 2, ...
    true: np.ndarray  # (T,) of the pairs of one landmark
    false: np.ndarray  # (T,) of the others
    pairs: tuple[int, int]  # how many there are of each

    def smallest(self, share: float) -> int:
        """The smallest number of inliers that at most this share of the false pairs reaches."""
        if not 0 <= share < 1:
            raise ValueError(f"share of false pairs is {share}; from 0 to below 1")
        return int(self.least[self.false <= share][0])

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(
            {"min_inliers": self.least, "true": self.true, "false": self.false}
        )


def sample(
    given: Labelled, trusted: np.ndarray, count: int = 500, seed: int = 0
) -> Sample:
    """Up to `count` pairs of each kind among the images `trusted` (N,) bool, drawn at random."""
    if count < 1:
        raise ValueError(f"{count} pairs of each kind; at least 1 calibrates")
    rng = np.random.default_rng(seed)
    trusted = trusted & (given.labels >= 0)
    same: list[tuple[int, int]] = []
    different: list[tuple[int, int]] = []
    for image in rng.permutation(np.flatnonzero(trusted)).tolist():
        near = given.graph.rows[image, :NEAR]
        near = near[(near >= 0) & (near != image)]
        near = near[trusted[near]]
        alike = given.labels[near] == given.labels[image]
        for pairs, partners in ((same, near[alike]), (different, near[~alike])):
            if len(partners) and len(pairs) < count:
                pairs.append((image, int(rng.choice(partners))))
        if len(same) == len(different) == count:
            break
    if not same or not different:
        raise ValueError(
            f"list {given.images.name}: {len(same)} pairs of one landmark and "
            f"{len(different)} of two among the trusted images; trust more of them"
        )
    return Sample(np.array(same), np.array(different))


def measure(
    pairs: Sample,
    given: Labelled,
    data: Path,
    way: Backend,
    folder: Path,
    *,
    seed: int = 0,
    processes: int = 0,
) -> Curve:
    """Verifies the pairs; local features lie in `folder` as long as that takes.

    A pair with an image that cannot be read says nothing and does not count.
    """
    both = np.concatenate([pairs.same, pairs.different])
    rows, places = np.unique(both, return_inverse=True)
    names = given.images.rows["path"].to_numpy()[rows]
    read = partial(decoded, open_reader(data))
    what = files.fingerprint([names.tolist(), cache.made_by(way.describe)])
    aside = folder / f"calibration-{what[:12]}"
    described = cache.fill(aside, names, read, way.describe, processes=processes)
    found = verification.verify(
        places.reshape(-1, 2), described, way, seed=seed, processes=processes
    )
    absent = np.isin(names, described.manifest["unreadable"])
    shutil.rmtree(aside)
    seen = ~absent[places.reshape(-1, 2)].any(axis=1)
    same, different = (
        found[part][seen[part]]
        for part in (slice(len(pairs.same)), slice(len(pairs.same), None))
    )
    if not len(same) or not len(different):
        raise ValueError(
            f"{data}: {absent.sum()} of the {len(names)} images that calibrate cannot be "
            f"read, such as {names[absent][0]}; no pairs are left"
        )
    return curve(same, different)


def curve(same: Sequence[int], different: Sequence[int]) -> Curve:
    """Inliers of pairs of one landmark and of others -> what each threshold accepts."""
    same, different = np.sort(same), np.sort(different)
    least = np.arange(1, max(same[-1], different[-1], 0) + 2)
    true, false = (
        (len(found) - np.searchsorted(found, least)) / len(found)
        for found in (same, different)
    )
    return Curve(least, true, false, (len(same), len(different)))
