"""Where some images stand in each query's ranking of a whole index, without making the ranking.

An image's place is the number of images that rank before it, by larger score or by equal score
and lower row, as `kit.features.search` ranks. So a million distractors are counted in blocks,
and nothing of the size queries x index is held.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from kit.features.certified.task import pack
from kit.features.store import Features

BLOCK = 8192  # rows scored at a time
QUERIES = 1024  # queries scored at a time


def count(
    queries: Sequence[Features],
    parts: Sequence[Sequence[Features]],
    marked: Sequence[np.ndarray],
    weights: Sequence[float],
) -> list[np.ndarray]:
    """The place of each of `marked`'s rows, -1 for what no model's ranking holds.

    queries: of each model. parts: of each model, stores that make up the index one after the
    other. marked: for each query, rows of that index. A query or an image that some model could
    not read has no ranking or is in none.
    """
    lost = np.logical_or.reduce([~each.readable() for each in queries])
    hidden = [
        np.logical_or.reduce([~part.readable() for part in models])
        for models in zip(*parts, strict=True)
    ]
    found: list[np.ndarray] = []
    for start in range(0, len(marked), QUERIES):
        chosen = slice(start, start + QUERIES)
        vectors = [_double(each.vectors[chosen]) for each in queries]
        rows = _padded(marked[chosen])
        keys = _keys(vectors, parts, hidden, rows, weights)
        places = _places(vectors, parts, hidden, keys, weights)
        places[(rows < 0) | (keys == NOWHERE)] = -1
        places[torch.from_numpy(lost[chosen])] = -1
        lengths = map(len, marked[chosen])
        found += [row[:n].numpy() for row, n in zip(places, lengths, strict=True)]
    return found


def of_rankings(ranked: Tensor, marked: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Rankings (Q, k) of rows, -1 for none -> the place of each of `marked`'s rows, or -1."""
    found = []
    for row, wanted in zip(ranked.numpy(), marked, strict=True):
        order = np.argsort(row, kind="stable")
        at = np.searchsorted(row, wanted, sorter=order).clip(max=len(row) - 1)
        found.append(np.where(row[order[at]] == wanted, order[at], -1))
    return found


NOWHERE = torch.iinfo(torch.int64).min


def _places(
    queries: Sequence[Tensor],
    parts: Sequence[Sequence[Features]],
    hidden: Sequence[np.ndarray],
    keys: Tensor,
    weights: Sequence[float],
) -> Tensor:
    """(Q, M) how many images of the index have a larger key than each of keys (Q, M)."""
    ascending, order = keys.sort(dim=1)
    width = keys.shape[1]
    # how many images have exactly so many of the marked below them
    counts = torch.zeros(len(keys), width + 1, dtype=torch.long)
    for block in _scored(queries, parts, hidden, weights):
        below = torch.searchsorted(ascending, block)
        counts.scatter_add_(1, below, torch.ones_like(below))
    above = counts.flip(1).cumsum(1).flip(1)[:, 1:]  # who has this one below it, too
    return torch.empty_like(keys).scatter_(1, order, above)


def _scored(
    queries: Sequence[Tensor],
    parts: Sequence[Sequence[Features]],
    hidden: Sequence[np.ndarray],
    weights: Sequence[float],
) -> Iterator[Tensor]:
    """Keys (Q, n) of the index, block by block; smaller ones than any for what is in no ranking."""
    first = 0
    for models, lost in zip(zip(*parts, strict=True), hidden, strict=True):
        for start in range(0, len(lost), BLOCK):
            here = slice(start, start + BLOCK)
            vectors = [_double(each.vectors[here]) for each in models]
            scores = _sum(
                (q @ x.T for q, x in zip(queries, vectors, strict=True)), weights
            )
            rows = torch.arange(first + start, first + start + scores.shape[1])
            keys = pack(scores, rows.expand(scores.shape))
            yield keys.masked_fill(torch.from_numpy(lost[here]), NOWHERE)
        first += len(lost)


def _keys(
    queries: Sequence[Tensor],
    parts: Sequence[Sequence[Features]],
    hidden: Sequence[np.ndarray],
    rows: Tensor,
    weights: Sequence[float],
) -> Tensor:
    """(Q, M) keys of each query's own rows (Q, M); NOWHERE for what is in no ranking."""
    lost = torch.from_numpy(np.concatenate(hidden))
    keys = torch.full(rows.shape, NOWHERE)
    for query in range(len(rows)):
        own = rows[query][rows[query] >= 0]
        vectors = [_gathered(each, own.numpy()) for each in parts]
        pairs = zip(queries, vectors, strict=True)
        scores = _sum((q[query] @ x.T for q, x in pairs), weights)
        keys[query, : len(own)] = pack(scores, own).masked_fill(lost[own], NOWHERE)
    return keys


def _sum(products: Iterator[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted, in the models' order, rounded once: the scores of a search."""
    total = sum(w * each for w, each in zip(weights, products, strict=True))
    return total.float()


def _gathered(parts: Sequence[Features], rows: np.ndarray) -> Tensor:
    """(M, D) the vectors of rows of an index made of parts."""
    ends = np.cumsum([len(part) for part in parts])
    owner = np.searchsorted(ends, rows, side="right")
    found = np.empty((len(rows), parts[0].dim), np.float16)
    for number, part in enumerate(parts):
        here = owner == number
        found[here] = part.vectors[rows[here] - (ends[number] - len(part))]
    return _double(found)


def _double(vectors: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(vectors)).double()


def _padded(marked: Sequence[np.ndarray]) -> Tensor:
    """(Q, M) rows, -1 where a query has fewer."""
    width = max([1, *map(len, marked)])
    rows = torch.full((len(marked), width), -1)
    for query, wanted in enumerate(marked):
        rows[query, : len(wanted)] = torch.from_numpy(np.asarray(wanted, np.int64))
    return rows
