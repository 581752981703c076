"""Labelled references near each query -> one landmark a query, and how sure that is.

The vote with inliers and the demotion of frequent landmarks are those of the 3rd place of Google
Landmark Recognition 2019 (Ozaki and Yokoo, arXiv 1906.04087); the penalty by images without a
landmark is that of the 1st place of 2020 (Henkel and Singer, arXiv 2010.01650).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kit.rerank import order, sort_insert

NEWTON = 100  # steps at most; it takes about ten
RIDGE = 1e-6  # keeps its matrix invertible where all scores are equal


class Recognised(NamedTuple):
    """One prediction a query."""

    labels: Tensor  # (Q,) int64; -1: none
    confidences: Tensor  # (Q,) float64, comparable between queries; -inf where none


# --- what references say -----------------------------------------------------------------------


def confirmed(
    inliers: Tensor, weight: float = 1.0, most: int = 70, least: int = 0
) -> Tensor:
    """(Q, K) float64: weight * min(inliers, most) / most, what is added to a reference's worth.

    inliers: (Q, K); fewer than `least` count as none.
    """
    counted = inliers.double().clamp(max=most).masked_fill(inliers < least, 0)
    return weight * counted / most


def vote(worths: Tensor, labels: Tensor) -> Recognised:
    """Worths (Q, K) of the nearest references, the nearest first, and their labels (Q, K) -> the
    label with the largest sum, which is its confidence; of equal sums that of the nearer one.

    References without a label (below 0) or worth (-inf) do not vote. A worth may be negative, as
    1 - d^2 is beyond d^2 = 1: then fewer votes are more.
    """
    there = ~torch.isneginf(worths)
    voting = labels.masked_fill(~there, order.ABSENT)
    return Recognised(*sort_insert.elect(torch.where(there, worths, 0.0), voting))


# --- what images without a landmark say ---------------------------------------------------------


def nearness(scores: Tensor, near: int, own: Tensor | None = None) -> Tensor:
    """(n,) float64 mean of the first `near` scores (n, k), best first; 0 where there is none.

    own: (n, k) bool, where an image was found among its own neighbours; such places do not count.
    """
    counted = torch.isfinite(scores) if own is None else torch.isfinite(scores) & ~own
    counted &= counted.cumsum(dim=1) <= near
    sums = torch.where(counted, scores.double(), 0.0).sum(dim=1)
    return sums / counted.sum(dim=1).clamp(min=1)


def lowered(found: Recognised, amounts: Tensor) -> Recognised:
    """The same landmarks, each confidence less by its amount (Q,)."""
    return found._replace(confidences=found.confidences - amounts.double())


# --- what makes confidences comparable ----------------------------------------------------------


def background(cosines: Tensor, labels: Tensor, found: Tensor, votes: int) -> Tensor:
    """(Q,) float64 mean cosine of the references beyond the first `votes` that are not of the
    landmark found (Q,): how near anything comes to this query.

    cosines, labels: (Q, M), the nearest first. Where all of them are of that landmark the last one
    stands for the rest, which are no nearer; where there are none it is 0.
    """
    far = cosines[:, votes:].double()
    there = torch.isfinite(far)
    others = there & (labels[:, votes:] != found[:, None])
    places = torch.arange(far.shape[1], device=far.device)
    last = there & (places == there.sum(dim=1, keepdim=True) - 1)
    counted = torch.where(others.any(dim=1, keepdim=True), others, last)
    sums = torch.where(counted, far, 0.0).sum(dim=1)
    return sums / counted.sum(dim=1).clamp(min=1)


def probability(confidences: Tensor, slope: float, offset: float) -> Tensor:
    """(Q,) in 0..1, in the same order; -inf stays."""
    sure = torch.sigmoid(slope * confidences.double() + offset)
    return torch.where(torch.isneginf(confidences), confidences.double(), sure)


def fit(confidences: Tensor, correct: Tensor) -> tuple[float, float] | None:
    """slope and offset of the logistic curve from confidence (n,) to being correct (n,) bool.

    Platt's (1999), with his targets that leave both ends short of 0 and 1. None where no rising
    curve fits: predictions are all correct or all wrong, or the surer ones are not the better.
    """
    x, right, wrong = confidences.double(), int(correct.sum()), int((~correct).sum())
    if not torch.isfinite(x).all():
        raise ValueError("a curve is fitted to finite confidences")
    if not right or not wrong:
        return None
    target = torch.where(correct, (right + 1) / (right + 2), 1 / (wrong + 2)).double()
    middle, scale = x.mean(), x.std(correction=0).clamp(min=1e-12)
    rows = torch.stack([(x - middle) / scale, torch.ones_like(x)], dim=1)
    beta = torch.zeros(2, dtype=torch.float64)
    for _ in range(NEWTON):
        sure = torch.sigmoid(rows @ beta)
        slack = (sure * (1 - sure)).clamp(min=1e-12)
        curvature = rows.T @ (slack[:, None] * rows) + RIDGE * torch.eye(2).double()
        step = torch.linalg.solve(curvature, rows.T @ (target - sure))
        beta += step.clamp(-2, 2)  # a full step may overshoot where the curve is steep
        if step.abs().max() < 1e-10:
            break
    slope = float(beta[0] / scale)
    return (slope, float(beta[1] - slope * middle)) if slope > 0 else None


# --- what the whole batch says: other queries change the answer ---------------------------------


def banned(labels: Tensor, most: int) -> Tensor:
    """(Q,) int64: how many queries have the same label (Q,), where they are more than `most`; else 0."""
    names, at, counts = labels.unique(return_inverse=True, return_counts=True)
    counted = torch.where((names >= 0) & (counts > most), counts, 0)
    return counted[at]


def demoted(found: Recognised, counts: Tensor) -> Recognised:
    """A landmark predicted too often is taken for scenery: its confidence is minus its count (Q,)."""
    sure = torch.where(counts > 0, -counts.double(), found.confidences)
    return found._replace(confidences=sure)


def spread(
    found: Recognised, counts: Tensor, cosines: Tensor, within: float
) -> Recognised:
    """Who looks like a banned query has confidence 0, and the banned keep theirs.

    counts: (Q,) of `banned`; cosines: (Q,) to the nearest banned query; within: of d^2, which is
    2 - 2 cos.
    """
    close = (2 - 2 * cosines.double() < within) & (counts == 0) & (found.labels >= 0)
    return found._replace(confidences=found.confidences.masked_fill(close, 0.0))


def by_rank(parts: Sequence[Recognised], weights: Sequence[float]) -> Recognised:
    """Several models' predictions made one: of each query the label with the largest weighted sum
    of places; of equal sums that of the first model.

    A model's place is the share of its predictions that are less sure, equal ones counted half;
    so models need not have the same scale. The confidence is the sum over the sum of weights.
    """
    whole = math.fsum(weights)
    if len(parts) != len(weights) or not whole > 0 or min(weights) < 0:
        raise ValueError(
            f"{len(parts)} models with weights {list(weights)}; one each, not negative, not all 0"
        )
    places = torch.stack([_places(part) for part in parts], dim=1)
    shares = torch.tensor(weights, dtype=torch.float64) / whole
    labels = torch.stack([part.labels for part in parts], dim=1)
    return Recognised(*sort_insert.elect(places * shares, labels))


def _places(found: Recognised) -> Tensor:
    """(Q,) float64; 0 where there is no prediction."""
    there = found.labels >= 0
    _, at, counts = found.confidences[there].unique(
        return_inverse=True, return_counts=True
    )
    less = counts.cumsum(0) - counts
    places = torch.zeros(len(there), dtype=torch.float64)
    places[there] = (less + counts / 2).double()[at] / max(1, int(there.sum()))
    return places
