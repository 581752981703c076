"""A number of landmarks -> all images of GLDv2 that show them, in its three splits."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kit.data import sources, tables


@dataclass(frozen=True)
class Part:
    """Some landmarks with all their images."""

    landmarks: frozenset[str]  # of train
    ids: dict[str, frozenset[str]]  # split -> images


def choose(metadata: Path, count: int, seed: int | None = None) -> Part:
    """The first landmarks in the order of labels (clean ones first), or `count` drawn by seed.

    Drawn are clean landmarks while there are any: a part needs a clean list. Its index images
    are those of the places with its landmarks' names, its test images those with such an answer.
    """
    train = tables.read_csv(metadata / "train/train.csv", ("id", "landmark_id"))
    clean = tables.read_csv(
        metadata / "train/train_clean.csv", ("landmark_id", "images")
    )
    first = clean["landmark_id"].unique()
    every = train["landmark_id"].unique()
    others = every[~np.isin(every.astype(str), first.astype(str))]
    if not 1 <= count <= len(first) + len(others):
        raise ValueError(
            f"a part of {count} landmarks: train has {len(first) + len(others)}"
        )
    if seed is not None:
        rng = np.random.default_rng(seed)
        first, others = (
            rng.permutation(np.asarray(some, object)) for some in (first, others)
        )
    chosen = frozenset([*first, *others][:count])
    trusted = clean.loc[clean["landmark_id"].isin(chosen), "images"]
    images = {*train.loc[train["landmark_id"].isin(chosen), "id"]}
    images |= set(" ".join(trusted).split())
    index = _index_images(metadata, chosen, {*first, *others})
    test = _test_images(metadata, index)
    ids = {"train": images, "index": index, "test": test}
    return Part(chosen, {split: frozenset(some) for split, some in ids.items()})


def _index_images(
    metadata: Path, chosen: Collection[str], known: Collection[str]
) -> set[str]:
    """Index images of places that are called as a chosen landmark is.

    The two number their landmarks differently; of train landmarks of one name the first in the
    file has it, as everywhere (kit.data.sources).
    """
    train = tables.read_csv(
        metadata / "train/train_label_to_category.csv", ("landmark_id", "category")
    )
    owner: dict[str, str] = {}
    for landmark, text in zip(train["landmark_id"], train["category"], strict=True):
        if landmark in known and (name := sources.category_name(text)):
            owner.setdefault(name, landmark)
    places = tables.read_csv(
        metadata / "index/index_label_to_category.csv", ("landmark_id", "category")
    ).drop_duplicates("landmark_id")
    names = places["category"].map(sources.category_name)
    ours = places.loc[names.map(owner).isin(chosen), "landmark_id"]
    where = tables.read_csv(
        metadata / "index/index_image_to_landmark.csv", ("id", "landmark_id")
    )
    index = tables.read_csv(metadata / "index/index.csv", ("id",))
    found = where.loc[where["landmark_id"].isin(set(ours)), "id"]
    return set(found) & set(index["id"])


def _test_images(metadata: Path, index: set[str]) -> set[str]:
    solution = tables.read_solution(metadata / "test/retrieval_solution_v2.1.csv")
    test = set(tables.read_csv(metadata / "test/test.csv", ("id",))["id"])
    asked = zip(solution["id"], solution["images"], strict=True)
    return {name for name, ids in asked if not index.isdisjoint(ids.split())} & test
