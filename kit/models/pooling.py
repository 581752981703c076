"""Feature maps (B, C, H, W) -> one vector an image (B, C)."""

import torch
from torch import Tensor, nn


def gem(x: Tensor, p: Tensor | float = 3.0, eps: float = 1e-6) -> Tensor:
    """Generalised mean over space (Radenovic et al., TPAMI 2018), in float32 under autocast too.

    Cubes of half-precision activations leave its range.
    """
    with torch.autocast(x.device.type, enabled=False):
        return x.float().clamp(min=eps).pow(p).mean(dim=(-2, -1)).pow(1.0 / p)


class GeM(nn.Module):
    """`gem` with its power: frozen, or trained from where it starts."""

    def __init__(self, p: float = 3.0, trainable: bool = False) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)), requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        return gem(x, self.p)
