"""mAP@100 as Google Landmark Retrieval defines it, on the public and the private half."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit.answers import submission
from kit.data.id_forms import refuse_other_form
from kit.data.tables import read_solution


def show_score(score: float) -> str:
    """Four digits; NaN is a half in which no query counts."""
    return "(no query)" if np.isnan(score) else f"{score:.4f}"


@dataclass(frozen=True)
class Score:
    """mAP@100 of both halves; NaN where a half has no query."""

    public: float
    private: float
    # id, usage, positives, landmark, ap: one row a query with an answer; queries of one
    # landmark have the same positives
    queries: pd.DataFrame

    def __str__(self) -> str:
        halves = (("private", self.private), ("public", self.public))
        return "  ".join(
            f"{half} mAP@100 {show_score(score)}" for half, score in halves
        )


def average_precision(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """hits (Q, k) bool, best first; positives (Q,) how many there are -> AP (Q,).

    The sum of precisions at the hits, divided by min(positives, k); NaN where there are none.
    """
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    most = np.where(positives > 0, np.minimum(positives, hits.shape[1]), np.nan)
    return (precision * hits).sum(axis=1) / most


class Marked(NamedTuple):
    """The queries that count, and where the positives of each stand in its ranking."""

    queries: pd.DataFrame  # id, images, usage
    hits: np.ndarray  # (Q, k) bool, best first
    positives: np.ndarray  # (Q,) how many there are


def marked(
    query_ids: Sequence[str] | np.ndarray,
    ranked: np.ndarray,
    solution: pd.DataFrame,
    k: int = 100,
) -> Marked:
    """query_ids (Q,), ranked (Q, any) ids, best first, and a table of `read_solution`.

    Ignored queries do not count. An id that is answered twice counts once, at its better place.
    """
    asked = solution[solution["usage"] != "Ignored"].reset_index(drop=True)
    row = pd.Index(query_ids).get_indexer(asked["id"])
    if (row < 0).any():
        raise ValueError(
            f"query {asked['id'][row < 0].iloc[0]} of the solution has no answer "
            f"({int((row < 0).sum())} missing)"
        )
    codes, texts = pd.factorize(asked["images"])  # queries of a landmark share theirs
    split = [images.split() for images in texts]
    truth = [split[code] for code in codes]
    hits = np.zeros((len(asked), k), dtype=bool)
    # sets take less than half the time that tables and arrays of text do
    for images, ranking, places in zip(
        truth, ranked[row, :k].tolist(), hits, strict=True
    ):
        left = set(images)
        for place, image in enumerate(ranking):
            if image in left:
                left.remove(image)
                places[place] = True
    return Marked(asked, hits, np.array([len(images) for images in truth], dtype=int))


def evaluate(
    query_ids: Sequence[str] | np.ndarray,
    ranked: np.ndarray,
    solution: pd.DataFrame,
    k: int = 100,
) -> Score:
    """mAP@k of a ranking; the arguments are those of `marked`."""
    asked, hits, positives = marked(query_ids, ranked, solution, k)
    ap = average_precision(hits, positives)
    landmark = pd.factorize(asked["images"])[0]
    queries = asked[["id", "usage"]].assign(
        positives=positives, landmark=landmark, ap=ap
    )
    public, private = (
        float(queries.loc[queries["usage"] == half, "ap"].mean())
        for half in ("Public", "Private")
    )
    return Score(public, private, queries)


class Gain(NamedTuple):
    """How much mAP one ranking has above another, and where 95 % of redrawn queries put it."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def gain(
    before: Score,
    after: Score,
    half: str = "Private",
    draws: int = 2_000,
    seed: int = 0,
    per_landmark: bool = False,
) -> Gain:
    """Paired bootstrap (Efron and Tibshirani, 1993) over landmarks, which are redrawn whole.

    per_landmark: every landmark counts as much as any other, however many queries it has.
    """
    if not before.queries["id"].equals(after.queries["id"]):
        raise ValueError("a gain needs two scores of the same queries")
    chosen = (after.queries["usage"] == half).to_numpy()
    if not chosen.any():
        raise ValueError(f"no query is of the half {half}")
    gains = (after.queries["ap"] - before.queries["ap"]).to_numpy()[chosen]
    owner = np.unique(after.queries["landmark"][chosen], return_inverse=True)[1]
    sums, counts = np.bincount(owner, gains), np.bincount(owner)
    if per_landmark:
        sums, counts = sums / counts, np.ones_like(counts)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    return Gain(
        float(sums.sum() / counts.sum()), *np.quantile(means, [0.025, 0.975]).tolist()
    )


def answers(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids of a submission's queries (Q,) and of their ranked images (Q, k), "" where none is left."""
    rankings = submission.read(path)
    width = max([1, *map(len, rankings.values())])
    ranked = [images + [""] * (width - len(images)) for images in rankings.values()]
    return list(rankings), np.array(ranked)


def evaluate_file(path: Path, solution: Path) -> Score:
    """Of a submission id,images; ValueError where its ids have another form than the truth's."""
    (queries, ranked), truth = answers(path), read_solution(solution)
    refuse_other_form(queries, set(truth["id"]), path, solution.name)
    images = set(" ".join(truth["images"]).split())
    refuse_other_form(ranked.ravel().tolist(), images, path, solution.name)
    return evaluate(queries, ranked, truth)
