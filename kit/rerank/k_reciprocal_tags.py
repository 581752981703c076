"""References nearest to a query by k-reciprocal distance among its neighbours' neighbours (2nd
place, Google Landmark Retrieval 2021): what lets better references vote for its landmark.

Pure functions on tensors: the query's nearest references and the references' own nearest, a stored
graph, arrive as arguments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kit.rerank import order
from kit.rerank.k_reciprocal import expand, half, mutual

CELLS = 1 << 21  # of the queries' own similarity matrices at a time: 8 MB


@dataclass(frozen=True)
class Reciprocity:
    """The published parameters."""

    k1: int = 10  # length of a list without the row itself
    k2: int = 3  # leading rows of a list whose encodings are averaged
    share: float = 0.5  # of the plain distance

    def __post_init__(self) -> None:
        if self.k1 < 1 or self.k2 < 1 or not 0 < self.share <= 1:
            raise ValueError(
                f"k1 {self.k1}, k2 {self.k2}, share {self.share:g}: k1 and k2 must be at "
                "least 1, share above 0 and at most 1"
            )


def tag_scores(
    queries: Tensor,
    rows: Tensor,
    graph: Tensor,
    references: Tensor,
    k: int = 3,
    how: Reciprocity = Reciprocity(),
) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and rows (Q, k) of the best references by k-reciprocal distance, best first.

    queries: (Q, D) and references: (R, D), of unit length, the references perhaps mapped from a
    file. rows: (Q, T) each query's nearest references, published T = 30. graph: (R, G) each
    reference's nearest others; with itself at the first place too, published 30, that is 29 others.
    -1 is nobody in both.

    U is the union of a query's neighbours and theirs. Inside {q} and U all rows are ranked anew and
    encoded (kit.rerank.k_reciprocal); the score is 1 - (share d + (1 - share) J), J being 1 outside
    U. Only U is looked at: with at least k neighbours nothing outside can be among the best k, as
    each neighbour has a smaller d and no larger J. (A member of U that is none of the T neighbours
    can, and does.) Ties go to the lower row.
    """
    unions, sizes = neighbourhoods(rows, graph)
    if len(queries) != len(rows):
        raise ValueError(f"{len(queries)} queries, neighbours of {len(rows)}")
    scores = queries.new_empty(len(rows), k, dtype=torch.float32)
    found = rows.new_empty(len(rows), k, dtype=torch.long)
    for batch in _batches(sizes):
        local = unions[batch, : int(sizes[batch].max())]
        values = _rescored(queries[batch].float(), local, references, how)
        values, at = order.top(values, k)
        scores[batch], found[batch] = order.fit(values, local.gather(1, at), k)
    return scores, found


