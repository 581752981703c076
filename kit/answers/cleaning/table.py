"""Images that stay -> a table in the form of train_clean.csv, and a JSON beside it that says how.

Columns landmark_id,images: ids with spaces between them, in the order of the list; landmarks in the
order in which the list first names them.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np

import kit
from kit import checksums, files
from kit.answers.cleaning.candidates import Labelled
from kit.answers.cleaning.rule import Kept
from kit.data import tables
from kit.text import in_a_line


def write(path: Path, given: Labelled, kept: Kept, how: dict[str, Any]) -> Path:
    """how: what JSON can hold of the decision, such as the rule and the features' identity."""
    labels = given.labels
    rows = np.flatnonzero(kept.images)
    if not len(rows):
        raise ValueError(
            f"no image of list {given.images.name} stays ({kept.counts()}); ask for less"
        )
    present, first = np.unique(labels, return_index=True)
    place = np.full(labels.max() + 1, len(labels))
    place[present[present >= 0]] = first[present >= 0]
    rows = rows[np.lexsort([rows, place[labels[rows]]])]
    ids = given.images.ids
    landmarks = given.images.rows["landmark_id"].to_numpy()
    groups = np.split(rows, np.flatnonzero(np.diff(labels[rows])) + 1)
    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["landmark_id", "images"])
        for group in groups:
            lines.writerow([landmarks[group[0]], " ".join(ids[group])])
    about = {
        "list": {"name": given.images.name, "hash": given.images.hash},
        "how": how,
        "landmarks": len(groups),
        "images": len(rows),
        "dropped": kept.counts(),
        "hash": files.sha256(path),
        "kit": kit.__version__,
    }
    about["checksums"] = checksums.compute_checksums(path.parent, [path.name])
    checksums.write_manifest(path.with_suffix(".json"), about)
    return path


def trusted(path: Path, given: Labelled) -> np.ndarray:
    """(N,) bool: images that a table in this form names under their landmark, at least one."""
    listed = tables.read_csv(path, ("landmark_id", "images"))
    pairs = {
        (image, landmark)
        for landmark, names in zip(listed["landmark_id"], listed["images"], strict=True)
        for image in names.split()
    }
    rows = given.images.rows
    named = zip(rows["id"], rows["landmark_id"], strict=True)
    found = np.fromiter((pair in pairs for pair in named), bool, len(rows))
    if not found.any():
        first = listed.iloc[0].to_dict() if len(listed) else "no rows"
        raise ValueError(
            f"{path}: no image of list {given.images.name} stands there under its landmark; it "
            f"has {in_a_line(first)}, the list has image {rows['id'].iloc[0]!r} of landmark "
            f"{rows['landmark_id'].iloc[0]!r}"
        )
    return found
