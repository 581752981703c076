"""Margin losses as functions on cosines (B, C) and labels (B,): logits for cross entropy.

A label of -1 says that the image's class is not among these columns (another rank has it).
Margins are numbers, or (B,) tensors with one for each image. Logits are float32 whatever
autocast made of the cosines, which are not modified; gradients stay finite at |cos| = 1.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def arcface(
    cosines: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.3,
    scale: float | Tensor = 30.0,
) -> Tensor:
    """Additive angular margin (Deng et al., CVPR 2019): cos(angle + margin) on the label's column.

    Past angle = pi - margin, where the cosine would turn back, the linear branch of the
    2019 and 2021 systems goes on downwards.
    """
    m = torch.as_tensor(margin, dtype=torch.float64, device=cosines.device)

    def bent(target: Tensor) -> Tensor:
        sine = (1 - target.square()).clamp(min=1e-12).sqrt()
        cos_m, sin_m = m.cos().to(target), m.sin().to(target)
        turned = target * cos_m - sine * sin_m
        return turned.where(target > -cos_m, target - sin_m * m.to(target))

    return _bend(cosines, labels, bent, scale)


def cosface(
    cosines: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.35,
    scale: float | Tensor = 64.0,
) -> Tensor:
    """Additive cosine margin (Wang et al., CVPR 2018): cos - margin on the label's column."""
    return _bend(cosines, labels, lambda target: target - margin, scale)


def am_softmax(
    cosines: Tensor,
    labels: Tensor,
    margin: float | Tensor = 0.35,
    scale: float | Tensor = 30.0,
) -> Tensor:
    """AM-Softmax (Wang et al., IEEE SPL 2018): CosFace's logits, at this paper's scale."""
    return cosface(cosines, labels, margin, scale)


def circle(
    cosines: Tensor, labels: Tensor, margin: float = 0.25, scale: float = 256.0
) -> Tensor:
    """Circle loss for classes (Sun et al., CVPR 2020): each cosine is weighted by its way to go.

    The label's column should reach 1 + margin, the others -margin; the weights are constants
    to the gradient.
    """
    cosines = _single(cosines)
    here = labels >= 0
    target = cosines.gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    way = (1 + margin - target.detach()).clamp(min=0)
    reached = scale * way * (target - (1 - margin))
    others = (cosines.detach() + margin).clamp_(min=0).mul_(scale)
    logits = others * (cosines - margin)
    rows = torch.arange(len(labels), device=labels.device)[here]
    return logits.index_put((rows, labels[here]), reached[here])


def sub_centres(cosines: Tensor, centres: int) -> Tensor:
    """(B, C * centres) -> (B, C): each class's nearest centre (Deng et al., ECCV 2020).

    A class's centres are adjacent columns.
    """
    if centres == 1:
        return cosines
    return cosines.unflatten(1, (-1, centres)).max(2).values


def fixed_scale(classes: int, angle: float = math.pi / 4) -> float:
    """AdaCos's fixed scale (Zhang et al., CVPR 2019): sqrt(2) log(C - 1).

    angle: of the targets as first assumed; the 2019 system's is 1.25.
    """
    return math.log(classes - 1) / math.cos(angle)


def dynamic_scale(
    others: Tensor, targets: Tensor, angle: float = math.pi / 4
) -> Tensor:
    """AdaCos's dynamic scale for this batch (Zhang et al., CVPR 2019), a number.

    others (B,): each image's log of the sum of exp(last scale * cos) over the classes that
    are not its own; targets (B,): cosines to its own class, whose median angle counts up to
    `angle`. Not below 1, where very few classes could bring it.
    """
    others, targets = _single(others), _single(targets)
    mean = others.logsumexp(0) - math.log(len(others))
    middle = targets.clamp(-1, 1).acos().median()
    return (mean / middle.clamp(max=angle).cos()).clamp(min=1)


def rarity(counts: Tensor, power: float = 0.25) -> Tensor:
    """(C,) images per class -> (C,) count ** -power stretched to 0 (most images) .. 1 (fewest).

    Ha et al., 2020 (3rd place of Google Landmark Recognition 2020) add 0.45 of it to a
    margin of 0.05. All 0 where all classes have as many images.
    """
    rare = counts.clamp(min=1).double() ** -power
    span = rare.max() - rare.min()
    return ((rare - rare.min()) / span.clamp(min=1e-12)).float()


def growing(epoch: float, start: float, end: float, epochs: float) -> float:
    """A margin that goes linearly from `start` to `end` in the first `epochs` epochs."""
    return end if epoch >= epochs else start + (end - start) * epoch / epochs


def _single(values: Tensor) -> Tensor:
    half = values.dtype in (torch.float16, torch.bfloat16)
    return values.float() if half else values


def _bend(
    cosines: Tensor,
    labels: Tensor,
    function: Callable[[Tensor], Tensor],
    scale: float | Tensor,
) -> Tensor:
    """scale * cosines, with `function` of the cosine on the label's column."""
    cosines = _single(cosines)
    here, columns = labels >= 0, labels.clamp(min=0)[:, None]
    target = cosines.detach().gather(1, columns).squeeze(1)
    with torch.enable_grad():
        bent = function(target.requires_grad_())
        (slope,) = torch.autograd.grad(bent.sum(), target)
    bent, slope = bent.detach().where(here, target.detach()), slope.where(here, 1)
    return _Bend.apply(cosines, columns, bent[:, None], slope[:, None], scale)


class _Bend(torch.autograd.Function):
    """One copy of the (B, C) cosines forward and one backward, where autograd makes five."""

    @staticmethod
    def forward(
        ctx: Any,
        cosines: Tensor,
        columns: Tensor,
        bent: Tensor,
        slope: Tensor,
        scale: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(columns, slope)
        ctx.scale = scale
        return (cosines * scale).scatter_(1, columns, bent * scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, slope = ctx.saved_tensors
        slopes = gradient * ctx.scale
        bent = slopes.gather(1, columns) * slope
        return slopes.scatter_(1, columns, bent), None, None, None, None
