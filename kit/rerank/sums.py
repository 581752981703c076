"""Sums of addends: those of several models, and members that name a row more than once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kit.rerank.addends import Addends, Members


def members(owners: Tensor, rows: Tensor, values: Tensor, queries: int) -> Members:
    """Values (M,) of rows (M,) for the queries `owners` (M,), those of one pair added up.

    Rows ascend within a query.
    """
    size = int(rows.max()) + 1 if len(rows) else 1
    keys, pairs = (owners * size + rows).unique(return_inverse=True)
    total = torch.zeros(len(keys), dtype=torch.float64, device=rows.device)
    total.index_add_(0, pairs, values.double())
    edges = torch.arange(queries + 1, device=rows.device) * size
    return Members(torch.searchsorted(keys, edges), keys % size, total)


def weighted_sum(parts: Sequence[Addends], weights: Sequence[float]) -> Addends:
    """The addends of several models, each times its weight, as one; sums are float64.

    Groups of the sum are the combinations of the models' groups that occur: keep them few.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(
            f"{len(weights)} weights for the addends of {len(parts)} models"
        )
    weighted = list(zip(parts, weights, strict=True))
    by_row = [w * a.by_row.double() for a, w in weighted if a.by_row is not None]
    grouped = [
        (a.groups, w * a.by_group.double())
        for a, w in weighted
        if a.groups is not None and a.by_group is not None
    ]
    groups, by_group = _combined(grouped) if grouped else (None, None)
    single = [(a.members, w) for a, w in weighted if a.members is not None]
    return Addends(sum(by_row) if by_row else None, groups, by_group, _joined(single))


def _combined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Groups (N,) and values (Q, G) of several pairs of them."""
    groups, values = parts[0]
    for others, theirs in parts[1:]:
        # group 0 of both is nobody's, worth 0
        width = theirs.shape[1] + 1
        pairs, groups = ((groups + 1) * width + others + 1).unique(return_inverse=True)
        ours, theirs = (
            torch.nn.functional.pad(each, (1, 0))[:, at]
            for each, at in ((values, pairs // width), (theirs, pairs % width))
        )
        values = ours + theirs
    return groups, values


def _joined(parts: Sequence[tuple[Members, float]]) -> Members | None:
    if not parts:
        return None
    owners = [torch.repeat_interleave(each.starts.diff()) for each, _ in parts]
    rows = [each.rows for each, _ in parts]
    values = [weight * each.values.double() for each, weight in parts]
    queries = len(parts[0][0].starts) - 1
    return members(torch.cat(owners), torch.cat(rows), torch.cat(values), queries)
