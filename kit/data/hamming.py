"""Two sets of 64-bit hashes -> which of them differ in few bits, exactly, in bounded memory.

Multi-index hashing (Norouzi, Punjani, Fleet, "Fast Exact Search in Hamming Space with
Multi-Index Hashing", TPAMI 2014). The 64 bits are cut into chunks c = 1..m, and each has a radius
r_c with sum(r_c + 1) = most + 1. A pair that differed in more than r_c bits of every chunk would
differ in at least most + 1 bits: so each pair within `most` bits is within r_c in some chunk c,
and it is found by looking up all keys within r_c there. It counts in the first such chunk only,
and there under one key: each pair comes once. A radius of -1 leaves its chunk out.

Working memory, beside the hashes: 32 bytes a hash of the longer set, a table of at most 2^22
places, and about 150 MB for blocks of candidates.
"""

from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb
from typing import NamedTuple

import numpy as np

BITS, WIDEST = 64, 22  # of a hash, and of a chunk: its table has 2^22 places
KEYS = 1 << 18  # looked up at a time
CANDIDATES = 1 << 20  # compared at a time, or those of one key
LOOP = 1000  # candidates that could be compared while a loop goes round


class Pairs(NamedTuple):
    """Hashes that differ in few bits."""

    first: np.ndarray  # (P,) int64 rows of the first set
    second: np.ndarray  # (P,) int64 rows of the second set
    bits: np.ndarray  # (P,) uint8, how many differ


class Nearest(NamedTuple):
    """What the first set has near a hash of the second, each row once."""

    rows: np.ndarray  # (n,) int64 rows of the first set, ascending
    of: (
        np.ndarray
    )  # (n,) int64 row of the nearest of the second set, of equal ones the first
    bits: np.ndarray  # (n,) int64, how many differ
    pairs: int  # of all rows that are near


class Chunk(NamedTuple):
    """Some bits of a hash."""

    shift: int
    width: int
    radius: int  # bits that may differ in it; -1: it is not looked at

    def keys(self, values: np.ndarray) -> np.ndarray:
        """(N,) uint64 -> (N,) int64."""
        mask = np.uint64((1 << self.width) - 1)
        return ((values >> np.uint64(self.shift)) & mask).astype(np.int64)

    def masks(self) -> Iterator[int]:
        """Every difference of at most `radius` bits."""
        for count in range(self.radius + 1):
            for bits in combinations(range(self.width), count):
                yield sum(1 << bit for bit in bits)

    def cost(self, keys: int, table: int) -> float:
        """Keys looked up and candidates compared, were the hashes random, and what a loop takes."""
        masks = sum(comb(self.width, count) for count in range(self.radius + 1))
        return masks * (LOOP + keys * (1 + table / 2**self.width)) + 2**self.width


def nearest(first: np.ndarray, second: np.ndarray, most: int) -> Nearest:
    """Which of `first` (N,) uint64 differ in at most `most` bits from one of `second` (M,).

    Equal hashes are searched once: thousands of copies of a picture cost no more than one, and
    all their pairs are counted without being listed.
    """
    ours, inverse, copies = np.unique(first, return_inverse=True, return_counts=True)
    theirs, lowest, others = np.unique(second, return_index=True, return_counts=True)
    best = np.full(len(ours), np.iinfo(np.int64).max)  # bits << 40 | row of second
    count = 0
    for pairs in within(ours, theirs, most):
        count += int(copies[pairs.first] @ others[pairs.second])
        key = pairs.bits.astype(np.int64) << 40 | lowest[pairs.second]
        np.minimum.at(best, pairs.first, key)
    best = best[inverse]
    rows = np.flatnonzero(best < np.iinfo(np.int64).max)
    return Nearest(rows, best[rows] & ((1 << 40) - 1), best[rows] >> 40, count)


def within(first: np.ndarray, second: np.ndarray, most: int) -> Iterator[Pairs]:
    """All pairs of `first` (N,) and `second` (M,) uint64 that differ in at most `most` bits.

    Each comes once, in blocks, in no order.
    """
    if not 0 <= most < BITS:
        raise ValueError(f"{most} bits cannot be asked for; give 0 to {BITS - 1}")
    for name, values in (("first", first), ("second", second)):
        if values.dtype != np.uint64 or values.ndim != 1:
            raise TypeError(f"{name}: {values.dtype} {values.shape}, not (N,) uint64")
    if not len(first) or not len(second):
        return
    if len(first) > len(second):  # the keys of the smaller set are varied
        for pairs in within(second, first, most):
            yield Pairs(pairs.second, pairs.first, pairs.bits)
        return
    chunks = plan(most, len(first), len(second))
    for number, chunk in enumerate(chunks):
        if chunk.radius >= 0:
            yield from _in_chunk(first, second, most, chunks[: number + 1])


def plan(most: int, keys: int, table: int) -> list[Chunk]:
    """The chunks, and their radii, of the least cost for so many hashes on either side."""
    least = -(-BITS // WIDEST)

    def cut(count: int) -> list[Chunk]:
        edges = [BITS * n // count for n in range(count + 1)]
        radius, larger = divmod(most + 1, count)
        return [
            Chunk(low, high - low, radius - (n >= larger))
            for n, (low, high) in enumerate(pairwise(edges))
        ]

    plans = [cut(count) for count in range(least, max(least, most + 1) + 1)]
    return min(plans, key=lambda chunks: sum(c.cost(keys, table) for c in chunks))


def _in_chunk(
    first: np.ndarray, second: np.ndarray, most: int, chunks: list[Chunk]
) -> Iterator[Pairs]:
    """Pairs whose first near chunk is the last of `chunks`."""
    chunk = chunks[-1]
    keys = chunk.keys(second)
    order = np.argsort(keys, kind="stable")
    begins = np.zeros((1 << chunk.width) + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=1 << chunk.width), out=begins[1:])
    sorted_second = second[order]
    own = chunk.keys(first)
    asking = np.argsort(own, kind="stable")  # neighbours look up the same part
    for start in range(0, len(first), KEYS):
        rows = asking[start : start + KEYS]
        values, key = first[rows], own[rows]
        for mask in chunk.masks():
            varied = key ^ mask
            begin = begins[varied]
            count = begins[varied + 1] - begin
            for asked, at in _candidates(begin, count):
                differing = values[asked] ^ sorted_second[at]
                bits = np.bitwise_count(differing)
                near = np.flatnonzero(bits <= most)
                near = near[_new(differing[near], chunks[:-1])]
                if len(near):
                    yield Pairs(rows[asked[near]], order[at[near]], bits[near])


def _candidates(
    begin: np.ndarray, count: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """n, repeated count[n] times, and the places from begin[n] on; a bounded number at a time."""
    there = np.flatnonzero(count)
    ends = count[there].cumsum()
    start = done = 0
    while start < len(there):
        stop = int(np.searchsorted(ends, done + CANDIDATES, "right"))
        stop = max(stop, start + 1)
        some = there[start:stop]
        asked = np.repeat(some, count[some])
        first = np.concatenate([[done], ends[start : stop - 1]]) - done
        step = np.arange(len(asked)) - np.repeat(first, count[some])
        yield asked, begin[asked] + step
        start, done = stop, int(ends[stop - 1])


def _new(differing: np.ndarray, before: list[Chunk]) -> np.ndarray:
    """(P,) bool: pairs that no earlier chunk has found."""
    fresh = np.ones(len(differing), bool)
    for chunk in before:
        fresh &= np.bitwise_count(chunk.keys(differing)) > chunk.radius
    return fresh
