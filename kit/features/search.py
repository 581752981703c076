"""Exact nearest rows by inner product of stored features, in bounded memory, on CPU or GPUs.

Scores are float64 inner products of the stored float16 values, rounded once to float32; ties
go to the lower row. The result is the same to the bit for any block size, number of threads,
processes and devices; `certified.nearest` says how it is found fast, and why nothing is missed.

Working memory, anonymous, beside queries and result, for up to 2,048 queries at a time (more
are searched in turns): a block of scores, 2 or 4 bytes each, about 4M scores over all workers
of a CPU; rows found and not yet scored, 18 bytes each and twice that while they are sorted,
about 3 k a query and at most 2M or 8 k a query; a few copies of queries and blocks. At 1,129
queries, k = 100, d = 512 that is less than 600 MB for any length of the database; addends
cost another 16 bytes a row.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kit.features import screen
from kit.features.certified.nearest import nearest
from kit.features.certified.task import (
    CHUNK,
    HIDDEN,
    NOTHING,
    Side,
    Task,
    pack,
    unpack,
)
from kit.features.store import Features
from kit.launch import Rank
from kit.rerank.addends import Addends

QUERIES = 2048  # searched at a time
SCORES = 1 << 24  # of a block, over all workers of a CPU
GPU_SCORES = 1 << 28

Rows = Features | np.ndarray | Tensor
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Neighbours(NamedTuple):
    """The best rows of each query, best first."""

    scores: Tensor  # (Q, k) float32; -inf where there is no row
    rows: Tensor  # (Q, k) int64; -1 where there is no row


def knn(
    query: Rows | Sequence[Rows],
    database: Rows | Sequence[Rows],
    k: int,
    *,
    weights: Sequence[float] | None = None,
    rows: np.ndarray | Tensor | None = None,
    skip: np.ndarray | Tensor | None = None,
    addends: Addends | None = None,
    screening: str = "auto",
    devices: Sequence[torch.device | str] | None = None,
    block: int | None = None,
    out: Neighbours | None = None,
) -> Neighbours:
    """The k rows of largest score of each query; fewer columns if the database is shorter.

    query, database: features, float16 arrays or tensors (Q, D) and (N, D), rows of unit length
    or zero; float32 queries are rounded to float16 first, as a store would. Or equally long
    sequences of them, one a model: scores are then summed with `weights`, non-negative.

    rows: (M,) the rows of the database that take part, repeats allowed. Everything else is then
    about positions in `rows`: the result, ties, `skip` and `addends`.
    skip: (N,) bool, rows that are never found. Where fewer than k are left, the score is -inf
    and the row -1.
    addends: what is added to the scores; with several models, to their sum.

    screening: type of the fast first pass: "bf16", "fp16" or "fp32"; "auto" takes float16 on a
    GPU and the faster of the others on a CPU, by a short measurement. A store's bfloat16 copy
    (`kit.features.screen`) saves the conversion. devices: all GPUs, else the CPU's threads; a
    device may be named more than once. out: where to write the result, such as mapped files.
    """
    task, count = _task(
        (query, database, k),
        weights=weights,
        rows=rows,
        skip=skip,
        addends=addends,
        screening=screening,
        devices=devices,
        block=block,
    )
    return _search(task, count, task.span, out)


def knn_over_ranks(
    query: Rows | Sequence[Rows],
    database: Rows | Sequence[Rows],
    k: int,
    rank: Rank,
    **options: Any,
) -> Neighbours:
    """`knn`, called by every rank of a launch with the same arguments.

    Each searches a contiguous part of the database on its own device, and all of them return
    the whole result, to the bit what one process finds. options: those of `knn` but `out`.
    """
    if rank.device.type != "cpu":
        options.setdefault("devices", [rank.device])
    task, count = _task((query, database, k), **options)
    size = len(task.span)
    part = range(rank.rank * size // rank.world, (rank.rank + 1) * size // rank.world)
    found = _search(task, count, part)
    if rank.world == 1:
        return found
    merged = [
        merge(_gathered(Neighbours(*some), rank), task.k)
        for some in zip(
            found.scores.split(QUERIES), found.rows.split(QUERIES), strict=True
        )
    ]
    scores, rows = zip(*merged, strict=True)
    return Neighbours(torch.cat(scores), torch.cat(rows))


def merge(parts: Sequence[Neighbours], k: int) -> Neighbours:
    """The k best of the neighbours found in different parts of a database."""
    keys = torch.cat([pack(part.scores, part.rows) for part in parts], dim=1)
    return Neighbours(*unpack(keys.sort(dim=1, descending=True).values[:, :k]))


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (Q, N), best first; ties go to the lower column.

    Scores are float32 without NaN. Columns are first skipped by the largest of a strided few.
    """
    if scores.dtype != torch.float32:
        raise TypeError(f"scores are {scores.dtype}, not float32")
    width, k = scores.shape[1], min(k, scores.shape[1])
    strides = width // CHUNK
    if strides >= 2 * k > 0 and len(scores):
        largest = scores[:, : strides * CHUNK].unflatten(1, (CHUNK, strides)).amax(1)
        floor = largest.topk(k).values[:, -1:]
        above = scores >= floor
        counts = above.sum(dim=1)
        if counts.max() <= 8 * k + CHUNK:
            return _top_of_few(scores, above, counts, k)
    columns = torch.arange(width, device=scores.device).expand(scores.shape)
    keys = pack(scores, columns).topk(k, dim=1).values
    at = unpack(keys)[1]
    return scores.gather(1, at), at


