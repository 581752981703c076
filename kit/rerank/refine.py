"""Refinement of a shortlist and of the query by global features alone, after SuperGlobal (Shao et
al., "Global Features are All You Need for Image Retrieval and Reranking", ICCV 2023).

The definition implemented here, for a query q and its shortlist x_1 ... x_M:
    x'_i = (x_i + beta sum_j max(cos_ij, 0) x_j) / (1 + beta sum_j max(cos_ij, 0)),
           j over the K images of the shortlist nearest to x_i, other than itself;
    s_i  = q . x'_i;
    q'   = the largest value in each dimension over the K + 1 images x'_i with the largest s_i;
    score of i = (q . x'_i + q' . x'_i) / 2.
Neither x' nor q' is scaled to unit length: an image among unlike ones has a shorter x'.
"""

import torch
from torch import Tensor

from kit.rerank import order

QUERIES = 8  # refined at a time


def refine(
    queries: Tensor,
    index: Tensor,
    scores: Tensor,
    rows: Tensor,
    neighbours: int = 9,
    beta: float = 0.15,
) -> tuple[Tensor, Tensor]:
    """A ranking (Q, M) -> scores (Q, M) and rows (Q, M) of the same images, best first.

    queries (Q, D), index (N, D); published with M = 400, 9 neighbours and beta 0.15. Ties go to
    the lower row; images of score -inf take no part and stay behind.
    """
    order.check(scores, rows, len(index))
    if len(queries) != len(rows) or queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"queries {tuple(queries.shape)}, rankings of {len(rows)} and an index "
            f"{tuple(index.shape)} do not belong together"
        )
    if neighbours < 1 or beta < 0:
        raise ValueError(
            f"neighbours are {neighbours} and beta {beta}; at least 1 and 0 are needed"
        )
    rows, by_row = rows.sort(dim=1)  # so that ties inside go to the lower row too
    scores = scores.gather(1, by_row)
    there = (rows >= 0) & torch.isfinite(scores)
    found = []
    for start in range(0, len(rows), QUERIES):
        block = slice(start, start + QUERIES)
        shortlist = index[rows[block].clamp(min=0)].float()
        found.append(
            _refined(queries[block].float(), shortlist, there[block], neighbours, beta)
        )
    return order.sort(torch.cat(found), rows)


def _refined(
    queries: Tensor, shortlist: Tensor, there: Tensor, neighbours: int, beta: float
) -> Tensor:
    """Scores (n, M) of shortlists (n, M, D); -inf where nothing is there."""
    cosines = shortlist @ shortlist.mT
    cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    cosines = cosines.masked_fill(~there[:, None, :], -torch.inf)
    near, at = order.top(cosines, neighbours)
    weights = beta * near.clamp(min=0)
    spread = torch.zeros_like(cosines).scatter_(2, at, weights)
    refined = shortlist + spread @ shortlist
    refined /= 1 + weights.sum(dim=2, keepdim=True)
    first = (refined @ queries[:, :, None])[:, :, 0]
    first = first.masked_fill(~there, -torch.inf)
    best, at = order.top(first, neighbours + 1)
    top = refined.gather(1, at[:, :, None].expand(-1, -1, refined.shape[2]))
    top = top.masked_fill(torch.isneginf(best)[:, :, None], -torch.inf)
    query = top.amax(dim=1)
    query = torch.where(torch.isneginf(query), 0.0, query)  # nothing there at all
    return (first + (refined @ query[:, :, None])[:, :, 0]) / 2
