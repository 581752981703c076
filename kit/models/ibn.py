"""IBN-a (Pan et al., ECCV 2018): half instance, half batch norm early in a timm ResNet."""

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

STAGES = ("layer1", "layer2", "layer3")  # the last stage keeps its batch norms


class IBN(nn.Module):
    """(B, C, H, W) -> the same: instance norm on the first C // 2 channels, batch norm on the rest.

    It starts from the batch norm it replaces: its scales, shifts and running statistics.
    """

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        half, like = norm.num_features // 2, {"device": norm.weight.device}
        self.sizes = (half, norm.num_features - half)
        self.instance = nn.InstanceNorm2d(half, norm.eps, affine=True, **like)
        self.batch = nn.BatchNorm2d(self.sizes[1], norm.eps, norm.momentum, **like)
        theirs, ours = norm.state_dict(), self.batch.state_dict()
        rest = {k: v[half:] if v.ndim else v for k, v in theirs.items()}
        self.batch.load_state_dict({key: rest[key] for key in ours})
        first = {key: theirs[key][:half] for key in ("weight", "bias")}
        self.instance.load_state_dict(first)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split(self.sizes, dim=1)
        return torch.cat((self.instance(first), self.batch(rest)), dim=1)


def convert(backbone: ResNet) -> None:
    """Makes `bn1` of every block in layers 1 to 3 an IBN, in place."""
    for name in STAGES:
        for block in getattr(backbone, name):
            block.bn1 = IBN(block.bn1)
