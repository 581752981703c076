"""Hard category reranks and the merging of tags (2nd place, Google Landmark Retrieval 2021):
rankings in which the images of the query's landmark come first.

Pure functions on tensors. Rankings are those of kit.rerank.order; new scores are the published
1 - place / N, which only tell the order.
"""

import torch
from torch import Tensor

from kit.rerank import order
from kit.rerank.inverted import Inverted, invert

QUERIES = 256  # reranked at a time
PAIRS = 16_384  # inner products of pairs at a time
WIDTH = 64  # references of a query at a time


def first_of_label(
    scores: Tensor,
    rows: Tensor,
    labels: Tensor,
    index_labels: Tensor,
    queries: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """Ranking (Q, k) -> (Q, k): all index images of the query's label, nearest first, those too
    that were not in the ranking, then the rest of it.

    labels: (Q,) such as `sort_insert.predict(...).labels`, the majority by summed cosine; -1 leaves
    the order alone. index_labels: (N,), -1 for none. queries (Q, D), index (N, D): the features.
    """
    order.check(scores, rows, len(index_labels))
    if not len(labels) == len(rows) == len(queries) or len(index_labels) != len(index):
        raise ValueError(
            f"a ranking of {len(rows)} queries with {len(labels)} labels and "
            f"{len(queries)} features, an index of {len(index)} features and "
            f"{len(index_labels)} labels"
        )
    inverted = invert(index_labels)
    parts = []
    for start in range(0, len(rows), QUERIES):
        block = slice(start, start + QUERIES)
        first = _nearest_members(
            inverted, labels[block], queries[block], index, rows.shape[1]
        )
        held = index_labels[rows[block].clamp(min=0)]
        again = (held == labels[block, None]) & (held >= 0)
        rest = rows[block].masked_fill(again, order.ABSENT)
        parts.append(torch.cat([first, rest], dim=1))
    merged = torch.cat(parts)
    to_front = (merged < 0).byte().argsort(dim=1, stable=True)
    return _placed(merged.gather(1, to_front)[:, : rows.shape[1]], len(index))


def expand_category(
    scores: Tensor,
    rows: Tensor,
    near: Tensor,
    reference_labels: Tensor,
    index: Tensor,
    references: Tensor,
    above: float = 0.6,
) -> tuple[Tensor, Tensor]:
    """Ranking (Q, M) -> (Q, M): first, in their order, the images with a cosine above `above` to
    any reference of the labels of the query's nearest references `near` (Q, K).

    Published with K = 3 over the whole index; here only the ranking's images are promoted.
    reference_labels: (R,), -1 for none. index (N, D), references (R, D): the features.
    """
    order.check(scores, rows, len(index))
    if len(near) != len(rows) or len(reference_labels) != len(references):
        raise ValueError(
            f"a ranking of {len(rows)} queries with neighbours of {len(near)}, "
            f"{len(references)} references with {len(reference_labels)} labels"
        )
    inverted = invert(reference_labels)
    voted = order.named(reference_labels, near)
    promoted = torch.cat(
        [
            _best_cosine(inverted, some, index, at, references) > above
            for some, at in zip(
                voted.split(QUERIES // 16), rows.split(QUERIES // 16), strict=True
            )
        ]
    )
    group = torch.where(rows < 0, 2, (~promoted).long())
    return _placed(rows.gather(1, group.argsort(dim=1, stable=True)), len(index))


def merge(tags: Tensor, scores: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Q,) one tag of those (M, Q) that M models give, with scores (M, Q) and weights (M,).

    That of all; -1 where all differ; else that of the largest sum of weighted scores, of equal
    sums the lower. -1 is a tag like any other.
    """
    if tags.shape != scores.shape:
        raise ValueError(
            f"tags {tuple(tags.shape)} and scores {tuple(scores.shape)} must be of one "
            "shape (models, queries)"
        )
    if len(tags) == 1:
        return tags[0].clone()
    worth = scores.double() if weights is None else scores * weights[:, None].double()
    same = tags[:, None] == tags
    sums = torch.stack([torch.where(each, worth, 0.0).sum(0) for each in same])
    best = torch.where(sums == sums.amax(0), tags, torch.iinfo(tags.dtype).max).amin(0)
    return best.masked_fill(same.sum(dim=(0, 1)) == len(tags), order.ABSENT)


def _nearest_members(
    inverted: Inverted, labels: Tensor, queries: Tensor, index: Tensor, k: int
) -> Tensor:
    """(Q, k) the rows of each query's label by cosine, then row; -1 beyond the last."""
    owners, members = inverted.members(labels)
    parts = zip(owners.split(PAIRS), members.split(PAIRS), strict=True)
    cosines = [(queries[o].double() * index[m].double()).sum(1) for o, m in parts]
    found = members.new_full((len(labels), k), order.ABSENT)
    if not cosines:
        return found
    by_score = torch.cat(cosines).float().sort(descending=True, stable=True).indices
    by_query = by_score[owners[by_score].sort(stable=True).indices]
    counts = torch.bincount(owners, minlength=len(labels))
    places = torch.arange(len(owners), device=owners.device)
    places = places - (counts.cumsum(0) - counts)[owners]
    kept = places < k
    found[owners[kept], places[kept]] = members[by_query][kept]
    return found


def _best_cosine(
    inverted: Inverted, labels: Tensor, index: Tensor, rows: Tensor, references: Tensor
) -> Tensor:
    """(Q, M) the largest cosine of each image at `rows` (Q, M) to any reference of labels (Q, K)."""
    owners, members = inverted.members(labels.flatten())
    owners = owners // labels.shape[1]
    counts = torch.bincount(owners, minlength=len(labels))
    starts = counts.cumsum(0) - counts
    near = index[rows.clamp(min=0).flatten()].float().view(*rows.shape, -1)
    best = near.new_full(rows.shape, -torch.inf)
    for low in range(0, int(counts.max()), WIDTH):
        some = (counts > low).nonzero()[:, 0]
        at = starts[some, None] + torch.arange(low, low + WIDTH, device=rows.device)
        at = at.minimum((starts + counts - 1)[some, None])  # the last one again
        theirs = references[members[at].flatten()].float().view(*at.shape, -1)
        cosines = (theirs @ near[some].transpose(1, 2)).amax(1)
        best[some] = torch.maximum(best[some], cosines)
    return best


def _placed(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Scores 1 - place / size of rows in order, strictly descending, and the rows."""
    places = torch.arange(rows.shape[1], device=rows.device, dtype=torch.float64)
    scores = (1 - places / size).float().expand(rows.shape)
    return order.stepped(scores.masked_fill(rows < 0, -torch.inf)), rows
