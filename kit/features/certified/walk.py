"""One search of some queries: floors, the rows found so far, and their exact scores."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kit.features.certified.members import Hidden
from kit.features.certified.task import CHUNK, NOTHING, Task, pack, unpack, uses_screen
from kit.features.screen import Bounds, refuse_odd, widest

PAIRS = 256  # of query and row, scored at a time: they stay in a core's cache


@dataclass
class Pending:
    """Rows found and not yet scored exactly, and between what their scores lie."""

    query: np.ndarray  # (P,) int16
    position: np.ndarray  # (P,) int64
    low: np.ndarray  # (P,) float32
    high: np.ndarray  # (P,) float32

    def of(self, which: np.ndarray) -> "Pending":
        columns = (self.query, self.position, self.low, self.high)
        return Pending(*(column[which] for column in columns))


def _joined(parts: Sequence[Pending]) -> Pending:
    return Pending(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("query", "position", "low", "high")
        )
    )


def _by_query(query: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(P,) float32 values, those of the first query first, ascending within a query."""
    bits = values.view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # in the floats' order
    keys = np.sort((query.astype(np.int64) << 33) + ordered)  # quicker than by argsort
    ordered = ((keys + (1 << 32)) & ((1 << 33) - 1)) - (1 << 32)
    bits = np.where(ordered < 0, -ordered | 1 << 31, ordered)
    return bits.astype(np.uint32).view(np.float32)


