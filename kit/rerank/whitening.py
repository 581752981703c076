"""Learned linear whitening of features: centre, project, scale to unit length.

PCA whitening (Jegou and Chum, ECCV 2012), and discriminative whitening (Mikolajczyk and Matas,
ICCV 2007; for retrieval Radenovic, Tolias and Chum, TPAMI 2018), which needs labels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 16_384  # rows at a time


@dataclass(frozen=True)
class Whitening:
    """unit((x - mean) projection)."""

    mean: Tensor  # (D,) float32
    projection: Tensor  # (D, d) float32, the most telling directions first

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a safetensors file."""
        return {"mean": self.mean, "projection": self.projection.contiguous()}

    @classmethod
    def load(cls, state: dict[str, Tensor]) -> "Whitening":
        if state.keys() != {"mean", "projection"}:
            raise ValueError(
                f"a whitening has mean and projection, not {', '.join(sorted(state))}"
            )
        return cls(state["mean"], state["projection"])

    def apply(self, features: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, D) -> (n, d) of unit length, float32 unless `out` says otherwise.

        Rows that are all zero (unreadable) stay zero.
        """
        dim, kept = self.projection.shape
        if features.shape[1] != dim:
            raise ValueError(
                f"features have {features.shape[1]} dimensions, the whitening {dim}"
            )
        if out is None:
            out = self.mean.new_empty(len(features), kept)
        for start in range(0, len(features), BLOCK):
            block = features[start : start + BLOCK].float()
            projected = F.normalize((block - self.mean) @ self.projection, dim=1)
            out[start : start + BLOCK] = projected * block.any(dim=1, keepdim=True)
        return out


def learn_pca(features: Tensor, dim: int | None = None) -> Whitening:
    """From features (n, D): unit variance in the `dim` directions of the largest; all if None."""
    rows = _readable(features).nonzero()[:, 0]
    mean, total = _total(features, rows)
    variances, directions = torch.linalg.eigh(total)
    variances, directions = variances.flip(0), directions.flip(1)
    dim = _checked(dim, features.shape[1])
    spanned = int((variances > 1e-10 * variances[0]).sum())
    if dim > spanned:
        raise ValueError(
            f"{len(rows)} features span only {spanned} directions; whiten to at most "
            f"{spanned} dimensions or learn from more"
        )
    return _whitening(mean, directions[:, :dim] / variances[:dim].sqrt())


def learn(
    features: Tensor, labels: Tensor, dim: int | None = None, ridge: float = 1e-3
) -> Whitening:
    """From features (n, D) and labels (n,): differences within a class become white, then the
    `dim` directions that tell classes apart best; all if None.

    The scatter within classes is that of all pairs of a class, each image counting once; the total
    scatter takes the place of that between classes, which has the same best directions. ridge: this
    share of the mean variance within classes is added to every direction, for few pairs. Labels
    below 0 and rows that are all zero take no part.
    """
    if len(labels) != len(features):
        raise ValueError(f"{len(features)} features, {len(labels)} labels")
    dim = _checked(dim, features.shape[1])
    rows = (labels >= 0).nonzero()[:, 0]
    if len(rows):
        rows = rows[_readable(features)[rows]]
    rows = rows[labels[rows].sort(stable=True).indices]
    counts = torch.unique_consecutive(labels[rows], return_counts=True)[1]
    if not (counts > 1).any() or len(counts) < 2:
        raise ValueError(
            f"{len(rows)} labelled features of {len(counts)} classes; a whitening needs "
            "two classes, and two features of one of them"
        )
    mean, total = _total(features, rows)
    within = _within(features, rows, counts)
    within += ridge * within.diagonal().mean() * torch.eye(len(within)).to(within)
    inverse = torch.linalg.inv(torch.linalg.cholesky(within))
    directions = torch.linalg.eigh(inverse @ total @ inverse.T).eigenvectors.flip(1)
    return _whitening(mean, inverse.T @ directions[:, :dim])


def _readable(features: Tensor) -> Tensor:
    blocks = [block.any(dim=1) for block in features.split(BLOCK)]
    if not blocks or not any(block.any() for block in blocks):
        raise ValueError("there is no feature to learn a whitening from")
    return torch.cat(blocks)


def _checked(dim: int | None, most: int) -> int:
    dim = most if dim is None else dim
    if not 1 <= dim <= most:
        raise ValueError(f"whitening to {dim} of {most} dimensions; choose 1 to {most}")
    return dim


def _total(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of those rows, float64."""
    dim = features.shape[1]
    total = torch.zeros(dim, dtype=torch.float64, device=features.device)
    for at in rows.split(BLOCK):
        total += features[at].double().sum(dim=0)
    mean = total / len(rows)
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for at in rows.split(BLOCK):
        centred = features[at].double() - mean
        scatter += centred.T @ centred
    return mean, scatter / len(rows)


def _within(features: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    """(D, D) covariance around the class means, float64; rows are in the order of classes."""
    dim = features.shape[1]
    scatter = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
    for at, sizes in _classes(rows, counts):
        values = features[at].double()
        owner = torch.repeat_interleave(sizes)
        means = values.new_zeros(len(sizes), dim).index_add_(0, owner, values)
        centred = values - (means / sizes[:, None])[owner]
        scatter += centred.T @ centred
    return scatter / len(rows)


def _classes(rows: Tensor, counts: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of whole classes: rows of about BLOCK images, and the sizes of their classes."""
    ends = counts.cumsum(0)
    first = 0
    while first < len(counts):
        start = int(ends[first] - counts[first])
        last = max(first + 1, int(torch.searchsorted(ends, start + BLOCK, right=True)))
        yield rows[start : int(ends[last - 1])], counts[first:last]
        first = last


def _whitening(mean: Tensor, projection: Tensor) -> Whitening:
    return Whitening(mean.float(), projection.float())
