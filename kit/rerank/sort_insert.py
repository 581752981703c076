"""Discriminative sort-and-insert (1st place, Google Landmark Retrieval 2019; Ozaki and Yokoo,
"Large-scale Landmark Retrieval/Recognition under a Noisy and Diverse Dataset", 2019-2020).

Each query and each index image has a predicted landmark. Retrieved images of the query's landmark
come first (sort), then the other index images of that landmark (insert), then the rest.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.rerank import order

QUERIES = 1024  # reranked at a time
VOTERS = 65_536  # images whose label is predicted at a time


@dataclass(frozen=True)
class Predictions:
    """The landmark that an image's neighbours among the references vote for."""

    labels: Tensor  # (n,) -1: nobody voted, or the image could not be read
    scores: (
        Tensor  # (n,) float32, s(x): what the votes for the label are worth together
    )


def cosine_mean(cosines: Tensor) -> Tensor:
    """(n, K) each vote is worth cos / K; published with an insert threshold of 0.6."""
    return cosines / cosines.shape[1]


def cosine_sum(cosines: Tensor) -> Tensor:
    """(n, K) each vote is worth cos; the same order, the threshold K times as high (1.8)."""
    return cosines


def distance_sum(cosines: Tensor) -> Tensor:
    """(n, K) each vote is worth 1 - d^2 = 2 cos - 1; the competition's, with a threshold of 0."""
    return 2 * cosines - 1


WORTHS: dict[str, Callable[[Tensor], Tensor]] = {
    "cosine_mean": cosine_mean,
    "cosine_sum": cosine_sum,
    "distance_sum": distance_sum,
}


def predict(
    scores: Tensor, labels: Tensor, worth: Callable[[Tensor], Tensor] = cosine_mean
) -> Predictions:
    """Cosines (n, K) of the nearest references, best first, and their labels (n, K) -> the label
    with the largest sum of votes; of equal sums that of the nearer reference.

    Labels below 0 do not vote; who has no voter has label -1 and score -inf.
    """
    order.check(scores, labels)
    blocks = zip(scores.split(VOTERS), labels.split(VOTERS), strict=True)
    found = [elect(worth(near.double()), named) for near, named in blocks]
    names, sums = zip(*found, strict=True)
    return Predictions(torch.cat(names), torch.cat(sums).float())


