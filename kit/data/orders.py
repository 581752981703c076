"""Orders of a list's rows for one epoch: pure functions of the columns and a random generator.

Written for millions of rows: what does not change between epochs is computed once by the caller.
"""

from dataclasses import dataclass

import numpy as np

Rng = np.random.Generator

# --- every row once -----------------------------------------------------------------------------


def shuffle(length: int, rng: Rng) -> np.ndarray:
    """(length,) every row once."""
    return rng.permutation(length)


def grouped(group: np.ndarray, batch: int, rng: Rng) -> np.ndarray:
    """(B * batch,) a random order cut into batches of one group (2019).

    group: (N,) from 0. The batches follow each other as their first rows do in the order; the
    rows at its end that do not fill a batch of their group are left out.
    """
    order = rng.permutation(len(group))
    # places in the order, group by group; NumPy counts small integers instead of comparing
    places = np.argsort(group[order].astype(np.int16), kind="stable")
    counts = np.bincount(group)
    starts = np.cumsum(counts) - counts
    firsts = [
        start + batch * np.arange(count // batch)
        for start, count in zip(starts, counts, strict=True)
    ]
    batches = places[np.concatenate(firsts)[:, None] + np.arange(batch)]
    return order[batches[np.argsort(batches[:, 0])]].reshape(-1)


# --- by class -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Classes:
    """The rows of each class, one class after the other."""

    rows: np.ndarray  # (N,) int32
    counts: np.ndarray  # (C,) at least 1
    starts: np.ndarray  # (C,) in rows

    def __len__(self) -> int:
        return len(self.counts)


def by_class(labels: np.ndarray) -> Classes:
    """(N,) labels, some numbers may be missing among them -> the classes that occur."""
    rows = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[rows], prepend=labels[rows[0]] - 1))
    return Classes(rows.astype(np.int32), np.diff(starts, append=len(labels)), starts)


def class_balanced(classes: Classes, count: int, rng: Rng) -> np.ndarray:
    """(count,) every class once in each round, by one random row of it."""
    rounds = -(-count // len(classes))
    turns = [rng.permutation(len(classes)) for _ in range(rounds)]
    chosen = np.concatenate(turns)[:count]
    picks = rng.integers(0, classes.counts[chosen])
    return classes.rows[classes.starts[chosen] + picks]


def image_uniform(classes: Classes, per_class: int, batch: int, rng: Rng) -> np.ndarray:
    """(B * batch,) batches of groups of `per_class` rows of one class, every row about once.

    Each class is shuffled and cut into groups, the last one filled from the class's beginning. The
    groups are dealt out to the batches one by one, class after class, so that a class is in a
    batch twice only where it has more groups than there are batches. The groups that do not fill a
    batch, a random few, are left out.
    """
    turn = rng.permutation(len(classes))  # order of the classes
    counts, starts = classes.counts[turn], classes.starts[turn]
    shuffled = _shuffled_within(classes, rng)
    slots = -(-counts // per_class) * per_class  # places of each class in its groups
    owner = np.repeat(np.arange(len(turn)), slots)
    slot = np.arange(len(owner)) - np.repeat(np.cumsum(slots) - slots, slots)
    groups = shuffled[starts[owner] + slot % counts[owner]].reshape(-1, per_class)
    width = batch // per_class
    steps = len(groups) // width
    kept = np.sort(rng.permutation(len(groups))[: steps * width])
    dealt = groups[kept].reshape(width, steps, per_class).swapaxes(0, 1)
    return dealt[rng.permutation(steps)].reshape(-1)


def pxk(
    classes: Classes, per_class: int, batch: int, count: int, rng: Rng
) -> np.ndarray:
    """(count,) batches of distinct classes, `per_class` rows each; count: a multiple of batch.

    Each round has every class once but those that do not fill its last batch. The rows of a class
    are distinct in a batch unless it has fewer than `per_class`: then they are drawn with
    replacement.
    """
    width = batch // per_class
    whole = len(classes) // width * width
    rounds = -(-(count // per_class) // whole)
    turns = [rng.permutation(len(classes))[:whole] for _ in range(rounds)]
    chosen = np.concatenate(turns)[: count // per_class]
    picks = _distinct(classes.counts[chosen], per_class, rng)
    return classes.rows[classes.starts[chosen][:, None] + picks].reshape(-1)


def _shuffled_within(classes: Classes, rng: Rng) -> np.ndarray:
    """(N,) `classes.rows` with each class in a random order."""
    owner = np.repeat(np.arange(len(classes), dtype=np.int32), classes.counts)
    order = rng.permutation(len(owner))
    return classes.rows[order[np.argsort(owner[order], kind="stable")]]


def _distinct(counts: np.ndarray, each: int, rng: Rng) -> np.ndarray:
    """(M, each) numbers below each count, without repeats where it has enough of them.

    Floyd's sampling (Bentley & Floyd, CACM 1987), all counts at once.
    """
    picks = np.empty((len(counts), each), np.int64)
    enough = counts >= each
    for turn in range(each):
        below = np.where(enough, counts - each + turn + 1, counts)
        pick = rng.integers(0, below)
        taken = enough & (picks[:, :turn] == pick[:, None]).any(axis=1)
        picks[:, turn] = np.where(taken, below - 1, pick)
    return picks


# --- by quota -----------------------------------------------------------------------------------


def quota(count: int, shares: np.ndarray) -> np.ndarray:
    """Parts of `count` in proportion to `shares`, rounded by the largest remainder."""
    exact = count * shares / shares.sum()
    parts = np.floor(exact).astype(np.int64)
    rest = np.round(exact - parts, 6)  # equal remainders: the first of them
    parts[np.argsort(-rest, kind="stable")[: count - parts.sum()]] += 1
    return parts


def by_quota(buckets: list[np.ndarray], counts: list[int], rng: Rng) -> np.ndarray:
    """As many rows of each bucket as counted, drawn with replacement, in a random order."""
    drawn = [
        rows[rng.integers(0, len(rows), count)]
        for rows, count in zip(buckets, counts, strict=True)
        if count
    ]
    return rng.permutation(np.concatenate(drawn))
