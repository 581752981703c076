"""Landmarks that train shares with other lists and with benchmarks, by label and by name."""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kit import files
from kit.data import lists
from kit.data.sources import category_name
from kit.data.tables import read_csv, read_solution

LETTERS = str.maketrans({"œ": "oe", "æ": "ae", "ø": "o", "ł": "l"})  # not decomposed


class Landmark(NamedTuple):
    """A landmark of a benchmark."""

    name: str  # benchmark/landmark
    spellings: frozenset[str]  # as `normalised` gives them


class Match(NamedTuple):
    """A landmark of train whose category has a benchmark's name."""

    landmark_id: str
    category: str
    of: str  # benchmark/landmark
    whole: bool  # False: the name is only a part of the category's


def normalised(name: str) -> str:
    """The words of a category or name: without case, accents and punctuation.

    An address is decoded; letters of other scripts stay as they are.
    """
    text = unicodedata.normalize("NFKD", category_name(name).casefold())
    text = "".join(c for c in text if not unicodedata.combining(c)).translate(LETTERS)
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def read_benchmarks(path: Path, wanted: Sequence[str]) -> list[Landmark]:
    """The landmarks of some benchmarks of roxford_rparis.json."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table of benchmarks")
    found = files.read_json(path)
    for name in wanted:
        if name not in found:
            raise ValueError(
                f"benchmark {name!r} is not one of {', '.join(found)} in {path}"
            )
    return [
        Landmark(
            f"{benchmark}/{landmark}",
            frozenset(
                normalised(text) for text in (*told["names"], *told["categories"])
            ),
        )
        for benchmark in dict.fromkeys(wanted)
        for landmark, told in found[benchmark].items()
    ]


def read_categories(data: Path, folder: Path) -> dict[str, str]:
    """Landmark id of list full -> category; without GLDv2's table a landmark's id is its name."""
    path = data / "train" / "train_label_to_category.csv"
    if path.exists():
        table = read_csv(path, ("landmark_id", "category"))
        return dict(zip(table["landmark_id"], table["category"], strict=True))
    full = lists.find(folder, "full")
    ids = {
        each for rows in full.blocks(("landmark_id",)) for each in rows["landmark_id"]
    }
    return {each: each for each in sorted(ids)}


def matches(
    categories: Mapping[str, str], landmarks: Sequence[Landmark]
) -> list[Match]:
    """Categories that have a landmark's name: alone, or among other words ("Eiffel Tower, Tokyo").

    A category that is a landmark's whole name is no match of another one.
    """
    whole = {text: each.name for each in landmarks for text in each.spellings}
    found = []
    for landmark_id, category in categories.items():
        words = normalised(category)
        if of := whole.get(words):
            found.append(Match(landmark_id, category, of, True))
            continue
        padded = f" {words} "
        parts = dict.fromkeys(of for text, of in whole.items() if f" {text} " in padded)
        found += [Match(landmark_id, category, of, False) for of in parts]
    return found


def labels_of(folder: Path, landmark_ids: Sequence[str]) -> dict[str, int]:
    """Landmark id of list full -> label, the one number that all lists share."""
    wanted, found = set(landmark_ids), {}
    for rows in lists.find(folder, "full").blocks(("landmark_id", "label")):
        some = rows[rows["landmark_id"].isin(wanted)]
        found.update(zip(some["landmark_id"], some["label"], strict=True))
    return found


def known_labels(folder: Path, name: str) -> np.ndarray:
    """(L,) labels that list `name` shows; of queries, those of their positives."""
    if name != "query":
        return _labels(folder, name)
    if not (folder / "solution.csv").exists():
        return np.zeros(0, np.int64)
    solution = read_solution(folder / "solution.csv")
    return _labels(folder, "index", set(" ".join(solution["images"].unique()).split()))


def _labels(folder: Path, name: str, ids: set[str] | None = None) -> np.ndarray:
    """(L,) labels of a list, or of some images in it."""
    found = [np.zeros(0, np.int64)]
    for rows in lists.find(folder, name).blocks(("id", "label")):
        some = rows if ids is None else rows[rows["id"].isin(ids)]
        found.append(some["label"].unique())
    labels = np.unique(np.concatenate(found))
    return labels[labels >= 0]
