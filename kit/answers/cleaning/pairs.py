"""Candidates -> the inliers of every pair of them, landmark by landmark, kept by `verified`.

A pair is verified once, whichever way it was found. The published rule verifies (i, j) and (j, i)
apart, and its two counts differ: each descriptor of one image looks for the nearest of the other.
Here a pair has one count, whichever image comes first. That changes the outcome only for pairs
whose two published counts lie on different sides of the threshold; who asks remains directed, as an
image counts nobody but its own candidates.

Local features live as long as their landmark is worked on. Those of a landmark with more than
`IN_MEMORY` images lie on disk meanwhile. What is there after a run that was killed is kept, and the
bytes at the end do not depend on that, nor on the number of processes.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kit import files, launch
from kit.answers.cleaning import candidates, verified
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.verified import FIRST, SECOND, Verified
from kit.data import images
from kit.data.readers import Reader, UnreadableImage, open_reader
from kit.rerank.local import cache, spread, verification
from kit.rerank.local.features import nothing
from kit.rerank.local.verification import Backend

log = logging.getLogger(__name__)

BLOCK = 256  # images of small landmarks that are finished together
IN_MEMORY = 1_000  # images of one landmark that a process holds: 540 MB of SIFT


@dataclass(frozen=True)
class Landmark:
    """Its images: rows of the list, ascending, and where they are."""

    rows: np.ndarray  # (n,) int32
    paths: np.ndarray  # (n,) bytes

    def __len__(self) -> int:
        return len(self.rows)


def verify(
    folder: Path,
    given: Labelled,
    features: dict[str, Any],
    data: Path,
    way: Backend,
    *,
    most: int = candidates.MOST,
    seed: int = 0,
    processes: int = 0,
) -> Verified:
    """Verifies what is not yet there; pairs of another list, features or way are replaced.

    features: what `kit.features.graph.identity` tells of those behind the graph. data: the folder
    that the list's paths start from. processes: 0 works in this one. Raises launch.Stopped when
    the time is over; the same call goes on.
    """
    if most < 1:
        raise ValueError(f"most is {most}; it is at least 1")
    made = _made_by(given, features, way, most, seed)
    with files.lock(folder):
        there = verified.begin(folder, made)
        if there["complete"]:
            return Verified(folder)
        if not (folder / "candidates.npy").exists():
            candidates.write(given, folder / "candidates.npy", most)
        pieces = list(enumerate(groups(given)))
        todo = [
            piece for piece in pieces if not verified.path(folder, piece[0]).exists()
        ]
        size = {number: sum(map(len, group)) for number, group in todo}
        shared = folder, partial(decoded, open_reader(data)), way, seed
        with tqdm(total=sum(size.values()), desc="images", disable=None) as bar:
            for count, number in enumerate(_each(todo, shared, processes), 1):
                bar.update(size[number])
                if count < len(todo) and launch.time_left() <= 0:
                    raise launch.Stopped(
                        f"{folder}: stopped, the time is over; run it again to go on"
                    )
        verified.finish(folder, there, len(pieces))
    found = Verified(folder)
    if unreadable := found.manifest["unreadable"]:
        log.warning(
            "%d images could not be read, such as %s; they have no inliers",
            *(len(unreadable), unreadable[0]),
        )
    return found


def groups(given: Labelled) -> Iterator[list[Landmark]]:
    """The landmarks of two images or more, in the order of labels, in blocks of about `BLOCK` images.

    One that has more than `IN_MEMORY` images is alone.
    """
    order = np.argsort(given.labels, kind="stable").astype(np.int32)
    paths = images.packed(given.images.rows["path"].to_numpy())
    labels, starts = np.unique(given.labels[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    group: list[Landmark] = []
    for label, start, end in zip(labels.tolist(), starts.tolist(), ends, strict=True):
        if label < 0 or end - start < 2:
            continue
        rows = order[start:end]
        there = sum(map(len, group))
        if group and (there + len(rows) > BLOCK or len(rows) > IN_MEMORY):
            yield group
            group = []
        group.append(Landmark(rows, paths[rows]))
    if group:
        yield group


def unordered(rows: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Candidates (n, most) of the images `rows` (n,), ascending, among themselves -> each pair once.

    (P, 2) places in `rows`, the lower first, in their order; (P,) whose candidate is whose.
    """
    own, at = np.nonzero(found >= 0)
    other = np.searchsorted(rows, found[own, at])
    key = np.minimum(own, other) * len(rows) + np.maximum(own, other)
    bit = np.where(own < other, FIRST, SECOND)
    once, place = np.unique(key, return_inverse=True)
    whose = np.bincount(place, weights=bit, minlength=len(once)).astype(np.int32)
    return np.stack(np.divmod(once, max(len(rows), 1)), axis=1), whose


