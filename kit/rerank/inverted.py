"""Inverted lists: labels of rows -> the rows of each label, ragged and without a loop."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inverted:
    """The rows of label l are rows[starts[l] : starts[l + 1]], ascending."""

    starts: Tensor  # (L + 1,)
    rows: Tensor  # (M,) a row whose label is below 0 is in no list

    def members(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For labels (n,): which of them (M,), ascending, and a row that carries it (M,).

        Labels that no row carries, also those below 0, have no members.
        """
        known = (labels >= 0) & (labels < len(self.starts) - 1)
        labels = labels.where(known, 0)
        counts = (self.starts[labels + 1] - self.starts[labels]).where(known, 0)
        owners, places = ranges(self.starts[labels], counts)
        return owners, self.rows[places]


def invert(labels: Tensor) -> Inverted:
    """Labels (N,), -1 for none -> the rows of every label from 0 to the largest."""
    labels, order = labels.sort(stable=True)
    count = max(int(labels[-1]) + 1, 1) if len(labels) else 1
    edges = torch.arange(count + 1, device=labels.device)
    return Inverted(torch.searchsorted(labels, edges), order)


def ranges(starts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Whose place it is (M,) and the places (M,) of the ranges [start, start + count)."""
    owners = torch.repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return owners, torch.arange(len(owners), device=starts.device) + (starts - before)[
        owners
    ]