def elect(votes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Worths (n, K) float64 of votes for labels (n, K), the nearer reference first -> the label of
    the largest sum (n,) and that sum (n,) float64; of equal sums that of the nearer reference.

    Labels below 0 do not vote; who has no voter has label -1 and sum -inf.
    """
    same = labels[:, :, None] == labels[:, None, :]
    sums = torch.where(same, votes[:, None, :], 0.0).sum(dim=2)
    sums = sums.masked_fill(labels < 0, -torch.inf)
    best = (sums == sums.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    sums = sums.gather(1, best)[:, 0]
    names = labels.gather(1, best)[:, 0]
    return names.masked_fill(torch.isneginf(sums), order.ABSENT), sums


def sort_insert(
    scores: Tensor,
    rows: Tensor,
    query: Predictions,
    index: Predictions,
    k: int | None = None,
    above: float = 0.6,
    at_least: float = -math.inf,
) -> tuple[Tensor, Tensor]:
    """A ranking (Q, m) -> scores (Q, k) and rows (Q, k) after sorting and inserting.

    k: places kept, as many as there were if None. above: index image i is inserted if
    s(q) + s(i) > above; +inf only sorts. at_least: queries of a smaller s(q) are left alone.
    Inserted images are ordered by s(i), ties to the lower row.

    Scores: retrieved images of the landmark keep theirs. The inserted ones, with s(i), and the
    rest, with theirs, are lowered, each group as a whole, as far as it reaches above the end of
    the group before it; then each score as little as makes the list strictly descending. A list
    that nothing changes keeps its scores.
    """
    width = rows.shape[1] if k is None else k
    order.check(scores, rows, len(index.labels), width)
    if len(query.labels) != len(rows):
        raise ValueError(f"{len(query.labels)} predictions for {len(rows)} queries")
    inverted = _invert(index)
    names = query.labels.masked_fill(query.scores < at_least, order.ABSENT)
    parts = [
        _rerank(
            scores[block],
            rows[block].long(),
            Predictions(names[block], query.scores[block]),
            index,
            inverted,
            width,
            above,
        )
        for block in (
            slice(start, start + QUERIES) for start in range(0, len(rows), QUERIES)
        )
    ]
    new_scores, new_rows = zip(*parts, strict=True)
    return torch.cat(new_scores), torch.cat(new_rows)


@dataclass(frozen=True)
class _Inverted:
    """Index rows by label, within a label by s descending, then by row."""

    rows: Tensor  # (N,)
    labels: Tensor  # (N,) ascending: the labels of `rows`
    places: Tensor  # (N,) where each index row stands in `rows`


def _invert(index: Predictions) -> _Inverted:
    rows = index.scores.sort(descending=True, stable=True).indices
    labels, by_label = index.labels[rows].sort(stable=True)
    rows = rows[by_label]
    places = torch.empty_like(rows)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return _Inverted(rows, labels, places)


def _rerank(
    scores: Tensor,
    rows: Tensor,
    query: Predictions,
    index: Predictions,
    inverted: _Inverted,
    k: int,
    above: float,
) -> tuple[Tensor, Tensor]:
    """`sort_insert` of a block of queries, by (Q, k) arrays only."""
    known = query.labels >= 0
    held = rows.clamp(min=0)
    agrees = (
        (index.labels[held] == query.labels[:, None]) & known[:, None] & (rows >= 0)
    )
    if (agrees & torch.isneginf(scores)).any():
        raise ValueError(
            "an index image with score -inf has a label; "
            "one that could not be read must have label -1"
        )
    first = torch.searchsorted(inverted.labels, query.labels)[:, None]
    end = torch.searchsorted(inverted.labels, query.labels, right=True)[:, None]
    # of the label's first k images at most those agreeing in the list are not new, so
    # they hold all that can still find a place
    near = first + torch.arange(k, device=rows.device)
    fresh = inverted.rows[near.clamp(max=len(inverted.rows) - 1)]
    worth = index.scores[fresh]
    enough = query.scores.double()[:, None] + worth.double() > above
    at = torch.where(agrees, (inverted.places[held] - first).clamp(max=k), k)
    there = torch.zeros(len(rows), k + 1, dtype=torch.bool, device=rows.device)
    there.scatter_(1, at, True)
    insert = (near < end) & known[:, None] & enough & ~there[:, :k]
    list_to, fresh_to = _targets(agrees, insert, k)
    scores_list, scores_fresh = _lowered(scores, agrees, worth, insert)
    new_rows = rows.new_full((len(rows), k + 1), order.ABSENT)
    new_rows = new_rows.scatter_(1, list_to, rows).scatter_(1, fresh_to, fresh)[:, :k]
    new_scores = scores.new_full((len(rows), k + 1), -torch.inf)
    new_scores.scatter_(1, list_to, scores_list).scatter_(1, fresh_to, scores_fresh)
    old_scores, old_rows = order.fit(scores, rows, k)
    kept = (new_rows == old_rows).all(dim=1, keepdim=True)
    return torch.where(kept, old_scores, order.stepped(new_scores[:, :k])), new_rows


def _targets(agrees: Tensor, insert: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """New places of the list (Q, m) and of what may be inserted (Q, k); k is out of the list."""
    positives = agrees.sum(dim=1, keepdim=True)
    inserted = insert.sum(dim=1, keepdim=True)
    rest = positives + inserted + (~agrees).cumsum(dim=1) - 1
    list_to = torch.where(agrees, agrees.cumsum(dim=1) - 1, rest)
    fresh_to = torch.where(insert, positives + insert.cumsum(dim=1) - 1, k)
    return list_to.clamp(max=k), fresh_to.clamp(max=k)


def _lowered(
    scores: Tensor, agrees: Tensor, worth: Tensor, insert: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores (Q, m) of the list and (Q, k) of what is inserted, each group below the one before."""

    def highest(values: Tensor, where: Tensor) -> Tensor:
        return values.masked_fill(~where, -torch.inf).amax(dim=1, keepdim=True)

    def lowest(values: Tensor, where: Tensor) -> Tensor:
        return values.masked_fill(~where, torch.inf).amin(dim=1, keepdim=True)

    end = lowest(scores, agrees)
    fresh = worth - (highest(worth, insert) - end).clamp(min=0)
    end = torch.minimum(end, lowest(fresh, insert))
    rest = scores - (highest(scores, ~agrees) - end).clamp(min=0)
    return torch.where(agrees, scores, rest), fresh
