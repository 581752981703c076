"""k-reciprocal re-ranking (Zhong et al., CVPR 2017): a nearest-neighbour graph and features ->
sparse encodings of the rows, Jaccard distances between them, and better scores.

The distance is that of the 2nd place of Google Landmark Retrieval 2021, d = 1 - (cos + 1) / 2: a
quarter of the squared Euclidean distance. Rows are those of the union of queries and index, queries
first. An image's neighbours are ranked among all the others, the other queries too.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.rerank import order
from kit.rerank.inverted import Inverted, invert, ranges

ROWS = 1024  # encoded at a time
PAIRS = 256  # cosines at a time: at 512 dimensions they stay in a core's cache
CELLS = 1 << 20  # of a dense block of overlaps: 4 MB


@dataclass(frozen=True)
class Encoding:
    """Sparse rows of V after query expansion: non-negative, summing to 1 within a row."""

    queries: int  # so many leading rows of the union are queries
    starts: Tensor  # (U + 1,)
    columns: Tensor  # (nnz,) rows of the union, distinct within a row
    values: Tensor  # (nnz,)


def own_first(rows: Tensor, k: int) -> Tensor:
    """Graph (U, K), with or without each row itself -> (U, k): itself, then its k - 1 nearest.

    -1 is where a graph has no neighbour, and where the row runs out of others.
    """
    own = torch.arange(len(rows), device=rows.device)[:, None]
    absent = (rows == own) | (rows < 0)  # moved behind the others
    others = rows.masked_fill(absent, -1)
    others = others.gather(1, absent.byte().argsort(dim=1, stable=True))[:, : k - 1]
    missing = k - 1 - others.shape[1]
    others = torch.nn.functional.pad(others, (0, missing), value=-1)
    return torch.cat([own, others], dim=1)


def mutual(lists: Tensor, of: Tensor | None = None) -> Tensor:
    """Lists (U, k) -> (n, k): the members of each list whose own lists name the row; -1 elsewhere.

    of: (n,) rows whose lists are wanted, all by default. The last row is nobody's, -1 throughout.
    """
    of = torch.arange(len(lists), device=lists.device) if of is None else of
    kept = [
        members.where((lists[members] == rows[:, None, None]).any(2), -1)
        for rows in of.split(ROWS * 16)
        for members in [lists[rows]]
    ]
    return torch.cat(kept) if kept else lists[of]


def expand(members: Tensor, near: Tensor) -> Tensor:
    """k-reciprocal sets R (n, k) -> R* (n, k + k h): a member's own set joins if more than two
    thirds of it are in R. Repeated rows stay; -1 is nobody.

    near: (U + 1, h) the k-reciprocal sets of all rows at half the k; the last row is nobody's, -1.
    """
    theirs = near[members]
    there = theirs >= 0
    inside = torch.zeros_like(there)
    for member in members.T:  # k is about 20
        inside |= theirs == member[:, None, None]
    joins = 3 * (inside & there).sum(2) > 2 * there.sum(2)
    return torch.cat([members, theirs.where(joins[:, :, None], -1).flatten(1)], dim=1)


def half(k: int) -> int:
    """Length of the short lists: round(k / 2), halves to even, and the row itself."""
    return round(k / 2) + 1


def encode(
    rows: Tensor, features: Tensor, queries: int, k1: int = 20, k2: int = 6
) -> Encoding:
    """Encodings of the union of queries and index.

    rows: (U, K) each row's nearest rows of the union, best first; its own row may be among them or
    not. features: (U, D) of unit length, of any floating type, perhaps mapped from a file. k1:
    length of the lists without the row itself. k2: how many leading rows of a list (the row itself
    is the first) make the mean that replaces its V.
    """
    _refuse(rows, features, queries, k1, k2)
    lists = own_first(rows, max(k1 + 1, k2))
    lists = torch.cat([lists, torch.full_like(lists[:1], -1)])  # nobody's, row -1
    near = mutual(lists[:, : half(k1)])
    counts, columns, values = [], [], []
    for block in torch.arange(len(rows), device=rows.device).split(ROWS):
        wide = expand(mutual(lists[:, : k1 + 1], block), near).sort(dim=1).values
        first = torch.ones_like(wide, dtype=torch.bool)
        first[:, 1:] = wide[:, 1:] != wide[:, :-1]
        first &= wide >= 0
        owners, where = first.nonzero(as_tuple=True)
        columns.append(wide[owners, where])
        weights = torch.exp((_cosines(features, block, owners, columns[-1]) - 1) / 2)
        sums = weights.new_zeros(len(block)).index_add_(0, owners, weights)
        values.append(weights / sums[owners])
        counts.append(first.sum(1))
    starts = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    encoding = Encoding(queries, starts, torch.cat(columns), torch.cat(values))
    return _expanded(encoding, lists[:-1, :k2])


def jaccard(encoding: Encoding, of: Tensor) -> Tensor:
    """(n, U) Jaccard distances of the rows `of` (n,) to the whole union: small, dense.

    1 - m / (2 - m), where m sums over the columns the smaller of the two rows' values.
    """
    inverse, block = invert(encoding.columns), _block(encoding)
    distances = encoding.values.new_empty(len(of), len(encoding.starts) - 1)
    for some, part in zip(of.split(block), distances.split(block), strict=True):
        overlap = _overlap(encoding, inverse, some)
        part.copy_(1 - overlap / (2 - overlap))
    return distances


def jaccard_rerank(
    scores: Tensor,
    rows: Tensor,
    encoding: Encoding,
    share: float = 0.3,
    of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shortlist of cosines (Q, M) and index rows (Q, M) -> the same, reranked, best first.

    The new score is 1 - ((1 - share) J + share d), between 0 and 1. of: (Q,) the queries that the
    shortlist is of, all by default. Places without a row (-1) or of score -inf come last, with -inf.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share:g}; it must be between 0 and 1")
    of = torch.arange(encoding.queries, device=rows.device) if of is None else of
    order.check(scores, rows, len(encoding.starts) - 1 - encoding.queries)
    if len(of) != len(rows):
        raise ValueError(f"a shortlist of {len(rows)} queries, encodings of {len(of)}")
    inverse = invert(encoding.columns)
    block = _block(encoding)
    overlaps = [
        _overlap(encoding, inverse, some).gather(
            1, near.clamp(min=0) + encoding.queries
        )
        for some, near in zip(of.split(block), rows.split(block), strict=True)
    ]
    overlap = torch.cat(overlaps)
    distances = 1 - overlap / (2 - overlap)
    new = 1 - ((1 - share) * distances + share * (1 - scores) / 2)
    absent = (rows < 0) | torch.isneginf(scores)
    return order.sort(new.masked_fill(absent, -torch.inf), rows)


def _refuse(rows: Tensor, features: Tensor, queries: int, k1: int, k2: int) -> None:
    if not len(rows) == len(features) > queries >= 0:
        raise ValueError(
            f"a graph of {len(rows)} rows and {len(features)} features for the union of "
            f"{queries} queries and an index; all its rows need both"
        )
    if int(rows.max()) >= len(rows):
        raise ValueError(
            f"the graph names row {int(rows.max())}; the union has {len(rows)}"
        )
    if k1 < 1 or k2 < 1:
        raise ValueError(f"k1 is {k1} and k2 is {k2}; both must be at least 1")
    needed = min(max(k1, k2 - 1), len(rows) - 1)
    if rows.shape[1] < needed:
        raise ValueError(
            f"the graph has {rows.shape[1]} neighbours a row; k1 = {k1} and k2 = {k2} "
            f"need {needed}"
        )


def _cosines(
    features: Tensor, block: Tensor, owners: Tensor, columns: Tensor
) -> Tensor:
    """(M,) cosines of the block's rows, block[owners], with the rows `columns`."""
    cosines = []
    for one, other in zip(
        block[owners].split(PAIRS), columns.split(PAIRS), strict=True
    ):
        products = features.index_select(0, one).float()
        products *= features.index_select(0, other)
        cosines.append(products.sum(1))
    return torch.cat(cosines)


