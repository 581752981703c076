"""Landmark-country rerank (2nd place, Google Landmark Retrieval 2021): neighbours among labelled
references vote for a query's landmarks and countries; index images that agree gain score.

Pure functions on tensors: the neighbours arrive as arguments. Whose votes they are decides the
caller: the nearest references by cosine, by k-reciprocal distance (kit.rerank.k_reciprocal_tags),
or the nearest class means. A bonus is added to one model's scores or to a sum over models alike.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.rerank.addends import Addends
from kit.rerank.inverted import invert
from kit.rerank.sums import members

UNKNOWN = -1


@dataclass(frozen=True)
class Votes:
    """What each query's neighbours say; absent places have label -1 and weight 0."""

    labels: Tensor  # (Q, K) distinct within a row
    weights: Tensor  # (Q, K) non-negative, summing to 1 where anybody voted


@dataclass(frozen=True)
class Weights:
    """How much agreement is worth, in units of cosine."""

    landmark: float = 1.0
    country: float = 0.1

    def __str__(self) -> str:
        return f"landmark {self.landmark:g}, country {self.country:g}"


PUBLISHED = Weights(1.0, 0.1)
NONE = Weights(0.0, 0.0)


def vote(scores: Tensor, labels: Tensor) -> Votes:
    """Neighbours' scores (Q, K) and labels (Q, K) -> the share of the score that each label holds.

    Equal labels add up at their best place; labels below 0 do not vote, negative scores count as 0.
    """
    same = labels[:, :, None] == labels[:, None, :]
    valid = labels >= 0
    summed = (same * (scores.clamp(min=0) * valid)[:, None, :]).sum(dim=2)
    earlier = torch.tril(torch.ones_like(same[0]), diagonal=-1)
    repeated = (same & earlier).any(dim=2)
    weights = summed.masked_fill(repeated | ~valid, 0)
    total = weights.sum(dim=1, keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp(min=1e-12), weights)
    return Votes(labels.masked_fill(repeated | ~valid, UNKNOWN), weights)


def gate(votes: Votes, at_least: float, confidence: Tensor | None = None) -> Votes:
    """The votes of confident queries; those of a confidence below `at_least` get weights of 0.

    confidence: (Q,), the largest share of a label by default.
    """
    if confidence is None:
        confidence = votes.weights.amax(dim=1)
    unsure = (confidence < at_least)[:, None]
    return Votes(votes.labels, votes.weights.masked_fill(unsure, 0))


def class_means(features: Iterable[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit means (C, D) of the features of each label, and the labels (C,), ascending.

    features: blocks (n, D) of R rows in all, streamed; labels: (R,), those below 0 have no mean.
    A label whose features add up to nothing has a mean of zero.
    """
    known = labels >= 0
    names, classes = labels[known].unique(return_inverse=True)
    places = torch.full_like(labels, len(names), dtype=torch.long)
    places[known] = classes
    sums, first = None, 0
    for block in features:
        if sums is None:
            sums = block.new_zeros(len(names) + 1, block.shape[1], dtype=torch.float32)
        here = places[first : first + len(block)]
        first += len(block)
        if len(here) == len(block):
            sums.index_add_(0, here, block.float())
    if sums is None or first != len(labels):
        raise ValueError(f"features of {first} rows, labels of {len(labels)}")
    return torch.nn.functional.normalize(sums[:-1], dim=1), names


def agreement(votes: Votes, index_labels: Tensor) -> Tensor:
    """(Q, N) share of each query's votes that fall on each index image's label; -1 agrees with none."""
    shares = votes.weights.new_zeros(len(votes.labels), len(index_labels))
    for labels, weights in zip(
        votes.labels.T, votes.weights.T, strict=True
    ):  # K is about 3
        agrees = (labels[:, None] == index_labels) & (index_labels != UNKNOWN)
        shares += weights[:, None] * agrees
    return shares


@dataclass(frozen=True)
class Tags:
    """Landmarks and countries of queries (votes) and index images (one label each)."""

    query_landmark: Votes
    query_country: Votes
    index_landmark: Tensor  # (N,)
    index_country: Tensor  # (N,)

    def of(self, queries: slice, index: slice) -> "Tags":
        """The same for some of the queries and some of the index."""
        landmark, country = (
            Votes(votes.labels[queries], votes.weights[queries])
            for votes in (self.query_landmark, self.query_country)
        )
        return Tags(
            landmark, country, self.index_landmark[index], self.index_country[index]
        )


def bonus(tags: Tags, weights: Weights) -> Tensor:
    """(Q, N) what is added to the cosines: agreement on the landmark and on the country.

    Small, dense; `addends` is the same without the matrix.
    """
    total = weights.landmark * agreement(tags.query_landmark, tags.index_landmark)
    return total + weights.country * agreement(tags.query_country, tags.index_country)


def addends(tags: Tags, weights: Weights) -> Addends:
    """The bonus: countries are groups, images of the voted landmarks members."""
    landmark, country = tags.query_landmark, tags.query_country
    voted = landmark.labels.masked_fill(landmark.weights <= 0, UNKNOWN)
    entries, rows = invert(tags.index_landmark).members(voted.flatten())
    values = weights.landmark * landmark.weights.double().flatten()[entries]
    owners = entries // voted.shape[1]
    return Addends(
        groups=tags.index_country,
        by_group=weights.country * _by_label(country, tags.index_country),
        members=members(owners, rows, values, len(voted)),
    )


def _by_label(votes: Votes, index_labels: Tensor) -> Tensor:
    """(Q, G) float64 share of each label from 0 to the largest of the index."""
    count = max(int(index_labels.max()) + 1, 0) if len(index_labels) else 0
    known = (votes.labels >= 0) & (votes.labels < count)
    shares = torch.zeros(
        len(votes.labels), count + 1, dtype=torch.float64, device=votes.labels.device
    )
    places = votes.labels.where(known, count)
    return shares.scatter_add_(1, places, votes.weights.double())[:, :count]
