"""GAP, the measure of Google Landmark Recognition: are the sure answers the right ones?

Global average precision, or micro average precision (Perronnin, Liu and Renders, CVPR 2009), as
the dataset's authors compute it: predictions of all queries stand in one list, the surest first;
of equally sure ones that of the lower query id, then of the lower landmark. Each correct one
counts the precision down to it, and the sum is divided by the number of queries that show a
landmark. So an answer to a query that shows none only lowers those below it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kit.answers import submission
from kit.answers.metrics.mean_ap import show_score
from kit.data.id_forms import refuse_other_form
from kit.data.tables import decode_label, read_recognition

HALVES = ("Public", "Private")


@dataclass(frozen=True)
class Score:
    """GAP of both halves; NaN where a half has no query that shows a landmark."""

    public: float
    private: float
    # share of the queries that show a landmark whose prediction is correct, by half
    accuracy: dict[str, float]
    # id, usage, truth, landmark ("": no prediction), confidence (NaN: none), correct
    queries: pd.DataFrame

    def __str__(self) -> str:
        if not any_landmark(self.queries.rename(columns={"truth": "landmarks"})):
            return "GAP is not defined: no query shows a landmark that is known"
        halves = (("private", self.private), ("public", self.public))
        return "  ".join(f"{half} GAP {show_score(score)}" for half, score in halves)


def average(confidences: np.ndarray, correct: np.ndarray, positives: int) -> float:
    """confidences (n,) and correct (n,) bool of all predictions -> GAP.

    positives: how many queries show a landmark. Ties stay in the order in which they are given.
    """
    if not positives:
        return float("nan")
    correct = correct[np.argsort(-confidences, kind="stable")]
    precision = correct.cumsum() / np.arange(1, len(correct) + 1)
    return float(precision[correct].sum() / positives)


def evaluate(predictions: pd.DataFrame, solution: pd.DataFrame) -> Score:
    """predictions: id, landmark (text), confidence; solution: a table of `read_recognition`.

    A query has one prediction at most; without one, or with landmark "", it gives nothing.
    Ignored queries and those that the solution lacks do not count.
    """
    _check(predictions)
    made = predictions[predictions["landmark"] != ""].set_index("id")
    asked = solution[solution["usage"] != "Ignored"].reset_index(drop=True)
    found = made[["landmark", "confidence"]].reindex(asked["id"])
    landmark = found["landmark"].fillna("").to_numpy(dtype=object)
    truth = ([decode_label(word) for word in t.split()] for t in asked["landmarks"])
    pairs = zip(landmark, truth, strict=True)
    queries = pd.DataFrame(
        {
            "id": asked["id"],
            "usage": asked["usage"],
            "truth": asked["landmarks"],
            "landmark": landmark,
            "confidence": found["confidence"].to_numpy(dtype=np.float64),
            "correct": np.array([name in truth for name, truth in pairs], dtype=bool),
        }
    )
    scores = [_half(queries, half) for half in HALVES]
    accuracy = {half: share for half, (_, share) in zip(HALVES, scores, strict=True)}
    return Score(scores[0][0], scores[1][0], accuracy, queries)


def any_landmark(solution: pd.DataFrame, half: str = "") -> bool:
    """Whether a query (of one half) of a table of `read_recognition` shows a landmark.

    Without one, as where every class of the queries is held out of training, no prediction can be
    right and GAP is not defined.
    """
    counts = solution["usage"].isin([half] if half else HALVES)
    return bool((counts & (solution["landmarks"].str.strip() != "")).any())


def coverage(score: Score, half: str) -> pd.DataFrame:
    """confidence, share, precision, recall: what answering only the surest queries would give.

    One row a prediction of the half, best first. share: of all its queries, how many are
    answered down to here; recall: of those that show a landmark, how many correctly.
    """
    queries = score.queries[score.queries["usage"] == half]
    ranked = _ranked(queries)
    right, answered = ranked["correct"].cumsum(), np.arange(1, len(ranked) + 1)
    return pd.DataFrame(
        {
            "confidence": ranked["confidence"].to_numpy(),
            "share": answered / max(1, len(queries)),
            "precision": right.to_numpy() / answered,
            "recall": right.to_numpy() / max(1, _positives(queries)),
        }
    )


def evaluate_file(path: Path, solution: Path) -> Score:
    """Of a submission id,landmarks; ValueError where its ids have another form than the truth's."""
    made, truth = submission.read_landmarks(path), read_recognition(solution)
    landmarks = {decode_label(word) for word in " ".join(truth["landmarks"]).split()}
    for ids, known in ((made["id"], set(truth["id"])), (made["landmark"], landmarks)):
        refuse_other_form(ids, known, path, solution.name)
    if len(truth) and not made["id"].isin(truth["id"]).any():
        raise ValueError(
            f"{path}: none of its {len(made)} queries is in {solution.name}"
        )
    return evaluate(made, truth)


def _half(queries: pd.DataFrame, half: str) -> tuple[float, float]:
    """GAP and accuracy."""
    queries = queries[queries["usage"] == half]
    ranked, positives = _ranked(queries), _positives(queries)
    correct = ranked["correct"].to_numpy()
    found = average(ranked["confidence"].to_numpy(), correct, positives)
    return found, float(correct.sum() / positives) if positives else float("nan")


def _ranked(queries: pd.DataFrame) -> pd.DataFrame:
    """Rows with a prediction, the surest first, ties by id and then by landmark."""
    return queries[queries["landmark"] != ""].sort_values(
        ["confidence", "id", "landmark"], ascending=[False, True, True]
    )


def _positives(queries: pd.DataFrame) -> int:
    return int((queries["truth"].str.strip() != "").sum())


def _check(predictions: pd.DataFrame) -> None:
    repeated = predictions.loc[predictions["id"].duplicated(), "id"]
    if len(repeated):
        raise ValueError(f"query {repeated.iloc[0]} has more than one prediction")
    nothing = predictions.loc[predictions["confidence"].isna(), "id"]
    if len(nothing):
        raise ValueError(f"the confidence of query {nothing.iloc[0]} is not a number")
