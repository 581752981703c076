"""Features -> ranking: tags from labelled references, scores of all models, top k in blocks.

Nothing of the size queries x index is ever held.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kit.data import lists
from kit.features import search, store
from kit.features.store import Features
from kit.rerank.landmark_country import NONE, Tags, Weights, bonus, vote

QUERIES, INDEX = 256, 16_384  # ranked at a time: about 190 MB with what top needs


@dataclass(frozen=True)
class Part:
    """One model's say in a ranking."""

    query: Features
    index: Features
    weight: float = 1.0  # of its scores in the sum over models
    tags: Tags | None = None
    rerank: Weights = NONE


def part(
    folder: Path,
    query: lists.ImageList,
    index: lists.ImageList,
    reference: lists.ImageList | None = None,
    votes: int = 3,
) -> Part:
    """One model's features in `folder`, tagged by the reference list's images if there is one.

    Refuses features of another version of a list, and of different models.
    """
    query_features = store.load(folder / query.name)
    model = query_features.manifest["model"]["hash"]
    store.expect(query_features, list_hash=query.hash)
    index_features = store.load(folder / index.name)
    store.expect(index_features, list_hash=index.hash, model_hash=model)
    _refuse_other_views(query_features, index_features)
    if reference is None:
        return Part(query_features, index_features)
    references = store.load(folder / reference.name)
    store.expect(references, list_hash=reference.hash, model_hash=model)
    _refuse_other_views(query_features, references)
    voters = reference.rows["label"].to_numpy() >= 0
    rows = references.find(reference.ids)
    voters &= references.readable()[rows]
    if not voters.any():
        raise ValueError(f"list {reference.name} has no labelled image that could vote")
    tags = tag(
        query_features,
        index_features,
        references,
        rows[voters],
        reference.labels[voters],
        reference.countries[voters],
        votes,
    )
    return Part(query_features, index_features, tags=tags)


def _refuse_other_views(ours: Features, theirs: Features) -> None:
    for name in ("scales", "flip"):
        if ours.manifest.get(name) != theirs.manifest.get(name):
            raise ValueError(
                f"features of {ours.manifest['list']['name']} and "
                f"{theirs.manifest['list']['name']} were made with different {name}"
            )


def tag(
    query: Features,
    index: Features,
    reference: Features,
    rows: np.ndarray,
    landmarks: np.ndarray,
    countries: np.ndarray,
    votes: int = 3,
) -> Tags:
    """Tags by nearest references: `votes` of them for a query, the nearest one for an index image.

    rows: (R,) rows of `reference` that vote, one a (reference image, landmark) pair; landmarks and
    countries: (R,) their integer tags, -1 for none.
    """
    landmark, country = torch.tensor(landmarks), torch.tensor(countries)
    near = [
        search.knn(block, reference.blocks(rows), votes)
        for block in query.blocks(size=QUERIES)
    ]
    scores, at = (torch.cat(found) for found in zip(*near, strict=True))
    nearest = torch.cat(
        [
            search.knn(block, reference.blocks(rows), 1)[1][:, 0]
            for block in index.blocks(size=INDEX)
        ]
    )
    return Tags(
        vote(scores, landmark[at]),
        vote(scores, country[at]),
        landmark[nearest],
        country[nearest],
    )


def rank(parts: Sequence[Part], k: int = 100) -> tuple[Tensor, Tensor]:
    """Scores (Q, k) and index rows (Q, k), best first, by the weighted sum of all parts' scores.

    Ties go to the lower row. Index images that could not be read come last, with score -inf.
    """
    first = parts[0]
    for part in parts[1:]:
        for ours, theirs in ((first.query, part.query), (first.index, part.index)):
            if not np.array_equal(ours.ids, theirs.ids):
                raise ValueError(
                    f"models {ours.manifest['model']['name']} and "
                    f"{theirs.manifest['model']['name']} have features of different images"
                )
    readable = [part.index.readable() for part in parts]
    unreadable = torch.from_numpy(~np.logical_and.reduce(readable))
    scores, rows = [], []
    for start in range(0, len(first.query), QUERIES):
        queries = slice(start, min(start + QUERIES, len(first.query)))
        best = torch.empty(queries.stop - start, 0)
        at = torch.empty(queries.stop - start, 0, dtype=torch.long)
        for low in range(0, len(first.index), INDEX):
            columns = slice(low, min(low + INDEX, len(first.index)))
            block = sum(part.weight * _score(part, queries, columns) for part in parts)
            block[:, unreadable[columns]] = -torch.inf
            here = torch.arange(low, columns.stop).expand(len(block), -1)
            best, kept = search.top(torch.cat([best, block], dim=1), k)
            at = torch.cat([at, here], dim=1).gather(1, kept)
        scores.append(best)
        rows.append(at)
    return torch.cat(scores), torch.cat(rows)


def _score(part: Part, queries: slice, columns: slice) -> Tensor:
    query, index = (
        torch.from_numpy(np.array(features.vectors[rows])).float()
        for features, rows in ((part.query, queries), (part.index, columns))
    )
    cosines = query @ index.T
    if part.tags is None:
        return cosines
    return cosines + bonus(part.tags.of(queries, columns), part.rerank)


def answers(parts: Sequence[Part], k: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the queries (Q,) and of their ranked index images (Q, k), best first.

    Empty text stands where the index ran out of images that can be read.
    """
    scores, rows = rank(parts, k)
    ids = parts[0].index.ids[rows.numpy()]
    return parts[0].query.ids, np.where(torch.isfinite(scores).numpy(), ids, "")


def seen(parts: Iterable[Part], reference: lists.ImageList) -> dict[str, str]:
    """hash -> name of every list that the models met or that votes."""
    met = {reference.hash: reference.name}
    for each in parts:
        met |= each.query.manifest["seen"]
    return met
