"""DOLG (Yang et al., ICCV 2021): maps of the last two stages -> one vector an image.

Local features of the third stage, freed of what the global vector of the fourth says
already, are averaged and stand beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATES = (6, 12, 18)  # dilations of the local branch


def orthogonal(local: Tensor, global_: Tensor) -> Tensor:
    """(B, C, H, W) part of every local feature at a right angle to (B, C) its image's vector.

    In float32, under autocast too.
    """
    local, vector = local.float(), global_.float()[..., None, None]
    length = vector.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
    share = (local * vector).sum(dim=1, keepdim=True) / length
    return local - share * vector


class MultiAtrous(nn.Module):
    """(B, C, H, W) -> the same: three dilated convolutions and the mean, seen together."""

    def __init__(self, channels: int, rates: Sequence[int] = RATES) -> None:
        super().__init__()
        half = channels // 2
        self.dilated = nn.ModuleList(
            nn.Conv2d(channels, half, 3, padding=rate, dilation=rate) for rate in rates
        )
        self.mean = nn.Conv2d(channels, half, 1)
        self.fuse = nn.Conv2d(half * (len(rates) + 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = F.relu(self.mean(x.mean(dim=(-2, -1), keepdim=True)))
        scales = [convolution(x) for convolution in self.dilated]
        scales.append(mean.expand_as(scales[0]))
        return F.relu(self.fuse(torch.cat(scales, dim=1)))


class SelfAttention(nn.Module):
    """(B, C, H, W) -> the same: features of unit length times their place's weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.weight = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.project(x))
        weight = F.softplus(self.weight(F.relu(x)).float())
        return weight * F.normalize(x.float(), dim=1)


class DOLG(nn.Module):
    """Maps of the third and the fourth stage -> (B, dim): global vector, then local mean."""

    def __init__(self, third: int, fourth: int, pool: nn.Module) -> None:
        """third, fourth: channels of the maps; pool: (B, fourth, H, W) -> (B, fourth)."""
        super().__init__()
        self.local = nn.Sequential(MultiAtrous(third), SelfAttention(third))
        self.pool = pool
        self.project = nn.Linear(fourth, third)
        self.dim = 2 * third

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        third, fourth = maps
        vector = self.project(self.pool(fourth))
        local = orthogonal(self.local(third), vector)
        return torch.cat([vector, local.mean(dim=(-2, -1))], dim=1)
