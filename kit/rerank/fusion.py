"""Several models' features or rankings made into one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kit.rerank import order


def concatenate(features: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(n, sum of D) features whose inner products are the weighted mean of the models' own.

    Each model's unit-length features (n, D) times sqrt(weight / sum of weights): unit length
    again, except where a model could not read the image. The 2019 winners' factors 0.5 and 1
    before the concatenation are weights of 0.25 and 1.
    """
    weights = _weights(weights, len(features))
    whole = math.fsum(weights)
    if not whole:
        raise ValueError("all weights are 0")
    parts = [
        each.float() * math.sqrt(weight / whole)
        for each, weight in zip(features, weights, strict=True)
    ]
    if len({len(each) for each in parts}) > 1:
        raise ValueError(
            f"features of {', '.join(str(len(each)) for each in parts)} images; "
            "they must be of the same ones"
        )
    return torch.cat(parts, dim=1)


def min_max(scores: Tensor) -> Tensor:
    """(Q, k) each query's finite scores on [0, 1]; equal scores are all 1."""
    finite = torch.isfinite(scores)
    low = scores.masked_fill(~finite, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(dim=1, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (scores - low) / span, 1.0)
    return scaled.masked_fill(~finite, -torch.inf)


def z_score(scores: Tensor) -> Tensor:
    """(Q, k) each query's finite scores in standard deviations from their mean; equal ones are 0."""
    finite = torch.isfinite(scores)
    count = finite.sum(dim=1, keepdim=True).clamp(min=1)
    values = torch.where(finite, scores, 0.0).double()
    centred = torch.where(finite, values - values.sum(dim=1, keepdim=True) / count, 0.0)
    deviation = (centred.square().sum(dim=1, keepdim=True) / count).sqrt()
    equal = deviation <= 1e-12 * values.abs().amax(dim=1, keepdim=True)
    scaled = torch.where(equal, 0.0, centred / deviation).float()
    return scaled.masked_fill(~finite, -torch.inf)


def weighted_sum(
    scores: Sequence[Tensor],
    rows: Sequence[Tensor],
    weights: Sequence[float],
    k: int,
) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and rows (Q, k) of the largest weighted sums over several rankings (Q, any).

    A ranking that lacks an image would have given it no more than its lowest finite score, so it
    counts with that. A place of score -inf is absent.
    """
    weights = _weights(weights, len(rows))
    gains, named, floor = [], [], 0.0
    for values, at, weight in zip(scores, rows, weights, strict=True):
        order.check(values, at)
        there = torch.isfinite(values) & (at >= 0)
        low = values.double().masked_fill(~there, torch.inf).amin(dim=1, keepdim=True)
        low = torch.where(torch.isinf(low), 0.0, low)
        gains.append(torch.where(there, weight * (values - low), 0.0))
        named.append(torch.where(there, at, order.ABSENT))
        floor = floor + weight * low
    return order.total(gains, named, k, floor)


def rrf(
    rows: Sequence[Tensor],
    k: int,
    weights: Sequence[float] | None = None,
    c: float = 60.0,
) -> tuple[Tensor, Tensor]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009) of rankings (Q, any).

    The score of an image is the sum of weight / (c + place) over the rankings that name it, places
    counting from 1; it does not depend on their scores.
    """
    weights = _weights([1.0] * len(rows) if weights is None else weights, len(rows))
    shares = [
        (weight / (c + 1 + torch.arange(at.shape[1], dtype=torch.float64))).to(
            at.device
        )
        for at, weight in zip(rows, weights, strict=True)
    ]
    return order.total(
        [share.expand(at.shape) for share, at in zip(shares, rows, strict=True)],
        rows,
        k,
    )


def _weights(weights: Sequence[float], count: int) -> list[float]:
    if not count or len(weights) != count:
        raise ValueError(f"{len(weights)} weights for {count} models or rankings")
    wrong = [weight for weight in weights if not 0 <= weight < math.inf]
    if wrong:
        raise ValueError(f"a weight is {wrong[0]}; weights are finite and not negative")
    return list(weights)
