"""Inliers of a shortlist -> better order: score bonuses at its head, and neighbours one may trust.

The bonus is that of the 2nd place of Google Landmark Retrieval 2021.
"""

import math

import torch
from torch import Tensor


def fold(
    rows: Tensor,
    scores: Tensor,
    inliers: Tensor,
    top: int = 10,
    weight: float = 0.15,
    most: float = 90,
    least: float = 0,
) -> tuple[Tensor, Tensor]:
    """Rows and scores (Q, k), best first, with the first `top` places in a new order.

    Their scores gain weight * min(inliers, most) / most, and they are sorted again, equals in
    their old order; fewer than `least` inliers count as none. What stands below stays, with its
    scores. inliers: (Q, at least min(top, k)). Places without a row (-1) or with score -inf
    stay last.
    """
    if rows.shape != scores.shape:
        raise ValueError(
            f"rows are {tuple(rows.shape)}, scores {tuple(scores.shape)}; they are one "
            "ranking"
        )
    if top < 1 or not 0 <= weight < math.inf or most <= 0:
        raise ValueError(
            f"top {top}, weight {weight}, most {most}: top is at least 1, the weight not "
            "negative, most above 0"
        )
    head = min(top, rows.shape[1])
    if len(inliers) != len(rows) or inliers.shape[1] < head:
        raise ValueError(
            f"inliers are {tuple(inliers.shape)}; the first {head} places of {len(rows)} "
            "rankings need them"
        )
    found = inliers[:, :head].to(scores)
    found = found.masked_fill((found < least) | (rows[:, :head] < 0), 0)
    gained = scores[:, :head] + weight * found.clamp(max=most) / most
    gained, order = gained.sort(dim=1, descending=True, stable=True)
    return (
        torch.cat([rows[:, :head].gather(1, order), rows[:, head:]], dim=1),
        torch.cat([gained, scores[:, head:]], dim=1),
    )


def verified(inliers: Tensor, least: int = 30, most: int | None = 5) -> Tensor:
    """(N, k) bool: each row's first `most` places that have `least` inliers or more.

    What verified query expansion and DBA may average (1st place of Google Landmark Retrieval
    2019: up to 5 of the nearest); most: None takes them all.
    """
    enough = inliers >= least
    if most is None:
        return enough
    return enough & (enough.cumsum(dim=1) <= most)
