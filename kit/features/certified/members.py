"""Members of `Addends` in a search: pairs of query and row with an addend of their own.

They are screened pair by pair and hidden from everybody else's screening, so that their addends
widen no chunk's bounds.
"""

import numpy as np
import torch
from torch import Tensor

from kit.features.certified.task import Task
from kit.rerank.addends import Addends

SCORED = -torch.inf  # the addend of a pair whose score is known already


class Hidden:
    """The members of some queries, by where a walk meets them."""

    def __init__(self, task: Task, addends: Addends, order: Tensor | None) -> None:
        self.size = task.span.stop
        query, position, values = _pairs(addends)
        kept = (position >= task.span.start) & (position < task.span.stop)
        if task.skip is not None:
            kept &= ~task.skip[position]
        query, position, values = query[kept], position[kept], values[kept]
        by_pair = (query * self.size + position).argsort()
        self._keys = (query * self.size + position)[by_pair]
        self._values = values[by_pair]

        self.places = position - task.span.start  # in the order of the walk
        if order is not None:
            inverse = torch.empty_like(order)
            inverse[order - task.span.start] = torch.arange(len(order))
            self.places = inverse[self.places]
        self.places, by_place = self.places.sort()
        self.query, self.position = query[by_place], position[by_place]
        total = values[by_place] + addends.common(self.query, self.position)
        self.addend = total.float()

    def largest(self) -> float:
        return self.addend.abs().max().item() if len(self.addend) else 0.0

    def of_block(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Places in the block, queries and addends of the members in it."""
        low, high = torch.searchsorted(self.places, torch.tensor([start, stop]))
        return (
            self.places[low:high] - start,
            self.query[low:high],
            self.addend[low:high],
        )

    def take(self, most: int) -> tuple[Tensor, Tensor]:
        """Query and position of each query's `most` members of largest addend; they count as
        scored from here on.
        """
        order = np.lexsort((-self.addend.numpy(), self.query.numpy()))
        counts = np.bincount(self.query.numpy())
        rank = np.arange(len(order)) - np.repeat(counts.cumsum() - counts, counts)
        chosen = torch.from_numpy(order[rank < most])
        self.addend[chosen] = SCORED
        return self.query[chosen], self.position[chosen]

    def values(self, query: Tensor, position: Tensor) -> Tensor:
        """(P,) float64 addends of pairs, 0 for those that are no members."""
        if not len(self._keys):
            return torch.zeros(len(query), dtype=torch.float64)
        keys = query * self.size + position
        at = torch.searchsorted(self._keys, keys).clamp(max=len(self._keys) - 1)
        return torch.where(self._keys[at] == keys, self._values[at], 0.0)


def _pairs(addends: Addends) -> tuple[Tensor, Tensor, Tensor]:
    if addends.members is None:
        nobody = torch.empty(0, dtype=torch.long)
        return nobody, nobody, torch.empty(0, dtype=torch.float64)
    starts, rows, values = addends.members
    query = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return query, rows.long(), values.double()
