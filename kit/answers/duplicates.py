"""Hashes or features of two lists -> which images of the first look like one of the second."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kit.data import hamming
from kit.data.perceptual import Hashes
from kit.features.search import QUERIES, knn
from kit.features.store import Features

FEW = 64  # near images that a search looks for; where there are more, all are scored
SCORED = 64, 16_384  # images of either list that are scored at a time


class Found(NamedTuple):
    """Images of a list that look like one of another list, each once, in the list's order."""

    ids: np.ndarray  # (n,) U16
    of: np.ndarray  # (n,) U16, the likest of the other list; of equal ones the first
    certainty: np.ndarray  # (n,) cosine, or minus the bits that differ
    pairs: int  # of all that look alike


class _Near(NamedTuple):
    """Pairs of near images."""

    ours: np.ndarray  # (P,) rows
    theirs: np.ndarray  # (P,) rows of the other list
    scores: np.ndarray  # (P,) float32


def by_hash(ours: Hashes, theirs: Hashes, bits: int) -> Found:
    """Images whose hashes differ in at most `bits` bits; flat ones have no hash."""
    mine, other = ours.rows, theirs.rows
    near = hamming.nearest(ours.values[mine], theirs.values[other], bits)
    ids, of = ours.ids[mine[near.rows]], theirs.ids[other[near.of]]
    return Found(ids, of, -near.bits.astype(np.float32), near.pairs)


def by_features(ours: Features, theirs: Features, least: float) -> Found:
    """Images whose features have a cosine of at least `least`, above 0: exact, however many.

    An unreadable image is a row of zeros, near to none. Memory: that of a search, and the pairs of `QUERIES` images that are near.
    """
    best = np.full(len(ours), -np.inf, np.float32)
    of = np.zeros(len(ours), np.int64)
    count = 0
    for start in range(0, len(theirs), QUERIES):
        rows = np.arange(start, min(start + QUERIES, len(theirs)))
        for near in _near(ours, theirs, rows, np.float32(least)):
            count += len(near.ours)
            _keep(near, best, of)
    rows = np.flatnonzero(best > -np.inf)
    return Found(ours.ids[rows], theirs.ids[of[rows]], best[rows], count)


def _near(
    ours: Features,
    theirs: Features,
    rows: np.ndarray,
    least: np.float32,
) -> Iterator[_Near]:
    """All near pairs of `rows`, which are theirs."""
    found = knn(np.array(theirs.vectors[rows]), ours, FEW)
    scores, near = found.scores.numpy(), found.rows.numpy()
    # where every row that was found is near, others may be
    more = (scores[:, -1] >= least) & (scores.shape[1] < len(ours))
    at, place = np.nonzero((scores >= least) & ~more[:, None])
    yield _Near(near[at, place], rows[at], scores[at, place])
    images, block = SCORED
    for start in range(0, int(more.sum()), images):
        some = rows[more][start : start + images]
        queries = theirs.vectors[some].astype(np.float64)
        for first in range(0, len(ours), block):
            part = ours.vectors[first : first + block].astype(np.float64)
            scores = (queries @ part.T).astype(np.float32)  # as the search rounds them
            at, place = np.nonzero(scores >= least)
            yield _Near(first + place, some[at], scores[at, place])


def _keep(near: _Near, best: np.ndarray, of: np.ndarray) -> None:
    """Sets the best score and its row, both (N,), where a pair is better than what is there."""
    order = np.lexsort((near.theirs, -near.scores, near.ours))
    first = order[np.unique(near.ours[order], return_index=True)[1]]
    row, their, score = (each[first] for each in near)
    tie = (score == best[row]) & (their < of[row])
    better = (score > best[row]) | tie
    best[row[better]], of[row[better]] = score[better], their[better]
