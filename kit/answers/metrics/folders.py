"""Any set of labelled pictures as a benchmark: one CSV, `path,label[,query][,x,y,w,h]`.

A picture finds those of its label. query: 1 for a picture that only asks, 0 or nothing for one
that is only searched, `both` for one that is searched and asks; without the column all are
`both`, as in UKB. A picture does not find itself. x, y, w, h: the box that a query
is cropped to, in pixels, as in INSTRE; empty: it asks with the whole picture. A searched picture
without a label is a distractor.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kit.answers.metrics.ground_truth import Box, GroundTruth, Query
from kit.data import tars
from kit.data.tables import read_csv
from kit.text import in_a_line

BOX = ("x", "y", "w", "h")
ASKS = {"0": (False, True), "": (False, True), "1": (True, False), "both": (True, True)}


def read(path: Path) -> GroundTruth:
    """Images and queries are named by their paths."""
    table = read_csv(path, ("path", "label"), ("query", *BOX))
    if "query" not in table:
        table["query"] = np.where(table["label"] == "", "0", "both")
    given = [name in table for name in BOX]
    if any(given) and not all(given):
        raise ValueError(f"{path}: a box has x, y, w and h; not all of them are there")
    _check(table, path)
    asks, searched = (
        np.array([ASKS[word][side] for word in table["query"]], bool) for side in (0, 1)
    )
    rows = np.where(searched, searched.cumsum() - 1, -1)  # of the index
    members = table.loc[searched].groupby("label").indices
    queries = []
    for at in np.flatnonzero(asks).tolist():
        row = table.iloc[at]
        same = np.sort(members.get(row["label"], np.empty(0, np.int64)))
        own = rows[[at]] if searched[at] else np.empty(0, np.int64)
        groups = {"same": np.setdiff1d(same, own), "self": own}
        box = _box(row, at, path)
        queries.append(Query(row["path"], box, groups, row["label"]))
    return GroundTruth("labels", table.loc[searched, "path"].tolist(), queries)


def _check(table: pd.DataFrame, path: Path) -> None:
    repeated = table.loc[table["path"].duplicated(), "path"]
    if len(repeated):
        raise ValueError(f"{path}: {repeated.iloc[0]} stands there more than once")
    for at, row in enumerate(table[["path", "label", "query"]].itertuples(index=False)):
        if not row.path.isprintable() or not tars.inside(row.path):
            raise ValueError(
                f"{path}: line {at + 2}: {in_a_line(repr(row.path))} leads "
                "out of the folder"
            )
        if row.query not in ASKS:
            words = ", ".join(filter(None, ASKS))
            raise ValueError(
                f"{path}: line {at + 2}: query {in_a_line(repr(row.query))} is not {words}"
            )
        if not row.label and ASKS[row.query][0]:
            raise ValueError(f"{path}: line {at + 2} asks without a label")
    if not table["query"].isin(["1", "both"]).any():
        raise ValueError(f"{path}: no picture asks")


def _box(row: Any, at: int, path: Path) -> Box | None:
    """Left, top, right, bottom."""
    texts = [row[name] for name in BOX if name in row]
    if not any(texts):
        return None
    try:
        x, y, width, height = map(float, texts)
    except ValueError:
        raise ValueError(
            f"{path}: line {at + 2}: box {' '.join(texts)} is not four numbers"
        ) from None
    if not (width > 0 and height > 0 and np.isfinite([x, y, width, height]).all()):
        raise ValueError(f"{path}: line {at + 2}: box {' '.join(texts)} is empty")
    return x, y, x + width, y + height
