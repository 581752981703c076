"""A list and the graph of its features -> each image's neighbours of its own landmark."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from kit import files
from kit.data.lists import ImageList
from kit.features import store
from kit.features.graph import Graph
from kit.features.store import Features

MOST = 99  # candidates of an image; published: 100 with the image itself
BLOCK = 4_096  # images whose neighbours are looked at together: 1,000 each are 50 MB


@dataclass(frozen=True)
class Labelled:
    """A list of labelled images and its neighbours, row by row the same images."""

    images: ImageList
    graph: Graph

    def __len__(self) -> int:
        return len(self.graph)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int32; -1: none."""
        return self.images.labels.astype(np.int32)

    def blocks(self) -> Iterator[slice]:
        """Rows of the list, some at a time."""
        for start in range(0, len(self), BLOCK):
            yield slice(start, min(start + BLOCK, len(self)))


def labelled(images: ImageList, features: Features, graph: Graph) -> Labelled:
    """Refuses features of another list, a graph of other features, and lists that cannot be cleaned.

    Can be cleaned: a list where an image stands once and a label is one landmark, such as `full`.
    """
    store.expect(features, list_hash=images.hash)
    if len(graph) != len(features):
        raise ValueError(
            f"the graph has {len(graph)} images, the features {len(features)}; "
            "build it again: 03_extract_features"
        )
    repeated = images.rows["id"].duplicated()
    if repeated.any():
        first = images.rows["id"][repeated].iloc[0]
        raise ValueError(
            f"list {images.name} names image {first} twice; cleaning takes a list that "
            "names an image once, such as full"
        )
    known = images.rows.loc[images.rows["label"] >= 0, ["label", "landmark_id"]]
    if known.empty:
        raise ValueError(f"list {images.name} has no labels to clean")
    pairs = known.drop_duplicates()
    for column, other in (("label", "landmark_id"), ("landmark_id", "label")):
        twice = pairs[pairs[column].duplicated()]
        if len(twice):
            value = twice[column].iloc[0]
            raise ValueError(
                f"list {images.name}: {column} {value} stands with more than one {other}; "
                "cleaning takes a list where they are one to one, such as full"
            )
    return Labelled(images, graph)


def same_landmark(
    neighbours: np.ndarray, own: np.ndarray, labels: np.ndarray, most: int = MOST
) -> np.ndarray:
    """(n, most) int32: first neighbours (n, k) of the images `own` (n,) that bear their label.

    Best first, -1 where there are no more. An image is left out of its own by what it is, not by
    where it stands: exact duplicates may come before it.
    """
    label = labels[own][:, None]
    same = (labels[neighbours] == label) & (label >= 0)
    same &= (neighbours >= 0) & (neighbours != own[:, None])
    place = same.cumsum(axis=1, dtype=np.int32) - 1
    same &= place < most
    found = np.full((len(own), most), -1, np.int32)
    images, at = np.nonzero(same)
    found[images, place[images, at]] = neighbours[images, at]
    return found


def blocks(given: Labelled, most: int = MOST) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the list and their candidates (n, most), block by block of the graph."""
    for here in given.blocks():
        own = np.arange(here.start, here.stop)
        yield here, same_landmark(given.graph.rows[here], own, given.labels, most)


def write(given: Labelled, path: Path, most: int = MOST) -> Path:
    """An .npy file (N, most) int32 of all candidates, written in bounded memory."""
    with files.replacing(path) as temporary:
        shape = len(given), most
        found = np.lib.format.open_memmap(temporary, "w+", np.int32, shape)
        for here, rows in blocks(given, most):
            found[here] = rows
        found.flush()
    return path


def counts(given: Labelled, most: int = MOST) -> np.ndarray:
    """(N,) int32: how many candidates each image has."""
    return np.concatenate(
        [(rows >= 0).sum(axis=1, dtype=np.int32) for _, rows in blocks(given, most)]
    )
