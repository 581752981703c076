"""Margin losses as functions on cosines (B, C) and labels (B,): logits for cross entropy."""

import math

import torch
from torch import Tensor


def arcface(
    cosines: Tensor, labels: Tensor, margin: float = 0.3, scale: float = 30.0
) -> Tensor:
    """Additive angular margin (Deng et al., CVPR 2019): cos(angle + margin) on the label's column.

    Past angle = pi - margin, where the cosine would turn back, the 2021 system's linear branch
    goes on downwards. Float32; gradients stay finite at |cos| = 1; `cosines` is not modified.
    """
    cosines = cosines.float()
    rows = torch.arange(len(labels), device=labels.device)
    target = cosines[rows, labels]
    sine = (1 - target.square()).clamp(min=1e-12).sqrt()
    bent = target * math.cos(margin) - sine * math.sin(margin)
    straight = target - math.sin(margin) * margin
    bent = torch.where(target > math.cos(math.pi - margin), bent, straight)
    return scale * cosines.index_put((rows, labels), bent)
