"""Batches of training rows in the orders of `kit.data.orders`, split over ranks, resumable.

An epoch's order is a function of (seed, epoch) alone; every rank computes all of it and takes its
part of each batch, so that neither the number of processes nor a restart changes what is seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch.utils.data import Sampler

from kit import config
from kit.data import orders

ORDERS = ("shuffle", "class_balanced", "image_uniform", "pxk", "continent")
QUOTA = (  # of the 2nd place of Google Landmark Retrieval 2021
    ("Asia", 0.5),
    ("Europe", 0.2),
    ("Africa", 0.15),
    ("North America", 0.1),
    ("South America", 0.02),
    ("Antarctica", 0.01),
    ("Oceania", 0.01),
    ("OTHER", 0.01),  # landmarks in no country file
)


@dataclass(frozen=True)
class Sampling:
    """Which rows an epoch has and in which order.

    shuffle: every row once.
    class_balanced: every class once, by one random row of it (id-uniform in 2021).
    image_uniform: batches of `per_class` rows a class, every row about once (2021).
    pxk: the same batches, every class equally often.
    continent: a quota of rows from each continent, of clean and of noisy ones (2021).
    """

    order: str = "shuffle"
    per_class: int = 4  # rows a class in a batch of image_uniform and pxk
    continents: tuple[tuple[str, float], ...] = (
        QUOTA  # share of each; others are unseen
    )
    clean_share: float = 0.66  # of a continent's rows
    fill: bool = False  # an empty continent's quota goes to the others; else an error
    epoch_size: int = 0  # rows; 0: the list's, of class_balanced the number of classes

    def __post_init__(self) -> None:
        config.check(
            self,
            least={"per_class": 1, "clean_share": 0, "epoch_size": 0},
            most={"clean_share": 1},
            choices={"order": ORDERS},
        )
        names = [name for name, _ in self.continents]
        shares = [share for _, share in self.continents]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"continents has {twice} twice")
        if min(shares, default=0) < 0 or abs(sum(shares) - 1) > 1e-6:
            listed = ", ".join(map(str, shares))
            raise ValueError(f"the shares of continents are not parts of 1: {listed}")


@dataclass(frozen=True)
class _Plan:
    """What an order does with one list."""

    draw: Callable[[np.random.Generator], np.ndarray]  # an epoch's rows
    size: int  # rows of an epoch
    unseen: int = 0  # rows that no epoch has


class Batches(Sampler[list[tuple[int, int]]]):
    """Batches of (number, row) for one rank, from any step of a stage to its end.

    A step takes `batch` rows of the epoch's order, the ranks side by side; the last step of an
    epoch is filled up from the order's beginning, so that every batch is whole on every rank.
    The number counts the rows given over the whole schedule: a row that an epoch has more than
    once comes with another number, and is augmented in another way, each time.
    """

    def __init__(
        self,
        sampling: Sampling,
        labels: np.ndarray,  # (N,) of the list's rows
        batch: int,  # rows a step, over all ranks
        first: int,  # epoch of the schedule that the stage starts with
        last: int,  # epoch before which it ends
        seed: int,
        *,
        clean: np.ndarray | None = None,  # (N,) bool, of order continent
        continents: np.ndarray | None = None,  # (N,) text, of order continent
        groups: np.ndarray | None = None,  # (N,) a batch has rows of one; None: of any
        name: str = "the list",  # in messages
        rank: int = 0,
        world: int = 1,
        step: int = 0,  # the first to give, counted over the whole stage
    ) -> None:
        if batch % world:
            raise ValueError(
                f"a batch of {batch} does not split over {world} processes"
            )
        if not len(labels):
            raise ValueError(f"{name} has no row to sample")
        columns = {"clean": clean, "continents": continents, "groups": groups}
        for column, values in columns.items():
            if values is not None and len(values) != len(labels):
                raise ValueError(f"{name}: {len(values)} {column}, {len(labels)} rows")
        plan = _plan(sampling, labels, batch, clean, continents, groups, name)
        self.unseen = plan.unseen  # rows that no epoch has
        self.per_epoch = -(-(sampling.epoch_size or plan.size) // batch)
        self.steps = (last - first) * self.per_epoch
        self.batch, self.first, self.last, self.seed = batch, first, last, seed
        self.rank, self.world, self.step, self._draw = rank, world, step, plan.draw

    def __len__(self) -> int:
        return self.steps - self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch // self.world
        done, begin = divmod(self.step, self.per_epoch)
        for epoch in range(self.first + done, self.last):
            order = self._draw(np.random.default_rng((self.seed, epoch)))
            order = np.resize(order, self.per_epoch * self.batch)  # repeats its start
            for number in range(begin, self.per_epoch):
                at = number * self.batch + self.rank * share
                mine = order[at : at + share].tolist()
                yield list(enumerate(mine, epoch * len(order) + at))
            begin = 0


def _plan(
    sampling: Sampling,
    labels: np.ndarray,
    batch: int,
    clean: np.ndarray | None,
    continents: np.ndarray | None,
    groups: np.ndarray | None,
    name: str,
) -> _Plan:
    if groups is not None and sampling.order != "shuffle":
        raise ValueError(
            f"order {sampling.order} cannot keep a batch in one aspect group: "
            "take order shuffle, or an input without template"
        )
    if groups is not None:
        return _by_group(groups, batch, name)
    if sampling.order == "shuffle":
        return _Plan(partial(orders.shuffle, len(labels)), len(labels))
    if sampling.order != "continent":
        return _by_class(labels, batch, sampling, name)
    if clean is None or continents is None:
        lacking = "clean" if clean is None else "continents"
        raise ValueError(f"order continent needs the column {lacking} of {name}")
    return _by_continent(np.asarray(clean), np.asarray(continents), sampling, name)


def _by_group(groups: np.ndarray, batch: int, name: str) -> _Plan:
    found, codes, counts = np.unique(groups, return_inverse=True, return_counts=True)
    size = int((counts // batch).sum()) * batch
    if not size:
        rows = ", ".join(f"{g}: {n}" for g, n in zip(found, counts, strict=True))
        raise ValueError(
            f"{name}: no aspect group fills a batch of {batch} (rows by group: {rows})"
        )
    unseen = int(counts[counts < batch].sum())
    return _Plan(partial(orders.grouped, codes, batch), size, unseen)


def _by_class(labels: np.ndarray, batch: int, sampling: Sampling, name: str) -> _Plan:
    if without := int((labels < 0).sum()):
        raise ValueError(f"{name}: {without} rows have no label to sample by")
    classes, each = orders.by_class(labels), sampling.per_class
    if sampling.order == "class_balanced":
        size = sampling.epoch_size or len(classes)
        count = -(-size // batch) * batch
        return _Plan(partial(orders.class_balanced, classes, count), size)
    if batch % each:
        raise ValueError(f"a batch of {batch} does not split into {each} rows a class")
    width, groups = batch // each, int((-(-classes.counts // each)).sum())
    uniform = sampling.order == "image_uniform"
    there = f"{groups} groups of {each} rows" if uniform else f"{len(classes)} classes"
    if (groups if uniform else len(classes)) < width:
        raise ValueError(
            f"{name}: {there} do not fill a batch of {batch}, {each} rows a class"
        )
    if uniform:
        draw = partial(orders.image_uniform, classes, each, batch)
        return _Plan(draw, groups // width * batch)
    size = sampling.epoch_size or len(labels)
    count = -(-size // batch) * batch
    return _Plan(partial(orders.pxk, classes, each, batch, count), size)


def _by_continent(
    clean: np.ndarray, continents: np.ndarray, sampling: Sampling, name: str
) -> _Plan:
    if not (continents != "").any():
        raise ValueError(
            f"{name} has no continents: build it in 00_image_lists from data with "
            "countries and a table of their continents, or take another order"
        )
    share_of = np.array([sampling.clean_share, 1 - sampling.clean_share])
    kinds = np.array([clean != 0, clean == 0])
    buckets, shares = [], []
    for continent, share in sampling.continents:
        member = continents == continent
        if share == 0 or (sampling.fill and not member.any()):
            continue
        pair = [np.flatnonzero(member & kind).astype(np.int32) for kind in kinds]
        lacking = [
            s > 0 and not len(rows) for s, rows in zip(share_of, pair, strict=True)
        ]
        if any(lacking) and not sampling.fill:
            kind = "" if not member.any() else "clean " if lacking[0] else "noisy "
            raise ValueError(
                f"{name}: no {kind}row of {continent}; set fill to give its quota to "
                "others, or change continents or clean_share"
            )
        buckets.append(pair)
        shares.append(share)
    if not buckets:
        raise ValueError(f"{name}: no row of a continent that has a quota")
    size = sampling.epoch_size or len(clean)
    counts: list[int] = []
    for pair, count in zip(buckets, orders.quota(size, np.array(shares)), strict=True):
        full = np.array([len(rows) > 0 for rows in pair])
        counts += orders.quota(count, share_of if full.all() else full).tolist()
    flat = [rows for pair in buckets for rows in pair]
    seen = sum(len(rows) for rows, count in zip(flat, counts, strict=True) if count)
    return _Plan(partial(orders.by_quota, flat, counts), size, len(clean) - seen)
