"""Rankings in order: larger scores first, ties to the lower row, absent places last.

A ranking is scores (Q, k) float32 and rows (Q, k), best first; a place where nothing stands has
row -1 and score -inf.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ABSENT = -1
_LAST = torch.iinfo(torch.long).max


def check(scores: Tensor, rows: Tensor, index: int | None = None, k: int = 1) -> None:
    """Refuses what is no ranking of an index of that many rows, and to make one of k < 1."""
    _wanted(k)
    if scores.shape != rows.shape or scores.dim() != 2:
        raise ValueError(
            f"scores {tuple(scores.shape)} and rows {tuple(rows.shape)} of a ranking "
            "must be of one shape (queries, places)"
        )
    if not scores.numel():
        raise ValueError(f"a ranking of {len(scores)} queries has no places")
    if scores.dtype != torch.float32 or rows.is_floating_point():
        raise TypeError(
            f"scores are {scores.dtype} and rows {rows.dtype}; they must be float32 "
            "and integers"
        )
    if not (scores < torch.inf).all():
        raise ValueError("scores of a ranking hold NaN or +inf")
    if index == 0:
        raise ValueError("the index has no rows")
    if index is not None and rows.numel() and rows.max() >= index:
        raise ValueError(
            f"a ranking names row {int(rows.max())} of an index of {index} rows"
        )


def sort(scores: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and rows (Q, k), best first; ties go to the lower row."""
    by_row = torch.where(rows < 0, _LAST, rows.long()).argsort(dim=1, stable=True)
    scores, rows = scores.gather(1, by_row), rows.gather(1, by_row)
    scores, by_score = scores.sort(dim=1, descending=True, stable=True)
    return scores, rows.gather(1, by_score)


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last dimension, best first, and their columns; float32 without NaN.

    Ties go to the lower column: `torch.topk` picks any of equal values, so score and column make
    one integer.
    """
    column = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    keys = (_ordered(scores) << 31) | column
    best = keys.topk(min(k, scores.shape[-1]), dim=-1).values
    at = scores.shape[-1] - 1 - (best & 0x7FFFFFFF)
    return scores.gather(-1, at), at


def stepped(scores: Tensor) -> Tensor:
    """(Q, k) float32 lowered as little as makes every row strictly descending.

    Scores then tell the same order as the places do, whoever sorts by them. Scores of -inf must
    come last and stay.
    """
    place = torch.arange(scores.shape[1], device=scores.device)
    lowered = (_ordered(scores) + place).cummin(dim=1).values - place
    bits = torch.where(lowered < 0, -lowered - 2**31, lowered).int()
    return torch.where(torch.isneginf(scores), scores, bits.view(torch.float32))


def total(
    scores: Sequence[Tensor],
    rows: Sequence[Tensor],
    k: int,
    base: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and rows (Q, k) of the largest sums over several lists (Q, any).

    Each list names a row at most once; a row that a list lacks gets nothing from it. All sums of a
    query start from its base (Q, 1). Summed in float64 in the order of the lists, rounded once.
    """
    named = torch.cat([each.long() for each in rows], dim=1)
    addends = torch.cat([each.double() for each in scores], dim=1)
    named, by_row = torch.where(named < 0, _LAST, named).sort(dim=1, stable=True)
    addends = addends.gather(1, by_row)
    sums = addends.clone()
    for shift in range(1, len(rows)):
        same = named[:, shift:] == named[:, :-shift]
        sums[:, :-shift] += torch.where(same, addends[:, shift:], 0.0)
    again = torch.zeros_like(named, dtype=torch.bool)
    again[:, 1:] = named[:, 1:] == named[:, :-1]
    sums = (sums + base).float().masked_fill(again | (named == _LAST), -torch.inf)
    sums, best = sums.sort(dim=1, descending=True, stable=True)
    found = named.gather(1, best).masked_fill(torch.isneginf(sums), ABSENT)
    return fit(sums, found, k)


def named(labels: Tensor, rows: Tensor) -> Tensor:
    """Labels (N,) of the rows (any shape); -1 where a row is absent."""
    if not len(labels):
        return torch.full_like(rows, ABSENT)
    return labels[rows.clamp(min=0)].masked_fill(rows < 0, ABSENT)


def fit(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """A ranking cut at k places, or filled up to them with absent ones."""
    _wanted(k)
    missing = max(0, k - scores.shape[1])
    return (
        torch.nn.functional.pad(scores[:, :k], (0, missing), value=-torch.inf),
        torch.nn.functional.pad(rows[:, :k], (0, missing), value=ABSENT),
    )


def _wanted(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")


def _ordered(scores: Tensor) -> Tensor:
    """Integers in the order of the float32 scores, neighbouring floats one apart."""
    bits = scores.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
