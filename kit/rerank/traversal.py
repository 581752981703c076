"""Explore-exploit graph traversal (Chang et al., CVPR 2019): a ranking by walking a
nearest-neighbour graph along its heaviest edges.

Explore: the neighbours of every image retrieved since the last time wait with the weight of the
edge that led to them, the largest of several. Exploit: the heaviest waiting image is retrieved, and
further ones as long as they weigh more than tau. With tau = inf every retrieved image is explored
at once: a maximum spanning tree grown from the query.
"""

import math

import torch
from torch import Tensor

from kit.rerank import order

QUERIES = 64  # walked at a time: 64 x 101 x 100 waiting places are 5 MB


def traverse(
    scores: Tensor,
    rows: Tensor,
    graph_scores: Tensor,
    graph_rows: Tensor,
    k: int = 100,
    explore: int = 100,
    tau: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """A ranking (Q, any) and the neighbours (N, any) of index rows, best first -> scores (Q, k) and
    rows (Q, k) in the order of retrieval; of equal weights the lower row is first.

    explore: neighbours looked at of the query and of each image. Scores are the smallest weight met
    so far, lowered as little as makes each list strictly descending.
    """
    order.check(graph_scores, graph_rows, len(graph_rows))
    order.check(scores, rows, len(graph_rows), k)
    if explore < 1:
        raise ValueError(f"explore is {explore}; it must be at least 1")
    graph = graph_scores[:, :explore], graph_rows[:, :explore].int()
    parts = [
        _walk(near[:, :explore], at[:, :explore].int(), *graph, k, tau)
        for near, at in zip(scores.split(QUERIES), rows.split(QUERIES), strict=True)
    ]
    new_scores, new_rows = zip(*parts, strict=True)
    return torch.cat(new_scores), torch.cat(new_rows)


def _walk(
    scores: Tensor,
    rows: Tensor,
    graph_scores: Tensor,
    graph_rows: Tensor,
    k: int,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """All queries of a block take a step at a time; one that waits for nothing stands still."""
    queries, width = len(rows), max(rows.shape[1], graph_rows.shape[1])
    # place p > 0 holds the neighbours of the p-th image retrieved, place 0 the query's
    weights = scores.new_full((queries, k + 1, width), -torch.inf)
    waiting = rows.new_full((queries, k + 1, width), order.ABSENT)
    weights[:, 0, : rows.shape[1]] = scores.masked_fill(rows < 0, -torch.inf)
    waiting[:, 0, : rows.shape[1]] = rows
    explored = torch.zeros(queries, 1, dtype=torch.long, device=rows.device)
    found = rows.new_full((queries, k), order.ABSENT)
    met = scores.new_full((queries, k), -torch.inf)
    places = torch.arange(k + 1, device=rows.device)[:, None]
    for step in range(k):
        seen = weights[:, : step + 1], waiting[:, : step + 1]
        hidden = places[: step + 1] > explored[:, :, None]
        best, row = _heaviest(seen[0].masked_fill(hidden, -torch.inf), seen[1])
        found[:, step] = torch.where(torch.isneginf(best), order.ABSENT, row)
        met[:, step] = best
        seen[0].masked_fill_(seen[1] == row[:, None, None], -torch.inf)
        near = graph_rows[row.clamp(min=0).long()]
        known = (near[:, :, None] == found[:, None, : step + 1]).any(dim=2)
        closed = known | (near < 0) | torch.isneginf(best)[:, None]
        weights[:, step + 1, : near.shape[1]] = graph_scores[
            row.clamp(min=0).long()
        ].masked_fill(closed, -torch.inf)
        waiting[:, step + 1, : near.shape[1]] = near
        left = seen[0].masked_fill(hidden, -torch.inf).flatten(1).amax(dim=1)
        explored = torch.where((left > tau)[:, None], explored, step + 1)
    return order.stepped(met), found.long()


def _heaviest(weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weight (n,) and its lowest row (n,)."""
    weights, rows = weights.flatten(1), rows.flatten(1)
    best = weights.amax(dim=1)
    none = torch.iinfo(rows.dtype).max
    tied = torch.where(weights == best[:, None], rows, none)
    return best, tied.amin(dim=1)
