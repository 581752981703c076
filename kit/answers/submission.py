"""submission.csv for retrieval: `id,images`, at most 100 index ids a query, best first."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kit import files
from kit.data.sources import read_csv


class Form(NamedTuple):
    """What a competition wants; the defaults are those of Google Landmark Retrieval."""

    columns: tuple[str, str] = ("id", "images")  # a query, and its index images
    most: int = 100  # images of a query


FORM = Form()


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


def read(path: Path, form: Form = FORM) -> dict[str, list[str]]:
    """Query id -> ranked index ids."""
    query, images = form.columns
    table = read_csv(path, form.columns)
    repeated = table.loc[table[query].duplicated(), query]
    if len(repeated):
        raise ValueError(
            f"{path}: query {repeated.iloc[0]} stands there more than once"
        )
    return dict(zip(table[query], table[images].str.split(), strict=True))


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
    wanted = set(query_ids)
    missing, strange = (
        sorted(wanted - rankings.keys()),
        sorted(rankings.keys() - wanted),
    )
    if missing:
        raise ValueError(
            f"{path}: query {missing[0]} has no line ({len(missing)} missing)"
        )
    if strange:
        raise ValueError(
            f"{path}: {strange[0]} is no query ({len(strange)} such lines)"
        )
    known = None if index_ids is None else set(index_ids)
    for query, images in rankings.items():
        if len(images) > form.most:
            raise ValueError(
                f"{path}: query {query} has {len(images)} images, more than {form.most}"
            )
        if len(set(images)) < len(images):
            raise ValueError(f"{path}: query {query} has an image twice")
        if known is not None and not known.issuperset(images):
            wrong = next(image for image in images if image not in known)
            raise ValueError(
                f"{path}: query {query} answers {wrong}, which is not in the index"
            )
    return len(rankings)
