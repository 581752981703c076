"""Exact nearest rows by inner product, block by block, in memory that does not grow."""

from collections.abc import Iterable

import torch
from torch import Tensor

QUERIES = 256  # at a time: with a block of 16,384 rows this takes 190 MB


def knn(queries: Tensor, database: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and rows (Q, k) of the k largest inner products, best first.

    queries: (Q, D) float32. database: blocks (n, D), such as `Features.blocks()`. Ties go to the
    lower row. A database of fewer than k rows gives that many columns.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    chunks = queries.split(QUERIES)
    best = [
        (chunk.new_empty(len(chunk), 0), torch.empty(len(chunk), 0, dtype=torch.long))
        for chunk in chunks
    ]
    first = 0
    for block in database:
        if block.shape[1] != queries.shape[1]:
            raise ValueError(
                f"queries have {queries.shape[1]} dimensions, "
                f"the database {block.shape[1]}"
            )
        columns = block.to(queries).T
        here = torch.arange(first, first + len(block), device=queries.device)
        for place, chunk in enumerate(chunks):
            scores, rows = best[place]
            scores = torch.cat([scores, chunk @ columns], dim=1)
            rows = torch.cat([rows.to(here), here.expand(len(chunk), -1)], dim=1)
            scores, at = top(scores, k)
            best[place] = scores, rows.gather(1, at)
        first += len(block)
    if not first:
        raise ValueError("the database has no rows")
    scores, rows = zip(*best, strict=True)
    return torch.cat(scores), torch.cat(rows)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (Q, N), best first; ties go to the lower column.

    Scores are float32 without NaN.

    `torch.topk` picks any of equal values, so scores and columns are packed into one integer whose
    order is total.
    """
    if scores.dtype != torch.float32:
        raise TypeError(f"scores are {scores.dtype}, not float32")
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(
        bits < 0, -(bits & 0x7FFFFFFF), bits
    )  # integers in the floats' order
    columns = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    keys = (ordered << 31) | columns
    best = keys.topk(min(k, scores.shape[1]), dim=1).values
    at = scores.shape[1] - 1 - (best & 0x7FFFFFFF)
    return scores.gather(1, at), at