def _top_of_few(
    scores: Tensor, above: Tensor, counts: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The same where few columns are `above` all that can be left out."""
    row, column = above.nonzero(as_tuple=True)
    place = torch.arange(len(row), device=row.device)
    place -= (counts.cumsum(0) - counts)[row]
    keys = torch.full((len(scores), int(counts.max())), NOTHING, device=scores.device)
    keys[row, place] = pack(scores[row, column], column)
    at = unpack(keys.topk(k, dim=1).values)[1]
    return scores.gather(1, at), at


def _search(
    task: Task, count: int, span: range, out: Neighbours | None = None
) -> Neighbours:
    """Searches some positions, for QUERIES queries at a time."""
    here = replace(task, span=span)
    shape = count, task.k
    if out is None:
        out = Neighbours(torch.empty(shape), torch.empty(shape, dtype=torch.long))
    elif out.scores.shape != shape or out.rows.shape != shape:
        raise ValueError(f"out has shape {tuple(out.scores.shape)}, the result {shape}")
    for start in range(0, count, QUERIES):
        queries = slice(start, min(start + QUERIES, count))
        found = _without_zeros(here, queries) or nearest(here, queries)
        out.scores[queries], out.rows[queries] = found
    return out


def _without_zeros(task: Task, queries: slice) -> Neighbours | None:
    """What is nearest where some queries are zero, as those of unreadable images are.

    All rows tie for them, which a search could only find by scoring every one exactly. None
    where there are none, or where addends make their scores differ.
    """
    given = [side.query[queries] for side in task.sides]
    zero = ~torch.stack([each.any(dim=1) for each in given]).any(dim=0)
    given_more = any(each is not None for each in vars(task.addends).values())
    if given_more or not zero.any():
        return None
    shape = len(zero), task.k
    scores = torch.full(shape, -torch.inf)
    rows = torch.full(shape, -1, dtype=torch.long)
    there = torch.arange(task.span.start, task.span.stop)
    if task.skip is not None:
        there = there[~task.skip[task.span.start : task.span.stop]]
    first = there[: task.k]
    scores[zero, : len(first)], rows[zero, : len(first)] = 0.0, first
    if not zero.all():
        sides = [
            side._replace(query=each[~zero])
            for side, each in zip(task.sides, given, strict=True)
        ]
        others = slice(0, len(zero) - int(zero.sum()))
        scores[~zero], rows[~zero] = nearest(replace(task, sides=sides), others)
    return Neighbours(scores, rows)


def _gathered(part: Neighbours, rank: Rank) -> list[Neighbours]:
    gathered = []
    for values in part:
        mine = values.contiguous().to(rank.device)
        everyone = [torch.empty_like(mine) for _ in range(rank.world)]
        torch.distributed.all_gather(everyone, mine)
        gathered.append([each.cpu() for each in everyone])
    return [Neighbours(*each) for each in zip(*gathered, strict=True)]


def _task(
    asked: tuple[Rows | Sequence[Rows], Rows | Sequence[Rows], int],
    *,
    weights: Sequence[float] | None = None,
    rows: np.ndarray | Tensor | None = None,
    skip: np.ndarray | Tensor | None = None,
    addends: Addends | None = None,
    screening: str = "auto",
    devices: Sequence[torch.device | str] | None = None,
    block: int | None = None,
) -> tuple[Task, int]:
    """The search that is asked for, checked, and the number of queries."""
    query, database, k = asked
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    sides = _sides(query, database, weights)
    count, size = len(sides[0].query), len(sides[0].vectors)
    if rows is not None:
        rows = torch.as_tensor(rows).cpu().long()
        strange = rows[(rows < 0) | (rows >= size)]
        if len(strange):
            raise ValueError(
                f"rows has {int(strange[0])}; the database has {size} rows"
            )
        size = len(rows)
    if not size:
        raise ValueError("the database has no rows")
    if size >= HIDDEN:
        raise ValueError(f"the database has {size} rows, more than 2^31 - 2; split it")
    if skip is not None:
        skip = torch.as_tensor(skip).cpu()
        if skip.dtype != torch.bool or skip.shape != (size,):
            raise ValueError(f"skip must be {size} booleans, one a row of the database")
    addends = (addends or Addends()).cpu()
    addends.check(count, size)
    places = _devices(devices)
    dtype = _type(screening, places)
    block = block or _block(min(count, QUERIES), places)
    task = Task(
        sides, min(k, size), range(size), rows, skip, addends, dtype, places, block
    )
    return task, count


def _sides(
    query: Rows | Sequence[Rows],
    database: Rows | Sequence[Rows],
    weights: Sequence[float] | None,
) -> list[Side]:
    """The models; refuses what does not fit together."""
    if isinstance(query, Features | np.ndarray | Tensor):
        query, database = [query], [database]
    weights = [1.0] * len(query) if weights is None else list(weights)
    if not len(query) == len(database) == len(weights) > 0:
        raise ValueError(
            f"{len(query)} queries, {len(database)} databases and {len(weights)} weights; "
            "there must be one of each for every model"
        )
    sides = []
    for number, (queries, rows, weight) in enumerate(
        zip(query, database, weights, strict=True)
    ):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight {weight} of model {number} is not at least 0")
        copy = screen.of(rows) if isinstance(rows, Features) else None
        side = Side(stored(queries, "queries"), stored(rows, "database"), weight, copy)
        for name, one, first in (
            ("queries", side.query, sides[0].query if sides else side.query),
            ("rows", side.vectors, sides[0].vectors if sides else side.vectors),
        ):
            if len(one) != len(first):
                raise ValueError(
                    f"model {number} has {len(one)} {name}, model 0 {len(first)}"
                )
        if side.query.shape[1] != side.vectors.shape[1]:
            raise ValueError(
                f"queries have {side.query.shape[1]} dimensions, "
                f"the database {side.vectors.shape[1]}"
            )
        sides.append(side)
    return sides


def stored(rows: Rows, name: str) -> Tensor:
    """(N, D) float16; queries may be float32 and are rounded."""
    rows = rows.vectors if isinstance(rows, Features) else rows
    values = screen.mapped(rows) if isinstance(rows, np.ndarray) else rows
    if values.dim() != 2:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, not (rows, dimensions)")
    if values.dtype == torch.float32 and name == "queries":
        return values.half()
    if values.dtype != torch.float16:
        raise TypeError(f"{name}: {values.dtype}, not float16 as features are stored")
    return values


def _devices(devices: Sequence[torch.device | str] | None) -> list[torch.device]:
    if devices is not None:
        if not devices:
            raise ValueError("devices is empty; name one, or leave it out")
        return [torch.device(device) for device in devices]
    gpus = range(torch.cuda.device_count())
    if gpus:
        return [torch.device("cuda", number) for number in gpus]
    return [torch.device("cpu")] * torch.get_num_threads()


def _type(screening: str, devices: Sequence[torch.device]) -> torch.dtype:
    if screening == "auto":
        on_cpu = any(device.type == "cpu" for device in devices)
        screening = faster_on_cpu() if on_cpu else "fp16"
    if screening not in TYPES:
        raise ValueError(
            f"screening is {screening!r}; choose from auto, {', '.join(TYPES)}"
        )
    return TYPES[screening]


@cache
def faster_on_cpu() -> str:
    """The type whose small gemm takes less time here, measured once a process."""
    seconds = {}
    for name in ("bf16", "fp32"):
        one = torch.ones(512, 512, dtype=TYPES[name])
        for _ in range(4):  # the first ones prepare the library
            start = time.perf_counter()
            one @ one
            took = time.perf_counter() - start
            seconds[name] = min(took, seconds.get(name, took))
    # a tie goes to float32: its margin is hardly any
    return "bf16" if seconds["bf16"] < 0.8 * seconds["fp32"] else "fp32"


def _block(queries: int, devices: Sequence[torch.device]) -> int:
    """Rows that a worker scores at a time."""
    on_cpu = any(device.type == "cpu" for device in devices)
    scores = SCORES // len(devices) if on_cpu else GPU_SCORES
    most = 8_192 if on_cpu else 1 << 18
    return min(max(scores // max(queries, 1) // CHUNK * CHUNK, 512), most)