def decoded(reader: Reader, path: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB; raises UnreadableImage."""
    return images.decode(reader.read(path), path)


def _made_by(
    given: Labelled, features: dict[str, Any], way: Backend, most: int, seed: int
) -> dict[str, Any]:
    return {
        "list": {"name": given.images.name, "hash": given.images.hash},
        "features": features,
        "neighbours": given.graph.k,
        "most": most,
        "images of a block, in memory": [BLOCK, IN_MEMORY],
        **cache.made_by(way.describe),
        "matcher": type(way.match).__name__,
        "match": asdict(way.match),
        "geometry": asdict(way.geometry),
        "seed": seed,
    }


def _each(
    todo: Sequence[tuple[int, list[Landmark]]], shared: tuple, processes: int
) -> Iterator[int]:
    """Numbers of the blocks as they are done: the large landmarks first, each by all processes."""
    large = [piece for piece in todo if len(piece[1][0]) > IN_MEMORY]
    for piece in large:
        yield _verify_large(piece, *shared, processes)
    small = [piece for piece in todo if len(piece[1][0]) <= IN_MEMORY]
    yield from spread.run(_verify_small, small, shared, processes)


def _verify_small(
    piece: tuple[int, list[Landmark]],
    folder: Path,
    read: Callable[[str], np.ndarray],
    way: Backend,
    seed: int,
) -> int:
    number, group = piece
    tables, unreadable = [], []
    for landmark in group:
        asked = _asked(folder, landmark)
        described = []
        for name in asked.names:
            try:
                described.append(way.describe(read(name)))
            except UnreadableImage:
                described.append(nothing(way.describe.dim, (0, 0)))
                unreadable.append(name)
        counts = verification.verify(asked.places, described, way, seed=seed)
        tables.append(asked.table(counts))
    verified.save(folder, number, np.concatenate(tables), unreadable)
    return number


def _verify_large(
    piece: tuple[int, list[Landmark]],
    folder: Path,
    read: Callable[[str], np.ndarray],
    way: Backend,
    seed: int,
    processes: int,
) -> int:
    number, (landmark,) = piece
    asked = _asked(folder, landmark)
    aside = folder / f"{number:05d}.local"
    described = cache.fill(aside, asked.names, read, way.describe, processes=processes)
    counts = verification.verify(
        asked.places, described, way, seed=seed, processes=processes
    )
    unreadable = described.manifest["unreadable"]
    verified.save(folder, number, asked.table(counts), unreadable)
    shutil.rmtree(aside)
    return number


@dataclass(frozen=True)
class _Asked:
    """What is to be verified of a landmark."""

    names: list[str]  # paths of the images that are in a pair
    places: np.ndarray  # (P, 2) of a pair's images in `names`
    rows: np.ndarray  # (P, 2) in the list
    whose: np.ndarray  # (P,)

    def table(self, counts: np.ndarray) -> np.ndarray:
        return np.column_stack([self.rows, counts, self.whose]).astype(np.int32)


def _asked(folder: Path, landmark: Landmark) -> _Asked:
    found = np.load(folder / "candidates.npy", mmap_mode="r", allow_pickle=False)
    pairs, whose = unordered(landmark.rows, found[landmark.rows])
    used, places = np.unique(pairs, return_inverse=True)
    names = [path.decode() for path in landmark.paths[used]]
    return _Asked(names, places.reshape(-1, 2), landmark.rows[pairs], whose)
