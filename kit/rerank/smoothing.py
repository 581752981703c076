"""Feature smoothing over a nearest-neighbour graph (FAC; 2nd place, Google Landmark Retrieval
2021, whose code took the farthest rows by mistake): features -> features.

Pure functions on tensors: the graph arrives as an argument.
"""

import torch
from torch import Tensor

from kit.rerank import order
from kit.rerank.expansion import expand


def smooth(
    features: Tensor,
    scores: Tensor,
    rows: Tensor,
    k: int = 5,
    beta: float = 0.2,
    out: Tensor | None = None,
) -> Tensor:
    """(N, D) each row averaged with the best k - 1 others of its neighbours (N, any).

    S_ij = exp(cos / beta) for row i's k nearest, itself the first; the features become
    unit(D_r^-1/2 S D_c^-1/2 X), D_r and D_c being the row and column sums of S. Features are of
    unit length or all zero (unreadable), which stay so. A row among its own neighbours is passed
    over, wherever it stands. Published: twice, the second time over the graph of the new features.
    """
    order.check(scores, rows, len(features))
    if k < 1 or beta <= 0:
        raise ValueError(
            f"k is {k} and beta {beta:g}; k must be at least 1, the row itself, and "
            "beta above 0"
        )
    near, at = scores[:, :k].double(), rows[:, :k].long()
    own = torch.arange(len(rows), device=rows.device)[:, None]
    others = (at >= 0) & (at != own)
    others &= others.cumsum(1) < k
    # all divided by S_ii = exp(1 / beta), which the unit length takes away again
    kernel = torch.where(others, torch.exp((near - 1) / beta), 0.0)
    sums = kernel.new_ones(len(rows))
    sums.index_add_(0, at.clamp(min=0).flatten(), kernel.flatten())
    weights = (kernel * (sums[own] / sums[at.clamp(min=0)]).sqrt()).float()
    return expand(features, features, at.masked_fill(~others, -1), weights, out)
