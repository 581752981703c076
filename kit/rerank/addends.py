"""What is added to a query's scores before the best are chosen, without a (Q, N) matrix.

An addend is told by what it depends on: the index row, the row's group (a country), or
single members of a query's list (images of a landmark). The search adds all three to the
inner product, in float64 and in this order, and rounds the sum once to float32.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Members(NamedTuple):
    """Addends of single index rows, query after query; a row at most once a query."""

    starts: Tensor  # (Q + 1,) int64: query q has starts[q] .. starts[q + 1]
    rows: Tensor  # int64
    values: Tensor  # as many, floating


@dataclass(frozen=True)
class Addends:
    """Addends of Q queries over N index rows; of any sign, and finite."""

    by_row: Tensor | None = None  # (N,) for every query
    groups: Tensor | None = None  # (N,) int64, the group of each index row; -1 for none
    by_group: Tensor | None = None  # (Q, G)
    members: Members | None = None

    def __post_init__(self) -> None:
        if (self.groups is None) != (self.by_group is None):
            raise ValueError(
                "groups and by_group come together; one of them is missing"
            )
        if self.by_group is not None and not self.by_group.shape[1]:
            # no row is in any group: one group of nobody, so that a column can be read
            nobody = self.by_group.new_zeros(len(self.by_group), 1)
            object.__setattr__(self, "by_group", nobody)
        if self.members is not None:
            _check_members(*self.members)
        for name, values in (
            ("by_row", self.by_row),
            ("by_group", self.by_group),
            (
                "values of members",
                None if self.members is None else self.members.values,
            ),
        ):
            if values is not None and not values.isfinite().all():
                raise ValueError(f"{name} of the addends: a value is not finite")

    def of(self, queries: slice) -> "Addends":
        """The same for some of the queries, which `queries` counts up from 0."""
        by_group = None if self.by_group is None else self.by_group[queries]
        if self.members is None:
            return replace(self, by_group=by_group)
        starts, rows, values = self.members
        first, last, step = queries.indices(len(starts) - 1)
        if step != 1:
            raise ValueError(
                f"addends of every {step}th query; only a step of 1 is cut"
            )
        last = max(first, last)
        low, high = int(starts[first]), int(starts[last])
        cut = starts[first : last + 1] - low
        return replace(
            self,
            by_group=by_group,
            members=Members(cut, rows[low:high], values[low:high]),
        )

    def common(self, query: Tensor, row: Tensor) -> Tensor:
        """float64 addends of pairs of query and row that broadcast, but for members'."""
        total = torch.zeros(torch.broadcast_shapes(query.shape, row.shape)).double()
        if self.by_row is not None:
            total += self.by_row[row].double()
        if self.groups is not None and self.by_group is not None:
            group = self.groups[row]
            value = self.by_group[query, group].double()
            total += torch.where(group >= 0, value, 0.0)
        return total

    def cpu(self) -> "Addends":
        """The same in the CPU's memory."""
        given = (self.by_row, self.groups, self.by_group)
        moved = [None if values is None else values.cpu() for values in given]
        members = self.members and Members(*(part.cpu() for part in self.members))
        return Addends(*moved, members)

    def check(self, queries: int, index: int) -> None:
        """Refuses addends that are not of so many queries and index rows."""
        starts = None if self.members is None else self.members.starts[1:]
        for name, given, wanted, kind in (
            ("by_row", self.by_row, index, "index rows"),
            ("groups", self.groups, index, "index rows"),
            ("by_group", self.by_group, queries, "queries"),
            ("members", starts, queries, "queries"),
        ):
            if given is not None and len(given) != wanted:
                raise ValueError(
                    f"{name} of the addends is for {len(given)} {kind}, not {wanted}"
                )
        if self.groups is not None and self.by_group is not None:
            _refuse_outside("groups", self.groups, -1, self.by_group.shape[1])
        if self.members is not None:
            _refuse_outside("rows of members", self.members.rows, 0, index)
            _refuse_repeated(*self.members[:2], index)


def _check_members(starts: Tensor, rows: Tensor, values: Tensor) -> None:
    rising = len(starts) > 0 and starts[0] == 0 and bool((starts.diff() >= 0).all())
    if not rising or starts[-1] != len(rows) or len(rows) != len(values):
        raise ValueError(
            f"members of the addends: starts must rise from 0 to the {len(rows)} rows "
            f"and {len(values)} values, which are as many"
        )


def _refuse_outside(name: str, rows: Tensor, low: int, high: int) -> None:
    strange = (rows < low) | (rows >= high)
    if strange.any():
        raise ValueError(
            f"{name} of the addends has {int(rows[strange][0])}, "
            f"which is not in {low}..{high - 1}"
        )


def _refuse_repeated(starts: Tensor, rows: Tensor, index: int) -> None:
    query = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    keys = (query * index + rows).sort().values
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        query_number, row = divmod(int(twice[0]), index)
        raise ValueError(
            f"members of the addends: query {query_number} has row {row} twice"
        )
