"""Features moved towards their neighbours: query expansion and database-side augmentation.

alpha-QE: Radenovic, Tolias and Chum, TPAMI 2018. Database-side augmentation (DBA): Arandjelovic
and Zisserman, CVPR 2012; its weights and the expansion by verified neighbours: 1st place of Google
Landmark Retrieval 2019.

The row itself always counts with weight 1. Sums are taken in float32 whatever the features' type,
and scaled to unit length. Rows that are all zero (unreadable) stay zero and add nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kit.rerank import order

ROWS = {"cpu": 512}  # expanded at a time: their sums stay in a core's cache
GATHERED = {"cpu": 2**20}  # numbers gathered at a time: 4 MB; elsewhere 256 MB
Weigh = Callable[[Tensor], Tensor]  # cosines (n, m), best first -> weights (n, m)


def equal(cosines: Tensor) -> Tensor:
    """Every neighbour counts as much as the row itself: the mean."""
    return torch.ones_like(cosines)


def decaying(cosines: Tensor) -> Tensor:
    """logspace(0, -1.5, m + 1) by place, the row itself being the first."""
    return (
        torch.logspace(0, -1.5, cosines.shape[1] + 1)[1:].to(cosines).expand_as(cosines)
    )


def powered(alpha: float) -> Weigh:
    """max(cos, 0)^alpha."""
    return lambda cosines: cosines.clamp(min=0) ** alpha


def alpha_qe(
    queries: Tensor,
    index: Tensor,
    scores: Tensor,
    rows: Tensor,
    n: int = 10,
    alpha: float = 3.0,
) -> Tensor:
    """(Q, D) unit(q + sum of max(cos, 0)^alpha i) over each query's n nearest index images.

    queries (Q, D), index (N, D); scores and rows (Q, any), best first. The neighbours are of the
    index: other test queries have no part in it.
    """
    order.check(scores, rows, len(index))
    return expand(queries, index, rows[:, :n], powered(alpha)(scores[:, :n]))


def dba(
    features: Tensor,
    scores: Tensor,
    rows: Tensor,
    k: int = 10,
    weigh: Weigh = equal,
    labels: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(N, D) each row moved towards the best k - 1 others of its neighbours (N, any).

    weigh: `equal`, `decaying` or `powered(alpha)`. labels (N,): only neighbours of the row's own
    landmark count (supervised); -1 is nobody's. A row among its own neighbours is passed over,
    wherever it stands.
    """
    order.check(scores, rows, len(features))
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1, the row itself")

    def neighbours(block: slice) -> tuple[Tensor, Tensor]:
        near, at = _others(scores[block], rows[block], block.start, k - 1)
        weights = weigh(near)
        if labels is not None:
            own = labels[block, None]
            weights = weights * ((labels[at.clamp(min=0)] == own) & (own >= 0))
        return at, weights

    return _expand(features, features, neighbours, out)


def verified(
    scores: Tensor, rows: Tensor, inliers: Tensor, at_least: int = 90, most: int = 5
) -> tuple[Tensor, Tensor]:
    """Rows (n, most) and weights (n, most) of the neighbours with the most inliers, for `expand`.

    scores, rows and inliers (n, k): those of fewer than `at_least` inliers do not count, equal ones
    are taken by place; weights are cosines. A row's own place must have 0 inliers.
    """
    order.check(scores, rows)
    if inliers.shape != rows.shape:
        raise ValueError(
            f"inliers {tuple(inliers.shape)} of rows {tuple(rows.shape)}; "
            "they must be of one shape"
        )
    trusted = (inliers >= at_least) & (rows >= 0)
    counts = torch.where(trusted, inliers, -1)
    best = counts.sort(dim=1, descending=True, stable=True).indices[:, :most]
    weights = torch.where(trusted, scores.clamp(min=0), 0.0)
    return rows.gather(1, best), weights.gather(1, best)


def expand(
    own: Tensor,
    features: Tensor,
    rows: Tensor,
    weights: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """(n, D) unit(own + sum of weights (n, m) times the features (N, D) at rows (n, m)), where
    rows below 0 are absent.

    Float32 unless `out`, which may be mapped from a file, says otherwise; never in place, so
    that no row is moved towards one that has moved already.
    """
    if not len(own) == len(rows) == len(weights):
        raise ValueError(
            f"{len(own)} features, neighbours of {len(rows)}, weights of {len(weights)}; "
            "they must be as many"
        )
    order.check(weights, rows, len(features))
    return _expand(own, features, lambda block: (rows[block], weights[block]), out)


def _others(scores: Tensor, rows: Tensor, first: int, m: int) -> tuple[Tensor, Tensor]:
    """The m best neighbours of the rows from `first` on, the row itself not being one."""
    own = torch.arange(first, first + len(rows), device=rows.device)[:, None]
    itself = rows == own
    place = torch.where(itself.any(dim=1), itself.int().argmax(dim=1), rows.shape[1])
    columns = torch.arange(m, device=rows.device)
    columns = columns + (columns >= place[:, None])
    beyond = columns >= rows.shape[1]
    columns = columns.clamp(max=rows.shape[1] - 1)
    near, at = scores.gather(1, columns), rows.gather(1, columns)
    return near.masked_fill(beyond, -torch.inf), at.masked_fill(beyond, order.ABSENT)


def _expand(
    own: Tensor,
    features: Tensor,
    neighbours: Callable[[slice], tuple[Tensor, Tensor]],
    out: Tensor | None,
) -> Tensor:
    if own.shape[1] != features.shape[1]:
        raise ValueError(
            f"features of {own.shape[1]} dimensions, neighbours of {features.shape[1]}"
        )
    if out is None:
        out = own.new_empty(own.shape, dtype=torch.float32)
    elif out.shape != own.shape or out.data_ptr() in (
        own.data_ptr(),
        features.data_ptr(),
    ):
        raise ValueError(
            f"out {tuple(out.shape)} must be of shape {tuple(own.shape)} and not the "
            "features themselves"
        )
    step = ROWS.get(own.device.type, 2**15)
    for start in range(0, len(own), step):
        block = slice(start, min(start + step, len(own)))
        rows, weights = neighbours(block)
        weights = torch.where(rows >= 0, weights, 0.0).float()
        itself = own[block].float()
        sums = itself + _weighted(features, rows.clamp(min=0), weights)
        sums *= torch.linalg.vector_norm(itself, dim=1, keepdim=True) > 0
        out[block] = F.normalize(sums, dim=1)
    return out


def _weighted(features: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """(n, D) float32 sums of features at rows (n, m).

    Short floats are gathered a few at a time, to stay in the processor's cache until they are
    summed: embedding_bag would round weights and sums to their type.
    """
    if features.dtype == torch.float32 and rows.numel():
        return F.embedding_bag(rows, features, mode="sum", per_sample_weights=weights)
    sums = weights.new_empty(len(rows), features.shape[1])
    numbers = GATHERED.get(features.device.type, 2**26)
    size = max(1, numbers // max(1, rows.shape[1] * features.shape[1]))
    for start in range(0, len(rows), size):
        at, scale = rows[start : start + size], weights[start : start + size, None]
        picked = features.index_select(0, at.flatten()).float()
        picked = picked.view(*at.shape, features.shape[1])
        torch.bmm(scale, picked, out=sums[start : start + size, None])
    return sums
