"""Rows of `bench.py rerank`: label votes, expansions and the metric against loops over queries.

The vectors are synthetic; what is compared is the work, and that it gives the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from kit.answers.metrics import mean_ap
from kit.rerank import expansion
from kit.rerank.sort_insert import Predictions, sort_insert

INDEX = 761_757  # images of the 2019 index
QUERIES, FEW_QUERIES = 117_577, 11_700  # images of the 2019 test set; with --quick
LANDMARKS = 50_000
LIST, ABOVE = 100, 0.6  # places, and the insert threshold
ROWS_IN, FEW_ROWS, DIM, NEAR = 100_000, 10_000, 512, 10
RANKED = 1129  # queries of 2021, for the metric
SORT_LOOP, ROW_LOOP = 8, 400  # queries and rows that the loops are timed on


def sort_insert_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """All test queries of 2019; the loop on some of them, scaled."""
    queries = FEW_QUERIES if bench.quick else QUERIES
    scores, rows, query, index = votes(queries, INDEX)
    table = pd.DataFrame(
        {
            "landmark": index.labels.numpy().astype(str),
            "score": index.scores.numpy(),
        },
        index=names(INDEX),
    ).sort_values("score", ascending=False, kind="stable")
    ids = names(INDEX)[rows[:SORT_LOOP].numpy()]
    votes_for = query.labels[:SORT_LOOP].numpy().astype(str)
    sums = query.scores[:SORT_LOOP].numpy()

    def ours() -> Tensor:
        return sort_insert(scores, rows, query, index, above=ABOVE)[1]

    def theirs() -> list[list[str]]:
        return [
            sort_insert_loop(table, *each)
            for each in zip(ids.tolist(), votes_for, sums, strict=True)
        ]

    same = names(INDEX)[ours()[:SORT_LOOP].numpy()].tolist()
    expect(same == theirs(), "sort-and-insert lists differ from the loop's")
    ours_s, theirs_s = bench.interleaved(ours, theirs)
    name = f"sort-and-insert, {queries} x {INDEX}, loop on {SORT_LOOP}"
    yield bench.speed(name, ours_s, theirs_s / SORT_LOOP * queries, 1000, False)


def votes(queries: int, index: int) -> tuple[Tensor, Tensor, Predictions, Predictions]:
    """Rankings of which a part is of the query's landmark; landmarks as uneven as real ones."""
    draw = torch.Generator().manual_seed(0)

    def predictions(count: int) -> Predictions:
        share = torch.rand(count, generator=draw, dtype=torch.float64)
        labels = (LANDMARKS * share**2).long()
        return Predictions(labels, torch.rand(count, generator=draw))

    query, database = predictions(queries), predictions(index)
    rows = torch.randint(index, (queries, LIST), generator=draw)
    by_label = database.labels.argsort()
    ends = torch.searchsorted(database.labels[by_label], query.labels, right=True)
    own = by_label[(ends[:, None] - 1 - torch.arange(LIST // 5)).clamp(min=0)]
    rows[:, : LIST // 5] = own  # some of the landmark, others of the ones before it
    rows = distinct(rows, index)
    rows = rows.gather(1, torch.rand(rows.shape, generator=draw).argsort(dim=1))
    scores = torch.rand(rows.shape, generator=draw).sort(dim=1, descending=True).values
    return scores, rows, query, database


def distinct(rows: Tensor, index: int) -> Tensor:
    """Rows (Q, k) with what repeats moved to the next free row."""
    rows = rows.sort(dim=1).values
    steps = torch.arange(rows.shape[1])
    return ((rows - steps).cummax(dim=1).values + steps) % index


def names(count: int) -> np.ndarray:
    return np.char.mod("%016x", np.arange(count))


def sort_insert_loop(
    table: pd.DataFrame, ids: list[str], landmark: str, score: float
) -> list[str]:
    """The baseline, a query at a time, with the 2019 winners' means: a pandas table of the index
    images by id, in the order of their scores, that is looked through for the landmark.
    """
    listed = table.loc[ids]
    agrees = listed["landmark"].eq(landmark)
    alike = table[table["landmark"].eq(landmark)]
    fresh = alike[~alike.index.isin(ids) & (alike["score"] + score > ABOVE)]
    return [*listed.index[agrees], *fresh.index, *listed.index[~agrees]][:LIST]


def expansion_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """alpha-QE of as many queries as index images, and DBA of the index, 10 neighbours each."""
    count = FEW_ROWS if bench.quick else ROWS_IN
    draw = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(count, DIM, generator=draw), dim=1)
    queries = F.normalize(torch.randn(count, DIM, generator=draw), dim=1)
    others = torch.randint(1, count, (count, NEAR), generator=draw)
    rows = (torch.arange(count)[:, None] + others) % count
    scores = torch.rand(count, NEAR, generator=draw).sort(dim=1, descending=True).values
    some = torch.randperm(count, generator=draw)[:ROW_LOOP]
    for kind in (torch.float32, torch.bfloat16):
        index, own = features.to(kind), queries.to(kind)
        short = str(kind).removeprefix("torch.")
        ours = partial(expansion.alpha_qe, own, index, scores, rows)
        problem = own, index, scores, rows
        yield expansion_row(bench, f"alpha-QE {short}", ours, problem, some)
        weigh = expansion.powered(3)
        ours = partial(expansion.dba, index, scores, rows, NEAR + 1, weigh)
        problem = index, index, scores, rows
        yield expansion_row(bench, f"DBA {short}", ours, problem, some)


def expansion_row(
    bench: Any,
    name: str,
    ours: Callable[[], Tensor],
    problem: tuple[Tensor, ...],
    some: Tensor,
) -> dict[str, Any]:
    own, index, scores, rows = problem

    def theirs() -> Tensor:
        return torch.stack(
            [
                expand_loop(own[row], index, scores[row], rows[row])
                for row in some.tolist()
            ]
        )

    difference = (ours()[some] - theirs().float()).abs().max().item()
    bound = (
        1e-5 if own.dtype == torch.float32 else 2e-2
    )  # the loop sums in its own type
    expect(difference < bound, f"{name} is {difference} off the loop")
    ours_s, theirs_s = bench.interleaved(ours, theirs)
    title = f"{name}, {len(own)} x {NEAR}, loop on {len(some)}"
    return bench.speed(title, ours_s, theirs_s / len(some) * len(own), 60, False)


def expand_loop(own: Tensor, index: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
    """The baseline, a row at a time."""
    weights = (scores**3).to(index.dtype)
    return F.normalize(own + weights @ index[rows], dim=0)


def metric_rows(bench: Any) -> Iterator[dict[str, Any]]:
    """mAP@100 whole: from ranked ids and the text of the solution to the queries' AP."""
    queries, ranked, solution = answers()

    def ours() -> pd.DataFrame:
        return mean_ap.evaluate(queries, ranked, solution).queries

    def theirs() -> list[float]:
        rankings = dict(zip(queries, ranked.tolist(), strict=True))
        return [
            average_precision_loop(rankings[query], images.split())
            for query, images in zip(solution["id"], solution["images"], strict=True)
        ]

    expect(
        np.allclose(ours()["ap"], theirs(), atol=1e-12),
        "mAP@100 differs from the loop's",
    )
    ours_s, theirs_s = bench.interleaved(ours, theirs)
    name = f"mAP@100, {len(queries)} queries, ids of {INDEX}"
    yield bench.speed(name, ours_s, theirs_s, 8, False)


def answers() -> tuple[list[str], np.ndarray, pd.DataFrame]:
    """Queries, ranked ids (Q, LIST) and a solution; half of the positives are in the ranking."""
    draw, ids = np.random.default_rng(0), names(INDEX)
    queries = [f"q{number:015x}" for number in range(RANKED)]
    rows = torch.from_numpy(draw.integers(INDEX, size=(RANKED, LIST)))
    ranked = ids[distinct(rows, INDEX).numpy()]
    images = []
    for ranking, count in zip(ranked, draw.integers(1, 31, RANKED), strict=True):
        own = np.concatenate([draw.choice(ranking, count), draw.choice(ids, count)])
        images.append(" ".join(np.unique(own)))
    usage = np.where(draw.random(RANKED) < 1 / 3, "Public", "Private")
    return (
        queries,
        ranked,
        pd.DataFrame({"id": queries, "images": images, "usage": usage}),
    )


def average_precision_loop(ranking: list[str], positives: list[str]) -> float:
    """The baseline, a place at a time, as Kaggle's competitions share it: lists are looked through,
    and the places before for repeats.
    """
    found, total = 0, 0.0
    for place, image in enumerate(ranking, 1):
        if image in positives and image not in ranking[: place - 1]:
            found += 1
            total += found / place
    return total / min(len(positives), LIST)


def expect(holds: bool, problem: str) -> None:
    if not holds:
        raise RuntimeError(problem)


ROWS = [sort_insert_rows, expansion_rows, metric_rows]
