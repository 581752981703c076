"""Bonuses of labels that a query and an index image share, beside landmark and country.

Pure functions on tensors: the neighbours that vote arrive as arguments. Each has a small dense form
and the same as Addends.
"""

import torch
from torch import Tensor

from kit.rerank.addends import Addends
from kit.rerank.inverted import invert
from kit.rerank.landmark_country import UNKNOWN, Votes
from kit.rerank.sums import members


def common_share(query: Votes, index: Votes) -> Tensor:
    """(Q, N) sum over the labels l of s_q(l) s_i(l): small, dense.

    Soft labels on both sides: of the queries (Q, K), of the index images (N, L).
    """
    share = query.weights.new_zeros(len(query.labels), len(index.labels))
    for labels, weights in zip(index.labels.T, index.weights.T, strict=True):
        for theirs, worth in zip(query.labels.T, query.weights.T, strict=True):
            same = (theirs[:, None] == labels) & (labels != UNKNOWN)
            share += same * worth[:, None] * weights
    return share


def soft_labels(query: Votes, index: Votes, weight: float = 1.0) -> Addends:
    """`weight` times the common share, as members; published with five votes on both sides."""
    width = index.labels.shape[1]
    labelled = invert(index.labels.masked_fill(index.weights <= 0, UNKNOWN).flatten())
    asked = query.labels.masked_fill(query.weights <= 0, UNKNOWN)
    entries, places = labelled.members(asked.flatten())
    shares = query.weights.double().flatten()[entries]
    shares = weight * shares * index.weights.double().flatten()[places]
    owners = entries // query.labels.shape[1]
    return Addends(members=members(owners, places // width, shares, len(query.labels)))


def same_label_bonus(
    query_labels: Tensor,
    index_labels: Tensor,
    cosines: Tensor,
    same: float = 1.0,
    other: float = 0.1,
) -> Tensor:
    """(Q, N) same c where query (Q,) and index image (N,) have one label, else -other c: small,
    dense.

    1st place of Google Landmark Retrieval 2021; c: (N,) cosine of the index image to its nearest
    train image, whose label it has. -1 is nobody's label.
    """
    agrees = (query_labels[:, None] == index_labels) & (index_labels != UNKNOWN)
    return torch.where(agrees, same * cosines, -other * cosines)


def same_label(
    query_labels: Tensor,
    index_labels: Tensor,
    cosines: Tensor,
    same: float = 1.0,
    other: float = 0.1,
) -> Addends:
    """`same_label_bonus` as what all rows lose and what the members of a label gain above it."""
    cosines = cosines.double()
    owners, rows = invert(index_labels).members(query_labels)
    gains = (same + other) * cosines[rows]
    return Addends(
        by_row=-other * cosines, members=members(owners, rows, gains, len(query_labels))
    )
