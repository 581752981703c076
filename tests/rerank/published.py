"""Slow transcriptions, in float64 loops, of what several tests compare with."""

import numpy as np
import torch


def k_reciprocal(features, queries, k1, k2, share, ranks=None):
    """(Q, U - Q) distances of the dense loop: share d + (1 - share) J, and (Q, U) J alone.

    features: (U, D) array, queries first. Of equal distances the row itself comes first, then the
    lower row.
    """
    cosines = features @ features.T
    distances = 1 - (cosines + 1) / 2
    if ranks is None:
        own_first = distances.copy()
        np.fill_diagonal(own_first, -1)
        ranks = np.argsort(own_first, axis=1, kind="stable")
    count, short = len(features), int(np.around(k1 / 2)) + 1

    def reciprocal(row, k):
        return [other for other in ranks[row, :k] if row in ranks[other, :k]]

    encoded = np.zeros((count, count))
    for row in range(count):
        members = reciprocal(row, k1 + 1)
        wide = set(members)
        for member in members:
            theirs = reciprocal(member, short)
            if len(set(theirs) & set(members)) > 2 / 3 * len(theirs):
                wide |= set(theirs)
        wide = sorted(wide)
        weights = np.exp(-distances[row, wide])
        encoded[row, wide] = weights / weights.sum()
    encoded = np.stack([encoded[ranks[row, :k2]].mean(0) for row in range(count)])
    jaccard = np.zeros((queries, count))
    for query in range(queries):
        overlap = np.minimum(encoded[query], encoded).sum(1)
        jaccard[query] = 1 - overlap / (2 - overlap)
    mixed = share * distances[:queries] + (1 - share) * jaccard
    return mixed[:, queries:], jaccard


def matrix(addends, queries, index):
    """(Q, N) float64 of what Addends say, one number after another."""
    addends.check(queries, index)
    full = torch.zeros(queries, index, dtype=torch.float64)
    for query in range(queries):
        for row in range(index):
            if addends.by_row is not None:
                full[query, row] += addends.by_row[row]
            if addends.groups is not None and addends.groups[row] >= 0:
                full[query, row] += addends.by_group[query, addends.groups[row]]
        if addends.members is not None:
            starts, rows, values = addends.members
            for place in range(starts[query], starts[query + 1]):
                full[query, rows[place]] += values[place]
    return full