def neighbourhoods(rows: Tensor, graph: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (Q, T) and their neighbours, each once: (Q, most) ascending and then -1; sizes (Q,)."""
    if rows.numel() and int(rows.max()) >= len(graph):
        raise ValueError(
            f"reference {int(rows.max())} of the neighbours is not in a graph of "
            f"{len(graph)}"
        )
    theirs = graph[rows.clamp(min=0)].long().masked_fill((rows < 0)[:, :, None], -1)
    named = torch.cat([rows.long(), theirs.flatten(1)], dim=1).sort(dim=1).values
    first = named >= 0
    first[:, 1:] &= named[:, 1:] != named[:, :-1]
    sizes = first.sum(1)
    if not sizes.all():
        raise ValueError(
            f"query {int(sizes.argmin())} has no neighbour that could vote"
        )
    queries, at = first.nonzero(as_tuple=True)
    places = (first.cumsum(1) - 1)[queries, at]
    unions = named.new_full((len(rows), int(sizes.max())), order.ABSENT)
    unions[queries, places] = named[queries, at]
    return unions, sizes


def _batches(sizes: Tensor) -> list[Tensor]:
    """Queries of similar sizes together, as many as CELLS allow; indices (n,)."""
    batches, start = [], 0
    by_size = sizes.argsort(stable=True).cpu()
    ordered = (sizes.cpu()[by_size] + 1).tolist()
    for end in range(1, len(ordered) + 1):
        full = end < len(ordered) and (end + 1 - start) * ordered[end] ** 2 > CELLS
        if full or end == len(ordered):
            batches.append(by_size[start:end].to(sizes.device))
            start = end
    return batches


def _rescored(
    queries: Tensor, unions: Tensor, references: Tensor, how: Reciprocity
) -> Tensor:
    """(B, n - 1) scores of the unions' rows (B, n - 1); -inf where there is none.

    The neighbourhoods are one graph in which they do not touch: row b n is query b, row
    b n + 1 + i the union's row i, and the last row nobody.
    """
    absent = torch.nn.functional.pad(unions < 0, (1, 0))
    near = references[unions.clamp(min=0).flatten()].float().view(*unions.shape, -1)
    vectors = torch.cat([queries[:, None], near], dim=1)
    cosines = vectors @ vectors.transpose(1, 2)
    lists = _lists(cosines, absent, max(how.k1 + 1, how.k2))
    overlap = _overlap(cosines, lists, how)[:, 1:]
    distance = how.share * (1 - cosines[:, 0, 1:]) / 2
    distance += (1 - how.share) * (1 - overlap / (2 - overlap))
    return (1 - distance).masked_fill(absent[:, 1:], -torch.inf)


def _lists(cosines: Tensor, absent: Tensor, k: int) -> Tensor:
    """(B n + 1, k) the nearest rows, the row itself first, -1 beyond the last; ties go to the lower
    row.
    """
    batch, n, _ = cosines.shape
    own = cosines.diagonal(dim1=1, dim2=2)
    before = own.clone()
    own.fill_(torch.inf)  # in place, and put back: a copy costs as much as the product
    ranked = cosines.flatten(0, 1)
    ranked.view(batch, n, n).masked_fill_(absent[:, None], -torch.inf)
    values, places = ranked.topk(min(k + 1, n), dim=1)
    # topk takes any of equal values and leaves them in any order
    equal = (values[:, 1:] == values[:, :-1]) & ~torch.isneginf(values[:, 1:])
    again = equal.any(dim=1).nonzero()[:, 0]
    resorted = ranked[again].sort(dim=1, descending=True, stable=True).indices
    places[again] = resorted[:, : places.shape[1]]
    places = places.masked_fill(torch.isneginf(values), -1)[:, :k]
    own.copy_(before)
    places = torch.nn.functional.pad(places, (0, k - places.shape[1]), value=-1)
    first = n * torch.arange(batch, device=cosines.device)[:, None, None]
    lists = places.view(batch, n, k)
    lists = torch.where((lists < 0) | absent[:, :, None], -1, lists + first)
    return torch.nn.functional.pad(lists.flatten(0, 1), (0, 0, 0, 1), value=-1)


def _overlap(cosines: Tensor, lists: Tensor, how: Reciprocity) -> Tensor:
    """(B, n) sums of the smaller of the query's and each row's encoding, column by column.

    Only the query's columns count, and only rows whose sets reach them are encoded: those are
    k-reciprocal with a member of a column's own short set, as all sets are mutual.
    """
    batch, n, _ = cosines.shape
    long, near = lists[:, : how.k1 + 1], mutual(lists[:, : half(how.k1)])
    leading = lists[:, : how.k2]
    counts = (leading >= 0).sum(1, keepdim=True).clamp(min=1)
    first = n * torch.arange(batch, device=lists.device)
    mine = leading[first]
    query = _encode(cosines, long, near, mine.flatten()).view(batch, -1, n)
    query = query.sum(1) / counts[first]
    support = query > 0
    width = int(support.sum(1).max())
    columns = support.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    query = query.gather(1, columns)

    reached = torch.where(query > 0, columns + first[:, None], -1).flatten()
    reached = _distinct(near[reached], len(lists))
    reached = _distinct(mutual(long, reached), len(lists))
    encoded = _encode(cosines, long, near, reached)
    encoded = encoded.gather(1, columns[reached // n])
    slots = torch.full((len(lists),), -1, device=lists.device)
    slots[reached] = torch.arange(len(reached), device=lists.device)
    encoded = torch.nn.functional.pad(encoded, (0, 0, 0, 1))
    means = sum(encoded[slots[members]] for members in leading[:-1].T) / counts[:-1]
    return torch.minimum(means.view(batch, n, -1), query[:, None]).sum(2)


def _encode(cosines: Tensor, lists: Tensor, near: Tensor, of: Tensor) -> Tensor:
    """(m, n) k-reciprocal encodings of the rows `of` (m,) over their own neighbourhoods."""
    n = cosines.shape[1]
    sets = expand(mutual(lists, of), near)
    columns = torch.where(sets >= 0, sets % n, n)  # column n is nobody's
    places = (of[:, None] * n + columns).clamp(0, cosines.numel() - 1)
    weights = torch.exp((cosines.flatten()[places] - 1) / 2)
    encoded = weights.new_zeros(len(of), n + 1).scatter_(1, columns, weights)[:, :n]
    return encoded / encoded.sum(1, keepdim=True).clamp(min=1e-12)


def _distinct(rows: Tensor, size: int) -> Tensor:
    """The rows below `size` that are named, each once, ascending; the last is nobody."""
    named = torch.zeros(size, dtype=torch.bool, device=rows.device)
    named[rows.flatten()] = True
    return named[:-1].nonzero()[:, 0]
