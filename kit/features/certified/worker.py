"""Screens blocks of rows on one device or one core."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kit.features.certified.rounding import half_unit, rounded_down
from kit.features.certified.task import CHUNK, NOTHING, pack, uses_screen
from kit.features.certified.walk import Pending, Walk
from kit.features.screen import STEP, convert, refuse_odd

EXACT = 512  # rows of a block that is scored exactly at a time


class Worker:
    """One device, or one core, with its buffers."""

    def __init__(self, walk: Walk, device: torch.device) -> None:
        self.walk, self.task, self.device = walk, walk.task, device
        self.queries = walk.screening.T.contiguous().to(device)  # (sum of D, Q)
        addends, kind = walk.addends, {"dtype": torch.float32, "device": device}
        self.by_group = None
        if addends.by_group is not None:  # (G + 1, Q), the last one for no group
            table = addends.by_group.T.to(**kind)
            self.by_group = torch.cat([table, table.new_zeros(1, table.shape[1])])
        self.scores = self.rows = torch.empty(0, device=device)

    def enter(self) -> None:
        """To be called by the worker's own thread."""
        if self.device.type == "cpu":
            torch.set_num_threads(1)

    def _buffers(self) -> None:
        if len(self.scores):
            return
        width = self.queries.shape[0]
        length = -(-self.task.block // CHUNK) * CHUNK
        kind = {"dtype": self.task.dtype, "device": self.device}
        self.scores = torch.empty(length, self.queries.shape[1], **kind)
        self.rows = torch.empty(self.task.block, width, **kind)

    def _gemm(self, start: int) -> tuple[Tensor, Tensor]:
        """Screened scores (n, Q) of the block at `start`, n a multiple of CHUNK; positions.

        -inf where there is no row, or none to be found.
        """
        self._buffers()
        positions = self.walk.positions(start)
        rows = self._rows(start, positions)
        full = -(-len(rows) // CHUNK) * CHUNK
        scores = self.scores[:full]
        torch.mm(rows, self.queries, out=scores[: len(rows)])
        scores[len(rows) :] = -torch.inf
        if self.task.skip is not None:
            scores[: len(rows)][self.task.skip[positions].to(self.device)] = -torch.inf
        return scores, positions

    def _hide(self, start: int, scores: Tensor) -> tuple[Tensor, ...]:
        """Takes the members out of the scores: their places, queries, scores and how far off."""
        place, query, addend = (
            part.to(self.device)
            for part in self.walk.hidden.of_block(start, start + len(scores))
        )
        value = scores[place, query].float()
        scores[place, query] = -torch.inf
        half = half_unit(value, scores.dtype) + self.walk.margin.to(self.device)[query]
        return place, query, value + addend, half

    def _rows(self, start: int, positions: Tensor) -> Tensor:
        """(n, sum of D) rows of all models in the screening type."""
        task, left = self.task, 0
        in_order = self.walk.order is None and task.rows is None
        first, on_cpu = task.span.start + start, self.device.type == "cpu"
        numbers = task.number(positions)
        for number, side in enumerate(task.sides):
            screened = uses_screen(side, task.dtype)
            source = side.screen.rows if screened else side.vectors
            block = source[first : first + len(positions)]
            if screened and in_order and len(task.sides) == 1 and on_cpu:
                return block
            out = self.rows[: len(positions), left : left + source.shape[1]]
            if not in_order:
                at = numbers.to(source.device)
                if screened and out.device == source.device:
                    block = torch.index_select(source, 0, at, out=out)
                else:
                    block = source.index_select(0, at)
            if not screened:
                step = STEP if on_cpu else len(block)
                bounds = convert(block, out, numbers, step, measure=False)
                self.walk.widen(number, bounds)
            elif block is not out:
                out.copy_(block)
            left += source.shape[1]
        return self.rows[: len(positions)]

    def _by_chunk(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Least and largest addend of each chunk, (chunks, Q) or (chunks, 1) or (1, 1)."""
        by_row, group = self._by_position(positions)
        least = largest = torch.zeros(1, 1, device=self.device)
        if by_row is not None:
            least, largest = by_row.amin(1, keepdim=True), by_row.amax(1, keepdim=True)
        if group is not None:
            low = self.by_group[group[:, 0]]
            high = low.clone()
            mixed = (group != group[:, :1]).any(dim=1)
            if mixed.any():
                several = self.by_group[group[mixed]]  # (mixed, CHUNK, Q)
                low[mixed], high[mixed] = several.amin(1), several.amax(1)
            least, largest = least + low, largest + high
        return least, largest

    def _by_position(self, positions: Tensor) -> Sequence[Tensor | None]:
        """by_row and groups (chunks, CHUNK) of the block, filled up to whole chunks."""
        addends = self.walk.addends
        count = -(-len(positions) // CHUNK) * CHUNK
        at = positions[torch.arange(count).clamp(max=len(positions) - 1)]
        return [
            None if values is None else values[at].view(-1, CHUNK).to(self.device, kind)
            for values, kind in (
                (addends.by_row, torch.float32),
                (addends.groups, torch.long),
            )
        ]

    def sample(self, start: int) -> None:
        """Notes lower bounds of the best row of each chunk."""
        scores, positions = self._gemm(start)
        self._hide(start, scores)
        best = scores.view(-1, CHUNK, scores.shape[1]).amax(1).float()
        low = best - half_unit(best, scores.dtype) + self._by_chunk(positions)[0]
        low = (low.cpu() - self.walk.margin).T.contiguous()
        with self.walk.lock:
            self.walk.low.append(low)

    def screen(self, start: int) -> None:
        """Notes the rows of a block that may be among the best."""
        scores, positions = self._gemm(start)
        self._found(positions, *self._hide(start, scores))
        margin = self.walk.margin
        wanted = (self.walk.floor - margin).to(self.device)
        chunk, query = self._chunks(scores, wanted, self._by_chunk(positions))
        values = scores.view(-1, CHUNK, scores.shape[1])[chunk, :, query]
        addend = self._by_hit(positions, chunk, query)
        least = rounded_down(wanted[query, None] - addend, scores.dtype)
        least = least.clamp(min=torch.finfo(scores.dtype).min)  # hidden ones are -inf
        places = (values >= least).flatten().nonzero()[:, 0]
        if len(places) > scores.numel() // 16:
            return self.score_exactly(start)
        hit, within = places // CHUNK, places % CHUNK
        value, query = values[hit, within].float(), query[hit]
        half = half_unit(value, scores.dtype) + margin.to(self.device)[query]
        value += addend.expand(values.shape)[hit, within]
        self._found(positions, chunk[hit] * CHUNK + within, query, value, half)

    def _found(
        self,
        positions: Tensor,
        place: Tensor,
        query: Tensor,
        value: Tensor,
        half: Tensor,
    ) -> None:
        """Notes which pairs of the block may be among the best: value - half to value + half."""
        high = value + half
        may = high >= self.walk.floor.to(self.device)[query]
        may &= value > -torch.inf
        place, query, high = place[may], query[may], high[may]
        low = value[may] - half[may]
        columns = (query.short(), positions[place.cpu()], low, high)
        self.walk.found(Pending(*(column.cpu().numpy() for column in columns)))

    def _chunks(
        self, scores: Tensor, wanted: Tensor, addend: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Numbers of chunks and queries where a score may reach what is wanted."""
        chunks = scores.view(-1, CHUNK, scores.shape[1])
        wanted = wanted - addend[1]
        if scores.dtype == torch.bfloat16 and bool((wanted > 0).all()):
            # as integers positive floats keep their order, negative ones are below them;
            # without its last bits a positive float32 is rounded down
            wanted = (wanted.view(torch.int32) >> 16).to(torch.int16)
            chunks = chunks.view(torch.int16)
        else:
            wanted = rounded_down(wanted, scores.dtype)
        return (chunks.amax(1) >= wanted).nonzero(as_tuple=True)

    def _by_hit(self, positions: Tensor, chunk: Tensor, query: Tensor) -> Tensor:
        """(hits, CHUNK), or one for all, addends of the rows of some chunks for some queries."""
        addend = torch.zeros(1, 1, device=self.device)
        by_row, group = self._by_position(positions)
        if by_row is not None:
            addend = addend + by_row[chunk]
        if group is not None:
            by_group = self.by_group[group[chunk, 0], query][:, None]
            mixed = (group != group[:, :1]).any(dim=1)
            if mixed.any():  # few, as rows are walked group by group
                by_group = by_group.repeat(1, CHUNK)
                at = mixed[chunk].nonzero()[:, 0]
                by_group[at] = self.by_group[group[chunk[at]], query[at, None]]
            addend = addend + by_group
        return addend

    def score_exactly(self, start: int) -> None:
        """Scores a whole block in float64, some rows at a time."""
        walk, task = self.walk, self.task
        for low in range(0, task.block, EXACT):
            positions = walk.positions(start)[low : low + EXACT]
            if not len(positions):
                return
            numbers, total = task.number(positions), 0.0
            for side, exact in zip(task.sides, walk.exact, strict=True):
                rows = side.vectors[numbers.to(side.vectors.device)].cpu().double()
                refuse_odd(torch.linalg.vector_norm(rows, dim=1), numbers)
                total = total + side.weight * (exact @ rows.T)
            queries = torch.arange(len(total))[:, None]
            total += walk.addends.common(queries, positions)
            keys = pack(total.float(), positions.expand(len(total), -1))
            if task.skip is not None:
                keys[:, task.skip[positions]] = NOTHING
            first = start + low
            place, query, _ = walk.hidden.of_block(first, first + len(positions))
            keys[query, place] = NOTHING
            few = keys.topk(min(task.k, keys.shape[1]), dim=1).values
            with walk.lock:
                walk.keep(few)