class Walk:
    """The search of some queries through the whole database, shared by its workers."""

    def __init__(self, task: Task, queries: slice) -> None:
        self.task, self.lock = task, threading.Lock()
        self.addends = task.addends.of(queries)
        self.queries = [side.query[queries].cpu().float() for side in task.sides]
        self.exact = [query.double() for query in self.queries]
        for query in self.exact:
            numbers = torch.arange(queries.start, queries.start + len(query))
            refuse_odd(torch.linalg.vector_norm(query, dim=1), numbers)
        count = len(self.queries[0])
        self.floor = torch.full((count,), -torch.inf)
        self.best = torch.full((count, task.k), NOTHING)
        self.pending: list[Pending] = []
        self.new = 0  # pending since floors were last raised
        self.low: list[Tensor] = []  # (Q, chunks) of the sample
        self.order = task.order()
        self.starts = range(0, len(task.span), task.block)
        self.hidden = Hidden(task, self.addends, self.order)
        self._margins()

    def _margins(self) -> None:
        task = self.task
        scaled = [
            side.weight * exact
            for side, exact in zip(task.sides, self.exact, strict=True)
        ]
        rounded = [query.to(task.dtype) for query in scaled]
        self.screening = torch.cat(rounded, dim=1)  # (Q, sum of D)
        self.lengths = torch.stack(
            [query.norm(dim=1) for query in scaled]
        )  # (models, Q)
        self.off = torch.stack(
            [(a - b.double()).norm(dim=1) for a, b in zip(scaled, rounded, strict=True)]
        )
        if task.dtype == torch.float16 and self.lengths.sum(dim=0).gt(2.0**14).any():
            raise ValueError("weights are too large for float16; screen in bf16")
        self.bounds = [
            side.screen.bounds if uses_screen(side, task.dtype) else Bounds()
            for side in task.sides
        ]
        given = (self.addends.by_row, self.addends.by_group)
        self.largest = self.hidden.largest() + sum(
            values.abs().max().item()
            for values in given
            if values is not None and values.numel()
        )
        self.margin = self._margin()

    def widen(self, number: int, bounds: Bounds) -> None:
        """Takes note of what is true of rows of a model; the margin grows if it must."""
        with self.lock:
            both = widest(self.bounds[number], bounds)
            if both != self.bounds[number]:
                self.bounds[number] = both
                self.margin = self._margin()

    def _margin(self) -> Tensor:
        """(Q,) float32: by how much a screened score may differ from the final one."""
        longest = torch.tensor([[bounds.longest] for bounds in self.bounds]).double()
        off = torch.tensor([[bounds.off] for bounds in self.bounds]).double()
        reach = ((self.lengths + self.off) * longest).sum(dim=0)
        margin = (self.off * longest + self.lengths * off).sum(dim=0)
        margin += 2.0**-23 * self.screening.shape[1] * reach
        margin += 2.0**-20 * (reach + self.largest)  # slack
        return (margin * 1.0001).float()

    def score_members(self, pool: ThreadPoolExecutor, most: int) -> None:
        """Scores each query's `most` members of largest addend exactly, for a first floor."""
        query, position = self.hidden.take(most)
        if len(query):
            self._found(query, position, self._scores(pool, query, position))

    def positions(self, start: int) -> Tensor:
        """(n,) positions that the block at `start` holds."""
        stop = min(start + self.task.block, len(self.task.span))
        if self.order is not None:
            return self.order[start:stop]
        return torch.arange(start, stop).add_(self.task.span.start)

    def share(
        self,
        pool: ThreadPoolExecutor,
        workers: Sequence[Any],
        step: Callable[[Any, int], None],
        starts: Sequence[int],
    ) -> None:
        """Lets every worker take the next block until there is none."""
        blocks, failed = iter(starts), threading.Event()

        def run(worker: Any) -> None:
            worker.enter()
            while not failed.is_set():
                with self.lock:
                    start = next(blocks, None)
                if start is None:
                    return
                try:
                    step(worker, start)
                except BaseException:
                    failed.set()
                    raise

        try:
            for done in [pool.submit(run, worker) for worker in workers]:
                done.result()
        except BaseException:  # of a worker, or an interruption of the one who waits
            failed.set()
            raise

    def sampled(self) -> Sequence[int]:
        """Blocks all over the database, with enough chunks for a first floor."""
        wanted = max(
            -(-4 * self.task.k * CHUNK // self.task.block), len(self.starts) // 50
        )
        return self.starts[:: -(-len(self.starts) // max(wanted, 1))]

    def start(self) -> None:
        """Sets the floors by the sample: the k-th largest of the chunks' best rows."""
        low = torch.cat(self.low, dim=1).numpy()
        self.low = []
        if low.shape[1] >= self.task.k:
            at = low.shape[1] - self.task.k
            self._raise(torch.from_numpy(np.partition(low, at, axis=1)[:, at]))

    def _raise(self, floor: Tensor) -> None:
        self.floor = torch.maximum(self.floor, floor)

    def found(self, pending: Pending) -> None:
        """Takes note of rows that may be among the best; raises the floors now and then."""
        with self.lock:
            self.pending.append(pending)
            self.new += len(pending.query)
            if self.new > len(self.floor) * (self.task.k + 16):
                self._tighten()
                if sum(len(part.query) for part in self.pending) > self.most:
                    self._score_pending()

    @property
    def most(self) -> int:
        """Pending rows that are held: 18 bytes each."""
        return max(2_000_000, 8 * len(self.floor) * self.task.k)

    def _tighten(self) -> None:
        """Raises the floors by the lower bounds of all that was found; drops what is below."""
        pending = _joined(self.pending)
        query, low = pending.query, pending.low
        at, column = (self.best > NOTHING).nonzero(as_tuple=True)
        if len(at):  # scored exactly before: members, whole blocks
            scores = unpack(self.best[at, column])[0]
            query = np.concatenate([query, at.numpy().astype(np.int16)])
            low = np.concatenate([low, scores.numpy()])
        counts = np.bincount(query, minlength=len(self.floor))
        enough = counts >= self.task.k
        last = np.cumsum(counts) - self.task.k  # of each query's, sorted ascending
        floor = np.full(len(counts), -np.inf, np.float32)
        floor[enough] = _by_query(query, low)[last[enough]]
        self._raise(torch.from_numpy(floor))
        self.pending = [pending.of(pending.high >= self.floor.numpy()[pending.query])]
        self.new = 0

    def _score_pending(self) -> None:
        for part in self.pending:
            for start in range(0, len(part.query), PAIRS):
                some = part.of(slice(start, start + PAIRS))
                query = torch.from_numpy(some.query).long()
                position = torch.from_numpy(some.position)
                self._found(query, position, self._score(query, position))
        self.pending = []

    def settle(self, pool: ThreadPoolExecutor) -> None:
        """Scores what is left: each query's k most promising rows, then who may beat them."""
        if not self.pending:
            return
        self._tighten()
        (pending,) = self.pending
        order = np.argsort(-pending.low)
        order = order[np.argsort(pending.query[order], kind="stable")]
        counts = np.bincount(pending.query, minlength=len(self.floor))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        first = rank < self.task.k
        for wave in (order[first], order[~first]):
            part = pending.of(wave)
            part = part.of(part.high >= self.floor.numpy()[part.query])
            query = torch.from_numpy(part.query).long()
            position = torch.from_numpy(part.position)
            if len(query):
                self._found(query, position, self._scores(pool, query, position))
        self.pending = []

    def _scores(
        self, pool: ThreadPoolExecutor, query: Tensor, position: Tensor
    ) -> Tensor:
        """(P,) float64: exact scores of pairs, by all workers."""
        pairs = zip(query.split(PAIRS), position.split(PAIRS), strict=True)
        return torch.cat(list(pool.map(lambda pair: self._score(*pair), pairs)))

    def _score(self, query: Tensor, position: Tensor) -> Tensor:
        """(P,) float64: exact scores of pairs."""
        total = torch.zeros(len(query), dtype=torch.float64)
        numbers = self.task.number(position)
        for side, queries in zip(self.task.sides, self.queries, strict=True):
            at = numbers.to(side.vectors.device)
            rows = side.vectors.index_select(0, at).cpu().float()
            rows *= queries.index_select(0, query)  # exact: 22 of 24 bits
            total += side.weight * rows.sum(dim=1, dtype=torch.float64)
        total += self.addends.common(query, position)
        return total + self.hidden.values(query, position)

    def _found(self, query: Tensor, position: Tensor, scores: Tensor) -> None:
        """Adds exact scores of pairs to the best, and raises the floors to the k-th."""
        k, count = self.task.k, len(self.floor)
        keys = pack(scores.float(), position).numpy()
        order = np.argsort(-keys)
        number = query.numpy().astype(np.int16)
        order = order[np.argsort(number[order], kind="stable")]
        counts = np.bincount(number, minlength=count)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        order, rank = order[rank < k], rank[rank < k]
        width = int(rank.max()) + 1 if len(rank) else 0
        more = torch.full((count, width), NOTHING)
        more[number[order], rank] = torch.from_numpy(keys[order])
        self.keep(more)

    def keep(self, keys: Tensor) -> None:
        """Merges packed (Q, n) rows with the best."""
        both = torch.cat([self.best, keys], dim=1)
        self.best = both.sort(dim=1, descending=True).values[:, : self.task.k]
        last = self.best[:, -1]
        floor = torch.where(last > NOTHING, unpack(last)[0], -torch.inf)
        self._raise(floor)
