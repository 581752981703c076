"""The official CSVs -> the same, or cut to the images that are there, in their places."""

import filecmp
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kit import files
from kit.data import sources
from kit.data.download.official import Official

BLOCK = 1 << 18  # rows in memory


def copy(metadata: Path, data: Path, official: Official, splits: Sequence[str]) -> None:
    """Puts the whole tables of some splits in their places."""
    for place in official.tables:
        source, target = metadata / place, data / place
        if place.split("/")[0] not in splits:
            continue
        if target.exists() and filecmp.cmp(source, target, shallow=False):
            continue
        with files.replacing(target) as temporary:
            shutil.copyfile(source, temporary)


def write(
    metadata: Path,
    data: Path,
    official: Official,
    splits: Sequence[str],
    exists: Callable[[str], bool],  # of a path in `data`
    landmarks: Collection[str] | None = None,  # None: all that have images there
) -> dict[str, int]:
    """Cuts the tables of some splits to the images that are there; returns rows by table.

    A query keeps the answers that are there, and is ignored where none is; without the split
    index the answers stay as they are.
    """
    cut = _Cut(exists, landmarks, whole_index="index" not in splits)
    rows = {}
    for place, change in cut.changes.items():
        if place.split("/")[0] not in splits:
            continue
        rows[place] = 0
        with files.replacing(data / place) as temporary:
            for block in _blocks(metadata / place, official.tables[place].columns):
                changed = change(block)
                begun = rows[place] > 0 or temporary.exists()
                changed.to_csv(
                    temporary,
                    mode="a" if begun else "w",
                    header=not begun,
                    index=False,
                    lineterminator="\n",
                )
                rows[place] += len(changed)
    return rows


class _Cut:
    """What is kept of each table; later ones ask what was kept of earlier ones."""

    def __init__(
        self,
        exists: Callable[[str], bool],
        landmarks: Collection[str] | None,
        whole_index: bool,
    ) -> None:
        self.exists, self.landmarks, self.whole_index = exists, landmarks, whole_index
        self.kept: set[str] = set()  # train landmarks with images
        self.places: set[str] = set()  # those of the index
        self.index_ids: set[str] = set()
        self.test_ids: set[str] = set()
        self.train_seen = False
        self.changes = {
            "train/train.csv": self._train,
            "train/train_clean.csv": self._clean,
            "train/train_label_to_category.csv": self._train_category,
            "index/index.csv": self._index,
            "index/index_image_to_landmark.csv": self._place,
            "index/index_label_to_category.csv": self._index_category,
            "test/test.csv": self._test,
            "test/retrieval_solution_v2.1.csv": self._retrieval,
            "test/recognition_solution_v2.1.csv": self._recognition,
        }

    def _train(self, rows: pd.DataFrame) -> pd.DataFrame:
        self.train_seen = True
        if self.landmarks is not None:
            rows = rows[rows["landmark_id"].isin(self.landmarks)]
        rows = rows[self._there("train", rows["id"])]
        self.kept.update(rows["landmark_id"])
        return rows

    def _clean(self, rows: pd.DataFrame) -> pd.DataFrame:
        if self.landmarks is not None:
            rows = rows[rows["landmark_id"].isin(self.landmarks)]
        there = [
            " ".join(i for i in ids.split() if self.exists(image_path("train", i)))
            for ids in rows["images"]
        ]
        rows = rows.assign(images=there)
        rows = rows[rows["images"] != ""]
        self.kept.update(rows["landmark_id"])
        return rows

    def _train_category(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows["landmark_id"].isin(self.kept)]

    def _index(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows[self._there("index", rows["id"])]
        self.index_ids.update(rows["id"])
        return rows

    def _place(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows[rows["id"].isin(self.index_ids)]
        self.places.update(rows["landmark_id"])
        return rows

    def _index_category(self, rows: pd.DataFrame) -> pd.DataFrame:
        return rows[rows["landmark_id"].isin(self.places)]

    def _test(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows[self._there("test", rows["id"])]
        self.test_ids.update(rows["id"])
        return rows

    def _retrieval(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows[rows["id"].isin(self.test_ids)]
        if self.whole_index:
            return rows
        there = [_common(ids, self.index_ids) for ids in rows["images"]]
        rows = rows.assign(images=there)
        ignored = (rows["images"] == "") | (rows["Usage"] == "Ignored")
        rows.loc[ignored, ["images", "Usage"]] = ["None", "Ignored"]
        return rows

    def _recognition(self, rows: pd.DataFrame) -> pd.DataFrame:
        rows = rows[rows["id"].isin(self.test_ids)]
        if not self.train_seen:
            return rows
        return rows.assign(landmarks=[_common(t, self.kept) for t in rows["landmarks"]])

    def _there(self, split: str, ids: pd.Series) -> np.ndarray:
        return np.array([self.exists(image_path(split, i)) for i in ids], bool)


def image_path(split: str, name: str) -> str:
    """split/a/b/c/<id>.jpg; an id that is not sixteen hex digits is refused, it names a file."""
    if not sources.ID.fullmatch(name):
        raise ValueError(f"{split}: {name!r} is not an id of 16 hex digits")
    return f"{split}/{name[0]}/{name[1]}/{name[2]}/{name}.jpg"


def _common(words: str, kept: Collection[str]) -> str:
    return " ".join(word for word in words.split() if word in kept)


def _blocks(path: Path, columns: Sequence[str]) -> Iterator[pd.DataFrame]:
    try:
        with pd.read_csv(
            path, dtype=str, keep_default_na=False, chunksize=BLOCK
        ) as blocks:
            for block in blocks:
                if missing := set(columns) - set(block.columns):
                    raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
                yield block
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a CSV file ({str(error).strip()})") from None
