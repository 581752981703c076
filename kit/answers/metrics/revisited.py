"""Revisited Oxford and Paris: mAP and mP@k of whole rankings, with images that do not count.

Radenović, Iscen, Tolias, Avrithis and Chum, "Revisiting Oxford and Paris: Large-Scale Image
Retrieval Benchmarking", CVPR 2018. Each query has groups of images; a setup says which of them
are to be found and which are junk, as if they were not in the index. All others are wrong. A
query without any image to find does not count. So do the sets before it (Philbin et al., CVPR
2007 and 2008) and any set of labelled images, in one setup.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

AT = (1, 5, 10)  # k of mP@k


class Setup(NamedTuple):
    """Groups of images, by name."""

    positive: tuple[str, ...]
    junk: tuple[str, ...]


REVISITED = {
    "Easy": Setup(("easy",), ("junk", "hard")),
    "Medium": Setup(("easy", "hard"), ("junk",)),
    "Hard": Setup(("hard",), ("junk", "easy")),
}
CLASSIC = {"classic": Setup(("good", "ok"), ("junk",))}
LABELS = {"all": Setup(("same",), ("self",))}
SETUPS = {"revisited": REVISITED, "classic": CLASSIC, "labels": LABELS}

# group -> 0-based places of its images in the query's ranking of the whole index, in any order;
# -1: in no ranking, such as an image that could not be read
Places = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Score:
    """Means over the queries that have an image to find; NaN without any."""

    mean_ap: float
    mean_precision: tuple[float, ...]  # at AT
    ap: np.ndarray  # (Q,) NaN: nothing to find
    precision: np.ndarray  # (Q, len(AT))

    @property
    def queries(self) -> int:
        """How many count."""
        return int((~np.isnan(self.ap)).sum())

    def __str__(self) -> str:
        pairs = zip(AT, self.mean_precision, strict=True)
        precisions = "  ".join(f"mP@{k} {value:.4f}" for k, value in pairs)
        mean = f"mAP (trapezoid) {self.mean_ap:.4f}"
        return f"{mean}  {precisions}  ({self.queries} queries)"


def evaluate(queries: Sequence[Places], setup: Setup) -> Score:
    """AP is the area under precision and recall, drawn with straight lines (trapezoid)."""
    rows = [_query(places, setup) for places in queries]
    table = np.array(rows, dtype=float).reshape(len(rows), 1 + len(AT))
    counted = table[~np.isnan(table[:, 0])]
    means = counted.mean(axis=0) if len(counted) else np.full(1 + len(AT), np.nan)
    return Score(float(means[0]), tuple(means[1:].tolist()), table[:, 0], table[:, 1:])


def average_precision(places: np.ndarray, positives: int) -> float:
    """0-based places of the positives that were found, ascending, and how many there are -> AP.

    Philbin et al., CVPR 2007: each positive counts the mean of the precision at it and just
    before it, which is 1 before the first place.
    """
    number = np.arange(len(places))
    after = (number + 1) / (places + 1)
    before = np.where(places == 0, 1.0, number / np.maximum(places, 1))
    return float(((before + after) / 2).sum() / positives)


def precision(places: np.ndarray, k: int) -> float:
    """mP@k of one query: k is at most the place of its last positive; 0 where none was found."""
    if not len(places):
        return 0.0
    at = min(int(places[-1]) + 1, k)
    return float((places < at).sum() / at)


def _query(places: Places, setup: Setup) -> list[float]:
    """AP, then precision at each of AT."""
    found, positives = places_found(places, setup)
    if not positives:
        return [float("nan")] * (1 + len(AT))
    ap = average_precision(found, positives)
    return [ap, *(precision(found, k) for k in AT)]


def places_found(places: Places, setup: Setup) -> tuple[np.ndarray, int]:
    """Places of the positives in the ranking, ascending, as if junk were not there; and how many
    positives there are.
    """
    positive = np.concatenate([places[name] for name in setup.positive])
    junk = np.concatenate([places[name] for name in setup.junk])
    found, junk = np.sort(positive[positive >= 0]), np.sort(junk[junk >= 0])
    return found - np.searchsorted(junk, found), len(positive)