def _expanded(encoding: Encoding, lists: Tensor) -> Encoding:
    """V -> the mean of V over the rows of each list (U, k2)."""
    size = len(lists)
    owners = torch.repeat_interleave(encoding.starts.diff())
    encoded = torch.sparse_coo_tensor(
        torch.stack([owners, encoding.columns]),
        encoding.values,
        (size, size),
        is_coalesced=True,
        check_invariants=False,
    )
    there = lists >= 0
    owners, places = there.nonzero(as_tuple=True)
    means = torch.sparse_coo_tensor(
        torch.stack([owners, lists[owners, places]]),
        (1 / there.sum(1).to(encoding.values))[owners],
        (size, size),
        check_invariants=False,
    )
    with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
        warnings.simplefilter("ignore", UserWarning)
        product = torch.sparse.mm(means, encoded).coalesce()
    owners, columns = product.indices()
    starts = torch.searchsorted(owners, torch.arange(size + 1, device=owners.device))
    return Encoding(encoding.queries, starts, columns, product.values())


def _block(encoding: Encoding) -> int:
    """Queries whose overlaps with all of the union are held at a time."""
    return max(1, CELLS // (len(encoding.starts) - 1))


def _overlap(encoding: Encoding, inverse: Inverted, of: Tensor) -> Tensor:
    """(n, U) sums over the columns of the smaller value of a row of `of` and a row."""
    starts = encoding.starts
    size = len(starts) - 1
    owners, places = ranges(starts[of], starts[of + 1] - starts[of])
    entries, theirs = inverse.members(encoding.columns[places])
    holders = torch.repeat_interleave(starts.diff())[theirs]
    smaller = torch.minimum(encoding.values[places][entries], encoding.values[theirs])
    overlap = encoding.values.new_zeros(len(of) * size)
    overlap.index_add_(0, owners[entries] * size + holders, smaller)
    return overlap.view(len(of), size)
