"""submission.csv: `id,images` for retrieval, at most 100 index ids a query, best first; `id,landmarks`
for recognition, a landmark_id and a score or nothing.
"""

import math
from collections.abc import Collection, Iterable
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from kit import files
from kit.data.id_forms import refuse_other_form
from kit.data.tables import decode_label, encode_label, read_csv
from kit.text import quoted

Table = pd.DataFrame
PREDICTIONS = ["id", "landmark", "confidence"]  # columns of a table of them


class Form(NamedTuple):
    """What a competition wants; the defaults are those of Google Landmark Retrieval."""

    columns: tuple[str, str] = ("id", "images")  # a query, and its index images
    most: int = 100  # images of a query


FORM = Form()
LANDMARKS = Form(("id", "landmarks"), 1)  # those of Google Landmark Recognition


def write(
    path: Path,
    query_ids: np.ndarray,
    ranked: np.ndarray,
    asked: Iterable[str] | None = None,
    index_ids: Iterable[str] | None = None,
    form: Form = FORM,
) -> Path:
    """query_ids: (Q,); ranked: (Q, k) ids, best first, empty ones left out.

    With the ids that were asked the file is checked before it replaces an older one.
    """
    if len(query_ids) != len(ranked):
        raise ValueError(f"{len(query_ids)} queries, but {len(ranked)} rankings")
    with files.replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(f"{','.join(form.columns)}\n")
            for query, images in zip(query_ids, ranked, strict=True):
                file.write(f"{query},{' '.join(filter(None, images.tolist()))}\n")
        if asked is not None:
            check(temporary, asked, index_ids, form)
    return path


def write_landmarks(
    path: Path,
    predictions: Table,
    asked: Iterable[str],
    landmarks: Collection[str] | None = None,
    form: Form = LANDMARKS,
) -> Path:
    """predictions: id, landmark ("": none) and confidence of some of the queries that are asked.

    The others get an empty line. The file is checked before it replaces an older one.
    """
    asked = list(asked)
    answers = dict.fromkeys(asked, "")
    rows = zip(*(predictions[name] for name in PREDICTIONS), strict=True)
    for query, landmark, confidence in rows:
        if query not in answers:
            raise ValueError(f"{query} is no query that is asked")
        if answers[query]:
            raise ValueError(f"query {quoted(query)} has more than one prediction")
        # the shortest text that reads back as the same number, so no two scores become one
        answers[query] = (
            f"{encode_label(landmark)} {float(confidence)!r}" if landmark else ""
        )
    with files.replacing(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(f"{','.join(form.columns)}\n")
            file.writelines(f"{query},{answer}\n" for query, answer in answers.items())
        check_landmarks(temporary, asked, landmarks, form)
    return path


def read(path: Path, form: Form = FORM) -> dict[str, list[str]]:
    """Query id -> ranked index ids."""
    answers = _read(path, form)
    return {query: answer.split() for query, answer in answers.items()}


def read_landmarks(path: Path, form: Form = LANDMARKS) -> Table:
    """id, landmark ("": none) and confidence (0 for none) of each query.

    A line is a landmark_id and a finite score, or empty: more than one prediction would not be
    counted as the competition says, and is refused.
    """
    rows = []
    for query, answer in _read(path, form).items():
        landmark, score = _prediction(path, query, answer)
        rows.append((query, landmark, score))
    return pd.DataFrame(rows, columns=PREDICTIONS)


def no_landmarks(asked: Iterable[str]) -> Table:
    """Every query, none of which has a prediction."""
    return pd.DataFrame([(query, "", 0.0) for query in asked], columns=PREDICTIONS)


def check(
    path: Path,
    query_ids: Iterable[str],
    index_ids: Iterable[str] | None = None,
    form: Form = FORM,
) -> int:
    """What Kaggle would refuse or score as zero, refused here; returns the number of queries.

    Every query once and no other, at most form.most images each, none twice, all of them in the index.
    """
    rankings = read(path, form)
    _refuse_others(path, rankings.keys(), query_ids)
    known = None if index_ids is None else set(index_ids)
    for query, images in rankings.items():
        if len(images) > form.most:
            raise ValueError(
                f"{path}: query {quoted(query)} has {len(images)} images, more than {form.most}"
            )
        if len(set(images)) < len(images):
            raise ValueError(f"{path}: query {quoted(query)} has an image twice")
        if known is not None and not known.issuperset(images):
            answered = (image for each in rankings.values() for image in each)
            refuse_other_form(answered, known, path, "the index")
            wrong = next(image for image in images if image not in known)
            raise ValueError(
                f"{path}: query {quoted(query)} answers {quoted(wrong)}, which is not in the index"
            )
    return len(rankings)


def check_landmarks(
    path: Path,
    query_ids: Iterable[str],
    landmarks: Collection[str] | None = None,
    form: Form = LANDMARKS,
) -> int:
    """As `check`, for landmarks: every query once and no other, one finite score each at most, and
    every landmark one of `landmarks`; returns the number of queries.
    """
    found = read_landmarks(path, form)
    _refuse_others(path, set(found["id"]), query_ids)
    named = found[found["landmark"] != ""]
    for query, landmark in zip(named["id"], named["landmark"], strict=True):
        if landmarks is not None and landmark not in landmarks:
            refuse_other_form(named["landmark"], landmarks, path, "the references")
            raise ValueError(
                f"{path}: query {quoted(query)} answers {quoted(landmark)}, which no reference shows"
            )
    return len(found)


def _read(path: Path, form: Form) -> dict[str, str]:
    """Query id -> the text of its answer."""
    query, answer = form.columns
    table = read_csv(path, form.columns)
    repeated = table.loc[table[query].duplicated(), query]
    if len(repeated):
        raise ValueError(
            f"{path}: query {quoted(repeated.iloc[0])} stands there more than once"
        )
    return dict(zip(table[query], table[answer], strict=True))


def _prediction(path: Path, query: str, answer: str) -> tuple[str, float]:
    """ "" and 0 for none."""
    parts = answer.split()
    if not parts:
        return "", 0.0
    if len(parts) != 2:
        raise ValueError(
            f"{path}: query {quoted(query)} has {quoted(answer)}, not one landmark and its score"
        )
    try:
        score = float(parts[1])
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(
            f"{path}: the score {quoted(parts[1])} of query {quoted(query)} is no finite number"
        )
    return decode_label(parts[0]), score


def _refuse_others(
    path: Path, there: AbstractSet[str], query_ids: Iterable[str]
) -> None:
    """Queries without a line, and lines without a query."""
    wanted = set(query_ids)
    refuse_other_form(there, wanted, path, "the queries that are asked")
    missing, strange = sorted(wanted - there), sorted(there - wanted)
    problems = []
    if missing:
        count = f"({len(missing)} missing)"
        problems.append(f"query {quoted(missing[0])} has no line {count}")
    if strange:
        count = f"({len(strange)} such lines)"
        problems.append(f"{quoted(strange[0])} is no query {count}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
