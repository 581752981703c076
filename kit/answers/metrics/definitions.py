"""What a ranking is worth by each definition in use, for a number means little without its own.

All look at the same hits: which of a query's first places (100 for a submission) show a positive.
Positives below them count as not found. A query without positives counts nowhere.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from kit.answers.metrics.gap import HALVES
from kit.answers.metrics.mean_ap import average_precision, marked, show_score

PLACES = (1, 5, 10, 20, 100)  # of CMC, precision and recall
MEAN_PRECISION = (5,)
POINTS = np.arange(11) / 10  # recalls of VOC 2007

# hits (Q, k) bool, best first, and positives (Q,), at least 1 -> the measure (Q,)
Definition = Callable[[np.ndarray, np.ndarray], np.ndarray]


def over_all(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The sum of precisions at the hits, divided by all positives, also those that do not fit."""
    precision = hits.cumsum(axis=1) / np.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(axis=1) / positives


def trapezoid(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The area under precision and recall, drawn with straight lines (Philbin et al., CVPR 2007).

    Between two hits precision falls first and then jumps at the second; the line joins what it
    is just before with what it is at the second. Before the first place it is 1.
    """
    place = np.arange(hits.shape[1])
    found = hits.cumsum(axis=1)
    after = found / (place + 1)
    before = (found - hits) / np.maximum(place, 1)
    before[:, :1] = 1
    return ((before + after) / 2 * hits).sum(axis=1) / positives


def voc_2007(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The mean, over recalls 0, 0.1, ..., 1, of the best precision at that recall or a larger one."""
    recall, precision = _curve(hits, positives)
    best = [np.where(recall >= at, precision, 0.0).max(axis=1) for at in POINTS]
    return np.mean(best, axis=0)


def voc_2010(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """The area under precision made falling: at each recall the best at it or at a larger one."""
    _, precision = _curve(hits, positives)
    falling = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    return (falling * hits).sum(axis=1) / positives


def cmc(k: int) -> Definition:
    """Whether any of the first k places is a hit (cumulative match characteristic)."""
    return lambda hits, positives: hits[:, :k].any(axis=1).astype(float)


def precision(k: int) -> Definition:
    """The share of the first k places that are hits."""
    return lambda hits, positives: hits[:, :k].sum(axis=1) / k


def recall(k: int) -> Definition:
    """The share of the positives that are in the first k places."""
    return lambda hits, positives: hits[:, :k].sum(axis=1) / positives


def mean_precision(k: int) -> Definition:
    """Precision at k, or at the place of the last hit where that comes first.

    As on the revisited Oxford and Paris (Radenović et al., CVPR 2018).
    """

    def measure(hits: np.ndarray, positives: np.ndarray) -> np.ndarray:
        reversed_last = hits[:, ::-1].argmax(axis=1)
        last = np.where(hits.any(axis=1), hits.shape[1] - reversed_last, k)
        at = np.minimum(last, k)
        inside = np.arange(hits.shape[1]) < at[:, None]
        return (hits & inside).sum(axis=1) / at

    return measure


DEFINITIONS: dict[str, Definition] = {
    "mAP@100, official: precisions at hits / min(positives, 100)": average_precision,
    "mAP@100, 2nd place 2021: precisions at hits / all positives": over_all,
    "mAP@100, trapezoid (Oxford and Paris)": trapezoid,
    "mAP@100, VOC 2007: 11 points": voc_2007,
    "mAP@100, VOC 2010: area": voc_2010,
    **{f"CMC@{k}: any hit in {k}": cmc(k) for k in PLACES},
    **{f"precision@{k}: hits in {k} / {k}": precision(k) for k in PLACES},
    **{f"recall@{k}: hits in {k} / all positives": recall(k) for k in PLACES},
    **{
        f"mP@{k}, revisited: k at most the last hit's place": mean_precision(k)
        for k in MEAN_PRECISION
    },
}


def evaluate(
    query_ids: Sequence[str] | np.ndarray, ranked: np.ndarray, solution: pd.DataFrame
) -> pd.DataFrame:
    """definition, public, private: the mean over a half's queries; NaN where it has none.

    The arguments are those of `mean_ap.marked`.
    """
    asked, hits, positives = marked(query_ids, ranked, solution)
    usage, some = asked["usage"].to_numpy(), positives > 0
    halves = [(usage == half) & some for half in HALVES]
    rows = []
    for name, definition in DEFINITIONS.items():
        means = [
            float(definition(hits[half], positives[half]).mean())
            if half.any()
            else float("nan")
            for half in halves
        ]
        rows.append((name, *means))
    return pd.DataFrame(rows, columns=["definition", "public", "private"])


def show(table: pd.DataFrame) -> str:
    """One line a definition."""
    lines = (
        f"{show_halves(row.private, row.public)}  {row.definition}"
        for row in table.itertuples()
    )
    return "\n".join(lines)


def show_halves(private: float, public: float) -> str:
    """Both numbers, as `mean_ap.show_score` shows them."""
    return f"private {show_score(private)}  public {show_score(public)}"


def _curve(hits: np.ndarray, positives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall (Q, k) and precision (Q, k) down to each place."""
    found = hits.cumsum(axis=1)
    return found / positives[:, None], found / np.arange(1, hits.shape[1] + 1)
