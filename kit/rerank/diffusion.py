"""Truncated diffusion on a nearest-neighbour graph (Iscen et al., CVPR 2017; Yang et al., AAAI
2019).

A query's neighbours are heated and the heat spreads over the graph of the index: the scores f
solve (I - alpha S) f = y by conjugate gradients. S = D^-1/2 A D^-1/2 is of the whole graph, cut to
the rows of a truncated set: the query's shortlist, or, before any query is known, the nearest rows
of each index image (Yang et al.).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.rerank import order

ROWS = 512  # of the graph at a time
SETS = 16  # truncated sets at a time: 16 x 1000 rows x 50 edges are 13 MB


@dataclass(frozen=True)
class Affinity:
    """S: the graph's symmetric, normalised affinities; a place without an edge weighs 0."""

    rows: Tensor  # (N, kd)
    weights: Tensor  # (N, kd) float32


@dataclass(frozen=True)
class Solver:
    """When conjugate gradients stop, and how far heat goes."""

    alpha: float = 0.99
    tolerance: float = 1e-6  # of the residual, relative to y
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < 1:
            raise ValueError(f"alpha is {self.alpha}; it must be in [0, 1)")


PUBLISHED = Solver()


def affinity(
    scores: Tensor, rows: Tensor, kd: int = 50, gamma: float = 3.0
) -> Affinity:
    """Neighbours (N, any) of every index row, best first -> A_ij = max(s_ij, 0)^gamma of mutual
    neighbours among the first kd, normalised by both degrees.

    s_ij is the mean of both directions, which an exact search makes equal. A row among its own
    neighbours takes one of the kd places and is no edge.
    """
    order.check(scores, rows, len(rows))
    scores, rows = scores[:, :kd], rows[:, :kd].long()
    edges = torch.cat(
        [_mutual(scores, rows, start) ** gamma for start in range(0, len(rows), ROWS)]
    )
    scale = edges.sum(dim=1).rsqrt()  # inf where a row has no edge, and no use of it
    for start in range(0, len(rows), ROWS):
        block = slice(start, start + ROWS)
        both = scale[block, None] * scale[rows[block].clamp(min=0)]
        edges[block] = torch.where(edges[block] > 0, edges[block] * both, 0.0)
    return Affinity(rows, edges)


def _mutual(scores: Tensor, rows: Tensor, start: int) -> Tensor:
    """Similarity to each neighbour of the rows from `start` on, 0 where it is not mutual."""
    near = rows[start : start + ROWS]
    own = torch.arange(start, start + len(near), device=rows.device)[:, None]
    held = near.clamp(min=0)
    back = rows[held] == own[:, :, None]  # (n, kd, kd)
    there = torch.where(back, scores[held], 0.0).sum(dim=2)
    mean = (scores[start : start + ROWS] + there) / 2
    edge = back.any(dim=2) & (near >= 0) & (near != own)
    return torch.where(edge, mean, 0.0).clamp(min=0)


def diffuse(
    scores: Tensor,
    rows: Tensor,
    graph: Affinity,
    kq: int = 10,
    gamma: float = 3.0,
    solver: Solver = PUBLISHED,
) -> tuple[Tensor, Tensor]:
    """A ranking (Q, T) -> the same rows by heat; y is max(s, 0)^gamma at the first kq.

    T is the truncation, published as 1000. Equal heat, such as none, keeps the order as it came.
    Scores are f, lowered as little as makes each list strictly descending.
    """
    order.check(scores, rows, len(graph.rows))
    heat = scores.clamp(min=0) ** gamma
    heat[:, kq:] = 0
    heat = solve(heat, rows, graph, solver).masked_fill(rows < 0, -torch.inf)
    heat, by_heat = heat.sort(dim=1, descending=True, stable=True)
    return order.stepped(heat), rows.gather(1, by_heat)


def offline(rows: Tensor, graph: Affinity, solver: Solver = PUBLISHED) -> Tensor:
    """(n, T) what one unit of heat at the first of rows (n, T) gives to all of them.

    rows: a truncated set of each index image, the image itself first.
    """
    unit = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    unit[:, :1] = 1
    return solve(unit, rows, graph, solver)


def online(
    scores: Tensor,
    rows: Tensor,
    truncated: Tensor,
    heats: Tensor,
    k: int,
    kq: int = 10,
    gamma: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and rows (Q, k): the sum over each query's first kq neighbours (Q, any) of
    max(s, 0)^gamma times what `offline` gave to the rows of their truncated sets (N, T).

    An image that no neighbour's heat reaches is absent.
    """
    order.check(scores, rows, len(truncated))
    found = []
    for start in range(0, len(rows), SETS):
        block = slice(start, start + SETS)
        named, gains = [], []
        for near, at in zip(scores[block, :kq].T, rows[block, :kq].T, strict=True):
            heat = near.clamp(min=0).double() ** gamma
            gains.append(heat[:, None] * heats[at.clamp(min=0)])
            reached = (at >= 0)[:, None] & (gains[-1] != 0)
            named.append(torch.where(reached, truncated[at.clamp(min=0)], order.ABSENT))
        found.append(order.total(gains, named, k))
    new_scores, new_rows = zip(*found, strict=True)
    return torch.cat(new_scores), torch.cat(new_rows)


def solve(heat: Tensor, rows: Tensor, graph: Affinity, solver: Solver) -> Tensor:
    """f (n, T) float32 of (I - alpha S) f = y (n, T), S cut to rows (n, T), each set by itself."""
    sets = zip(heat.split(SETS), rows.long().split(SETS), strict=True)
    return torch.cat(
        [_conjugate_gradients(y.double(), _cut(at, graph), solver) for y, at in sets]
    ).float()


def _cut(rows: Tensor, graph: Affinity) -> Callable[[Tensor], Tensor]:
    """The map v (n, T) -> S v inside each set of rows (n, T)."""
    near = graph.rows[rows.clamp(min=0)].flatten(1)
    ascending, place = rows.sort(dim=1)
    at = torch.searchsorted(ascending, near).clamp(max=rows.shape[1] - 1)
    inside = ascending.gather(1, at) == near
    columns = torch.where(inside, place.gather(1, at), 0)
    weights = graph.weights[rows.clamp(min=0)].double()
    weights *= inside.view_as(weights) & (rows >= 0)[:, :, None]
    return lambda v: (weights * v.gather(1, columns).view_as(weights)).sum(dim=2)


def _conjugate_gradients(
    y: Tensor, cut: Callable[[Tensor], Tensor], solver: Solver
) -> Tensor:
    """Every set stops by its own residual; float64."""
    f, residual, direction = torch.zeros_like(y), y.clone(), y.clone()
    length = residual.square().sum(dim=1, keepdim=True)
    enough = solver.tolerance**2 * length
    for _ in range(solver.iterations):
        live = length > enough
        if not live.any():
            break
        image = direction - solver.alpha * cut(direction)
        step = length / (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(live, step, 0.0)
        f += step * direction
        residual -= step * image
        new = residual.square().sum(dim=1, keepdim=True)
        direction = torch.where(live, residual + new / length * direction, direction)
        length = new
    return f
