"""Places of the images to find -> measures by query and by class, and the files that hold them.

<folder>/answers.csv      query,place,image: the first images of each query's ranking
        /per_query.csv    query,class,positives,first_hit, and one column a measure
        /metrics.json     the protocol, and of each measure the means with their intervals

metrics.json is written last and holds the hashes of the other two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit import files
from kit.answers.metrics import definitions, revisited
from kit.answers.metrics.protocol import Protocol
from kit.answers.metrics.revisited import Places, Setup

PLACES = 100  # of a ranking that measures "@100" look at
OFFICIAL = next(iter(definitions.DEFINITIONS))  # mAP@100 as Google defines it
WHOLE = "mAP, trapezoid over the whole ranking (Oxford and Paris)"
SHOWN = (  # printed; metrics.json has all
    OFFICIAL,
    WHOLE,
    *(f"CMC@{k}: any hit in {k}" for k in (1, 5, 10)),
    *(f"recall@{k}: hits in {k} / all positives" for k in (1, 5, 10)),
)
DRAWS = 2_000


class Mean(NamedTuple):
    """A mean, and where 95 % of redrawn classes put it (bootstrap; classes are redrawn whole)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Results:
    """Measures of the queries that have an image to find."""

    per_query: pd.DataFrame  # query, class, positives, first_hit, and measures by name
    answers: pd.DataFrame  # query, place (from 1), image

    @property
    def measures(self) -> list[str]:
        return list(self.per_query.columns[4:])

    def mean(self, measure: str, per_class: bool = False) -> Mean:
        """Over queries, or over classes that count the same however many queries they have."""
        classes = pd.factorize(self.per_query["class"])[0]
        return class_mean(self.per_query[measure].to_numpy(), classes, per_class)

    def lines(self, name: str) -> list[str]:
        """One a measure of SHOWN, the official one first."""
        if self.per_query.empty:
            return [f"{name}: no query has an image to find, nothing is measured"]
        counts = f"{len(self.per_query)} queries, {self.per_query['class'].nunique()} classes"
        return [
            f"{name} {measure}: per query {self.mean(measure)}, "
            f"per class {self.mean(measure, per_class=True)}"
            + f" ({counts})"
            * (measure == OFFICIAL)
            for measure in SHOWN
            if measure in self.per_query
        ]


def measure(
    queries: Sequence[str],
    classes: Sequence[str],
    placed: Sequence[Places],
    setup: Setup,
    ranked: Sequence[Sequence[str]],
) -> Results:
    """queries, their classes, the places of their images, and their first images, best first.

    Images that are junk by the setup count nowhere; `ranked` must be without them.
    """
    found = [revisited.places_found(places, setup) for places in placed]
    positives = np.array([count for _, count in found], int)
    hits = np.zeros((len(found), PLACES), bool)
    for row, (places, _) in zip(hits, found, strict=True):
        row[places[places < PLACES]] = True
    counted = np.flatnonzero(positives)
    table = pd.DataFrame(
        {
            "query": np.array(queries, object)[counted],
            "class": np.array(classes, object)[counted],
            "positives": positives[counted],
            "first_hit": [
                str(found[q][0][0] + 1) if len(found[q][0]) else "" for q in counted
            ],
        }
    )
    for name, definition in definitions.DEFINITIONS.items():
        table[name] = definition(hits[counted], positives[counted])
    whole = [revisited.average_precision(*found[query]) for query in counted]
    table.insert(5, WHOLE, np.array(whole, float))
    rows = [
        (query, place, image)
        for query, images in zip(queries, ranked, strict=True)
        for place, image in enumerate(images, 1)
    ]
    return Results(table, pd.DataFrame(rows, columns=["query", "place", "image"]))


def class_mean(values: np.ndarray, classes: np.ndarray, per_class: bool) -> Mean:
    """values (n,) and the number of each one's class (n,); NaN of none."""
    if not len(values):
        return Mean(np.nan, np.nan, np.nan)
    sums, counts = np.bincount(classes, values), np.bincount(classes)
    if per_class:
        sums, counts = sums / counts, np.ones_like(counts)
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return Mean(
        float(sums.sum() / counts.sum()), *np.quantile(means, [0.025, 0.975]).tolist()
    )


def write(results: Results, name: str, protocol: Protocol, folder: Path) -> Path:
    """Writes the three files, each whole or not at all; returns metrics.json."""
    about = folder / "metrics.json"
    about.unlink(missing_ok=True)
    hashes = {}
    for file, table in (
        ("answers.csv", results.answers),
        ("per_query.csv", results.per_query),
    ):
        text = table.to_csv(index=False, lineterminator="\n")
        hashes[file] = files.sha256(files.write_text(folder / file, text))
    return files.write_json(
        about,
        {
            "benchmark": name,
            "protocol": asdict(protocol),
            "queries": len(results.per_query),
            "classes": int(results.per_query["class"].nunique()),
            "measures": {
                measure: {
                    "per_query": _json(results.mean(measure)),
                    "per_class": _json(results.mean(measure, per_class=True)),
                }
                for measure in results.measures
            },
            "files": hashes,
        },
    )


def _json(mean: Mean) -> Mapping[str, float] | None:
    return None if np.isnan(mean.mean) else mean._asdict()
