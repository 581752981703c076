"""Losses that compare the images of a batch, or images and class means: (B, D) -> loss.

Where ranks share a batch, all of it is given, so that their number does not matter.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def triplet(embedding: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    """Batch-hard triplet loss (Hermans et al., 2017) on embeddings of length 1.

    Of each image: distance to the farthest of its class - distance to the nearest of
    another + margin, not below 0; with margin 0 softly, log(1 + exp(.)). The mean over the
    images that have both; 0 without one.
    """
    x = F.normalize(embedding)
    with torch.no_grad():
        products = x @ x.T
        same = labels[:, None] == labels
        other = ~same
        same.fill_diagonal_(False)
        far = products.masked_fill(~same, 2).argmin(1)
        near = products.masked_fill(~other, -2).argmax(1)
        both = same.any(1) & other.any(1)
    # only these 2 B distances need gradients; at distance 0 theirs is 0
    gap = torch.linalg.vector_norm(x - x[far], dim=1)
    gap = gap - torch.linalg.vector_norm(x - x[near], dim=1)
    losses = F.relu(gap + margin) if margin else F.softplus(gap)
    return losses.where(both, 0).sum() / both.sum().clamp(min=1)


def contrastive(embedding: Tensor, labels: Tensor, margin: float = 0.7) -> Tensor:
    """Contrastive loss (Hadsell et al., CVPR 2006) on embeddings of length 1.

    Half the squared distance, as a mean over the pairs of a class, and half the square of
    what a distance lacks to `margin`, as a mean over the other pairs that lack any.
    """
    x = F.normalize(embedding)
    squares = (2 - 2 * x @ x.T).clamp(min=1e-12)  # a root has no slope at 0
    same = labels[:, None] == labels
    other = ~same
    same.fill_diagonal_(False)
    lacking = F.relu(margin - squares.sqrt()).where(other, 0)
    pull = squares.where(same, 0).sum() / same.sum().clamp(min=1)
    push = lacking.square().sum() / (lacking > 0).sum().clamp(min=1)
    return (pull + push) / 2


def centre_distances(embedding: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """(B,) half squared distances to the class means (C, D) (Wen et al., ECCV 2016).

    The paper's centre loss is their mean. Label -1: 0, another rank has the class.
    """
    away = embedding - means[labels.clamp(min=0)]
    return (away.square().sum(1) / 2).where(labels >= 0, 0)


@torch.no_grad()
def move_means(
    means: Tensor, embedding: Tensor, labels: Tensor, rate: float = 0.5
) -> None:
    """Moves the means of the batch's classes towards its images, in place, as Wen et al. do.

    Of n images each takes rate / (1 + n) of the way: few images move a mean a little.
    """
    here = labels >= 0
    found, order, count = labels[here].unique(return_inverse=True, return_counts=True)
    away = torch.zeros_like(means[found])
    away.index_add_(0, order, embedding[here] - means[labels[here]])
    means[found] += rate * away / (1 + count[:, None])
