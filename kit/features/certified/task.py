"""What a search is asked for, and how scores and rows rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit.features.screen import Screen
from kit.rerank.addends import Addends

CHUNK = 32  # rows that are skipped together
HIDDEN = (1 << 31) - 1  # a row number that sorts after all others


class Side(NamedTuple):
    """One model's queries and rows, and how much its scores weigh."""

    query: Tensor  # (Q, D) float16
    vectors: Tensor  # (N, D) float16
    weight: float
    screen: Screen | None


@dataclass(frozen=True)
class Task:
    """Everything but the queries that decides a search."""

    sides: Sequence[Side]
    k: int
    span: range  # positions that take part
    rows: Tensor | None  # (M,) the row of the vectors at each position; else the same
    skip: Tensor | None  # (M,) bool
    addends: Addends
    dtype: torch.dtype
    devices: Sequence[torch.device]
    block: int  # rows that a worker scores at a time

    def number(self, positions: Tensor) -> Tensor:
        """The rows of the vectors at these positions."""
        return positions if self.rows is None else self.rows[positions]

    def order(self) -> Tensor | None:
        """(len(span),) positions such that addends hardly vary between neighbours."""
        groups, by_row = self.addends.groups, self.addends.by_row
        keys = [
            values[self.span.start : self.span.stop].cpu().numpy()
            for values in (by_row, groups)
            if values is not None
        ]
        if not keys:
            return None
        return torch.from_numpy(np.lexsort(keys)).add_(self.span.start)


def uses_screen(side: Side, dtype: torch.dtype) -> bool:
    return side.screen is not None and dtype == torch.bfloat16


def pack(scores: Tensor, rows: Tensor) -> Tensor:
    """Scores float32 without NaN and rows (-1: none) -> integers that sort as they rank."""
    bits = scores.contiguous().view(torch.int32).long()
    ordered = torch.where(bits < 0, -(bits & HIDDEN), bits)  # in the floats' order
    return (ordered << 31) | torch.where(rows < 0, 0, HIDDEN - rows)


def unpack(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and rows again; 0.0 for -0.0."""
    ordered = keys >> 31
    bits = torch.where(ordered < 0, -ordered | (1 << 31), ordered)
    scores = bits.to(torch.int32).view(torch.float32)
    rows = HIDDEN - (keys & HIDDEN)
    return scores, torch.where(rows == HIDDEN, -1, rows)


NOTHING = int(pack(torch.tensor([-torch.inf]), torch.tensor([-1]))[0])
