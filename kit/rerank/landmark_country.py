"""Landmark-country rerank (2nd place, Google Landmark Retrieval 2021): neighbours among labelled
references vote for a query's landmarks and countries; index images that agree gain score.

Pure functions on tensors: the neighbours arrive as arguments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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
    """(Q, N) what is added to the cosines: agreement on the landmark and on the country."""
    total = weights.landmark * agreement(tags.query_landmark, tags.index_landmark)
    return total + weights.country * agreement(tags.query_country, tags.index_country)
